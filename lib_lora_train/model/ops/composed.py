"""Weights that are composed of trained factors, and made once more in backward instead of being kept.

A composed weight is as large as the frozen one beside it. It is made in the factors' own dtype (fp32) and rounded once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.grad import conv2d_input, conv2d_weight

Compose = Callable[..., Tensor]
"""Factors -> a tensor made of them; differentiable."""


def composed_linear(x: Tensor, compose: Compose, factors: Sequence[Tensor]) -> Tensor:
    """x [..., in] @ compose(*factors) [out, in].T in x's dtype; gradients for x and the factors, of which autograd keeps x."""
    return _Composed.apply(x, compose, None, *factors)


def composed_conv2d(x: Tensor, compose: Compose, factors: Sequence[Tensor], *, stride: int, padding: int) -> Tensor:
    """x [B, in, h, w] convolved with compose(*factors) [out, in, k, k], as `composed_linear`."""
    return _Composed.apply(x, compose, (stride, padding), *factors)


def remade(compose: Compose, factors: Sequence[Tensor]) -> Tensor:
    """compose(*factors), of which autograd keeps the factors only."""
    return _Remade.apply(compose, *factors)


def _gradients(compose: Compose, factors: Sequence[Tensor], wanted: Sequence[bool],
               grad: Callable[[Tensor], Tensor]) -> list[Tensor | None]:
    """Those of the wanted factors, where `grad` gives the result's."""
    with torch.enable_grad():
        leaves = [factor.detach().requires_grad_(needed) for factor, needed in zip(factors, wanted, strict=True)]
        result = compose(*leaves)
    found = iter(torch.autograd.grad(result, [leaf for leaf in leaves if leaf.requires_grad], grad(result.detach())))
    return [next(found) if needed else None for needed in wanted]


class _Remade(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, compose: Compose, *factors: Tensor) -> Tensor:
        ctx.compose, ctx.factors = compose, factors
        return compose(*factors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, *_gradients(ctx.compose, ctx.factors, ctx.needs_input_grad[1:], lambda result: grad)


class _Composed(torch.autograd.Function):
    """A product with a composed weight. The factors are kept as attributes: hooks on saved tensors are for activations."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, compose: Compose, geometry: tuple[int, int] | None, *factors: Tensor) -> Tensor:
        ctx.save_for_backward(x if any(ctx.needs_input_grad[3:]) else None)
        ctx.compose, ctx.geometry, ctx.factors, ctx.shape = compose, geometry, factors, x.shape
        kernel = compose(*factors).to(x.dtype)
        return F.linear(x, kernel) if geometry is None else F.conv2d(x, kernel, stride=geometry[0], padding=geometry[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x,), wanted, geometry = ctx.saved_tensors, ctx.needs_input_grad[3:], ctx.geometry
        grad_x = None
        if ctx.needs_input_grad[0] and not any(wanted):
            grad_x = _of_input(ctx, ctx.compose(*ctx.factors), grad)

        def of_kernel(kernel: Tensor) -> Tensor:
            nonlocal grad_x
            if ctx.needs_input_grad[0]:
                grad_x = _of_input(ctx, kernel, grad)
            if geometry is None:
                return (grad.flatten(0, -2).t() @ x.flatten(0, -2)).to(kernel.dtype)
            return conv2d_weight(x, kernel.shape, grad, stride=geometry[0], padding=geometry[1]).to(kernel.dtype)

        grads = _gradients(ctx.compose, ctx.factors, wanted, of_kernel) if any(wanted) else [None] * len(wanted)
        return grad_x, None, None, *grads


def _of_input(ctx: Any, kernel: Tensor, grad: Tensor) -> Tensor:
    kernel = kernel.to(grad.dtype)
    if ctx.geometry is None:
        return grad @ kernel
    return conv2d_input(ctx.shape, kernel, grad, stride=ctx.geometry[0], padding=ctx.geometry[1])
