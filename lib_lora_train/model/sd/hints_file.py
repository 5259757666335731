"""The `.yaml` beside a checkpoint, and the checkpoint's own metadata -> `Hints` and tokenizers: the layouts of ldm (SD1, SD2)
and sgm (SDXL), as kohya and the WebUI read them."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import yaml

from lib_lora_train.errors import ModelError
from lib_lora_train.model.architecture import Hints
from lib_lora_train.model.sd.schedule import scaled_linear_alphas_cumprod
from lib_lora_train.model.sd.tokens import Tokenizer, tokenizer_from_folder


def hints_from_yaml(path: str | Path) -> Hints:
    """What the configuration at `path` says beyond shapes: heads, prediction type, noise schedule, latent scale.

    A text encoder given as a folder (`version: some/folder`) contributes that folder's `config.json`; a relative
    folder is looked for beside the file, then from the working directory. Raises ModelError where the file cannot be
    read as such a configuration.
    """
    path = Path(path)
    model = _model(path)
    unet = _section(model, "unet_config", "params") or _section(model, "network_config", "params")
    scale = model.get("scale_factor")
    text = [_read_json(folder / "config.json") if folder else {} for folder in _text_folders(model, path, "config.json")]
    try:
        return Hints(
            unet_heads=_positive(unet.get("num_heads")),
            unet_head_channels=_positive(unet.get("num_head_channels")),
            text_heads=_all(_positive(folder.get("num_attention_heads")) for folder in text),
            text_activations=_all(_activation(folder.get("hidden_act")) for folder in text),
            prediction_type=_prediction_type(model),
            alphas_cumprod=_alphas_cumprod(model),
            latent_scale=None if scale is None else _within(float(scale), low=1e-6, high=1e6, name="scale_factor"),
        )
    except (TypeError, ValueError, OverflowError) as error:
        raise ModelError(f"'{path.name}' has a value that is not a number, or not a possible one", why=str(error),
                         remedy="repair the file or remove it") from error


def with_words_of_file(hints: Hints, path: Path) -> Hints:
    """`hints` with what the checkpoint file at `path` says about prediction and schedule; unchanged where it is no safetensors
    file or cannot be read.

    Read are ModelSpec's `prediction_type` and the names of its architectures, ComfyUI's `modelspec.predict_key`, the empty
    tensors `v_pred` and `ztsnr` by which ComfyUI and reForge know such models, and a stored ᾱ that ends at zero. A prediction
    type of another kind ("flow") is passed on as it is written.
    """
    if path.suffix.lower() != ".safetensors":
        return hints
    try:
        with safetensors.safe_open(path, "pt") as file:
            metadata, names = file.metadata() or {}, set(file.keys())
            stored = file.get_tensor("alphas_cumprod") if "alphas_cumprod" in names else None
    except (safetensors.SafetensorError, OSError, ValueError):
        return hints
    words = [metadata.get(f"modelspec.{key}", "").strip().lower().replace("-", "_")
             for key in ("prediction_type", "predict_key", "architecture")]
    said = {*words, *names & {"v_pred"}}
    prediction = ("v_prediction" if said & {"v", "v_prediction", "v_pred", "vpred", "stable_diffusion_v2_768_v"} else
                  "epsilon" if said & {"epsilon", "eps", "stable_diffusion_v2_512"} else words[0] or words[1] or None)
    # Stable Diffusion's own schedule ends at 0.0047.
    zero = "ztsnr" in names or stored is not None and stored.ndim == 1 and bool(stored[-1:].float().lt(1e-4).any())
    return dataclasses.replace(hints, file_prediction_type=prediction, file_zero_terminal_snr=zero or None)


def tokenizers_from_yaml(path: Path) -> list[Tokenizer] | None:
    """Those in the folders of text encoders that the configuration at `path` names; None where it names none, or not one for
    each. Raises ModelError."""
    folders = _text_folders(_model(path), path, "vocab.json")
    return [tokenizer_from_folder(folder) for folder in folders] if folders and all(folders) else None


def _model(path: Path) -> Mapping[str, Any]:
    try:
        if path.stat().st_size > 1_000_000:  # published ones have a few thousand
            raise ValueError("it is longer than a million bytes")
        content = _parsed(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:  # ValueError: of UTF-8, dates, numbers too long
        raise ModelError(f"'{path.name}' cannot be read as a model configuration", why=" ".join(str(error).split()),
                         remedy="repair the file or remove it") from error
    model = _section(content, "model", "params")
    if not model:
        raise ModelError(f"'{path.name}' is not a model configuration", why="it has no section 'model: params:'",
                         remedy="repair the file or remove it")
    return model


@functools.lru_cache(maxsize=1)
def _parsed(text: str) -> Any:
    """Of a job's start, which asks for the hints first and for the tokenizers later. Not to be changed."""
    return yaml.safe_load(text)


