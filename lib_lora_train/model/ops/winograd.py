"""3x3 convolutions of stride 1 with 4/9 of the multiplications: F(2x2, 3x3) of Lavin & Gray 2015, arXiv 1509.09308.

For the CPU. A tile of 4x4 pixels and a kernel are each transformed into 16 numbers a channel, in which the convolution
that gives 2x2 pixels is 16 products: matrix products over the channels, for all tiles together. The transforms are additions
over long rows of channels, so images are in NHWC order, and go by bands of tiles that fit the cache.
In fp32 the result is as near to the exact one as that of the plain convolution.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

TILES_A_BAND = 256
KERNEL_BYTES = 2 ** 24  # beyond some size each new tensor costs fresh pages of the operating system
# G of the paper's equation 9; the other two matrices are written as the additions they are.
_G = ((1.0, 0.0, 0.0), (0.5, 0.5, 0.5), (0.5, -0.5, 0.5), (0.0, 0.0, 1.0))


def convolved(x: Tensor, kernel: Tensor, bias: Tensor | None) -> Tensor:
    """x [B, h, w, in] with even h and w, padded by 1, with kernel [out, in, 3, 3] -> [B, h, w, out]."""
    parts = [transformed(part).mT for part in kernel.split(_channels(kernel.shape[1]), dim=0)]
    y = _convolved(x, parts, kernel.shape[0])
    return y if bias is None else y.add_(bias)


def differentiated(grad: Tensor, kernel: Tensor) -> Tensor:
    """The gradient for x: grad [B, h, w, out] with kernel [out, in, 3, 3] -> [B, h, w, in]."""
    parts = [transformed(part, mirrored=True) for part in kernel.split(_channels(kernel.shape[0]), dim=1)]
    return _convolved(grad, parts, kernel.shape[1])


def transformed(kernel: Tensor, *, mirrored: bool = False) -> Tensor:
    """kernel [out, in, 3, 3] -> G k Gᵀ as [16, out, in]; `mirrored` both ways, as the gradient needs it."""
    g = kernel.new_tensor(_G)
    both = torch.kron(g, g)
    return (both.flip(1) if mirrored else both).mm(kernel.reshape(-1, 9).t()).view(16, *kernel.shape[:2])


def _channels(others: int) -> int:
    """So many that the transformed kernel between them and the others is about `KERNEL_BYTES` large."""
    return max(KERNEL_BYTES // (16 * 4 * others), 1)


def _convolved(x: Tensor, kernels: Sequence[Tensor], outputs: int) -> Tensor:
    """With parts [16, in, part of the outputs] of the transformed kernel."""
    images, height, width, _ = x.shape
    y = x.new_empty(images, height, width, outputs)
    band = min(max(TILES_A_BAND // (width // 2), 1), height // 2)
    workspace = _Band(x, kernels, outputs, band)
    for padded, result in zip(F.pad(x, (0, 0, 1, 1, 1, 1)), y, strict=True):
        for first in range(0, height // 2, band):
            # The last band may repeat some rows of the one before rather than be shorter.
            first = min(first, height // 2 - band)
            workspace.convolve(padded[2 * first:2 * (first + band) + 2], result[2 * first:2 * (first + band)])
    return y


class _Band:
    """A band of rows of tiles of one image, and the memory that all bands share."""

    def __init__(self, x: Tensor, kernels: Sequence[Tensor], outputs: int, rows: int) -> None:
        columns, channels = x.shape[2] // 2, x.shape[3]
        self._kernels = kernels
        self._rows_transformed = x.new_empty(4, rows, x.shape[2] + 2, channels)
        self._tiles = x.new_empty(4, 4, rows, columns, channels)
        self._products = x.new_empty(4, 4, rows, columns, outputs)
        self._summed = x.new_empty(2, 4, rows, columns, outputs)

    def convolve(self, x: Tensor, y: Tensor) -> None:
        """x [2·rows + 2, w + 2, in] into y [2·rows, w, out]."""
        rows, columns = self._tiles.shape[2:4]
        _transform([x[k:k + 2 * rows - 1:2] for k in range(4)], self._rows_transformed.unbind(0))
        _transform([self._rows_transformed[:, :, k:k + 2 * columns - 1:2] for k in range(4)], self._tiles.unbind(1))
        for number, (tile, product) in enumerate(zip(self._tiles.flatten(0, 1), self._products.flatten(0, 1), strict=True)):
            sizes = [kernel.shape[2] for kernel in self._kernels]
            for kernel, part in zip(self._kernels, product.flatten(0, 1).split(sizes, dim=1), strict=True):
                torch.mm(tile.flatten(0, 1), kernel[number], out=part)
        _transform_back(self._products.unbind(0), self._summed.unbind(0))
        pixels = y.view(rows, 2, columns, 2, -1)
        _transform_back(self._summed.unbind(1), [pixels[:, :, :, k].transpose(0, 1) for k in range(2)])


def _transform(d: Sequence[Tensor], out: Sequence[Tensor]) -> None:
    """Bᵀ d along one side of the tiles."""
    torch.sub(d[0], d[2], out=out[0])
    torch.add(d[1], d[2], out=out[1])
    torch.sub(d[2], d[1], out=out[2])
    torch.sub(d[1], d[3], out=out[3])


def _transform_back(m: Sequence[Tensor], out: Sequence[Tensor]) -> None:
    """Aᵀ m along one side of the tiles."""
    torch.add(m[0], m[1], out=out[0]).add_(m[2])
    torch.sub(m[1], m[2], out=out[1]).sub_(m[3])
