"""Distances between images. Pixels are [N, 3, h, w] in [0, 1]; each function gives one number an image, [N]."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

_WINDOW, _SIGMA = 11, 1.5
_C1, _C2 = 0.01 ** 2, 0.03 ** 2


def psnr(pixels: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio in dB, 10·log10(1 / mean squared difference); infinite for equal images."""
    return -10 * (pixels - reference).square().mean(dim=(1, 2, 3)).log10()


def ssim(pixels: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Structural similarity (Wang et al. 2004, IEEE TIP 13(4)): 1 for equal images.

    As in the paper: a Gaussian window of 11×11 pixels with σ = 1.5, K1 = 0.01, K2 = 0.03, where it fits whole; the mean
    over positions and the three channels.
    """
    x, y = pixels.double(), reference.double()
    mean_x, mean_y = _blurred(x), _blurred(y)
    variance_x, variance_y = _blurred(x * x) - mean_x ** 2, _blurred(y * y) - mean_y ** 2
    covariance = _blurred(x * y) - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + _C1) / (mean_x ** 2 + mean_y ** 2 + _C1)
    structure = (2 * covariance + _C2) / (variance_x + variance_y + _C2)
    return (luminance * structure).mean(dim=(1, 2, 3)).float()


def feature_distance(features: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """1 − cosine of the angle between features [N, D], row by row: 0 is the same direction, 1 unrelated, 2 opposite."""
    return (1 - F.cosine_similarity(features, reference, dim=1)).clamp(min=0)  # not below for rounding's sake


def nearest_distance(pixels: torch.Tensor, gallery: torch.Tensor) -> torch.Tensor:
    """The RMS difference of pixels to the nearest image of `gallery` [M, 3, h, w]."""
    size = pixels[0].numel()
    return torch.cdist(pixels.flatten(1).double(), gallery.flatten(1).double()).amin(dim=1).float() / math.sqrt(size)


def nearest_index(features: torch.Tensor, gallery: torch.Tensor) -> torch.Tensor:
    """int64 [N]: which row of `gallery` [M, D] points most nearly in the direction of each of `features` [N, D]."""
    return (F.normalize(features, dim=1) @ F.normalize(gallery, dim=1).T).argmax(dim=1)


def _blurred(x: torch.Tensor) -> torch.Tensor:
    """The window's weighted mean at each place where it fits."""
    offsets = torch.arange(_WINDOW, dtype=x.dtype) - _WINDOW // 2
    weights = torch.exp(-offsets.square() / (2 * _SIGMA ** 2))
    weights, channels = weights / weights.sum(), x.shape[1]
    rows = F.conv2d(x, weights.view(1, 1, -1, 1).expand(channels, 1, -1, 1), groups=channels)
    return F.conv2d(rows, weights.view(1, 1, 1, -1).expand(channels, 1, 1, -1), groups=channels)
