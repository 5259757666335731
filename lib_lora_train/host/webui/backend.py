"""The model of Forge and Forge Neo (`ModelAccess`): a plain engine object around modules of its own, loaded when it is needed.

The page's drop-down only notes a wish (`forge_loading_parameters`), which the next generation fulfils; so does a lease. Active
LoRAs are clones of the patchers `unet` and `clip`, whose modules are the same ones: the weights are changed when a clone is
moved to the GPU, and stay so. `forge_objects_original` holds the bare patchers.

Written for Forge of 2025-06 and Neo 2.26.
"""

from __future__ import annotations

import re
import sys
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from backend import memory_management
from modules import sd_models, shared
from torch import Tensor, nn

from lib_lora_train.errors import HostError, LoraTrainError, ModelError, translated
from lib_lora_train.host.port import Checkpoint
from lib_lora_train.host.webui import clones
from lib_lora_train.host.webui.model_access import Identity, attention_heads, choose_checkpoint, described, refusal_of
from lib_lora_train.model.family import Hints
from lib_lora_train.model.sd.components import UNET_PREFIX, VAE_PREFIX
from lib_lora_train.model.sd.refusals import SUPPORTED, quantised, refuse_other_kinds, refuse_quantised
from lib_lora_train.model.sd.tokens import FunctionTokenizer, Tokenizer

_TEXT_PREFIXES = {"sd1": {"clip_l": "cond_stage_model."}, "sd2": {"clip_h": "cond_stage_model."},
                  "sdxl": {"clip_l": "conditioner.embedders.0.", "clip_g": "conditioner.embedders.1."}}
"""Family -> the engine's name of each text encoder -> how its names begin in a checkpoint, in the checkpoint's order."""
_ENGINES = {"StableDiffusion3": "a Stable Diffusion 3 model", "StableDiffusionXLRefiner": "the SDXL refiner"}
_identities: weakref.WeakKeyDictionary[Any, Identity] = weakref.WeakKeyDictionary()
"""Of the engines that were asked for while it was known: an engine itself does not know its VAE's file."""
_refusals: weakref.WeakKeyDictionary[Any, str] = weakref.WeakKeyDictionary()
"""Of engines, whose weights are looked through once: they are described every second."""


def current() -> Any:
    """See `ModelAccess`. Before the first model there is a stand-in without parts."""
    engine = sd_models.model_data.sd_model
    return engine if getattr(engine, "forge_objects_original", None) is not None else None


def load() -> Any:
    """See `ModelAccess`."""
    if current() is None:
        sd_models.model_data.forge_hash = ""  # Forge takes a model that it failed to load for loaded
    if sd_models.model_data.forge_loading_parameters:
        try:
            with translated("loading the checkpoint"):
                sd_models.forge_model_reload()
        except LoraTrainError:
            raise
        except Exception as error:  # of any class: no file, a file of an unknown kind
            lines = str(error).strip().splitlines() or [type(error).__name__]
            raise HostError("The WebUI could not load its checkpoint", why=lines[0],
                            remedy="choose another checkpoint at the top of the page") from error
    engine = current()
    if engine is not None:
        identity(engine)
    return engine


def select(title: str) -> str:
    """See `ModelAccess`. As the page's drop-down does, and loaded at once, so that what is wrong is known."""
    from modules_forge import main_entry

    def reload(_: Any) -> Any:
        main_entry.refresh_model_loading_parameters()
        return load()
    before = pending() or getattr(current(), "sd_checkpoint_info", None)
    return choose_checkpoint(title, before=before.title if before else "", load=reload)


def pending() -> Any:
    """See `ModelAccess`."""
    return None if _fulfilled() else sd_models.model_data.forge_loading_parameters.get("checkpoint_info")


def _fulfilled() -> bool:
    """Whether the loaded model is the one that the WebUI is set to."""
    return current() is not None and str(sd_models.model_data.forge_loading_parameters) == sd_models.model_data.forge_hash


def _wanted() -> Identity:
    """Of what the WebUI is set to; without files where that is nothing."""
    parameters = sd_models.model_data.forge_loading_parameters
    modules = [re.split(r"[\\/]", path)[-1] for path in parameters.get("additional_modules") or ()]
    return Identity(getattr(parameters.get("checkpoint_info"), "filename", ""), " + ".join(sorted(modules)))


def identity(engine: Any) -> Identity:
    """See `ModelAccess`. The names of VAE and text encoders beside the checkpoint stand for the VAE."""
    if engine not in _identities:
        known = engine is current() and _fulfilled()
        _identities[engine] = _wanted() if known else Identity(engine.sd_checkpoint_info.filename, "")
    return _identities[engine]


def restored(wanted: Identity) -> Any:
    """See `ModelAccess`."""
    engine = current()
    if engine is not None and identity(engine) == wanted:
        return engine
    return load() if _wanted() == wanted else None


def may_be_back(wanted: Identity) -> bool:
    """See `ModelAccess`."""
    engine = current()
    return _wanted() == wanted or engine is not None and identity(engine) == wanted


def refuse_options() -> None:
    """See `ModelAccess`."""


