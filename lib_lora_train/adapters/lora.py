"""One low-rank layer (LoRA, Hu et al. 2021, arXiv 2106.09685): h = W x + b + (alpha / r) · B A x.

It owns A (`down`) and B (`up`) and says what they add; `model.products` computes that together with the frozen layer.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from lib_lora_train.model.ops.linear import LowRank


class LoRALayer(nn.Module):
    """A [r, in] and B [out, r] in fp32; `multiplier` scales both (1 while training).

    `low_rank` makes it a `model.layers.LowRankAdapter`. `working` may hold (A, B) in the dtype of the computation; whoever
    puts them there brings them up to date when A and B have changed.

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
