"""Frozen layers over borrowed tensors.

A `Layers` computes `F.linear`, `F.conv2d` and the norms on somebody else's tensors, addressed by name.
The three promises to the lender:

- No copy, unless one was asked for (`replace`, `lay_out_channels_last`), and then `copied_bytes` tells. A weight is used
  where it lies. Where its dtype differs from the activation's it is cast for one call, and the cast is dropped at once:
  autograd keeps the borrowed tensor and casts it again in backward.
- No gradient. The tensors are detached views, so `requires_grad` of the lender's parameters neither matters
  nor changes.
- No surprise. No method of the lender's modules runs, so none of the host's patches do.

Gradients flow to the activations only. Do not call this under autocast: the caller chooses the dtype of the
computation by the dtype of the activations.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from lib_lora_train.model.products import LowRank, frozen_linear, shared_linears
from lib_lora_train.model.refusals import incomplete
from lib_lora_train.model.weights import Weight, borrowed, dense


class Adapter(Protocol):
    """A trained layer in the place of a frozen one: it computes the WHOLE layer, so that it can be fused.

    `weight` and `bias` are the borrowed tensors in the lender's dtype, which may differ from `x.dtype`:
    use `frozen_linear` and `frozen_conv2d`, which deal with that. The result has `x.dtype`.
    """

    def linear(self, x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
        """x [..., in], weight [out, in], bias [out] -> [..., out]."""
        ...

    def conv2d(self, x: Tensor, weight: Weight, bias: Tensor | None, *, stride: int, padding: int) -> Tensor:
        """x [B, in, h, w], weight [out, in, k, k], bias [out] -> [B, out, h', w']."""
        ...


@runtime_checkable
class LowRankAdapter(Protocol):
    """An adapter whose layer is the frozen one plus a low-rank product, so that layers of one input can share it."""

    def low_rank(self) -> LowRank | None:
        """What is added to the frozen layer; None for nothing."""
        ...


Adapters = Mapping[str, Adapter]
Norm = Callable[[Tensor, Tensor, Tensor], Tensor]
NO_ADAPTERS: Adapters = MappingProxyType({})


class _FrozenConv2d(torch.autograd.Function):
    """`F.conv2d` with a frozen weight of any dtype; keeps neither the input nor a cast of the weight.

    torch's own convolution saves its input even where the weight wants no gradient. The gradient with respect to
    the input needs that input's shape only, which an expanded scalar stands in for.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Weight, bias: Tensor | None, stride: int, padding: int) -> Tensor:
        ctx.weight, ctx.shape, ctx.stride, ctx.padding = weight, x.shape, stride, padding
        return F.conv2d(x, dense(weight, x.dtype), _cast(bias, x.dtype), stride=stride, padding=padding)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        shape_only = grad.new_empty(1).expand(ctx.shape)
        grad_x, _, _ = torch.ops.aten.convolution_backward(
            grad, shape_only, dense(ctx.weight, grad.dtype), None, (ctx.stride,) * 2, (ctx.padding,) * 2, (1, 1),
            False, (0, 0), 1, (True, False, False))
        return grad_x, None, None, None, None


class _CastNorm(torch.autograd.Function):
    """A norm in fp32 of an x, or with a frozen weight and bias, of another dtype; saves all three as they are.

    Backward computes the norm once more, which is cheaper than keeping an fp32 copy of every activation.
    """

    @staticmethod
    def forward(ctx: Any, norm: Norm, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, bias)
        ctx.norm = norm
        return norm(x.float(), weight.float(), bias.float()).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, None, None]:
        x, weight, bias = ctx.saved_tensors
        with torch.enable_grad():
            again = x.detach().float().requires_grad_()
            normed = ctx.norm(again, weight.float(), bias.float())
        (grad_x,) = torch.autograd.grad(normed, again, grad.float())
        return None, grad_x.to(x.dtype), None, None


def frozen_conv2d(x: Tensor, weight: Weight, bias: Tensor | None, *, stride: int, padding: int) -> Tensor:
    """x [B, in, h, w] convolved with weight [out, in, k, k], in `x.dtype`; a gradient for x only."""
    return _FrozenConv2d.apply(x, weight, bias, stride, padding)


