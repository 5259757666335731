"""AUTOMATIC1111's loaded model (`ModelAccess`): its tensors by reference under checkpoint names, and what their shapes cannot
tell. Written for v1.10.1.

The names of the WebUI's modules are those of the checkpoint, but for its wrappers around the text encoders
("cond_stage_model.wrapped.transformer…") and around their token embeddings. No method of a module is called that
computes anything, so none of the WebUI's patches of them matter.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from modules import sd_models, shared
from torch import Tensor, nn

from lib_lora_train.errors import HostError, ModelError, translated
from lib_lora_train.host.port import Checkpoint
from lib_lora_train.host.webui.model_access import Identity, attention_heads, choose_checkpoint, described, refusal_of
from lib_lora_train.model.architecture import Activation
from lib_lora_train.model.family import FAMILIES, Hints
from lib_lora_train.model.sd.refusals import SUPPORTED
from lib_lora_train.model.sd.tokens import FunctionTokenizer, Tokenizer


def current() -> Any:
    """See `ModelAccess`. `shared.sd_model` would wait for a model that is being loaded, or load one: not asked."""
    return sd_models.model_data.sd_model


def load() -> Any:
    """See `ModelAccess`. Waits for the thread that loads the model at the start."""
    return shared.sd_model


def select(title: str) -> str:
    """See `ModelAccess`."""
    sd_model = load()
    with sd_models.model_data.lock:  # at the start, the model is known before its loading has ended
        before = sd_model.sd_checkpoint_info.title if sd_model is not None else ""

    def reload(chosen: Any) -> Any:
        sd_models.reload_model_weights(info=chosen)
        return current()
    return choose_checkpoint(title, before=before, load=reload)


def pending() -> Any:
    """See `ModelAccess`. A checkpoint is loaded when it is chosen."""
    return None


def identity(sd_model: nn.Module) -> Identity:
    """See `ModelAccess`."""
    return Identity(sd_model.sd_checkpoint_info.filename, getattr(sd_model, "loaded_vae_file", None) or "")


def restored(wanted: Identity) -> Any:
    """See `ModelAccess`."""
    sd_model = current()
    if sd_model is not None and _will_return(wanted, sd_model):
        with translated("loading the checkpoint that is trained on again"):
            sd_model = sd_models.reload_model_weights()
    if sd_model is None:
        raise HostError("The WebUI's model was unloaded while others used it",
                        remedy="choose the checkpoint again at the top of the page and resume the run")
    return sd_model if identity(sd_model) == wanted else None


def may_be_back(wanted: Identity) -> bool:
    """See `ModelAccess`."""
    sd_model = current()
    return sd_model is not None and (identity(sd_model) == wanted or _will_return(wanted, sd_model))


def _will_return(wanted: Identity, sd_model: nn.Module) -> bool:
    """Whether the WebUI is set to this checkpoint and holds another one only until the next generation, as after a
    refiner or an API call with `override_settings`."""
    return (sd_model.sd_checkpoint_info.filename != wanted.checkpoint
            and sd_models.select_checkpoint().filename == wanted.checkpoint)


def refuse_options() -> None:
    """See `ModelAccess`."""
    if shared.cmd_opts.lowvram:
        raise HostError("Training is not possible with --lowvram", why="it keeps the model in pieces outside the GPU's memory",
                        remedy="start the WebUI with --medvram, or without either")


def refuse_kind(sd_model: nn.Module) -> None:
    """See `ModelAccess`."""
    if not isinstance(sd_model, nn.Module):
        raise ModelError(f"This WebUI keeps its model in a way that is not known here ({type(sd_model).__name__})",
                         remedy="train in AUTOMATIC1111, Forge, Forge Neo or reForge")
    kinds = {"a Stable Diffusion 3 model": getattr(sd_model, "is_sd3", False),
             "an SSD-1B model": getattr(sd_model, "is_ssd", False),
             "an instruct-pix2pix model": getattr(sd_model, "cond_stage_key", None) == "edit"}
    for kind in (name for name, found in kinds.items() if found):
        raise ModelError(f"The checkpoint is {kind}, which this trainer does not support", remedy=SUPPORTED)


def describe(sd_model: nn.Module) -> Checkpoint:
    """See `ModelAccess`."""
    refusal = refusal_of(sys.modules[__name__], sd_model)
    return described(sd_model.sd_checkpoint_info, family="" if refusal else _family(sd_model), vae=identity(sd_model).vae,
                     refusal=refusal)


def modules(sd_model: nn.Module) -> Sequence[nn.Module]:
    """See `ModelAccess`."""
    return [sd_model]


def collect(sd_model: nn.Module) -> dict[str, Tensor]:
    """See `ModelAccess`."""
    tensors = {}
    sdxl = hasattr(sd_model, "conditioner")
    for name, tensor in sd_model.state_dict(keep_vars=True).items():
        # The WebUI calls SDXL's conditioner by SD1's name too.
        if not (sdxl and name.startswith("cond_stage_model.")):
            tensors[name.replace(".wrapped.", ".")] = tensor
    if any(tensor.is_meta for tensor in tensors.values()):
        raise HostError("The WebUI's model is not in memory", why="it was thrown away",
                        remedy="choose the checkpoint again at the top of the page")
    return tensors


def hints(sd_model: nn.Module) -> Hints:
    """See `ModelAccess`."""
    heads, head_channels = attention_heads(sd_model.model.diffusion_model)
    encoders = [_text_encoder(embedder) for embedder in _embedders(sd_model)]
    return Hints(
        unet_heads=heads, unet_head_channels=head_channels,
        text_heads=tuple(heads for heads, _ in encoders) or None,
        text_activations=tuple(activation for _, activation in encoders) or None,
        prediction_type="v_prediction" if sd_model.parameterization == "v" else "epsilon",
        zero_terminal_snr=shared.opts.sd_noise_schedule == "Zero Terminal SNR" or bool(getattr(sd_model, "ztsnr", False)),
        # `alphas_cumprod` itself is rewritten, and may be rounded, at every generation; where there is no other, only at those
        # with zero terminal SNR, which make one.
        alphas_cumprod=getattr(sd_model, "alphas_cumprod_original", sd_model.alphas_cumprod).detach().float().clone(),
        latent_scale=float(sd_model.scale_factor))


def tokenizers(sd_model: nn.Module) -> Sequence[Tokenizer]:
    """See `ModelAccess`."""
    return [FunctionTokenizer(lambda text, tokenize=embedder.tokenize: tokenize([text])[0], start=embedder.id_start,
                              end=embedder.id_end, comma=embedder.comma_token) for embedder in _embedders(sd_model)]


def remove_loras(sd_model: nn.Module, networks: Any) -> None:
    """See `ModelAccess`."""
    layers = getattr(sd_model, "network_layer_mapping", {}).values()
    with torch.no_grad():
        networks.load_networks([], [], [])
        for layer in layers:
            if hasattr(layer, "network_current_names"):
                networks.network_apply_weights(layer)
    if any(getattr(layer, "network_current_names", ()) for layer in layers):
        raise HostError("A LoRA that is active in the WebUI could not be taken out of the model",
                        remedy="choose the checkpoint again at the top of the page, then train")


def unload(sd_model: nn.Module) -> None:
    """See `ModelAccess`."""
    if getattr(sd_model, "lowvram", False):
        # Of --medvram. The WebUI remembers which one part it put on the GPU, and would not put it back a second time.
        from modules import lowvram

        lowvram.send_everything_to_cpu()


def _family(sd_model: nn.Module) -> str:
    stem = getattr(getattr(getattr(sd_model, "model", None), "diffusion_model", None), "input_blocks", None)
    if stem is None or stem[0][0].weight.shape[1] != 4 or getattr(sd_model, "is_ssd", False):
        return ""
    for family in reversed(FAMILIES.values()):
        if getattr(sd_model, f"is_{family.name}", False):  # the WebUI's own flags
            several = len(family.text) > 1
            return "" if several and len(_embedders(sd_model)) != len(family.text) else family.name
    return ""


def _embedders(sd_model: nn.Module) -> list[Any]:
    """The WebUI's wrappers around the text encoders, in the order of the checkpoint."""
    candidates = sd_model.conditioner.embedders if hasattr(sd_model, "conditioner") else [sd_model.cond_stage_model]
    return [embedder for embedder in candidates if hasattr(embedder, "wrapped") and hasattr(embedder, "tokenize")]


def _text_encoder(embedder: Any) -> tuple[int, Activation]:
    """(heads, activation) of the transformer below a wrapper: Hugging Face's, or OpenCLIP's."""
    if hasattr(embedder.wrapped, "transformer"):
        config = embedder.wrapped.transformer.config
        return config.num_attention_heads, "quick_gelu" if config.hidden_act == "quick_gelu" else "gelu"
    block = embedder.wrapped.model.transformer.resblocks[0]
    quick = type(block.mlp.gelu).__name__ == "QuickGELU"
    return block.attn.num_heads, "quick_gelu" if quick else "gelu"
