"""What neither a word nor a style is told by. Images are [N, 3, h, w] in [0, 1]."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def without_rim(x: Tensor) -> Tensor:
    """Without a twentieth at each side: there the model's decoder paints white, whatever the ground."""
    rim = x.shape[-1] // 20
    return x[:, :, rim:-rim, rim:-rim]


def augmented(x: Tensor, generator: torch.Generator, *, scale: tuple[float, float], shift: float, turn: float, colour: float,
              grey: float, noise: float) -> Tensor:
    """Random augmentation of images on white: each moved, resized, mirrored, rotated, tinted, blurred and with noise.

    scale of what is seen (above 1 the thing looks smaller), shift in halves of the side, turn in radians, colour and noise
    in brightness, grey the share that loses its colours.
    """
    count = len(x)

    def drawn(*shape: int) -> Tensor:
        return torch.rand(count, *shape, generator=generator)

    size, angle = scale[0] + (scale[1] - scale[0]) * drawn(), (2 * drawn() - 1) * turn
    mirror = (drawn() < 0.5).float() * 2 - 1
    transform = torch.zeros(count, 2, 3)
    transform[:, 0, 0], transform[:, 0, 1] = size * mirror * angle.cos(), -size * angle.sin()
    transform[:, 1, 0], transform[:, 1, 1] = size * mirror * angle.sin(), size * angle.cos()
    transform[:, :, 2] = (2 * drawn(2) - 1) * shift / 2
    grid = F.affine_grid(transform, [*x.shape], align_corners=False)
    x = F.grid_sample(x, grid, align_corners=False, padding_mode="border")  # beyond the border the ground goes on
    ink = (x < 0.99).float()
    x = 1 - (1 - x) * (1 + (2 * drawn(1, 1, 1) - 1) * colour) + (drawn(3, 1, 1) - 0.5) * colour * ink
    blurred, strength = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, stride=1), drawn(1, 1, 1) / 2
    x = (1 - strength) * x + strength * blurred
    pale = (drawn(1, 1, 1) < grey).float()
    x = (1 - pale) * x + pale * x.mean(dim=1, keepdim=True)
    return x + 2 * noise * drawn(1, 1, 1) * torch.randn(x.shape, generator=generator)


def weathered(x: Tensor, generator: torch.Generator) -> Tensor:
    """Contrast from 0.65 to 1.4, saturation from 0.8 to 1.25, half of them blurred: what painting does to a drawing."""
    def drawn(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(len(x), 1, 1, 1, generator=generator)

    middle = x.mean(dim=(2, 3), keepdim=True)
    x = middle + (x - middle) * drawn(0.65, 1.4)
    pale = x.mean(dim=1, keepdim=True)
    x = pale + (x - pale) * drawn(0.8, 1.25)
    soft = F.avg_pool2d(F.pad(x, (2, 2, 2, 2), mode="replicate"), 5, stride=1)
    strength = drawn(-1.0, 1.0).clamp(min=0)
    return ((1 - strength) * x + strength * soft).clamp(0, 1)
