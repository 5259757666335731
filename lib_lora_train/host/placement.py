"""Parts of a lent model set aside: moved to the CPU while they are not needed, and back.

A tensor is moved in place: the object stays, its storage becomes another one, so that whoever holds the object (a module
of the host, the mapping that was lent) sees the new place and nobody keeps the old one alive. Its dtype, its strides, whether
it wants a gradient and whether it is an inference tensor stay what they were; tensors that shared their memory share it
afterwards.
"""

from __future__ import annotations

import contextlib
import gc
import traceback
import weakref
from collections.abc import Collection, Iterable, Iterator, Mapping

import torch
from torch import Tensor

from lib_lora_train.errors import is_out_of_memory
from lib_lora_train.model.family import FAMILIES
from lib_lora_train.model.sd.components import UNET_PREFIX, VAE_PREFIX

CPU = torch.device("cpu")
PREFIXES: Mapping[str, tuple[str, ...]] = {
    "unet": (UNET_PREFIX,), "vae": (VAE_PREFIX,),
    "text": tuple({spec.prefix for family in FAMILIES.values() for spec in family.text})}
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


def indexed(device: torch.device) -> torch.device:
    """A card with its number: the current one's where there is none. Older torch is not told of a card's memory without."""
    return torch.device("cuda", torch.cuda.current_device()) if device.type == "cuda" and device.index is None else device


def move(tensors: Iterable[Tensor], device: torch.device) -> None:
    """Move those of the tensors that lie elsewhere to `device`, in place.

    Raises what torch raises where the device has no room; nothing has moved then.
    """
    were = {tensor: device_of(tensor) for tensor in tensors}
    with contextlib.ExitStack() as otherwise:
        otherwise.callback(_each_to, were)
        _each_to(dict.fromkeys(were, device))
        otherwise.pop_all()


class Strays:
    """Tensors that found no room at home. Nobody keeps them for this: their owner may drop them."""

    def __init__(self) -> None:
        self._homes: list[tuple[weakref.ref[Tensor], torch.device]] = []

    def __len__(self) -> int:
        return len(self._homes)

    def send_home(self, homes: Mapping[Tensor, torch.device]) -> None:
        """Move each home; those for which there is no room are strays afterwards."""
        try:
            _each_to(homes)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            self._homes += [(weakref.ref(tensor), home) for tensor, home in homes.items() if not _lies(tensor, home)]

    def try_again(self) -> bool:
        """Send home those there are, all memory collected that nobody uses. Whether none is left."""
        found = [(reference(), home) for reference, home in self._homes]
        self._homes.clear()
        homes = {tensor: home for tensor, home in found if tensor is not None}
        if homes:
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            self.send_home(homes)
        return not self._homes


@contextlib.contextmanager
def aside(homes: Mapping[Tensor, torch.device], strays: Strays) -> Iterator[None]:
    """The tensors on the CPU until the block is left, then each at its home, whatever happens, or among the strays.

    Who moved one of them meanwhile has placed it himself: it stays where it is now. Raises as `move` before the block.
    """
    move(homes, CPU)
    try:
        yield
    finally:
        strays.send_home({tensor: home for tensor, home in homes.items() if _lies(tensor, CPU)})


def emptied(error: BaseException) -> None:
    """Empty the frames that an error and those it came of have left: until it is forgotten, these hold all that was in their
    variables. Where it came from can still be told."""
    left: list[BaseException | None] = [error]
    seen: set[int] = set()
    while left:
        one = left.pop()
        if one is not None and id(one) not in seen:
            seen.add(id(one))
            traceback.clear_frames(one.__traceback__)  # passes over those that are not left yet
            left += [one.__cause__, one.__context__]


def _each_to(places: Mapping[Tensor, torch.device]) -> None:
    # Tied weights are several objects over one memory, and stay so.
    tied: dict[tuple[object, ...], list[Tensor]] = {}
    for tensor, device in places.items():
        if not _lies(tensor, device):
            memory = (device_of(tensor), tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, device)
            tied.setdefault(memory, []).append(tensor)
    for (*_, device), tensors in tied.items():
        moved = None
        for tensor in tensors:
            with torch.inference_mode(tensor.is_inference()):
                if moved is None:
                    moved = onto(tensor.data, device)
                tensor.data = moved


def _lies(tensor: Tensor, device: torch.device) -> bool:
    """Whether a tensor lies on a device; "cuda" without a number is whichever card it is on."""
    at = device_of(tensor)
    return at.type == device.type and (device.index is None or at.index == device.index)
