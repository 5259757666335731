"""The inputs of a process that trains together with others: its rows of each batch, and what the others have encoded."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

import torch

from lib_lora_train.dataset.buckets import Placement
from lib_lora_train.dataset.folder import Dataset
from lib_lora_train.distributed import ProcessGroup, rows_of
from lib_lora_train.inputs.latents import Latents, LatentSource, Prepared


class OwnRows:
    """A `LatentSource` of whole global batches that looks up, or encodes, only this process's rows.

    The other rows are zeros; the training step drops them.
    """

    def __init__(self, source: LatentSource, group: ProcessGroup) -> None:
        self.dataset: Dataset = source.dataset
        self.placements: tuple[Placement, ...] = source.placements
        self._source, self._group = source, group

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
        rows = rows_of(len(indices), self._group)
        # Where no row is this process's, the first image gives the shape.
        return slice(0, 1) if rows.start == rows.stop else rows
