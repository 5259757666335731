"""The WebUI's built-in Lora extension: its LoRAs out of the weights, and its files read again.

It adds active LoRAs to the weights and leaves them there after a generation; it keeps what it read of a file,
and the WebUI keeps the text condition of the last prompt. All of that would be stale after an overwrite: the file's
new weights would not be used until another LoRA was.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

from modules import extra_networks, processing

from lib_lora_train.host.webui.model_access import ModelAccess


def unmerge(access: ModelAccess, sd_model: Any) -> None:
    """Give every layer the checkpoint's own weights again. To be called with the queue's lock held.

    Raises HostError if a layer is still changed afterwards.
    """
    networks = _extension()
    if networks is not None:
        access.remove_loras(sd_model, networks)


def refresh(access: ModelAccess) -> None:
    """Read the LoRA folder again and forget what was read, merged or computed before. Lock as for `unmerge`."""
    networks = _extension()
    if networks is None:
        return
    networks.list_available_networks()
    # What is kept of a file: by AUTOMATIC1111, by Forge.
    getattr(networks, "networks_in_memory", {}).clear()
    getattr(getattr(networks, "load_lora_state_dict", None), "cache_clear", lambda: None)()
    sd_model = access.current()
    if sd_model is not None:
        unmerge(access, sd_model)
    for owner, names in ((processing.StableDiffusionProcessing, ("cached_c", "cached_uc")),
                         (processing.StableDiffusionProcessingTxt2Img, ("cached_hr_c", "cached_hr_uc"))):
        for name in names:
            setattr(owner, name, [None] * len(getattr(owner, name)))


def _extension() -> ModuleType | None:
    """Its module `networks`; None where the extension is switched off. It cannot be imported by name from here."""
    lora = extra_networks.extra_network_registry.get("lora")
    return None if lora is None else getattr(sys.modules[type(lora).__module__], "networks", None)
