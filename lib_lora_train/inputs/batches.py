"""Batches in an order that follows from the seed alone, so that a run can be repeated and resumed exactly.

All randomness here (order, captions, mirroring, crop, colour) comes from generators derived from (seed,
epoch, position); timesteps and noise are the training step's own.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from lib_lora_train.dataset.buckets import Placement, Size
from lib_lora_train.dataset.caption_variation import known_captions, process_caption
from lib_lora_train.distributed import SINGLE_PROCESS, ProcessGroup, rows_of
from lib_lora_train.inputs.batch import Batch
from lib_lora_train.inputs.latents import LatentSource, Visit
from lib_lora_train.inputs.masks import Masks


@dataclass(frozen=True, eq=False)
class PreparedBatch:
    """A batch as far as it goes without the model; `Batches.finish` does the rest.

    rows      of the batch, those that this process trains
    visits    what `LatentSource.prepare` made for each of them
    masks     what `Masks.weights` says of them; nothing where the whole of each image is learnt
    """

    indices: tuple[int, ...]
    captions: tuple[str, ...]
    rows: slice
    visits: tuple[Visit, ...]
    masks: Mapping[str, torch.Tensor] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        """What it takes while it waits."""
        return sum(visit.latents.nbytes for visit in self.visits)


class Batches:
    """The batches of each epoch. Settings carry kohya's names.

    Every image is visited `repeats` times an epoch; batches hold one bucket each, the last of a bucket
    may be smaller; visits within a bucket and batches of an epoch are shuffled.
    """

    def __init__(
        self, source: LatentSource, *, train_batch_size: int, seed: int, prior_loss_weight: float = 1.0,
        gradient_accumulation_steps: int = 1, steps: int = 0, group: ProcessGroup = SINGLE_PROCESS, masks: Masks | None = None,
    ) -> None:
        """`train_batch_size` is that of all processes of the `group` together; `steps` are those of the run, for captions that
        warm up over a share of them."""
        self._source, self._batch_size, self._seed, self._group = source, train_batch_size, seed, group
        self._prior_loss_weight, self._accumulation, self._steps = prior_loss_weight, gradient_accumulation_steps, steps
        self._masks = masks
        self._buckets: dict[Size, list[int]] = {}
        for index, (example, placement) in enumerate(zip(source.dataset.examples, source.placements, strict=True)):
            self._buckets.setdefault(placement.bucket, []).extend([index] * example.repeats)

    def __len__(self) -> int:
        """Batches in an epoch: Σ over buckets ⌈visits / batch size⌉."""
        return sum(-(-len(visits) // self._batch_size) for visits in self._buckets.values())

    def fixed_captions(self) -> tuple[str, ...] | None:
        """All captions that can occur, if they are few enough to know: see `known_captions`."""
        return known_captions(self._source.dataset.examples)

    def order(self, epoch: int) -> tuple[tuple[int, ...], ...]:
        """The indices of each batch of an epoch."""
        rng = self._rng("order", epoch)
        batches = []
        for size in sorted(self._buckets):
            visits = self._buckets[size].copy()
            rng.shuffle(visits)
            batches += [tuple(visits[i:i + self._batch_size]) for i in range(0, len(visits), self._batch_size)]
        rng.shuffle(batches)
        return tuple(batches)

    def prepare(self, epoch: int, position: int, *, indices: tuple[int, ...]) -> PreparedBatch:
        """What can be done without the model, in any thread, for the batch at this position of `order(epoch)`."""
        rows = self._rows(indices)
        # Separate generators, so that switching one kind of variation on does not change the others.
        visits = tuple(self._source.prepare(indices[slot], self._rng("picture", epoch, position, slot))
                       for slot in range(rows.start, rows.stop))
        masks = self._masks.weights(indices[rows], visits) if self._masks else {}
        return PreparedBatch(indices, self._captions(epoch, position, indices), rows, visits, masks)

    def finish(self, prepared: PreparedBatch) -> Batch:
        """The batch, made in the thread that trains. The rows of other processes are zeros, which the training step drops."""
        indices, rows = prepared.indices, prepared.rows
        own = self._source.finish(indices[rows], [visit.latents for visit in prepared.visits])
        posterior = own.new_zeros(2, len(indices), *own.shape[2:])
        posterior[:, rows] = own.transpose(0, 1)
        flipped = [False] * len(indices)
        flipped[rows] = [visit.flipped for visit in prepared.visits]
        examples = [self._source.dataset.examples[index] for index in indices]
        sizes = [_sizes(self._source.placements[index], flipped=mirrored)
                 for index, mirrored in zip(indices, flipped, strict=True)]
        return Batch({
            "mean": posterior[0], "std": posterior[1], "sizes": torch.tensor(sizes, dtype=torch.float32),
            "loss_weight": torch.tensor([e.subset.loss_weight * (self._prior_loss_weight if e.is_regularisation else 1.0)
                                         for e in examples]),
            **{name: _among(len(indices), rows, own) for name, own in prepared.masks.items()},
        }, prepared.captions)

    def fixed(self, index: int) -> Batch:
        """One image with its caption as it is written, the same at each call: to look at, not to train on. Where visits vary
        it, it is varied in one of the same manners. Raises as `LatentSource`."""
        visit = self._source.prepare(index, self._rng("fixed", index))
        return image_batch(self._source.finish([index], [visit.latents])[0], self._source.placements[index],
                           caption=self._source.dataset.examples[index].caption, flipped=visit.flipped)

    def size_of(self, indices: tuple[int, ...]) -> int:
        """Bytes that preparing such a batch takes; 0 where nothing is to be gained from doing it ahead."""
        return self._source.size_of(indices[self._rows(indices)])

    def _rows(self, indices: tuple[int, ...]) -> slice:
        rows = rows_of(len(indices), self._group)
        # Where no row is this process's, the first image gives the shape.
        return slice(0, 1) if rows.start == rows.stop else rows

    def _captions(self, epoch: int, position: int, indices: tuple[int, ...]) -> tuple[str, ...]:
        steps = -(-len(self) // self._accumulation) * (epoch - 1) + position // self._accumulation
        examples = [self._source.dataset.examples[index] for index in indices]
        return tuple(
            process_caption(example.lines, example.subset.captions, rng=self._rng("caption", epoch, position, slot),
                            trigger_word=example.trigger_word, epoch=epoch, step=steps, total_steps=self._steps)
            for slot, example in enumerate(examples))

    def _rng(self, *purpose: str | int) -> random.Random:
        # Seeded with a string: hashed with SHA-512, so neighbouring numbers give unrelated sequences,
        # the same in every process and on every system.
        return random.Random("/".join(map(str, (self._seed, *purpose))))


def image_batch(latents: torch.Tensor, placement: Placement, *, caption: str, flipped: bool = False) -> Batch:
    """A batch of one image on the CPU, from its latents [2, C, h, w]: mean and standard deviation, unscaled."""
    mean, std = latents.cpu()[:, None]
    return Batch({"mean": mean, "std": std, "sizes": torch.tensor([_sizes(placement, flipped=flipped)], dtype=torch.float32),
                  "loss_weight": torch.ones(1)}, (caption,))


def _among(count: int, rows: slice, own: torch.Tensor) -> torch.Tensor:
    """[count, …]: these rows, the others zeros."""
    every = own.new_zeros(count, *own.shape[1:])
    every[rows] = own
    return every


def _sizes(placement: Placement, *, flipped: bool) -> tuple[int, ...]:
    """Original (height, width), crop (top, left), target (height, width): SDXL's size conditioning."""
    (width, height), (across, down) = placement.original, placement.bucket
    return height, width, *placement.size_condition_crop(flipped=flipped), down, across
