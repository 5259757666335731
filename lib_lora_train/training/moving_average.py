"""The exponential moving average of the trained weights, which is saved and sampled in their place."""

from __future__ import annotations

import torch
from torch import Tensor


class MovingAverage:
    """The average of weights over the steps. As in diffusers' EMAModel the first step's weights are the first average, and
    after n steps it is multiplied by min(decay, (1 + n) / (10 + n)): a short run does not average in its beginning.

    values    [n], as the weights
    updates   0-d int64, steps so far
    """

    def __init__(self, weights: Tensor, *, decay: float) -> None:
        self.values, self.updates = weights.detach().clone(), torch.zeros((), dtype=torch.int64)
        self._decay = decay

    @torch.no_grad()
    def update(self, weights: Tensor) -> None:
        """After a step, also one that was skipped."""
        before = int(self.updates)  # on the CPU: nothing waits for it
        decay = min(self._decay, (1 + before) / (10 + before)) if before else 0.0
        self.values.lerp_(weights, 1 - decay)
        self.updates += 1
