"""Moving parts of a leased model off its device while they are not needed, and back.

A tensor is moved in place: the object stays, its storage becomes another one, so that whoever holds the object (a module
of the host, the leased mapping) sees the new place and nobody keeps the old one alive. Its dtype, its strides, whether
it requires a gradient and whether it is an inference tensor stay what they were; tensors that shared their memory share it
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
PARTS = frozenset(PREFIXES)


def tensors_of(tensors: Mapping[str, Tensor], parts: Collection[str]) -> list[Tensor]:
    """Those of a checkpoint's tensors that belong to these parts ("unet", "vae", "text")."""
    prefixes = tuple(prefix for part in parts for prefix in PREFIXES[part])
    return [tensor for name, tensor in tensors.items() if name.startswith(prefixes)]


def weights_of(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A checkpoint's weights, without the noise schedule's buffers, which the WebUI makes anew at each generation: rescaled
    for zero terminal SNR, or rounded."""
    prefixes = tuple(prefix for part in PREFIXES.values() for prefix in part)
    return {name: tensor for name, tensor in tensors.items() if name.startswith(prefixes)}


def device_of(tensor: Tensor) -> torch.device:
    """The device of a tensor. Only here and in `copy_to` torch is asked about devices, so that a test can replace both."""
    return tensor.device


def copy_to(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy of the tensor on another device, of the same strides."""
    return tensor.to(device)


def indexed(device: torch.device) -> torch.device:
    """A GPU with its index, by default the current one's: older torch does not tell a GPU's memory without."""
    return torch.device("cuda", torch.cuda.current_device()) if device.type == "cuda" and device.index is None else device


def move(tensors: Iterable[Tensor], device: torch.device) -> None:
    """Move the tensors to `device`, in place.

    Raises what torch raises where the device has no room; nothing has moved then.
    """
    originals = {tensor: device_of(tensor) for tensor in tensors}
    with contextlib.ExitStack() as on_error:
        on_error.callback(_move_each, originals)
        _move_each(dict.fromkeys(originals, device))
        on_error.pop_all()


class MisplacedTensors:
    """Tensors for which their original device had no room, with that device. Only weak references: their owner may drop
    them."""

    def __init__(self) -> None:
        self._originals: list[tuple[weakref.ref[Tensor], torch.device]] = []

    def __len__(self) -> int:
        return len(self._originals)

    def restore(self, originals: Mapping[Tensor, torch.device]) -> None:
        """Move each tensor to its original device; those for which there is no room are kept here. Raises any other error, and
        keeps here then what had not moved."""
        try:
            _move_each(originals)
        except BaseException as error:
            self._originals += [(weakref.ref(tensor), device) for tensor, device in originals.items()
                                if not _is_on(tensor, device)]
            if not is_out_of_memory(error):
                raise

    def retry(self) -> bool:
        """Restore those there are, after unused memory is freed. Whether none is left."""
        found = [(reference(), device) for reference, device in self._originals]
        self._originals.clear()
        originals = {tensor: device for tensor, device in found if tensor is not None}
        if originals:
            gc.collect()
            free_unused()
            self.restore(originals)
        return not self._originals


@contextlib.contextmanager
def moved(originals: Mapping[Tensor, torch.device], device: torch.device, misplaced: MisplacedTensors) -> Iterator[None]:
    """Keep the tensors on `device` inside the block; afterwards, also on an exception, each is on its original device or
    among the misplaced ones.

    A tensor that somebody else moved inside the block stays where it is then. Raises as `move` before the block.
    """
    move(originals, device)
    try:
        yield
    finally:
        misplaced.restore({tensor: original for tensor, original in originals.items() if _is_on(tensor, device)})


def free_unused() -> None:
    """Give the GPU back what torch keeps of its memory for later tensors."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def clear_frames(error: BaseException) -> None:
    """Free the local variables that an error and its causes keep alive through their tracebacks, which still print."""
    pending: list[BaseException | None] = [error]
    seen: set[int] = set()
    while pending:
        one = pending.pop()
        if one is not None and id(one) not in seen:
            seen.add(id(one))
            traceback.clear_frames(one.__traceback__)  # skips frames that still run
            pending += [one.__cause__, one.__context__]


def _move_each(devices: Mapping[Tensor, torch.device]) -> None:
    # Tied weights are several objects over one memory, and stay so.
    tied: dict[tuple[object, ...], list[Tensor]] = {}
    for tensor, device in devices.items():
        if not _is_on(tensor, device):
            memory = (device_of(tensor), tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, device)
            tied.setdefault(memory, []).append(tensor)
    for (*_, device), tensors in tied.items():
        moved = None
        for tensor in tensors:
            with torch.inference_mode(tensor.is_inference()):
                moved = copy_to(tensor.data, device) if moved is None else moved
                tensor.data = moved


def _is_on(tensor: Tensor, device: torch.device) -> bool:
    """Whether a tensor is on a device; "cuda" without an index is whichever GPU it is on."""
    current = device_of(tensor)
    return current.type == device.type and (device.index is None or current.index == device.index)
