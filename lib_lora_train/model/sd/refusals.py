"""The kinds of checkpoint that are not trained on, each recognised by a name or a shape and refused in one sentence."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lib_lora_train.errors import ModelError
from lib_lora_train.model.sd.components import UNET_PREFIX
from lib_lora_train.model.sd.lora_keys import foreign_layout

SUPPORTED = "choose a Stable Diffusion 1.x, 2.x or SDXL base checkpoint"
_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)

# (what the name of a tensor begins with, or holds) -> the kind of model. The first match is told.
_BEGINNINGS = (
    (("lora_unet_", "lora_te", "lycoris_"), "a LoRA, not a checkpoint"),
    (("model.diffusion_model.joint_blocks.", "joint_blocks."), "a Stable Diffusion 3 model"),
    (("model.diffusion_model.double_blocks.", "double_blocks."), "a Flux model"),
    (("depth_model.",), "a depth-to-image model"),
    (("embedder.model.",), "an unCLIP model"),
    (("cond_stage_model.roberta.",), "an AltDiffusion model"),
    (("control_model.", "input_hint_block.", "controlnet_"), "a ControlNet, not a checkpoint"),
    (("emb_params", "clip_l", "clip_g", "string_to_param"), "a textual inversion embedding, not a checkpoint"),
    (("edm_mean", "edm_std", "edm_vpred"), "an EDM model (continuous noise levels)"),
    (("model_ema.",), "a training checkpoint with EMA weights only"),
    (("down_blocks.", "unet.down_blocks."), "a UNet in the layout of diffusers"),
)
# What is computed with, of UNet, VAE and text encoders.
_USED = ("input_blocks.", "middle_block.", "output_blocks.", "out.", "time_embed.", "label_emb.", "encoder.", "decoder.",
         "quant_conv.", "post_quant_conv.", "text_model.", "text_projection.")
_INPUT_CHANNELS = {
    9: "an inpainting model", 8: "an instruct-pix2pix model", 7: "an upscaling model", 5: "a depth-to-image model",
}


def refuse_other_kinds(tensors: Mapping[str, Tensor]) -> None:
    """Raise ModelError where the checkpoint is of a kind that cannot be trained on."""
    stem = tensors.get(f"{UNET_PREFIX}input_blocks.0.0.weight")
    if (layout := foreign_layout(tensors)) and stem is None:
        raise _refused(f"a LoRA in the layout of {layout}, not a checkpoint")
    for beginnings, kind in _BEGINNINGS:
        if kind.startswith(("a training", "a UNet", "a LoRA", "a textual")) and stem is not None:
            continue  # such extras do no harm beside a usable UNet
        if any(name.startswith(beginnings) for name in tensors):
            raise _refused(kind)
    if any(".time_stack." in name for name in tensors):
        raise _refused("a video model")
    first, second = (any(name.startswith(f"conditioner.embedders.{index}.") for name in tensors) for index in (0, 1))
    if first and not second and "conditioner.embedders.0.model.ln_final.weight" in tensors:
        raise _refused("the SDXL refiner", remedy="choose the SDXL base model, or one made from it")
    if stem is not None and stem.ndim == 4 and stem.shape[1] != 4:
        channels = stem.shape[1]
        raise _refused(_INPUT_CHANNELS.get(channels, "a model of an unknown kind"),
                       why=f"its UNet takes {channels} channels instead of 4")


def refuse_quantised(part: Mapping[str, Tensor]) -> None:
    """Raise ModelError where a weight of a `part` (local names) that is computed with is not stored as 16 or 32 bits."""
    for name, tensor in part.items():
        # Buffers such as `position_ids` are integers in sound checkpoints.
        if name.startswith(_USED) and name.endswith((".weight", ".bias")) and (stored := _compressed(tensor)):
            raise quantised(name, stored)


def quantised(name: str, stored: str) -> ModelError:
    """The error for a checkpoint whose tensor `name` is stored as `stored`."""
    return ModelError("The weights of this checkpoint are quantised", why=f"'{name}' is stored as {stored}",
                      remedy="load it in 16 or 32 bits (no fp8, nf4 or gguf storage)")


def _compressed(tensor: Tensor) -> str:
    """How a tensor is stored whose numbers are no plain floats; "" for one of 16, 32 or 64 bits."""
    if gguf := getattr(tensor, "gguf_cls", None):  # of Forge
        return f"GGUF ({gguf.__name__})"
    if hasattr(tensor, "quant_type"):  # of bitsandbytes
        return str(tensor.quant_type)
    stored = str(tensor.dtype).removeprefix("torch.")
    return "" if tensor.dtype in _FLOATS else f"{stored} (fp8)" if stored.startswith("float8") else stored


def _refused(kind: str, *, why: str = "", remedy: str = SUPPORTED) -> ModelError:
    what = f"The checkpoint is {kind}, which this trainer does not support"
    if kind.endswith("not a checkpoint"):
        what = f"The file is {kind}"
    return ModelError(what, why=why, remedy=remedy)
