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
    return _Composed.apply(x, compose, _Linear(), *factors)


def composed_conv2d(x: Tensor, compose: Compose, factors: Sequence[Tensor], *, stride: int, padding: int) -> Tensor:
    """x [B, in, h, w] convolved with compose(*factors) [out, in, k, k], as `composed_linear`."""
    return _Composed.apply(x, compose, _Conv2d(stride, padding), *factors)


def composed_blocks(x: Tensor, compose: Compose, factors: Sequence[Tensor]) -> Tensor:
    """The n parts of each row of x [..., n·size] @ compose(*factors) [n, size, size], each by its own, as `composed_linear`."""
    return _Composed.apply(x, compose, _Blocks(), *factors)


class _Linear:
    """A product of x and a kernel, and its gradients."""

    def product(self, x: Tensor, kernel: Tensor) -> Tensor:
        return F.linear(x, kernel)

    def of_input(self, shape: torch.Size, kernel: Tensor, grad: Tensor) -> Tensor:
        return grad @ kernel

    def of_kernel(self, x: Tensor, shape: torch.Size, grad: Tensor) -> Tensor:
        return grad.flatten(0, -2).t() @ x.flatten(0, -2)


class _Conv2d:
    def __init__(self, stride: int, padding: int) -> None:
        self._geometry = {"stride": stride, "padding": padding}

    def product(self, x: Tensor, kernel: Tensor) -> Tensor:
        return F.conv2d(x, kernel, **self._geometry)

    def of_input(self, shape: torch.Size, kernel: Tensor, grad: Tensor) -> Tensor:
        return conv2d_input(shape, kernel, grad, **self._geometry)

    def of_kernel(self, x: Tensor, shape: torch.Size, grad: Tensor) -> Tensor:
        return conv2d_weight(x, shape, grad, **self._geometry)


class _Blocks:
    def product(self, x: Tensor, kernel: Tensor) -> Tensor:
        return self._assembled(torch.bmm(self._parts(x, len(kernel)), kernel), x.shape)

    def of_input(self, shape: torch.Size, kernel: Tensor, grad: Tensor) -> Tensor:
        return self._assembled(torch.bmm(self._parts(grad, len(kernel)), kernel.mT), shape)

    def of_kernel(self, x: Tensor, shape: torch.Size, grad: Tensor) -> Tensor:
        return torch.bmm(self._parts(x, shape[0]).mT, self._parts(grad, shape[0]))

    def _parts(self, x: Tensor, count: int) -> Tensor:
        """[..., n·size] -> [n, rows, size], without a copy."""
        return x.reshape(-1, count, x.shape[-1] // count).transpose(0, 1)

    def _assembled(self, parts: Tensor, shape: torch.Size) -> Tensor:
        return parts.transpose(0, 1).reshape(shape)


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
    def forward(ctx: Any, x: Tensor, compose: Compose, kind: _Linear | _Conv2d | _Blocks, *factors: Tensor) -> Tensor:
        ctx.save_for_backward(x if any(ctx.needs_input_grad[3:]) else None)
        ctx.compose, ctx.kind, ctx.factors, ctx.shape = compose, kind, factors, x.shape
        return kind.product(x, compose(*factors).to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x,), wanted, grad_x = ctx.saved_tensors, ctx.needs_input_grad[3:], None

        def of_input(kernel: Tensor) -> Tensor | None:
            return ctx.kind.of_input(ctx.shape, kernel.to(grad.dtype), grad) if ctx.needs_input_grad[0] else None

        def of_kernel(kernel: Tensor) -> Tensor:
            nonlocal grad_x
            grad_x = of_input(kernel)
            return ctx.kind.of_kernel(x, kernel.shape, grad).to(kernel.dtype)

        if not any(wanted):
            return of_input(ctx.compose(*ctx.factors)), None, None, *[None] * len(wanted)
        grads = _gradients(ctx.compose, ctx.factors, wanted, of_kernel)
        return grad_x, None, None, *grads
