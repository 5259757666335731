"""A GPU on a machine that has none: all of it is computed on the CPU, but each tensor is on one of two devices, moves as it
would between them, and an operation on tensors of both is refused as on a real one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")
GIGABYTE = 1 << 30
_JOINED = (torch.cat, torch.stack)  # these want even single numbers to be on one device
_ANYWHERE = ("copy_", "_has_compatible_shallow_copy_type", "__getitem__", "__setitem__", "index", "set_", "_make_subclass",
             "__set__", "__repr__", "__format__")


class PretendedGpu(TorchFunctionMode):
    """Where each tensor is, by its memory. Of memory that torch made by itself, such as gradients, it is not known."""

    def __init__(self) -> None:
        super().__init__()
        self._places: dict[StorageWeakRef, torch.device] = {}

    def place(self, tensor: Tensor, device: torch.device) -> Tensor:
        """From now on this tensor, and all in its memory, is there."""
        if len(self._places) > 20_000:
            self._places = {key: place for key, place in self._places.items() if not key.expired()}
        self._places[StorageWeakRef(tensor.untyped_storage())] = device
        return tensor

    def place_of(self, tensor: Tensor) -> torch.device | None:
        """Where it is; None where that is not known."""
        return torch.device("meta") if tensor.is_meta else self._places.get(StorageWeakRef(tensor.untyped_storage()))

    def __torch_function__(self, func: Any, types: Any, args: Sequence[Any] = (),
                           kwargs: Mapping[str, Any] | None = None) -> Any:
        kwargs, name = dict(kwargs or {}), getattr(func, "__name__", "")
        if func == Tensor.device.__get__:
            return self._device(args[0])
        if func in (Tensor.is_cuda.__get__, Tensor.is_cpu.__get__):
            return self._device(args[0]).type == ("cuda" if func == Tensor.is_cuda.__get__ else "cpu")
        if func in (Tensor.to, Tensor.cpu, Tensor.cuda):
            return self._moved(func, args, kwargs)
        if func == Tensor.pin_memory:
            assert self._device(args[0]).type == "cpu", "only the CPU's memory can be pinned"
            return args[0]
        if func == Tensor.backward:
            with self:  # torch leaves it off within an operation, and this one is all of backward
                return torch.autograd.Variable._execution_engine.run_backward(
                    (args[0],), (torch.ones_like(args[0]),), False, False, (), allow_unreachable=True, accumulate_grad=True)
        if func == Tensor.is_pinned:
            return False
        if name in ("numpy", "__array__") and self._device(args[0]).type == "cuda":
            raise TypeError("can't convert cuda:0 device type tensor to numpy")
        kwargs.pop("pin_memory", None)
        if kwargs.get("device") is not None:
            return self._created(func, args, kwargs)
        given = list(_tensors((args, kwargs)))
        places = {self.place_of(t) for t in given if t.ndim or func in _JOINED or self.place_of(t) != CPU} - {None}
        if len(places) > 1 and name not in _ANYWHERE:
            raise RuntimeError("Expected all tensors to be on the same device, but found at least two devices, "
                               f"{' and '.join(sorted(map(str, places)))}, in {name}")
        result = func(*args, **kwargs)
        own = GPU if GPU in places else CPU if places or not given or None not in map(self.place_of, given) else None
        for tensor in _tensors(result) if own else ():
            if self.place_of(tensor) is None:
                self.place(tensor, own)
        return result

    def _device(self, tensor: Tensor) -> torch.device:
        return self.place_of(tensor) or CPU

    def _moved(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Tensor:
        tensor, target = args[0], {Tensor.cpu: CPU, Tensor.cuda: GPU}.get(func) or kwargs.pop("device", None)
        rest = [value for value in args[1:] if isinstance(value, torch.dtype)]
        for value in args[1:]:
            if isinstance(value, Tensor):
                target, rest = self._device(value), [value.dtype]
            elif isinstance(value, (torch.device, str)):
                target = value
        device = self._device(tensor) if target is None else torch.device(target)
        if "meta" in (device.type, self._device(tensor).type):
            return Tensor.to(tensor, device, *rest, **kwargs)
        result = Tensor.to(tensor, *rest, **kwargs) if rest or kwargs.keys() - {"non_blocking"} else tensor
        if device.type != self._device(tensor).type and result.untyped_storage().data_ptr() == tensor.untyped_storage(
                ).data_ptr():
            result = result.clone()
        if target is None and self.place_of(tensor) is None:
            return result
        return result if result is tensor else self.place(result, GPU if device.type == "cuda" else CPU)

    def _created(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        device = torch.device(kwargs["device"])
        if device.type != "meta":
            kwargs["device"] = CPU
        if device.type == "cuda" and kwargs.get("generator") is not None:
            raise RuntimeError("Expected a 'cuda' device type for generator but found 'cpu'")
        result = func(*args, **kwargs)
        for tensor in _tensors(result) if device.type != "meta" else ():
            if not any(tensor is given for given in _tensors(args)):
                self.place(tensor, GPU if device.type == "cuda" else CPU)
        return result


def _tensors(values: Any) -> Iterator[Tensor]:
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, (list, tuple)):
        for value in values:
            yield from _tensors(value)
    elif isinstance(values, dict):
        yield from _tensors(list(values.values()))


class _Stream:
    """Whatever is asked of a stream or an event: everything happens at once here."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.device = GPU

    def __getattr__(self, name: str) -> Any:
        return {"query": lambda: True, "record_event": lambda *_: _Stream()}.get(name, lambda *_: None)


class _Cudart:
    @staticmethod
    def cudaHostRegister(address: int, size: int, flags: int) -> int:
        return 0

    @staticmethod
    def cudaHostUnregister(address: int) -> int:
        return 0


@contextlib.contextmanager
def pretended_gpu(monkeypatch: pytest.MonkeyPatch, *, free: int = 100 * GIGABYTE,
                  capability: tuple[int, int] = (8, 6)) -> Iterator[PretendedGpu]:
    """A GPU with so many bytes free, inside the block and in its thread."""
    given: Mapping[str, Any] = {
        "is_available": lambda: True, "current_device": lambda: 0, "empty_cache": lambda: None,
        "mem_get_info": lambda *_: (free, free), "memory_allocated": lambda *_: 0, "memory_reserved": lambda *_: 0,
        "max_memory_allocated": lambda *_: GIGABYTE, "reset_peak_memory_stats": lambda *_: None,
        "get_device_capability": lambda *_: capability, "device": lambda *_: contextlib.nullcontext(),
        "stream": lambda *_: contextlib.nullcontext(), "current_stream": lambda *_: _Stream(), "Stream": _Stream,
        "Event": _Stream, "cudart": lambda: _Cudart, "is_current_stream_capturing": lambda: False}
    for name, value in given.items():
        monkeypatch.setattr(torch.cuda, name, value)
    # What torch saves within an operation is not known to be on the GPU, and compared with what is computed again.
    monkeypatch.setitem(torch.utils.checkpoint._allowed_determinism_checks_to_fns, "default", lambda tensor: tensor.shape)
    with PretendedGpu() as gpu:
        yield gpu
