"""Frozen linear layers fused with the LoRA deltas that are added to them.

One autograd function computes all layers that read the same x (q, k and v of an attention):
y_i = x W_iᵀ + b_i + s_i x A_iᵀ B_iᵀ (LoRA, Hu et al. 2021, arXiv 2106.09685, eq. 3). In plain operations each layer makes
three products and two more passes over its output. Here

- x A_iᵀ of all layers is one product with the stacked A_i, and B_i's product is accumulated into the frozen one by BLAS;
- backward accumulates all contributions to x's gradient into one buffer likewise;
- autograd keeps x only where an A is trained, x A_iᵀ (as wide as the ranks) only where a B is, and never a cast of a
  weight: backward casts it once more;
- where x is made by a recipe (a norm, a gate), the recipe's source is kept in its place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from lib_lora_train.model.ops.recipes import Recipe
from lib_lora_train.model.ops.weights import Weight, dense


@dataclass(frozen=True, eq=False)
class LoRADelta:
    """A trained product: `scale` · up · down, with down [r, in] and up [out, r], whose gradients have their dtype.

    For a convolution above 1x1, `down` is [r, in, k, k].
    `working` are the same numbers in another dtype, used by activations of that dtype in place of a cast. Where such a copy has
    a `grad`, the gradient is added there, in one kernel, and autograd has none of the weight: whoever made the copy adds it to
    the weight's.
    """

    down: Tensor
    up: Tensor
    scale: float
    working: tuple[Tensor, Tensor] | None = None

    def factors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """(down, up) in `dtype`, differentiable."""
        if self.working is None or self.working[0].dtype != dtype:
            return self.down.to(dtype), self.up.to(dtype)
        if not torch.is_grad_enabled():
            return self.working
        return _Copy.apply(self.down, self.working[0]), _Copy.apply(self.up, self.working[1])


class _Copy(torch.autograd.Function):
    """A copy of a weight in another dtype, of which the copy has the gradient if it has any, else the weight, as of a cast."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, copy: Tensor) -> Tensor:
        ctx.dtype, ctx.grad = weight.dtype, copy.grad
        return copy.view_as(copy)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None]:
        if ctx.grad is None:
            return grad.to(ctx.dtype), None
        ctx.grad.add_(grad)
        return None, None


Frozen = tuple[Weight, "Tensor | None"]


