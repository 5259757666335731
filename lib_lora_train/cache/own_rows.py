"""The rows of a global batch that are this process's: the others' are neither encoded nor looked up."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch

from lib_lora_train.cache.latents import Latents, LatentSource
from lib_lora_train.dataset.buckets import Placement
from lib_lora_train.dataset.folder import Dataset
from lib_lora_train.ranks import Ranks, share


class OwnRows:
    """A source that is asked for whole global batches and looks up, or encodes, this process's rows of them alone.

    The others' rows are zeros: the step cuts them away. A `LatentSource`.
    """

    def __init__(self, source: LatentSource, ranks: Ranks) -> None:
        self.dataset: Dataset = source.dataset
        self.placements: tuple[Placement, ...] = source.placements
        self._source, self._ranks = source, ranks

    def get(self, indices: Sequence[int], rngs: Sequence[random.Random]) -> Latents:
        """See `LatentSource.get`."""
        rows = share(len(indices), self._ranks)
        if rows.start == rows.stop:
            rows = slice(0, 1)  # nothing of this batch is this process's; one picture tells the shape
        found = self._source.get(indices[rows], rngs[rows])
        mean = found.mean.new_zeros(len(indices), *found.mean.shape[1:])
        std, flipped = torch.zeros_like(mean), [False] * len(indices)
        mean[rows], std[rows], flipped[rows] = found.mean, found.std, found.flipped
        return Latents(mean, std, tuple(flipped))
