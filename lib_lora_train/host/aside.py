"""Parts of a lent model set aside: moved to the CPU while they are not needed, and back.

A tensor is moved in place: the object stays, its storage becomes another one, so that whoever holds the object (a module
of the host, the mapping that was lent) sees the new place and nobody keeps the old one alive. Its dtype, its strides, whether
it wants a gradient and whether it is an inference tensor stay what they were; tensors that shared their memory share it
afterwards.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Collection, Iterable, Iterator, Mapping

import torch
from torch import Tensor

from lib_lora_train.errors import is_out_of_memory
from lib_lora_train.model.components import SDXL_TEXT_PREFIXES, TEXT_PREFIXES, UNET_PREFIX, VAE_PREFIX

CPU = torch.device("cpu")
PREFIXES: Mapping[str, tuple[str, ...]] = {
    "unet": (UNET_PREFIX,), "vae": (VAE_PREFIX,), "text": (*TEXT_PREFIXES, *SDXL_TEXT_PREFIXES)}
"""How the names of a part's tensors begin."""


def tensors_of(tensors: Mapping[str, Tensor], parts: Collection[str]) -> list[Tensor]:
    """Those of a checkpoint's tensors that belong to these parts ("unet", "vae", "text")."""
    prefixes = tuple(prefix for part in parts for prefix in PREFIXES[part])
    return [tensor for name, tensor in tensors.items() if name.startswith(prefixes)]


def device_of(tensor: Tensor) -> torch.device:
    """Where a tensor lies. Here and in `onto` only a device is asked about or moved to."""
    return tensor.device


def onto(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor's numbers on another device: a copy, of the same strides."""
    return tensor.to(device)


def move(tensors: Iterable[Tensor], device: torch.device) -> None:
    """Move those of the tensors that lie elsewhere to `device`, in place.

    Raises what torch raises where the device has no room; each tensor then lies wholly here or there.
    """
    _each_to({tensor: device for tensor in tensors})


@contextlib.contextmanager
def aside(tensors: Iterable[Tensor], place: torch.device = CPU) -> Iterator[None]:
    """The tensors at `place` until the block is left, then each where it was, whatever happens.

    Who moved one of them meanwhile has placed it himself: it stays where it is now.
    """
    homes = {tensor: device_of(tensor) for tensor in tensors}
    try:
        _each_to({tensor: place for tensor in homes})
        yield
    finally:
        back = {tensor: home for tensor, home in homes.items() if _lies(tensor, place)}
        try:
            _each_to(back)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            # What the borrower has just let go of may wait for the collector. The lender's model comes before his.
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            _each_to(back)


def _each_to(places: Mapping[Tensor, torch.device]) -> None:
    moved: dict[tuple[object, ...], Tensor] = {}
    for tensor, device in places.items():
        if _lies(tensor, device):
            continue
        # Tied weights are two objects over one memory, and stay so.
        memory = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, device)
        with torch.inference_mode(tensor.is_inference()):
            if memory not in moved:
                moved[memory] = onto(tensor.data, device)
            tensor.data = moved[memory]


def _lies(tensor: Tensor, device: torch.device) -> bool:
    """Whether a tensor lies on a device; "cuda" without a number is whichever card it is on."""
    at = device_of(tensor)
    return at.type == device.type and (device.index is None or at.index == device.index)
