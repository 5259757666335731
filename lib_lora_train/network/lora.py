"""One low-rank layer (LoRA, Hu et al. 2021, arXiv 2106.09685): h = W x + b + (alpha / r) · B A x.

The frozen weight is passed in at each call and never held, so the layer owns nothing but A (`down`) and
B (`up`). It computes the whole layer, frozen part included, so that the low-rank product is accumulated into the frozen one.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from lib_lora_train.model.convolution import frozen_conv2d, over_pixels
from lib_lora_train.model.products import LowRank, frozen_linear, shared_linears
from lib_lora_train.model.weights import Weight


class LoRALayer(nn.Module):
    """A [r, in] and B [out, r] in fp32; `multiplier` scales both (1 while training).

    `linear`, `conv2d` and `low_rank` satisfy `model.layers.Adapter` and `LowRankAdapter`. `working` may hold (A, B) in the
    dtype of the computation; whoever puts them there brings them up to date when A and B have changed.

    A starts uniform as kaiming_uniform(a=√5) makes it, B starts at zero, so a new layer changes nothing. `alpha` is a
    Python number: a tensor would have to be read back from the device at each step.
    """

    def __init__(self, *, in_features: int, out_features: int, rank: int, alpha: float,
                 generator: torch.Generator) -> None:
        super().__init__()
        bound = 1 / math.sqrt(in_features)          # kaiming_uniform: gain(√5) · √3 / √fan_in, gain = √(1/3)
        self.down = nn.Parameter(torch.empty(rank, in_features).uniform_(-bound, bound, generator=generator))
        self.up = nn.Parameter(torch.zeros(out_features, rank))
        self.alpha = float(alpha)
        self.multiplier = 1.0
        self.working: tuple[Tensor, Tensor] | None = None

    @property
    def rank(self) -> int:
        """r, the number of rows of A."""
        return self.down.shape[0]

    @property
    def scale(self) -> float:
        """alpha / r, times the multiplier."""
        return self.multiplier * self.alpha / self.rank

    def low_rank(self) -> LowRank | None:
        """What is added to the frozen layer; None at multiplier 0, which is bit for bit the layer without a LoRA."""
        return LowRank(self.down, self.up, self.scale, self.working) if self.multiplier else None

    def linear(self, x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
        """x [..., in], weight [out, in] (or [out, in, 1, 1]) of any dtype -> [..., out], computed in the dtype of x."""
        low_rank = self.low_rank()
        if low_rank is None:
            return frozen_linear(x, weight, bias)
        return shared_linears(x, [(weight, bias)], [low_rank])[0]

    def conv2d(self, x: Tensor, weight: Weight, bias: Tensor | None, *,
               stride: int = 1, padding: int = 0) -> Tensor:
        """x [B, in, h, w] -> [B, out, h', w'] for a 1x1 convolution; larger kernels are LoCon's.

        Computed as a linear layer over the pixels, which reads an x in NHWC order where it lies.
        """
        assert weight.shape[2:] == (1, 1) and padding == 0, "only 1x1 convolutions are adapted"
        if self.low_rank() is None:
            return frozen_conv2d(x, weight, bias, stride=stride, padding=padding)
        return over_pixels(x[:, :, ::stride, ::stride], lambda rows: self.linear(rows, weight, bias))
