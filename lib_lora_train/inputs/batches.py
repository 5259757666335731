"""Batches in an order that follows from the seed alone, so that a run can be repeated and resumed exactly.

All randomness here (order, captions, mirroring, crop, colour) comes from generators derived from (seed,
epoch, position); timesteps and noise are the training step's own.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch

from lib_lora_train.dataset.buckets import Size
from lib_lora_train.dataset.captions import process_caption
from lib_lora_train.inputs.batch import Batch
from lib_lora_train.inputs.latents import LatentSource, Prepared


@dataclass(frozen=True, eq=False)
class PreparedBatch:
    """A batch as far as it goes without the model; `Batches.finish` does the rest."""

    latents: Prepared
    captions: tuple[str, ...]

    @property
    def bytes(self) -> int:
        """What it takes while it waits."""
        return self.latents.bytes


class Batches:
    """The batches of each epoch. Settings carry kohya's names.

    Every picture is visited `repeats` times an epoch; batches hold one bucket each, the last of a bucket
    may be smaller; visits within a bucket and batches of an epoch are shuffled.
    """

    def __init__(
        self, source: LatentSource, *, train_batch_size: int, seed: int, prior_loss_weight: float = 1.0,
        trigger_word: str = "", shuffle_caption: bool = False, keep_tokens: int = 0, caption_dropout_rate: float = 0.0,
        caption_tag_dropout_rate: float = 0.0,
    ) -> None:
        self._source, self._batch_size, self._seed = source, train_batch_size, seed
        self._prior_loss_weight, self._trigger_word = prior_loss_weight, trigger_word
        self._shuffle_caption, self._keep_tokens = shuffle_caption, keep_tokens
        self._caption_dropout_rate, self._caption_tag_dropout_rate = caption_dropout_rate, caption_tag_dropout_rate
        self._last_order: tuple[int, tuple[tuple[int, ...], ...]] | None = None
        self._buckets: dict[Size, list[int]] = {}
        for index, (example, placement) in enumerate(zip(source.dataset.examples, source.placements, strict=True)):
            self._buckets.setdefault(placement.bucket, []).extend([index] * example.repeats)

    @property
    def batch_size(self) -> int:
        """Pictures in a full batch."""
        return self._batch_size

    def __len__(self) -> int:
        """Batches in an epoch: Σ over buckets ⌈visits / batch size⌉."""
        return sum(-(-len(visits) // self._batch_size) for visits in self._buckets.values())

    def fixed_captions(self) -> tuple[str, ...] | None:
        """All captions that can occur, if they are few enough to know: None where tags are shuffled or dropped."""
        if self._shuffle_caption or self._caption_tag_dropout_rate > 0:
            return None
        captions = dict.fromkeys(self._caption(i, random.Random(0), dropout=0.0)
                                 for i in range(len(self._source.dataset.examples)))
        if self._caption_dropout_rate > 0:
            captions[""] = None
        return tuple(captions)

    def order(self, epoch: int) -> tuple[tuple[int, ...], ...]:
        """The indices of each batch of an epoch."""
        last = self._last_order
        if last is not None and last[0] == epoch:
            return last[1]
        rng = self._rng("order", epoch)
        batches = []
        for size in sorted(self._buckets):
            visits = self._buckets[size].copy()
            rng.shuffle(visits)
            batches += [tuple(visits[i:i + self._batch_size]) for i in range(0, len(visits), self._batch_size)]
        rng.shuffle(batches)
        order = tuple(batches)
        self._last_order = epoch, order  # another thread may ask for another epoch meanwhile
        return order

    def prepare(self, epoch: int, position: int, *, indices: tuple[int, ...]) -> PreparedBatch:
        """What can be done without the model, in any thread, for the batch at this position of `order(epoch)`."""
        # Separate generators, so that switching one kind of variation on does not change the others.
        image_rngs = [self._rng("picture", epoch, position, slot) for slot in range(len(indices))]
        return PreparedBatch(self._source.prepare(indices, image_rngs), self._captions(epoch, position, indices))

    def finish(self, prepared: PreparedBatch) -> Batch:
        """The batch, made in the thread that trains."""
        indices = prepared.latents.indices
        latents = self._source.finish(prepared.latents)
        examples = [self._source.dataset.examples[index] for index in indices]
        placements = [self._source.placements[index] for index in indices]
        crops = [placement.size_condition_crop(flipped=flipped)
                 for placement, flipped in zip(placements, latents.flipped, strict=True)]
        sizes = [(e.height, e.width, *crop, p.bucket[1], p.bucket[0])
                 for e, crop, p in zip(examples, crops, placements, strict=True)]
        return Batch({
            "mean": latents.mean, "std": latents.std, "sizes": torch.tensor(sizes, dtype=torch.float32),
            "loss_weight": torch.tensor([self._prior_loss_weight if e.is_regularisation else 1.0 for e in examples]),
        }, prepared.captions)

    def size_of(self, indices: tuple[int, ...]) -> int:
        """Bytes that preparing such a batch takes; 0 where nothing is to be gained from doing it ahead."""
        return self._source.size_of(indices)

    def _captions(self, epoch: int, position: int, indices: tuple[int, ...]) -> tuple[str, ...]:
        return tuple(
            self._caption(index, self._rng("caption", epoch, position, slot), dropout=self._caption_dropout_rate)
            for slot, index in enumerate(indices))

    def _caption(self, index: int, rng: random.Random, *, dropout: float) -> str:
        example = self._source.dataset.examples[index]
        return process_caption(
            example.caption, rng=rng, trigger_word="" if example.is_regularisation else self._trigger_word,
            shuffle_caption=self._shuffle_caption, keep_tokens=self._keep_tokens, caption_dropout_rate=dropout,
            caption_tag_dropout_rate=self._caption_tag_dropout_rate)

    def _rng(self, *purpose: str | int) -> random.Random:
        # Seeded with a string: hashed with SHA-512, so neighbouring numbers give unrelated sequences,
        # the same in every process and on every system.
        return random.Random("/".join(map(str, (self._seed, *purpose))))
