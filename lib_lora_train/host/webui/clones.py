"""Active LoRAs of the Forges: clones of the patchers, out of use and out of the weights that all clones share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from lib_lora_train.errors import HostError


def remove_loras(sd_model: Any, networks: Any, *, unload: Callable[[], None]) -> None:
    """As `ModelAccess.remove_loras`; `unload` puts the model where its weights are bare."""
    bare = sd_model.forge_objects_original
    patchers = [bare.unet, bare.clip.patcher]
    with torch.inference_mode():  # the model's parameters are made under it, and so are those that are put back
        networks.load_networks([], [], [])
        sd_model.forge_objects = bare.shallow_copy()
        sd_model.forge_objects_after_applying_lora = bare.shallow_copy()
        unload()
        for patcher in patchers:
            if hasattr(patcher, "refresh_loras"):  # of Forge, whose unloading leaves them in
                patcher.refresh_loras()
    if any(getattr(getattr(patcher, "lora_loader", patcher), "backup", None) for patcher in patchers):
        raise HostError("A LoRA that is active in the WebUI could not be taken out of the model",
                        remedy="choose the checkpoint again at the top of the page, then train")
