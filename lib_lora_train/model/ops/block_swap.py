"""Block swapping: weights of some blocks wait in the CPU's memory and come to the device when their block is computed.

They are frozen, so they travel in one direction only. Two slots on the device, each as large as the largest of these blocks,
hold the block that is computed and the one that comes next: in forward the following one, in backward the preceding one, and
at either end the way back. Its copy begins when the block before it is entered, on a stream of its own, and waits there for
the kernels that still read what was in the slot. A block that was not expected is copied when it is asked for: another order
takes more time and computes the same.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Container, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from lib_lora_train.model.ops.quantised import is_kernel
from lib_lora_train.model.ops.weights import Quantised, Weight

log = logging.getLogger(__name__)
CPU = torch.device("cpu")
_ALIGNMENT = 256  # bytes, as torch's own allocations have it
_OUT_OF_MEMORY = 2  # cudaErrorMemoryAllocation


def spread(blocks: Sequence[str], count: int) -> tuple[str, ...]:
    """`count` of the blocks at even distances, so that each copy has the blocks in between to hide behind."""
    count = min(count, len(blocks))
    return tuple(blocks[(2 * number + 1) * len(blocks) // (2 * count)] for number in range(count))


def block_of(name: str, ndim: int, blocks: Container[str]) -> str | None:
    """The one of `blocks` whose kernel the UNet's tensor of this local name is; norms and biases always stay on the device."""
    outer = name if is_kernel(name, ndim) else ""
    while outer and outer not in blocks:
        outer = outer.rpartition(".")[0]
    return outer or None


