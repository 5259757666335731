"""Activations kept in the CPU's memory between forward and backward.

What autograd saves goes out as it is saved, and comes back shortly before backward wants it. On CUDA both ways are copies on
a stream of their own, through pinned memory, beside the computation:

- Out: the copy waits for what made the tensor. The tensor is held until `WINDOW` bytes younger than it are on their way, and
  the computation is then told to wait for its copy: from that point of the computation on its memory is free for others,
  without anybody asking the device.
- Back: when backward takes a tensor, those that were saved just before it, `WINDOW` bytes of them, are sent for too. The
  computation waits for a copy only where it takes the tensor.

Elsewhere they are plain copies. Small tensors, weights and whatever is spared stay where they are. Where units are
recomputed in backward (`torch.utils.checkpoint`, not reentrant) it is their inputs that go out. Not for CUDA graphs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import weakref
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

SMALLEST = 1 << 20
"""A tensor of fewer bytes is not worth the copy."""
WINDOW = 64 << 20
"""Bytes that may be on their way, in either direction, before the computation has to wait for them."""


@dataclasses.dataclass(eq=False)
class _Parcel:
    """A saved tensor: its end on the CPU (`away`), its end on the device while it has one (`here`), and who waits for it."""

    like: tuple[torch.Size, tuple[int, ...], torch.dtype]
    size: int
    place: int
    away: Tensor | None = None
    here: Tensor | None = None
    event: Any = None
    takers: int = 1


class _Copies:
    """Plain copies, done when the call returns. Where the device is the CPU they are copies all the same."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def out(self, parcel: _Parcel) -> None:
        """Begin to copy `here` to a new `away`."""
        size, stride, dtype = parcel.like
        parcel.away = torch.empty_strided(size, stride, dtype=dtype).copy_(parcel.here)

    def back(self, parcel: _Parcel) -> None:
        """Begin to copy `away` to a new `here`."""
        size, stride, dtype = parcel.like
        parcel.here = torch.empty_strided(size, stride, dtype=dtype, device=self.device).copy_(parcel.away)

    def wait(self, parcel: _Parcel) -> None:
        """Let the computation wait for the copy that was begun last."""

    def wait_for_all(self) -> None:
        """Let the computation wait for every copy that was begun."""


class _Imagined(_Copies):
    """For tensors without memory, on the meta device: what is away takes none, what is back is there anew."""

    def out(self, parcel: _Parcel) -> None:
        """Nothing to keep."""

    def back(self, parcel: _Parcel) -> None:
        """New memory, so that whoever counts sees it."""
        size, stride, dtype = parcel.like
        parcel.here = torch.empty_strided(size, stride, dtype=dtype, device=self.device)


