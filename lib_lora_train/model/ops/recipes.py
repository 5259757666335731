"""Norms, activations and gates that backward recomputes from their input.

They cost next to nothing beside the matrix products around them, but plain autograd keeps the result of each. A recipe
says how such an input x of a layer is made of its source, so that autograd keeps the source only. Norms are computed in
fp32 where x has fewer bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from lib_lora_train.model.ops.weights import is_nhwc


class Recipe(Protocol):
    """A function of one tensor, the source, and its gradient."""

    def known(self, source: Tensor) -> Any:
        """The intermediate results that `finish` and `grad` share."""

    def finish(self, source: Tensor, known: Any) -> Tensor:
        """x."""

    def grad(self, source: Tensor, known: Any, grad_x: Tensor) -> Tensor:
        """The gradient for the source."""


def made(recipe: Recipe, source: Tensor) -> Tensor:
    """x by the recipe; autograd keeps the source only."""
    return _Made.apply(source, recipe)


class _Made(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, source: Tensor, recipe: Recipe) -> Tensor:
        ctx.save_for_backward(source)
        ctx.recipe = recipe
        return recipe.finish(source, recipe.known(source))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_x: Tensor) -> tuple[Tensor, None]:
        (source,) = ctx.saved_tensors
        return ctx.recipe.grad(source, ctx.recipe.known(source), grad_x), None


@dataclass(frozen=True, eq=False)
class LayerNorm:
    """Over the last dimension [C]; weight and bias [C] in any dtype."""

    weight: Tensor
    bias: Tensor
    eps: float = 1e-5

    def known(self, source: Tensor) -> Any:
        """(the norm's input, weight and bias in the dtype it is computed in; its output, mean, 1/σ)"""
        if source.is_cuda and source.dtype == self.weight.dtype == self.bias.dtype:
            given = source, self.weight, self.bias  # the kernel computes in fp32 by itself, moments included
        else:
            given = _wide(source, source), _wide(self.weight, source), _wide(self.bias, source)
        return given, *torch.native_layer_norm(given[0], given[1].shape, given[1], given[2], self.eps)

    def finish(self, source: Tensor, known: Any) -> Tensor:
        """[..., C] -> [..., C] in its dtype."""
        return known[1].to(source.dtype)

    def grad(self, source: Tensor, known: Any, grad_x: Tensor) -> Tensor:
        """Of the source's dtype."""
        (x, weight, bias), _, mean, rstd = known
        grad_source, _, _ = torch.ops.aten.native_layer_norm_backward(
            grad_x.to(x.dtype).contiguous(), x, weight.shape, mean, rstd, weight, bias, [True, False, False])
        return grad_source.to(source.dtype)


@dataclass(frozen=True, eq=False)
class GroupNorm:
    """Over groups of the channels of an image [B, C, h, w] (ldm's GroupNorm32), with or without a SiLU after it.

    The memory layout stays. `rows` returns [B, h·w, C], which is a view of an NHWC image.
    """

    weight: Tensor
    bias: Tensor
    eps: float
    silu: bool = False
    rows: bool = False
    groups: int = 32

    def known(self, source: Tensor) -> Any:
        """(the norm's input in the dtype it is computed in; its output, mean, 1/σ)"""
        x, weight, bias = _wide(_dense_image(source), source), _wide(self.weight, source), _wide(self.bias, source)
        if is_nhwc(x) and not x.is_cpu:
            normed, mean, rstd = group_norm_nhwc(x, weight, bias, self.eps, self.groups)  # torch's kernel returns NCHW
        else:
            normed, mean, rstd = torch.native_group_norm(
                x, weight, bias, x.shape[0], x.shape[1], x[0, 0].numel(), self.groups, self.eps)
        return x, normed, mean, rstd

    def finish(self, source: Tensor, known: Any) -> Tensor:
        """[B, C, h, w] -> [B, C, h, w] or [B, h·w, C], in its dtype."""
        result = (F.silu(known[1]) if self.silu else known[1]).to(source.dtype)
        return result.permute(0, 2, 3, 1).flatten(1, 2) if self.rows else result

    def grad(self, source: Tensor, known: Any, grad_x: Tensor) -> Tensor:
        """Of the source's dtype and memory layout."""
        x, normed, mean, rstd = known
        if self.rows:
            grad_x = grad_x.unflatten(1, x.shape[2:]).permute(0, 3, 1, 2)
        grad = grad_x.to(x.dtype)
        if self.silu:
            grad = torch.ops.aten.silu_backward(grad, normed)
        nhwc = is_nhwc(x)
        grad = grad.contiguous(memory_format=torch.channels_last if nhwc else torch.contiguous_format)
        if nhwc:
            return self._grad_nhwc(x, mean, rstd, grad).to(source.dtype)
        grad_source, _, _ = torch.ops.aten.native_group_norm_backward(
            grad, x, mean, rstd, _wide(self.weight, x), x.shape[0], x.shape[1], x[0, 0].numel(), self.groups,
            [True, False, False])
        return grad_source.to(source.dtype)

    def _grad_nhwc(self, x: Tensor, mean: Tensor, rstd: Tensor, grad: Tensor) -> Tensor:
        """torch's kernel for this layout is several times slower on the CPU, and returns NCHW on GPUs.

        With g the gradient times the weight, m and r the group's moments and N its size: r·g - r/N·(Σg + x̂·Σg·x̂),
        which is scale·grad + slope·x + shift for each channel.
        """
        size = x[0].numel() // self.groups
        rows, grads = (t.permute(0, 2, 3, 1).flatten(1, 2) for t in (x, grad))
        weight = _wide(self.weight, x)
        sum_g = self._by_group(grads.sum(dim=1) * weight)
        sum_gx = self._by_group((grads * rows).sum(dim=1) * weight)
        along = (sum_gx - mean * sum_g) * rstd  # Σ g·x̂
        slope = -rstd.square() / size * along
        shift = -rstd / size * sum_g - mean * slope
        scale, shift, slope = (_by_channel(numbers, x) for numbers in (rstd, shift, slope))
        result = torch.addcmul(shift[:, None], rows, slope[:, None])
        result.addcmul_(grads, (scale * weight)[:, None])
        return result.unflatten(1, x.shape[2:]).permute(0, 3, 1, 2)

    def _by_group(self, of_channels: Tensor) -> Tensor:
        """[B, C] -> [B, groups], added up."""
        return of_channels.unflatten(1, (self.groups, -1)).sum(dim=2)


def group_norm_nhwc(x: Tensor, weight: Tensor, bias: Tensor, eps: float, groups: int) -> tuple[Tensor, Tensor, Tensor]:
    """Group norm of x [B, C, h, w] in NHWC order, which it keeps; with mean and 1/σ [B, groups]."""
    rows = x.permute(0, 2, 3, 1).flatten(1, 2)
    variance, mean = torch.var_mean(rows.unflatten(2, (groups, -1)), dim=(1, 3), unbiased=False)
    rstd = (variance + eps).rsqrt()
    scale = _by_channel(rstd, x) * weight
    shift = torch.addcmul(bias, _by_channel(mean, x), scale, value=-1)
    normed = torch.addcmul(shift[:, None], rows, scale[:, None])
    return normed.unflatten(1, x.shape[2:]).permute(0, 3, 1, 2), mean, rstd


def _by_channel(of_groups: Tensor, x: Tensor) -> Tensor:
    """[B, groups] -> [B, C]"""
    return of_groups.repeat_interleave(x.shape[1] // of_groups.shape[1], dim=1)


@dataclass(frozen=True)
class GatedGELU:
    """value · gelu(gate) of [..., 2·C], value first (GEGLU, Shazeer 2020, arXiv 2002.05202)."""

    def known(self, source: Tensor) -> Any:
        """gelu(gate)"""
        return F.gelu(source.chunk(2, dim=-1)[1])

    def finish(self, source: Tensor, known: Any) -> Tensor:
        """[..., 2·C] -> [..., C]"""
        return source.chunk(2, dim=-1)[0] * known

    def grad(self, source: Tensor, known: Any, grad_x: Tensor) -> Tensor:
        """[..., C] -> [..., 2·C]"""
        value, gate = source.chunk(2, dim=-1)
        result = torch.empty_like(source)
        of_value, of_gate = result.chunk(2, dim=-1)
        torch.mul(grad_x, known, out=of_value)
        torch.mul(grad_x, value, out=of_gate)
        of_gate.copy_(torch.ops.aten.gelu_backward(of_gate, gate))
        return result


@dataclass(frozen=True)
class GELU:
    """The exact one, or its approximation x · σ(1.702·x) that CLIP was trained with (`quick`)."""

    quick: bool

    def known(self, source: Tensor) -> Any:
        """σ(1.702·x), if that is what it is made of."""
        return torch.sigmoid(1.702 * source) if self.quick else None

    def finish(self, source: Tensor, known: Any) -> Tensor:
        """[...] -> [...]"""
        return F.gelu(source) if known is None else source * known

    def grad(self, source: Tensor, known: Any, grad_x: Tensor) -> Tensor:
        """[...] -> [...]"""
        if not self.quick:
            return torch.ops.aten.gelu_backward(grad_x, source)
        return grad_x * (known + torch.ops.aten.sigmoid_backward(1.702 * source, known))


def _wide(tensor: Tensor, x: Tensor) -> Tensor:
    """In the dtype that norms of x are computed in: fp32, or fp64 for an x of that."""
    return tensor.to(torch.float64 if x.dtype == torch.float64 else torch.float32)


def _dense_image(x: Tensor) -> Tensor:
    """x [B, C, h, w] without gaps, in NCHW or NHWC order, whichever it is nearer to."""
    if x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last):
        return x
    last = x.stride(1) == 1
    return x.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