def refuse_kind(engine: Any) -> None:
    """See `ModelAccess`."""
    bare, name = engine.forge_objects_original, type(engine).__name__
    kind = _ENGINES.get(name, "" if _family(engine) else f"{'an' if name[0] in 'AEIOU' else 'a'} {name} model")
    prediction = "" if kind else bare.unet.model.predictor.prediction_type
    if prediction in ("edm", "const"):
        kind = "an EDM model (continuous noise levels)" if prediction == "edm" else "a model of rectified flow"
    if kind:
        raise ModelError(f"The checkpoint is {kind}, which this trainer does not support", remedy=SUPPORTED)
    unet, vae, text = modules(engine)
    stem = "input_blocks.0.0.weight"
    refuse_other_kinds({f"{UNET_PREFIX}{stem}": unet.get_parameter(stem)})
    for part in (unet, vae, *(getattr(text, encoder).transformer for encoder in _TEXT_PREFIXES[_family(engine)])):
        weights = dict(part.named_parameters())
        refuse_quantised(weights)
        for name, weight in weights.items():
            if type(weight) not in (Tensor, nn.Parameter):  # holds its numbers as it likes, whatever its dtype says
                raise quantised(name, type(weight).__name__)


def describe(engine: Any) -> Checkpoint:
    """See `ModelAccess`."""
    if engine not in _refusals:
        _refusals[engine] = refusal_of(sys.modules[__name__], engine)
    refusal = _refusals[engine]
    return described(engine.sd_checkpoint_info, family="" if refusal else _family(engine), vae=identity(engine).vae,
                     refusal=refusal)


def _family(engine: Any) -> str:
    encoders = getattr(engine.forge_objects_original.clip, "cond_stage_model", None)
    return next((family for family, names in _TEXT_PREFIXES.items() if getattr(engine, f"is_{family}", False)
                 and all(hasattr(encoders, name) for name in names)), "")


def modules(engine: Any) -> Sequence[nn.Module]:
    """See `ModelAccess`."""
    bare = engine.forge_objects_original
    return [bare.unet.model.diffusion_model, bare.vae.first_stage_model, bare.clip.cond_stage_model]


def collect(engine: Any) -> dict[str, Tensor]:
    """See `ModelAccess`."""
    tensors = dict(_named(engine))
    if any(tensor.is_meta for tensor in tensors.values()):
        raise HostError("The WebUI's model is not in memory", why="it was thrown away",
                        remedy="choose the checkpoint again at the top of the page")
    return tensors


def _named(engine: Any) -> Iterator[tuple[str, Tensor]]:
    unet, vae, text = modules(engine)
    yield from ((f"{UNET_PREFIX}{name}", parameter) for name, parameter in unet.named_parameters())
    yield from ((f"{VAE_PREFIX}{name}", parameter) for name, parameter in vae.named_parameters())
    family = _family(engine)
    for part, prefix in _TEXT_PREFIXES[family].items():
        encoder = getattr(text, part)
        for name, parameter in encoder.named_parameters():
            # The engine makes a projection for each encoder, which only one of them has in its checkpoint.
            unused = name.endswith("logit_scale") or "text_projection" in name and part != "clip_g"
            if ".wrapped." not in name and not unused:
                yield f"{prefix}{name}", parameter
                # The last layer of SD2's text encoder is left out, because its output is not used. It is there by name, so
                # that layers are counted as in a checkpoint.
                last = encoder.transformer.config.num_hidden_layers
                if family == "sd2" and f".layers.{last - 1}." in name:
                    yield prefix + name.replace(f".layers.{last - 1}.", f".layers.{last}."), parameter


def hints(engine: Any) -> Hints:
    """See `ModelAccess`."""
    unet, vae, _ = modules(engine)
    heads, head_channels = attention_heads(unet)
    configs = [text.text_encoder.transformer.config for text in _text_engines(engine)]
    predictor = engine.forge_objects_original.unet.model.predictor
    scale = vae.latent_format.scale_factor if hasattr(vae, "latent_format") else vae.scaling_factor  # Neo, Forge
    return Hints(
        unet_heads=heads, unet_head_channels=head_channels,
        text_heads=tuple(config.num_attention_heads for config in configs),
        text_activations=tuple("quick_gelu" if config.hidden_act == "quick_gelu" else "gelu" for config in configs),
        prediction_type=predictor.prediction_type,
        zero_terminal_snr=bool(getattr(engine.model_config, "ztsnr", False))
        or getattr(shared.opts, "sd_noise_schedule", "") == "Zero Terminal SNR",
        alphas_cumprod=predictor.alphas_cumprod.detach().float(), latent_scale=float(scale))


def tokenizers(engine: Any) -> Sequence[Tokenizer]:
    """See `ModelAccess`."""
    return [FunctionTokenizer(lambda text, tokenize=encoder.tokenize: tokenize([text])[0], start=encoder.id_start,
                              end=encoder.id_end, comma=encoder.comma_token) for encoder in _text_engines(engine)]


def _text_engines(engine: Any) -> list[Any]:
    names = ("text_processing_engine", "text_processing_engine_l", "text_processing_engine_g")
    return [getattr(engine, name) for name in names if hasattr(engine, name)]


def remove_loras(engine: Any, networks: Any) -> None:
    """See `ModelAccess`."""
    clones.remove_loras(engine, networks, unload=lambda: unload(engine))


def unload(engine: Any) -> None:
    """See `ModelAccess`. The next generation loads what it needs by itself."""
    with torch.inference_mode():
        memory_management.unload_all_models()
