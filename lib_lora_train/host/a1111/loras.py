"""The WebUI's built-in Lora extension: its LoRAs out of the weights, and its files read again.

It adds active LoRAs into the very weights and leaves them there after a generation; it keeps what it read of a file,
and the WebUI keeps the text condition of the last prompt. All of that would be stale after an overwrite: the file's
new weights would not be used until another LoRA was.
"""

from __future__ import annotations

import sys
from types import ModuleType

import torch
from modules import extra_networks, processing, sd_models
from torch import nn

from lib_lora_train.errors import HostError


def unmerge(sd_model: nn.Module) -> None:
    """Give every layer the checkpoint's own weights again. To be called with the queue's lock held.

    Raises HostError if a layer is still changed afterwards.
    """
    networks = _extension()
    if networks is None:
        return
    layers = getattr(sd_model, "network_layer_mapping", {}).values()
    with torch.no_grad():
        networks.load_networks([], [], [], [])
        for layer in layers:
            if hasattr(layer, "network_current_names"):
                networks.network_apply_weights(layer)
    if any(getattr(layer, "network_current_names", ()) for layer in layers):
        raise HostError("A LoRA that is active in the WebUI could not be taken out of the model",
                        remedy="choose the checkpoint again at the top of the page, then train")


def refresh() -> None:
    """Read the LoRA folder again and forget what was read, merged or computed before. Lock as for `unmerge`."""
    networks = _extension()
    if networks is None:
        return
    networks.list_available_networks()
    networks.networks_in_memory.clear()
    sd_model = sd_models.model_data.sd_model
    if sd_model is not None:
        unmerge(sd_model)
    for owner, names in ((processing.StableDiffusionProcessing, ("cached_c", "cached_uc")),
                         (processing.StableDiffusionProcessingTxt2Img, ("cached_hr_c", "cached_hr_uc"))):
        for name in names:
            setattr(owner, name, [None, None])


def _extension() -> ModuleType | None:
    """Its module `networks`; None where the extension is switched off. It cannot be imported by name from here."""
    lora = extra_networks.extra_network_registry.get("lora")
    return None if lora is None else getattr(sys.modules[type(lora).__module__], "networks", None)
