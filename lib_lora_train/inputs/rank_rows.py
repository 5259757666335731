"""The rows of a global batch that are this process's: the others' are neither encoded nor looked up."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

import torch

from lib_lora_train.dataset.buckets import Placement
from lib_lora_train.dataset.folder import Dataset
from lib_lora_train.distributed import ProcessGroup, share
from lib_lora_train.inputs.latents import Latents, LatentSource, Prepared


class OwnRows:
    """A source that is asked for whole global batches and looks up, or encodes, this process's rows of them alone.

    The others' rows are zeros: the step cuts them away. A `LatentSource`.
    """

    def __init__(self, source: LatentSource, ranks: ProcessGroup) -> None:
        self.dataset: Dataset = source.dataset
        self.placements: tuple[Placement, ...] = source.placements
        self._source, self._ranks = source, ranks

    def prepare(self, indices: Sequence[int], rngs: Sequence[random.Random]) -> Prepared:
        """See `LatentSource.prepare`."""
        rows = self._rows(indices)
        return replace(self._source.prepare(indices[rows], rngs[rows]), indices=tuple(indices))

    def finish(self, prepared: Prepared) -> Latents:
        """See `LatentSource.finish`."""
        indices = prepared.indices
        rows = self._rows(indices)
        found = self._source.finish(replace(prepared, indices=indices[rows]))
        mean = found.mean.new_zeros(len(indices), *found.mean.shape[1:])
        std, flipped = torch.zeros_like(mean), [False] * len(indices)
        mean[rows], std[rows], flipped[rows] = found.mean, found.std, found.flipped
        return Latents(mean, std, tuple(flipped))

    def size_of(self, indices: Sequence[int]) -> int:
        """See `LatentSource.size_of`."""
        return self._source.size_of(indices[self._rows(indices)])

    def close(self) -> None:
        """See `LatentSource.close`."""
        self._source.close()

    def _rows(self, indices: Sequence[int]) -> slice:
        rows = share(len(indices), self._ranks)
        # Where nothing of this batch is this process's, one picture tells the shape.
        return slice(0, 1) if rows.start == rows.stop else rows
