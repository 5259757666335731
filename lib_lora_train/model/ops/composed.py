"""Functions of trained factors that are computed once more in backward, so that nothing they make in between is kept.

A weight composed of factors is as large as the frozen one beside it. It is made in the factors' own dtype (fp32) and rounded
once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

Compose = Callable[..., Tensor]
"""Factors -> a tensor made of them; differentiable."""


def composed_linear(x: Tensor, compose: Compose, factors: Sequence[Tensor]) -> Tensor:
    """x [..., in] @ compose(*factors) [out, in].T in x's dtype, of which autograd keeps x and the factors."""
    return _Remade.apply(lambda x, *factors: F.linear(x, compose(*factors).to(x.dtype)), x, *factors)


def composed_conv2d(x: Tensor, compose: Compose, factors: Sequence[Tensor], *, stride: int, padding: int) -> Tensor:
    """x [B, in, h, w] convolved with compose(*factors) [out, in, k, k], as `composed_linear`."""
    return _Remade.apply(lambda x, *factors: F.conv2d(x, compose(*factors).to(x.dtype), stride=stride, padding=padding),
                         x, *factors)


def composed_blocks(x: Tensor, compose: Compose, factors: Sequence[Tensor]) -> Tensor:
    """The n parts of each row of x [..., n·size] @ compose(*factors) [n, size, size], each by its own, as `composed_linear`."""
    def product(x: Tensor, *factors: Tensor) -> Tensor:
        blocks = compose(*factors).to(x.dtype)
        parts = x.reshape(-1, len(blocks), blocks.shape[1]).transpose(0, 1)         # [n, rows, size], without a copy
        return torch.bmm(parts, blocks).transpose(0, 1).reshape(x.shape)
    return _Remade.apply(product, x, *factors)


def remade(compose: Compose, factors: Sequence[Tensor]) -> Tensor:
    """compose(*factors), of which autograd keeps the factors only."""
    return _Remade.apply(lambda _, *factors: compose(*factors), None, *factors)


class _Remade(torch.autograd.Function):
    """`function(x, *factors)`. The factors are kept as attributes: hooks on saved tensors are for activations."""

    @staticmethod
    def forward(ctx: Any, function: Callable[..., Tensor], x: Tensor | None, *factors: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        ctx.function, ctx.factors = function, factors
        return function(x, *factors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        wanted = ctx.needs_input_grad[1:]
        with torch.enable_grad():
            inputs = [value if value is None else value.detach().requires_grad_(needed)
                      for value, needed in zip((*ctx.saved_tensors, *ctx.factors), wanted, strict=True)]
            result = ctx.function(*inputs)
        needed = [value for value in inputs if value is not None and value.requires_grad]
        grads = iter(torch.autograd.grad(result, needed, grad))
        return None, *(next(grads) if value is not None and value.requires_grad else None for value in inputs)