class _Streams(_Copies):
    """Copies beside the computation, whose stream is the current one; memory on the device is always allocated there."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._side = torch.cuda.Stream(device)
        self._pin = True

    def out(self, parcel: _Parcel) -> None:
        """Once what computes it has been queued."""
        size, stride, dtype = parcel.like
        parcel.away = self._pinned(size, stride, dtype)
        self._copy(parcel.away, parcel.here, parcel)

    def back(self, parcel: _Parcel) -> None:
        """Once what used the new memory before has been queued."""
        size, stride, dtype = parcel.like
        parcel.here = torch.empty_strided(size, stride, dtype=dtype, device=self.device)
        self._copy(parcel.here, parcel.away, parcel)

    def wait(self, parcel: _Parcel) -> None:
        """On the device only: the program goes on."""
        torch.cuda.current_stream(self.device).wait_event(parcel.event)

    def wait_for_all(self) -> None:
        """On the device only."""
        torch.cuda.current_stream(self.device).wait_stream(self._side)

    def _copy(self, target: Tensor, source: Tensor, parcel: _Parcel) -> None:
        self._side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._side):
            target.copy_(source, non_blocking=True)
            parcel.event = self._side.record_event()

    def _pinned(self, size: torch.Size, stride: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        if self._pin:
            try:
                return torch.empty_strided(size, stride, dtype=dtype, pin_memory=True)
            except RuntimeError:  # the system pins no more: ordinary memory is slower and right
                self._pin = False
        return torch.empty_strided(size, stride, dtype=dtype)


class Traffic:
    """What is saved for backward, and where it is. `bytes_out` have been sent out so far."""

    def __init__(self, copies: _Copies, *, spared: Iterable[Tensor], smallest: int, window: int) -> None:
        self.bytes_out = 0
        self._copies, self._smallest, self._window = copies, smallest, window
        self._spared = {tensor.untyped_storage()._cdata for tensor in spared}
        self._saved: list[weakref.ref[_Parcel]] = []
        self._leaving: deque[_Parcel] = deque()
        self._known: dict[tuple[Any, ...], _Parcel] = {}  # of those that are leaving

    def save(self, tensor: Tensor) -> Tensor | _Parcel:
        """What autograd keeps in the place of `tensor`."""
        size = tensor.numel() * tensor.element_size()
        storage = tensor.untyped_storage()
        if (size < self._smallest or size > storage.nbytes() or tensor.device.type != self._copies.device.type
                or storage._cdata in self._spared or (tensor.is_leaf and tensor.requires_grad)):
            return tensor
        key = (storage._cdata, tensor.storage_offset(), tensor.size(), tensor.stride(), tensor._version)
        if key in self._known:  # saved twice in a row: by a norm and by a product, for example
            self._known[key].takers += 1
            return self._known[key]
        stride = tensor.stride() if _is_dense(tensor) else _contiguous_stride(tensor.size())
        parcel = _Parcel((tensor.size(), stride, tensor.dtype), size, len(self._saved), here=tensor.detach())
        self._copies.out(parcel)
        self.bytes_out += size
        self._saved.append(weakref.ref(parcel))
        self._leaving.append(parcel)
        self._known[key] = parcel
        while sum(other.size for other in self._leaving) > self._window:
            self._see_off()
        return parcel

    def take(self, kept: Tensor | _Parcel) -> Tensor:
        """The tensor in whose place this was kept."""
        if isinstance(kept, Tensor):
            return kept
        if self._leaving:  # forward is over: what is still here will be wanted first, and stays
            self._leaving.clear()
            self._known.clear()
        self._send_for(kept)
        self._copies.wait(kept)
        tensor = kept.here
        kept.takers -= 1
        if kept.takers <= 0:
            kept.here = None
        self._send_ahead(kept.place)
        return tensor

    def settle(self) -> None:
        """Everything that was sent out is out, or will not be missed."""
        while self._leaving:
            self._see_off()

    def _send_ahead(self, place: int) -> None:
        """Those that were saved just before, and so are taken next."""
        ahead = 0
        for index in range(place - 1, -1, -1):
            parcel = self._saved[index]()
            if parcel is not None and parcel.takers > 0:
                ahead += parcel.size
                if ahead > self._window:
                    return
                self._send_for(parcel)

    def _see_off(self) -> None:
        parcel = self._leaving.popleft()
        self._copies.wait(parcel)
        parcel.here = None
        self._known = {key: other for key, other in self._known.items() if other is not parcel}

    def _send_for(self, parcel: _Parcel) -> None:
        if parcel.here is None:
            self._copies.back(parcel)


@contextlib.contextmanager
def offloaded(device: torch.device, *, spared: Iterable[Tensor] = (), smallest: int = SMALLEST,
              window: int = WINDOW) -> Iterator[Traffic]:
    """Inside, what autograd saves on `device` is kept in the CPU's memory; forward and backward both belong inside.

    `spared` stays where it is: weights, of which autograd keeps some. Nothing waits for the device but the device itself.
    """
    copies = _Streams(device) if device.type == "cuda" else _Imagined(device) if device.type == "meta" else _Copies(device)
    traffic = Traffic(copies, spared=spared, smallest=smallest, window=window)
    try:
        with torch.autograd.graph.saved_tensors_hooks(traffic.save, traffic.take):
            yield traffic
    finally:
        # Also after an error: what is freed then may still be a copy's source or target.
        traffic.settle()
        copies.wait_for_all()


def _is_dense(tensor: Tensor) -> bool:
    """Whether it fills its memory without gaps, in whatever order."""
    expected = 1
    for stride, size in sorted((stride, size) for stride, size in zip(tensor.stride(), tensor.size(), strict=True) if size > 1):
        if stride != expected:
            return False
        expected *= size
    return True


def _contiguous_stride(size: torch.Size) -> tuple[int, ...]:
    strides, step = [], 1
    for length in reversed(size):
        strides.append(step)
        step *= max(1, length)
    return tuple(reversed(strides))
