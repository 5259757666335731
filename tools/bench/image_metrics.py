"""Distances between images. Pixels are [N, 3, h, w] in [0, 1]; each function gives one number an image, [N]."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F


def nearest_distance(pixels: torch.Tensor, gallery: torch.Tensor) -> torch.Tensor:
    """The RMS difference of pixels to the nearest image of `gallery` [M, 3, h, w]."""
    size = pixels[0].numel()
    return torch.cdist(pixels.flatten(1).double(), gallery.flatten(1).double()).amin(dim=1).float() / math.sqrt(size)


def nearest_index(features: torch.Tensor, gallery: torch.Tensor) -> torch.Tensor:
    """int64 [N]: which row of `gallery` [M, D] points most nearly in the direction of each of `features` [N, D]."""
    return (F.normalize(features, dim=1) @ F.normalize(gallery, dim=1).T).argmax(dim=1)
