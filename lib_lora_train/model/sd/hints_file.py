"""The `.yaml` beside a checkpoint -> `Hints` and tokenizers: the layouts of ldm (SD1, SD2) and sgm (SDXL), as kohya and the
WebUI read them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

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
    text = [_read_json(folder / "config.json") if folder else {} for folder in _text_folders(model, path, "config.json")]
    try:
        return Hints(
            unet_heads=_positive(unet.get("num_heads")),
            unet_head_channels=_positive(unet.get("num_head_channels")),
            text_heads=_all(folder.get("num_attention_heads") for folder in text),
            text_activations=_all(folder.get("hidden_act") for folder in text),
            prediction_type=_prediction_type(model),
            alphas_cumprod=_alphas_cumprod(model),
            latent_scale=float(model["scale_factor"]) if "scale_factor" in model else None,
        )
    except (TypeError, ValueError) as error:
        raise ModelError(f"'{path.name}' has a value that is not a number", why=str(error),
                         remedy="repair the file or remove it") from error


def tokenizers_from_yaml(path: Path) -> list[Tokenizer] | None:
    """Those in the folders of text encoders that the configuration at `path` names; None where it names none, or not one for
    each. Raises ModelError."""
    folders = _text_folders(_model(path), path, "vocab.json")
    return [tokenizer_from_folder(folder) for folder in folders] if folders and all(folders) else None


def _model(path: Path) -> Mapping[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ModelError(f"'{path.name}' cannot be read as a model configuration", why=" ".join(str(error).split()),
                         remedy="repair the file or remove it") from error
    model = _section(content, "model", "params")
    if not model:
        raise ModelError(f"'{path.name}' is not a model configuration", why="it has no section 'model: params:'",
                         remedy="repair the file or remove it")
    return model


def _section(content: Any, *names: str) -> Mapping[str, Any]:
    for name in names:
        content = content.get(name) if isinstance(content, Mapping) else None
    return content if isinstance(content, Mapping) else {}


def _positive(value: Any) -> int | None:
    """ldm writes -1 for "not given"."""
    return int(value) if value is not None and int(value) > 0 else None


def _prediction_type(model: Mapping[str, Any]) -> str | None:
    scaling = _section(model, "denoiser_config", "params", "scaling_config").get("target")
    if isinstance(scaling, str):  # sgm
        return "v_prediction" if scaling.rpartition(".")[2].startswith("VScaling") else "epsilon"
    if not _section(model, "unet_config"):
        return None
    return "v_prediction" if model.get("parameterization", "eps") == "v" else "epsilon"  # ldm's default is eps


def _alphas_cumprod(model: Mapping[str, Any]) -> Any:
    if "linear_start" not in model or "linear_end" not in model:
        return None
    return scaled_linear_alphas_cumprod(
        start=float(model["linear_start"]), end=float(model["linear_end"]), steps=int(model.get("timesteps", 1000)))


def _text_folders(model: Mapping[str, Any], path: Path, file: str) -> list[Path | None]:
    """The folder with `file` of each text encoder that the configuration at `path` names; None for one without."""
    embedders = _section(model, "conditioner_config", "params").get("emb_models")
    sections = [model.get("cond_stage_config")] if not isinstance(embedders, list) else [
        embedder for embedder in embedders if isinstance(embedder, Mapping) and embedder.get("input_key") == "txt"]
    versions = [_section(section, "params").get("version") for section in sections]
    candidates = [[path.parent / version, Path(version)] if isinstance(version, str) else [] for version in versions]
    return [next((folder for folder in folders if (folder / file).is_file()), None) for folders in candidates]


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
