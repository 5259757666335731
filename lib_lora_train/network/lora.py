"""One low-rank layer (LoRA, Hu et al. 2021, arXiv 2106.09685): h = W x + b + (alpha / r) · B A x.

The frozen weight is passed in at each call and never held, so the layer owns nothing but A (`down`) and
B (`up`). It computes the whole layer, frozen part included, which is what lets a fused kernel take its place.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lib_lora_train.model.layers import frozen_conv2d, frozen_linear


class LoRALayer(nn.Module):
    """A [r, in] and B [out, r] in fp32; `multiplier` scales both (1 while training).

    `linear` and `conv2d` satisfy `model.layers.Adapter`. A starts uniform as kaiming_uniform(a=√5) makes it, B
    starts at zero, so a new layer changes nothing. `alpha` is a Python number: a tensor would have to be read
    back from the device at each step.
    """

    def __init__(self, *, in_features: int, out_features: int, rank: int, alpha: float,
                 generator: torch.Generator) -> None:
        super().__init__()
        bound = 1 / math.sqrt(in_features)          # kaiming_uniform: gain(√5) · √3 / √fan_in, gain = √(1/3)
        self.down = nn.Parameter(torch.empty(rank, in_features).uniform_(-bound, bound, generator=generator))
        self.up = nn.Parameter(torch.zeros(out_features, rank))
        self.alpha = float(alpha)
        self.multiplier = 1.0

    @property
    def rank(self) -> int:
        """r, the number of rows of A."""
        return self.down.shape[0]

    @property
    def scale(self) -> float:
        """alpha / r, times the multiplier."""
        return self.multiplier * self.alpha / self.rank

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """x [..., in], weight [out, in] of any dtype -> [..., out], computed in the dtype of x."""
        frozen = frozen_linear(x, weight, bias)
        if self.multiplier == 0:
            return frozen                           # bit for bit the layer without a LoRA
        return frozen + F.linear(F.linear(x, self.down.to(x.dtype)) * self.scale, self.up.to(x.dtype))

    def conv2d(self, x: Tensor, weight: Tensor, bias: Tensor | None, *,
               stride: int = 1, padding: int = 0) -> Tensor:
        """x [B, in, h, w] -> [B, out, h', w'] for a 1x1 convolution; larger kernels are LoCon's."""
        assert weight.shape[2:] == (1, 1), "only 1x1 convolutions are adapted"
        frozen = frozen_conv2d(x, weight, bias, stride=stride, padding=padding)
        if self.multiplier == 0:
            return frozen
        down, up = self.down[:, :, None, None].to(x.dtype), self.up[:, :, None, None].to(x.dtype)
        return frozen + F.conv2d(F.conv2d(x, down, stride=stride, padding=padding) * self.scale, up)