class Copies(Protocol):
    """How weights come to the device."""

    def pin(self, tensor: Tensor) -> None:
        """Let this tensor on the CPU be copied while the device computes, until `unpin`."""

    def begin(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> Any:
        """Begin to copy each (target, source), after all that was computed until now; what is returned is for `wait`."""

    def wait(self, copied: Any) -> None:
        """Let what is computed from now on come after that copy."""

    def finish(self) -> None:
        """Return when no copy is under way."""

    def unpin(self) -> None:
        """Pin nothing any longer; no copy is under way."""


class PlainCopies:
    """Copies that are made when they begin: for devices without streams."""

    def pin(self, tensor: Tensor) -> None:
        """Nothing."""

    def begin(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        """See `Copies`."""
        for target, source in pairs:
            target.copy_(source)

    def wait(self, copied: Any) -> None:
        """Nothing."""

    def finish(self) -> None:
        """Nothing."""

    def unpin(self) -> None:
        """Nothing."""


class CudaCopies:
    """Copies on a stream of their own, beside the computation.

    The host's tensors are page-locked where they lie, as ComfyUI does: torch's own pinned memory would be a second copy,
    rounded up to powers of two and kept until the process ends. What cannot be locked is copied all the same, but then the
    CPU waits for it.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._stream = device, torch.cuda.Stream(device)
        self._pinned: dict[int, Tensor] = {}
        self._refused = False

    def pin(self, tensor: Tensor) -> None:
        """See `Copies`."""
        if self._refused or tensor.data_ptr() in self._pinned or tensor.is_pinned():
            return
        if error := int(torch.cuda.cudart().cudaHostRegister(tensor.data_ptr(), tensor.nbytes, 0)):
            # Without memory for it nothing more is asked for; others may fail for one tensor, as in a mapped file.
            self._refused = error == _OUT_OF_MEMORY
            log.warning("%d MiB of weights could not be page-locked (CUDA error %d, after %d MiB): they are copied more slowly",
                        tensor.nbytes >> 20, error, sum(pinned.nbytes for pinned in self._pinned.values()) >> 20)
            with contextlib.suppress(RuntimeError):  # CUDA reports it once more at the next kernel, whatever that is
                torch.zeros(1, device=self._device).add_(1)
        else:
            self._pinned[tensor.data_ptr()] = tensor

    def begin(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> torch.cuda.Event:
        """See `Copies`."""
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            for target, source in pairs:
                target.copy_(source, non_blocking=True)
            return self._stream.record_event()

    def wait(self, copied: torch.cuda.Event) -> None:
        """See `Copies`."""
        torch.cuda.current_stream(self._device).wait_event(copied)

    def finish(self) -> None:
        """See `Copies`."""
        self._stream.synchronize()

    def unpin(self) -> None:
        """See `Copies`."""
        self._refused = False
        while self._pinned:
            address, _held = self._pinned.popitem()  # until it is unlocked: freed memory may be somebody else's
            torch.cuda.cudart().cudaHostUnregister(address)


@dataclasses.dataclass
class _Slot:
    """Memory on the device, and the block (a number) whose weights are in it or on their way; None for none."""

    memory: Tensor
    block: int | None = None
    weights: dict[str, Weight] = dataclasses.field(default_factory=dict)
    copied: Any = None


class BlockSwap:
    """The weights of `blocks`, names in the order of computation, on the CPU and, two blocks at a time, on `device`."""

    def __init__(self, blocks: Sequence[str], device: torch.device, *, copies: Copies | None = None) -> None:
        self.device = device
        self._numbers = {block: number for number, block in enumerate(blocks)}
        self._copies = copies or (CudaCopies(device) if device.type == "cuda" else PlainCopies())
        self._stored: list[dict[str, Weight]] = [{} for _ in blocks]
        self._slots: list[_Slot] = []  # the one that is computed with comes first

    def placed(self, name: str, weight: Weight) -> Weight:
        """The UNet's weight of this local name as it is computed with: a kernel of the blocks as a `Swapped`, anything else
        on the device."""
        block = block_of(name, len(weight.shape), self._numbers)
        if block is None:
            return weight.to(self.device)
        number, weight = self._numbers[block], weight.to(CPU)
        for tensor in _tensors_of(weight):
            self._copies.pin(tensor)
        self._clear()  # slots of other weights, or too small
        self._stored[number][name] = weight
        return Swapped(weight, self, number, name)

    def fetch(self, block: int, name: str) -> Weight:
        """That weight of the block of this number on the device, until a weight of another block is fetched."""
        if not self._slots or self._slots[0].block != block:
            self._enter(block)
        return self._slots[0].weights[name]

    def release(self) -> None:
        """Hold nothing on the device and none of the weights, until they are placed anew."""
        self._clear()
        self._copies.unpin()
        for stored in self._stored:
            stored.clear()

    @property
    def device_bytes(self) -> int:
        """Bytes of the two slots."""
        return 2 * max(map(bytes_in_slot, self._stored), default=0)

    def _clear(self) -> None:
        if self._slots:
            self._copies.finish()
            self._slots.clear()

    def _enter(self, block: int) -> None:
        if not self._slots:
            with torch.inference_mode(False):  # where samples are made under it, gradients are wanted of the same slots later
                self._slots = [_Slot(torch.empty(self.device_bytes // 2, dtype=torch.uint8, device=self.device))
                               for _ in range(2)]
        before = self._slots[0].block
        if self._slots[1].block != block:
            self._load(self._slots[1], block)
        self._slots.reverse()
        self._copies.wait(self._slots[0].copied)
        direction = 1 if before is None or block > before else -1
        following = block + direction if 0 <= block + direction < len(self._stored) else block - direction
        if 0 <= following < len(self._stored) and following != self._slots[1].block:
            self._load(self._slots[1], following)

    def _load(self, slot: _Slot, block: int) -> None:
        slot.block = None  # until the copy has begun
        with torch.inference_mode(False), torch.no_grad():
            slot.weights = dict(_laid_out(slot.memory, self._stored[block]))
            slot.copied = self._copies.begin([
                pair for name, weight in slot.weights.items()
                for pair in zip(_tensors_of(weight), _tensors_of(self._stored[block][name]), strict=True)])
        slot.block = block


@dataclasses.dataclass(frozen=True, eq=False)
class Swapped:
    """A kernel that waits in the CPU's memory until its block is computed; see `model.ops.weights.Held`."""

    stored: Weight
    swap: BlockSwap
    block: int
    name: str

    @property
    def shape(self) -> torch.Size:
        """The kernel's."""
        return self.stored.shape

    @property
    def device(self) -> torch.device:
        """The CPU."""
        return self.stored.device

    @property
    def nbytes(self) -> int:
        """On the CPU."""
        return self.stored.nbytes

    @property
    def values(self) -> Tensor:
        """What has the kernel's memory layout."""
        return _tensors_of(self.stored)[0]

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The kernel in `dtype` on the device."""
        weight = self.swap.fetch(self.block, self.name)
        return weight.to(dtype) if isinstance(weight, Tensor) else weight.dense(dtype)

    def to(self, device: torch.device | str) -> Weight:
        """The weight itself on a device, where it does not wait."""
        return self.stored.to(device)


def bytes_in_slot(weights: dict[str, Weight]) -> int:
    """Bytes that a block's weights take side by side."""
    return sum(_aligned(tensor.nbytes) for weight in weights.values() for tensor in _tensors_of(weight))


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _tensors_of(weight: Weight) -> tuple[Tensor, ...]:
    return (weight.values, weight.scale) if isinstance(weight, Quantised) else (weight,)


def _laid_out(memory: Tensor, weights: dict[str, Weight]) -> Iterator[tuple[str, Weight]]:
    """Each weight's place in the memory, side by side, with its shape, dtype and memory layout."""
    begin = 0
    for name, weight in weights.items():
        places = []
        for tensor in _tensors_of(weight):
            # What has gaps is copied without them.
            stride = torch.empty_like(tensor, device="meta").stride()
            places.append(memory[begin:begin + tensor.nbytes].view(tensor.dtype).as_strided(tensor.shape, stride))
            begin += _aligned(tensor.nbytes)
        yield name, Quantised(*places) if isinstance(weight, Quantised) else places[0]
