"""The model of reForge and Forge Classic (`ModelAccess`): AUTOMATIC1111's shell, into which the modules of a patched ComfyUI
backend are hung. What is asked of the shell is AUTOMATIC1111's; how weights are moved and LoRAs are added is the Forges'.

Written for reForge of 2026-03 and Classic of 2025-02.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from ldm_patched.modules import model_management
from torch import Tensor

from lib_lora_train.host import placement
from lib_lora_train.host.port import Checkpoint
from lib_lora_train.host.webui import a1111, clones
from lib_lora_train.host.webui.a1111 import (
    current,
    hints,
    identity,
    load,
    may_be_back,
    modules,
    pending,
    refuse_kind,
    restored,
    select,
    tokenizers,
)
from lib_lora_train.host.webui.model_access import described

__all__ = ["current", "load", "select", "pending", "restored", "may_be_back", "identity", "refuse_kind", "modules", "hints",
           "tokenizers"]


def refuse_options() -> None:
    """See `ModelAccess`."""


def describe(sd_model: Any) -> Checkpoint:
    """See `ModelAccess`. The shell takes SD2 for SD1; the UNet tells them apart."""
    try:
        unet, checkpoint = sd_model.model.diffusion_model, a1111.describe(sd_model)
        names = unet.named_parameters() if checkpoint.family == "sd1" else ()
        projection = next((weight for name, weight in names if name.endswith(".proj_in.weight")), None)
    except (TypeError, AttributeError):  # reForge takes a model that it drops apart, and has none in its place for a while
        return described(sd_model.sd_checkpoint_info, family="", refusal="The WebUI is changing its model; wait a moment.")
    linear = projection is not None and projection.ndim == 2
    return dataclasses.replace(checkpoint, family="sd2") if linear else checkpoint


def collect(sd_model: Any) -> dict[str, Tensor]:
    """See `ModelAccess`. The shell calls some tensors by several names, of which those of a checkpoint are taken."""
    return placement.weights_of(a1111.collect(sd_model))


def remove_loras(sd_model: Any, networks: Any) -> None:
    """See `ModelAccess`."""
    clones.remove_loras(sd_model, networks, unload=lambda: unload(sd_model))


def unload(sd_model: Any) -> None:
    """See `ModelAccess`. The next generation loads what it needs by itself."""
    model_management.unload_all_models()