def _cast(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if tensor is None else tensor.to(dtype)


class Layers:
    """Borrowed tensors by local name ("input_blocks.1.0.in_layers.2.weight"), and the layers made of them."""

    def __init__(self, tensors: Mapping[str, Tensor], *, adapters: Adapters = NO_ADAPTERS) -> None:
        self._weights: dict[str, Weight] = {name: borrowed(tensor) for name, tensor in tensors.items()}
        self._own: set[str] = set()
        self.tensors: Mapping[str, Weight] = MappingProxyType(self._weights)
        self._adapters = adapters

    def let_go(self) -> None:
        """Hold none of the lender's memory, until `take`; not to be computed with meanwhile."""
        for name in self._weights.keys() - self._own:
            del self._weights[name]

    def take(self, tensors: Mapping[str, Tensor]) -> None:
        """Compute on these tensors from now on: the same weights, where they lie now. What was replaced stays so."""
        self._weights.update({name: borrowed(tensor) for name, tensor in tensors.items() if name not in self._own})

    def replace(self, weights: Mapping[str, Weight]) -> None:
        """Compute with these in the place of the lender's tensors of the same names, which are held no longer.

        Ours from now on, whatever is lent later. For copies of the same weights in another form (quantised, another
        memory layout) only.
        """
        assert weights.keys() <= self._weights.keys(), "only weights that are there can be replaced"
        self._weights.update(weights)
        self._own.update(weights)

    def lay_out_channels_last(self) -> None:
        """Put copies in NHWC order in the place of convolutions' kernels above 1x1 that lie otherwise."""
        kernels = {name: weight for name, weight in self._weights.items()
                   if isinstance(weight, Tensor) and weight.ndim == 4 and weight.shape[2:] != (1, 1)}
        self.replace({name: kernel.contiguous(memory_format=torch.channels_last) for name, kernel in kernels.items()
                      if not kernel.is_contiguous(memory_format=torch.channels_last)})

    @property
    def copied_bytes(self) -> int:
        """Bytes of weights that are not the lender's: 0 unless something was replaced."""
        return sum(self._weights[name].nbytes for name in self._own)

    def adapted(self, adapters: Adapters) -> Layers:
        """The same tensors, with `adapters` (by module name) computing their layers."""
        other = Layers.__new__(Layers)
        other.tensors, other._weights, other._own, other._adapters = self.tensors, self._weights, self._own, adapters
        return other

    def has(self, name: str) -> bool:
        """Whether the module `name` has a weight."""
        return f"{name}.weight" in self.tensors

    def weight(self, name: str) -> Weight:
        """The weight of the module `name`; ModelError where the checkpoint lacks it."""
        return self._tensor(f"{name}.weight")

    def bias(self, name: str) -> Tensor:
        """The borrowed bias of the module `name`; ModelError where the checkpoint lacks it."""
        return self._tensor(f"{name}.bias")

    def linear(self, name: str, x: Tensor, *, bias: bool = True) -> Tensor:
        """x [..., in] -> [..., out]; `bias` says whether the architecture has one here."""
        adapter = self._adapters.get(name)
        compute = frozen_linear if adapter is None else adapter.linear
        return compute(x, self.weight(name), self.bias(name) if bias else None)

    def linears(self, names: Sequence[str], x: Tensor, *, bias: bool = True) -> tuple[Tensor, ...]:
        """The outputs of several layers for one x, which is kept once and whose gradient is added up in one buffer."""
        adapters = [self._adapters.get(name) for name in names]
        if not all(adapter is None or isinstance(adapter, LowRankAdapter) for adapter in adapters):
            return tuple(self.linear(name, x, bias=bias) for name in names)
        frozen = [(self.weight(name), self.bias(name) if bias else None) for name in names]
        return shared_linears(x, frozen, [None if adapter is None else adapter.low_rank() for adapter in adapters])

    def conv2d(self, name: str, x: Tensor, *, stride: int = 1, padding: int = 0) -> Tensor:
        """x [B, in, h, w] -> [B, out, h', w']."""
        adapter = self._adapters.get(name)
        compute = frozen_conv2d if adapter is None else adapter.conv2d
        return compute(x, self.weight(name), self.bias(name), stride=stride, padding=padding)

    def group_norm(self, name: str, x: Tensor, *, eps: float) -> Tensor:
        """Thirty-two groups, computed in fp32 whatever x's dtype (ldm's GroupNorm32); x [B, C, ...]."""
        return self._norm(name, x, lambda x, weight, bias: F.group_norm(x, 32, weight, bias, eps))

    def layer_norm(self, name: str, x: Tensor) -> Tensor:
        """Over the last dimension, computed in fp32 whatever x's dtype; x [..., C]."""
        return self._norm(name, x, lambda x, weight, bias: F.layer_norm(x, weight.shape, weight, bias, 1e-5))

    def _norm(self, name: str, x: Tensor, norm: Norm) -> Tensor:
        weight, bias = self.weight(name), self.bias(name)
        if x.dtype == weight.dtype == bias.dtype == torch.float32:
            return norm(x, weight, bias)
        return _CastNorm.apply(norm, x, weight, bias)

    def embedding(self, name: str, ids: Tensor, *, dtype: torch.dtype) -> Tensor:
        """ids [...] (integers) -> [..., C] in `dtype`; only the rows that are looked up are cast."""
        return F.embedding(ids, self.weight(name)).to(dtype)

    def _tensor(self, name: str) -> Weight:
        try:
            return self.tensors[name]
        except KeyError:
            raise incomplete(name) from None


def attention(q: Tensor, k: Tensor, v: Tensor, *, heads: int, causal: bool = False) -> Tensor:
    """softmax(q kᵀ / √d) v for each head; q [B, n, heads·d], k and v [B, m, heads·d] -> [B, n, heads·d]."""
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2).flatten(-2)