def _section(content: Any, *names: str) -> Mapping[str, Any]:
    for name in names:
        content = content.get(name) if isinstance(content, Mapping) else None
    return content if isinstance(content, Mapping) else {}


def _positive(value: Any) -> int | None:
    """ldm writes -1 for "not given"."""
    return _within(int(value), low=1, high=4096, name="a number of heads") if value is not None and int(value) > 0 else None


def _activation(value: Any) -> Any:
    if value not in (None, "quick_gelu", "gelu"):
        raise ValueError(f"hidden_act is {value!r:.60}, not gelu or quick_gelu")
    return value


def _within(value: Any, *, low: float, high: float, name: str) -> Any:
    if not low <= value <= high:
        raise ValueError(f"{name} is {value}, not between {low} and {high}")
    return value


def _prediction_type(model: Mapping[str, Any]) -> str | None:
    scaling = _section(model, "denoiser_config", "params", "scaling_config").get("target")
    if isinstance(scaling, str):  # sgm
        said = re.sub("Scaling.*", "", scaling.rpartition(".")[2])
    elif _section(model, "unet_config"):
        said = model.get("parameterization", "eps")  # ldm's default
    else:
        return None
    predictions = {"eps": "epsilon", "v": "v_prediction"}
    if str(said).lower() not in predictions:
        raise ValueError(f"its prediction type is {said!r:.60}, not eps or v")
    return predictions[str(said).lower()]


def _alphas_cumprod(model: Mapping[str, Any]) -> Any:
    if "linear_start" not in model or "linear_end" not in model:
        return None
    start, end = (_within(float(model[name]), low=0, high=0.999, name=name) for name in ("linear_start", "linear_end"))
    steps = _within(int(model.get("timesteps", 1000)), low=1, high=100_000, name="timesteps")
    return scaled_linear_alphas_cumprod(start=start, end=end, steps=steps)


def _text_folders(model: Mapping[str, Any], path: Path, file: str) -> list[Path | None]:
    """The folder with `file` of each text encoder that the configuration at `path` names; None for one without."""
    embedders = _section(model, "conditioner_config", "params").get("emb_models")
    sections = [model.get("cond_stage_config")] if not isinstance(embedders, list) else [
        embedder for embedder in embedders if isinstance(embedder, Mapping) and embedder.get("input_key") == "txt"]
    versions = [_section(section, "params").get("version") for section in sections]
    candidates = [[path.parent / version, Path(version)] if isinstance(version, str) else [] for version in versions]
    return [next((folder for folder in folders if os.path.isfile(folder / file)), None) for folders in candidates]


def _read_json(file: Path) -> Mapping[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"The text encoder's configuration '{file}' cannot be read", why=str(error),
                         remedy="repair the file or remove it") from error
    return content.get("text_config", content) if isinstance(content, Mapping) else {}


def _all(values: Any) -> tuple[Any, ...] | None:
    """The values as a tuple, or None where one of them is unknown."""
    values = tuple(values)
    return None if not values or None in values else values
