"""What several tests compare with: LoRA in plain operations, numbers drawn from a seed, images in NHWC order."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def nhwc(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def draws(seed: int, *shapes: tuple[int, ...], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def lora(x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, scale: float) -> Tensor:
    """y = x Wᵀ + b + s x Aᵀ Bᵀ (arXiv 2106.09685, eq. 3)."""
    return F.linear(x, weight.flatten(1), bias) + scale * F.linear(F.linear(x, down), up)


class WrittenOut:
    """The adapter that computes this, one layer at a time."""

    def __init__(self, down: Tensor, up: Tensor, scale: float) -> None:
        self.down, self.up, self.scale = down, up, scale

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return lora(x, weight, bias, self.down, self.up, self.scale)
