"""Convolutions with frozen kernels, in NCHW or NHWC order.

On the CPU torch reorders a kernel at each call, which for the widest layers takes longer than the convolution of their few
pixels. There the kernel is multiplied as it is, as a matrix, with the columns of its input. Many pixels under a wide kernel
are convolved with fewer multiplications (`winograd.py`). Elsewhere, where x is in NHWC order and the kernel is not, torch
would copy the kernel; if x is smaller, x is reordered instead.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from lib_lora_train.model.ops import winograd
from lib_lora_train.model.ops.linear import LoRADelta, frozen_linear
from lib_lora_train.model.ops.weights import Weight, dense, is_nhwc

NHWC, NCHW = torch.channels_last, torch.contiguous_format
COLUMNS_UP_TO, COLUMNS_FROM = 400, 2 ** 23
"""Pixels and kernel elements. Measured with oneDNN and MKL on one core, 1280 to 1280 channels: twice as fast at 8x8 pixels,
1.15 times at 16x16, as fast at 20x20, slower beyond; kernels that fit the cache are better left to the convolution."""

WINOGRAD_FROM, WINOGRAD_CHANNELS = 576, 256
"""Pixels, and channels on the narrower side. Measured on one core: 1.25 to 1.6 times as fast as oneDNN's convolution from 256
channels on, at 24x24 pixels as at 64x64; slower with 128 channels."""


def frozen_conv2d(x: Tensor, weight: Weight, bias: Tensor | None, *, stride: int, padding: int) -> Tensor:
    """x [B, in, h, w] convolved with weight [out, in, k, k], in `x.dtype`; a gradient for x only.

    Autograd keeps neither x nor a cast of the weight. The result is in NHWC order where x is, or where the kernel is.
    """
    if tuple(weight.shape[2:]) == (1, 1) and padding == 0 and stride == 1 and is_nhwc(x):
        return frozen_linear(x.permute(0, 2, 3, 1), weight, bias).permute(0, 3, 1, 2)
    return _FrozenConv2d.apply(x, weight, bias, stride, padding)


def conv2d_delta(x: Tensor, delta: LoRADelta, *, stride: int, padding: int) -> Tensor:
    """What a LoRA adds to a convolution of x [B, in, h, w]: down [r, in] or [r, in, k, k] with that convolution's stride and
    padding, up [out, r] on each pixel. Gradients for x and both factors; autograd keeps x."""
    down, up = delta.factors(x.dtype)
    down = down if down.ndim == 4 else down[:, :, None, None]
    projected = F.conv2d(x, down, stride=stride, padding=padding)
    return F.conv2d(projected, up[:, :, None, None]) * delta.scale


class _FrozenConv2d(torch.autograd.Function):
    """`F.conv2d` with a frozen weight of any dtype; keeps neither the input nor a cast of the weight.

    torch's own convolution saves its input even where the weight wants no gradient. The gradient with respect to
    the input needs that input's shape only.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Weight, bias: Tensor | None, stride: int, padding: int) -> Tensor:
        ctx.weight, ctx.shape, ctx.stride, ctx.padding, ctx.nhwc = weight, x.shape, stride, padding, is_nhwc(x)
        kernel, bias = dense(weight, x.dtype), None if bias is None else bias.to(x.dtype)
        size = _size(x.shape, kernel, stride, padding)
        if _as_columns(x, kernel, size):
            columns = F.unfold(x, kernel.shape[2:], padding=padding, stride=stride)  # [B, in·k·k, pixels]
            matrix, nhwc = _matrix(kernel)
            if nhwc:
                columns = columns.unflatten(1, (kernel.shape[1], -1)).transpose(1, 2).flatten(1, 2)  # [B, k·k·in, pixels]
            rows = F.linear(columns.mT.flatten(0, 1), matrix, bias)
            y = rows.unflatten(0, (len(x), *size)).permute(0, 3, 1, 2)
            return y if ctx.nhwc or nhwc else y.contiguous()
        if ctx.nhwc and _by_winograd(x, kernel, stride, padding):
            return winograd.convolved(x.permute(0, 2, 3, 1), kernel, bias).permute(0, 3, 1, 2)
        if ctx.nhwc and reordering_x_is_cheaper(x, kernel, size):
            return F.conv2d(x.contiguous(), kernel, bias, stride=stride, padding=padding).contiguous(memory_format=NHWC)
        return F.conv2d(x, kernel, bias, stride=stride, padding=padding)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        kernel, order = dense(ctx.weight, grad.dtype), NHWC if ctx.nhwc else NCHW
        if _as_columns(grad, kernel, grad.shape[2:]):
            (matrix, nhwc), grads = _matrix(kernel), grad.flatten(2)
            # One image's columns are made in the layout that `fold` needs.
            columns = (matrix.t() @ grads[0])[None] if len(grads) == 1 else (grads.mT @ matrix).mT
            if nhwc:
                columns = columns.unflatten(1, (-1, kernel.shape[1])).transpose(1, 2).flatten(1, 2)  # [B, in·k·k, pixels]
            grad_x = F.fold(columns, ctx.shape[2:], kernel.shape[2:], padding=ctx.padding, stride=ctx.stride)
            return grad_x.contiguous(memory_format=order), None, None, None, None
        if ctx.nhwc and _by_winograd(grad, kernel, ctx.stride, ctx.padding):
            rows = grad.contiguous(memory_format=NHWC).permute(0, 2, 3, 1)
            return winograd.differentiated(rows, kernel).permute(0, 3, 1, 2), None, None, None, None
        reordered = ctx.nhwc and reordering_x_is_cheaper(grad, kernel, ctx.shape[2:])
        # `convolution_backward` wants the input, and cuDNN takes that one's order for the gradient's: an expanded scalar in its
        # place would have it copy an NHWC gradient to NCHW and back. The transposed convolution wants the gradient only.
        rest = [(side + 2 * ctx.padding - k) % ctx.stride for side, k in zip(ctx.shape[2:], kernel.shape[2:], strict=True)]
        grad_x = F.conv_transpose2d(grad.contiguous(memory_format=NCHW if reordered else order), kernel, stride=ctx.stride,
                                    padding=ctx.padding, output_padding=rest)
        return grad_x.contiguous(memory_format=order), None, None, None, None


