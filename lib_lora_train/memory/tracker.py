"""What memory a computation takes, followed on the meta device: every storage from its birth to its death.

Nothing is computed and no memory is taken. A `Ledger` sees each operation that torch dispatches, in forward and in
backward, books the storages that come out of it and notices when they are gone. What a kernel takes for itself without
showing it (attention's accumulators, a convolution's copies in another layout) is added where it is known.

Not here: what is run (`rehearsal`), and what allocator and driver take besides (`memory_plan`).
"""

from __future__ import annotations

import functools
import math
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

AttentionKernel = Literal["fused", "math"]

# Most of what dies, dies young: those are asked first whether they still live. All are asked where the sum would exceed the
# highest one by this share, which is how much too high a peak may be.
_YOUNG, _SLACK = 24, 0.001


class Ledger(TorchDispatchMode):
    """Live bytes by kind, and the highest sum of them, on a machine of the kind `device_type` ("cuda", "cpu").

    A storage has the kind it was `enter`ed with, else that of the `kind` in force at its birth. What is entered stays.

    peak         bytes by kind when the sum was highest; "working" is what a kernel takes beside its results
    operations   multiplications and additions in products and convolutions
    kernels      operations that do work: views do none
    """

    def __init__(self, device_type: str) -> None:
        super().__init__()
        self.kind = "activations"
        self.operations, self.kernels = 0.0, 0
        self.peak: dict[str, int] = {}
        self.births = 0
        self._cuda = device_type == "cuda"
        self._live: dict[int, tuple[str, int, int]] = {}  # address of the storage -> kind, bytes, its place among the births
        self._entered: dict[int, Tensor] = {}             # held, so that no address is given out again
        self._young: list[int] = []
        self._sums: dict[str, int] = {}
        self._total = self._highest = 0

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        for address in self._live:
            torch.UntypedStorage._free_weak_ref(address)
        self._live, self._young = {}, []

    def enter(self, kind: str, tensors: Iterable[Tensor]) -> None:
        """Count these from now on until the end."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage._cdata in self._live:
                self._bury(storage._cdata)
            if storage._cdata not in self._entered:
                self._entered[storage._cdata] = tensor
                self._add(kind, storage.nbytes())

    def live(self) -> dict[str, int]:
        """Bytes by kind that are there now."""
        self._sweep(list(self._live))
        return {kind: size for kind, size in self._sums.items() if size}

    def born_between(self, spans: Sequence[tuple[int, int]]) -> list[int]:
        """For each span of `births`, the bytes of those in it that are there now."""
        self._sweep(list(self._live))
        places = [place for _, _, place in self._live.values()]  # in order: a dict keeps it
        sums = [0, *accumulate(size for _, size, _ in self._live.values())]
        return [sums[bisect_left(places, end)] - sums[bisect_left(places, begin)] for begin, end in spans]

    def work(self, size: int) -> None:
        """Count `size` bytes that are taken for a moment, beside all that is there."""
        if self._total + size > self._highest:
            self._rise(size)

    def __torch_dispatch__(self, func: Any, types: Sequence[type], args: Sequence[Any] = (),
                           kwargs: Mapping[str, Any] | None = None) -> Any:
        if getattr(func, "is_view", False):
            return func(*args, **(kwargs or {}))
        self.kernels += 1
        result = _imagined(func, args, kwargs or {})
        for tensor in (result,) if isinstance(result, Tensor) else result if isinstance(result, (tuple, list)) else ():
            if isinstance(tensor, Tensor) and tensor.is_meta:
                self._birth(tensor.untyped_storage())
        if count := _OPERATIONS.get(func):
            self.operations += count(result, args)
            if self._cuda and func in _CONVOLUTIONS:
                self.work(_relayout(func, result, args))
        return result

    def _birth(self, storage: Any) -> None:
        address = storage._cdata
        if address in self._live or address in self._entered:
            return
        size = storage.nbytes()
        self._live[storage._weak_ref()] = (self.kind, size, self.births)
        self.births += 1
        self._young.append(address)
        self._add(self.kind, size)

    def _add(self, kind: str, size: int) -> None:
        self._sums[kind] = self._sums.get(kind, 0) + size
        self._total += size
        if self._total > self._highest:
            self._rise(0)

    def _rise(self, extra: int) -> None:
        """The sum, an upper bound so far, may be a new peak: see what has died meanwhile."""
        self._sweep(self._young)
        if self._total + extra > self._highest * (1 + _SLACK):
            self._sweep(list(self._live))
        if self._total + extra > self._highest:
            self._highest = self._total + extra
            self.peak = {**self._sums, "working": self._sums.get("working", 0) + extra}

    def _sweep(self, addresses: Sequence[int]) -> None:
        # Weak references to storages that call back exist from torch 2.2 on; this asks, which works everywhere.
        expired = torch.UntypedStorage._expired
        for address in addresses:
            if address in self._live and expired(address):
                self._bury(address)
                torch.UntypedStorage._free_weak_ref(address)
        self._young = [address for address in self._young[-_YOUNG:] if address in self._live]

    def _bury(self, address: int) -> None:
        kind, size, _ = self._live.pop(address)
        self._sums[kind] -= size
        self._total -= size


class Attention(TorchFunctionMode):
    """What `F.scaled_dot_product_attention` takes where it is `kernel`: "fused" (flash, memory-efficient), which keeps q, k,
    v, the result and a logarithm for each row, or "math", which keeps the whole map. On the meta device torch would always
    take the latter."""

    def __init__(self, ledger: Ledger, kernel: AttentionKernel) -> None:
        super().__init__()
        self._ledger, self._kernel = ledger, kernel

    def __torch_function__(self, func: Any, types: Sequence[type], args: Sequence[Any] = (),
                           kwargs: Mapping[str, Any] | None = None) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        if self._kernel == "fused":
            return _Fused.apply(self._ledger, *args[:3])
        return torch.ops.aten._scaled_dot_product_attention_math(*args[:3], is_causal=(kwargs or {}).get("is_causal", False))[0]


class _Fused(torch.autograd.Function):
    """q [B, h, n, d], k and v [B, h, m, d] -> [B, h, n, d]; nothing is computed.

    Results lie as flash attention lays them, [B, n, h, d]. Its backward sums up the gradient of q in fp32 over rows that are
    filled up to 128 and columns filled up to 32 (Dao 2023, arXiv 2307.08691), as the memory-efficient kernel does.
    """

    @staticmethod
    def forward(ctx: Any, ledger: Ledger, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        batch, heads, rows, _ = q.shape
        out = q.new_empty(batch, rows, heads, v.shape[-1]).transpose(1, 2)
        sums = q.new_empty(batch, heads, rows, dtype=torch.float32)
        ctx.ledger = ledger
        ledger.operations += _attention_operations(q, k, v)
        ctx.save_for_backward(q, k, v, out, sums)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, Tensor, Tensor]:
        q, k, v, _, _ = ctx.saved_tensors
        batch, heads, rows, width = q.shape
        filled = 128 * math.ceil(rows / 128)
        ctx.ledger.operations += 2.5 * _attention_operations(q, k, v)  # five products instead of two
        grads = tuple(torch.empty_like(t) for t in (q, k, v))
        ctx.ledger.work(4 * batch * heads * filled * (32 * math.ceil(width / 32) + 1))
        return None, *grads


@functools.cache
def _written(func: Any) -> int | str | None:
    """Where the tensor stands that `func` writes its one result into: 0 (its first argument), a name, or None."""
    names = [argument.name for argument in func._schema.arguments if argument.kwarg_only and argument.alias_info is not None]
    if names:
        return names[0] if len(names) == 1 else None
    first = func._schema.arguments[0] if func._schema.arguments else None
    in_place = first is not None and first.alias_info is not None and first.alias_info.is_write
    return 0 if in_place and func._schema.name.endswith("_") and func not in _MOVING else None


def _imagined(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """What `func` returns. Torch's stand-ins for the meta device are slow, and some fail: each is asked once for tensors of
    the same shapes, and none for what is written into a tensor that is there."""
    written = _written(func)
    if written is not None:
        target = args[0] if written == 0 else kwargs.get(written)
        if isinstance(target, Tensor) and target.is_meta:
            return target
    key = (func, _shapes(args), _shapes(tuple(kwargs.items())))
    made = _MADE.get(key)
    if made is None:
        result = func(*args, **kwargs)
        if len(_MADE) >= _MOST_MADE:
            _MADE.clear()
        _MADE[key] = _recipe(result, (*args, *kwargs.values()))
        return result
    if made is _ANEW:
        return func(*args, **kwargs)
    tensors = tuple(None if like is None else torch.empty_strided(like[0], like[1], dtype=like[2], device="meta")
                    for like in made)
    return tensors if isinstance(made, tuple) else tensors[0]


def _recipe(result: Any, arguments: Sequence[Any]) -> Any:
    """Size, stride and dtype of a result (a list), or of each of several (a tuple); `_ANEW` where it is made of an argument."""
    tensors = (result,) if isinstance(result, Tensor) else result
    given = {t.untyped_storage()._cdata for t in _flat(arguments)}
    if not isinstance(tensors, tuple) or not all(t is None or isinstance(t, Tensor) and t.is_meta for t in tensors) or any(
            t is not None and t.untyped_storage()._cdata in given for t in tensors):
        return _ANEW
    likes = (None if t is None else (t.size(), t.stride(), t.dtype) for t in tensors)
    return list(likes) if isinstance(result, Tensor) else tuple(likes)


def _flat(values: Any) -> Iterator[Tensor]:
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, (tuple, list)):
        for value in values:
            yield from _flat(value)


def _shapes(value: Any) -> Any:
    """Arguments as a key: tensors by what the shape of a result may depend on, numbers with their type."""
    if isinstance(value, Tensor):
        return value.size(), value.stride(), value.dtype, value.device
    if isinstance(value, (tuple, list)):
        return tuple(map(_shapes, value))
    return type(value), value


def _attention_operations(q: Tensor, k: Tensor, v: Tensor) -> float:
    return 2.0 * q.numel() * k.shape[-2] + 2.0 * q.shape[:-1].numel() * v.shape[-2] * v.shape[-1]


def _product(result: Any, args: Sequence[Any]) -> float:
    """Of mm, addmm, bmm, baddbmm: the last two arguments are the factors."""
    return 2.0 * result.numel() * args[-1].shape[-2]


def _convolution(result: Any, args: Sequence[Any]) -> float:
    return 2.0 * result.numel() * args[1].shape[1:].numel()


def _convolution_backward(result: Any, args: Sequence[Any]) -> float:
    """grad, input, weight, …, which of the three gradients are wanted."""
    return 2.0 * args[0].numel() * args[2].shape[1:].numel() * sum(bool(wanted) for wanted in args[-1][:2])


def _relayout(func: Any, result: Any, args: Sequence[Any]) -> int:
    """Bytes that cuDNN (or ATen before it) takes to compute in NHWC on what lies as NCHW: both sides and the kernel."""
    if func is torch.ops.aten.convolution.default:
        sides, weight = (args[0], result), args[1]
    else:
        sides, weight = (args[0], result[0] if result[0] is not None else args[1]), args[2]
    return sum(t.numel() * t.element_size() for t in (*sides, weight)
               if not t.is_contiguous(memory_format=torch.channels_last) and t.shape[2:].numel() > 1)


_ANEW = object()
_MADE: dict[Any, Any] = {}
_MOST_MADE = 50_000
_aten = torch.ops.aten
_MOVING = {_aten.set_.source_Storage_storage_offset, _aten.set_.source_Tensor, _aten.set_.source_Storage, _aten.resize_.default}
_CONVOLUTIONS = {_aten.convolution.default, _aten.convolution_backward.default}
_OPERATIONS: dict[Any, Callable[[Any, Sequence[Any]], float]] = {
    _aten.mm.default: _product, _aten.bmm.default: _product, _aten.addmm.default: _product, _aten.baddbmm.default: _product,
    _aten.addmm_.default: _product, _aten.baddbmm_.default: _product, _aten.addmm.out: _product, _aten.mm.out: _product,
    _aten.convolution.default: _convolution, _aten.convolution_backward.default: _convolution_backward}