def frozen_linear(x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
    """x [..., in] @ weight [out, in].T + bias, in `x.dtype`; a gradient for x only."""
    if isinstance(weight, Tensor) and weight.dtype == x.dtype and (bias is None or bias.dtype == x.dtype):
        return F.linear(x, weight.flatten(1), bias)  # keeps nothing but the borrowed weight
    return shared_linears(x, [(weight, bias)], [None])[0]


def shared_linears(source: Tensor, frozen: Sequence[Frozen], trained: Sequence[LoRADelta | None], *,
                   recipe: Recipe | None = None) -> tuple[Tensor, ...]:
    """The outputs [..., out_i] of several layers for one x [..., in], in x's dtype.

    source: x, or what `recipe` makes it of.
    frozen: (weight [out_i, in] or [out_i, in, 1, 1], bias [out_i]) of each layer, in any dtype.
    trained: what is added to each, or None.
    """
    factors = [factor for delta in trained if delta is not None for factor in (delta.down, delta.up)]
    return _SharedInput.apply(source, recipe, tuple(frozen), tuple(trained), *factors)


_FACTORS = 4  # the first of `_SharedInput`'s arguments that is a trained factor


class _SharedInput(torch.autograd.Function):
    """Several frozen products of one input, with low-rank ones accumulated into them.

    Weights are kept as attributes, not among the saved tensors: hooks on those (checkpointing, offloading) are for
    activations.
    """

    @staticmethod
    def forward(ctx: Any, source: Tensor, recipe: Recipe | None, frozen: tuple[Frozen, ...],
                trained: tuple[LoRADelta | None, ...], *factors: Tensor) -> tuple[Tensor, ...]:
        x = source if recipe is None else recipe.finish(source, recipe.known(source))
        rows, pairs = _rows(x), [None if delta is None else delta.factors(x.dtype) for delta in trained]
        projected = rows @ _stacked(pairs).t() if factors else None
        results, start = [], 0
        for (weight, bias), delta, pair in zip(frozen, trained, pairs, strict=True):
            y = F.linear(rows, _matrix(weight, x.dtype), None if bias is None else bias.to(x.dtype))
            if pair is not None:
                end = start + pair[0].shape[0]
                y.addmm_(projected[:, start:end], pair[1].t(), alpha=delta.scale)
                start = end
            results.append(y.view(*x.shape[:-1], y.shape[-1]))
        wanted = ctx.needs_input_grad[_FACTORS:]  # a down and an up of each trained layer
        needs_source = any(wanted[::2]) or (recipe is not None and ctx.needs_input_grad[0])
        ctx.save_for_backward(source if needs_source else None, projected if any(wanted[1::2]) else None)
        ctx.recipe, ctx.frozen, ctx.trained, ctx.shape, ctx.dtype = recipe, frozen, trained, x.shape, x.dtype
        return tuple(results)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        source, projected = ctx.saved_tensors
        known = None if source is None or ctx.recipe is None else ctx.recipe.known(source)
        x = None
        if any(ctx.needs_input_grad[_FACTORS::2]):
            x = source if ctx.recipe is None else ctx.recipe.finish(source, known)
        grads = tuple(map(_rows, grads))
        pairs = [None if delta is None else delta.factors(ctx.dtype) for delta in ctx.trained]
        ups, projected_grads, start = [], [], 0
        for grad, delta, pair in zip(grads, ctx.trained, pairs, strict=True):
            if pair is None:
                continue
            end = start + pair[0].shape[0]
            wanted = ctx.needs_input_grad[_FACTORS + 1 + 2 * len(ups)]
            ups.append(_product(grad.t(), projected[:, start:end], delta, 1, scale=delta.scale) if wanted else None)
            projected_grads.append(_scaled(grad @ pair[1], delta))
            start = end
        projected_grad = _concatenated(projected_grads, dim=1) if projected_grads else None
        downs = [None] * len(ups) if x is None else [
            _product(grad.t(), _rows(x), delta, 0) if wanted else None for grad, delta, wanted in zip(
                projected_grads, filter(None, ctx.trained), ctx.needs_input_grad[_FACTORS::2], strict=True)]

        grad_source = grad_x = None
        if ctx.needs_input_grad[0]:
            for grad, (weight, _) in zip(grads, ctx.frozen, strict=True):
                matrix = _matrix(weight, ctx.dtype)
                grad_x = grad @ matrix if grad_x is None else grad_x.addmm_(grad, matrix)
            if projected_grad is not None:
                grad_x.addmm_(projected_grad, _stacked(pairs))
            grad_source = grad_x.view(ctx.shape)
            if ctx.recipe is not None:
                grad_source = ctx.recipe.grad(source, known, grad_source)
        return grad_source, None, None, None, *(side for pair in zip(downs, ups, strict=True) for side in pair)


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _product(left: Tensor, right: Tensor, delta: LoRADelta, side: int, *, scale: float = 1.0) -> Tensor | None:
    """The gradient of `down` (side 0) or `up` (1), `scale` · left · right; None where it was added to the copy's."""
    copy = None if delta.working is None or delta.working[side].dtype != left.dtype else delta.working[side]
    if copy is None or copy.grad is None:
        product = left @ right
        return (product if scale == 1 else product.mul_(scale)).to((delta.down, delta.up)[side].dtype)
    copy.grad.addmm_(left, right, alpha=scale)
    return None


def _scaled(product: Tensor, delta: LoRADelta) -> Tensor:
    return product if delta.scale == 1 else product.mul_(delta.scale)


def _matrix(weight: Weight, dtype: torch.dtype) -> Tensor:
    """The weight [out, in] in `dtype`, also where it is that of a 1x1 convolution."""
    return dense(weight, dtype).flatten(1)


def _stacked(pairs: Sequence[tuple[Tensor, Tensor] | None]) -> Tensor:
    """All A below each other, [sum of ranks, in]."""
    return _concatenated([pair[0] for pair in pairs if pair is not None], dim=0)


def _concatenated(tensors: Sequence[Tensor], *, dim: int) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors, dim=dim)