def _size(shape: torch.Size, kernel: Tensor, stride: int, padding: int) -> tuple[int, int]:
    height, width = ((side + 2 * padding - k) // stride + 1 for side, k in zip(shape[2:], kernel.shape[2:], strict=True))
    return height, width


def _matrix(kernel: Tensor) -> tuple[Tensor, bool]:
    """The kernel without a copy: [out, in·k·k], or [out, k·k·in] and True where it is in NHWC order."""
    nhwc = is_nhwc(kernel)
    return (kernel.permute(0, 2, 3, 1) if nhwc else kernel).flatten(1), nhwc


def _as_columns(x: Tensor, kernel: Tensor, size: torch.Size | tuple[int, int]) -> bool:
    return x.is_cpu and x.dtype == torch.float32 and (kernel.is_contiguous() or is_nhwc(kernel)) and \
        x.shape[0] * size[0] * size[1] <= COLUMNS_UP_TO and kernel.numel() >= COLUMNS_FROM


def _by_winograd(x: Tensor, kernel: Tensor, stride: int, padding: int) -> bool:
    images, _, height, width = x.shape
    return x.is_cpu and x.dtype == torch.float32 and kernel.shape[2:] == (3, 3) and stride == padding == 1 and \
        height % 2 == width % 2 == 0 and images * height * width >= WINOGRAD_FROM and \
        min(kernel.shape[:2]) >= WINOGRAD_CHANNELS


def reordering_x_is_cheaper(x: Tensor, kernel: Tensor, size: torch.Size | tuple[int, int]) -> bool:
    """Whether x and the result [., ., *size] have fewer numbers than an NCHW kernel that torch would copy."""
    pixels = x.shape[0] * size[0] * size[1]
    return x.is_cpu and kernel.is_contiguous() and kernel.numel() > x.numel() + pixels * max(kernel.shape[:2])
