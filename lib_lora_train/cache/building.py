"""The pass over all pictures before training starts: read and decoded in threads, encoded bucket by bucket."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from lib_lora_train.cache.encoding import VaeWork, check_finite
from lib_lora_train.cache.exchange import all_texts, exchange
from lib_lora_train.cache.store import LatentStore
from lib_lora_train.dataset.ahead import Ahead
from lib_lora_train.dataset.augment import scale_and_crop, to_samples
from lib_lora_train.dataset.buckets import Placement, Size
from lib_lora_train.dataset.folder import Example, Problem
from lib_lora_train.dataset.pictures import read_picture
from lib_lora_train.dataset.watch import Watch
from lib_lora_train.errors import DatasetError
from lib_lora_train.ranks import Ranks, share

_DECODER_BYTES = 8  # Pillow keeps 4 bytes a pixel, and has the picture twice while it turns it upright
_AHEAD_A_THREAD = 4  # pictures that may be ready, for each thread that makes them
_A_ROUND = 4  # pictures that each of several ranks encodes before they meet, where the batch size is left to the device


@dataclass(frozen=True, eq=False)
class _Found:
    """What a thread has found out about one picture; nothing set: its latents are in the disk cache."""

    samples: torch.Tensor | None = None  # [H, W, 3] uint8, to be encoded
    latents: torch.Tensor | None = None  # [flips, 2, 4, h, w], from the disk cache
    error: DatasetError | None = None

    @property
    def bytes(self) -> int:
        return sum(tensor.nbytes for tensor in (self.samples, self.latents) if tensor is not None)


class Building:
    """The latents of all pictures into a store. Where there are several ranks, each encodes its share of every round: as
    many neighbours of one bucket as there are ranks times the batch size; the round ends with their exchange."""

    def __init__(self, vae: VaeWork, examples: Sequence[Example], *, placements: Sequence[Placement], flip_aug: bool,
                 store: LatentStore, watch: Watch, ranks: Ranks) -> None:
        self._lost: dict[int, str] = {}  # which pictures cannot be used, and why
        self._vae, self._examples, self._placements, self._store = vae, examples, placements, store
        self._flips = (False, True) if flip_aug else (False,)
        self._watch, self._ranks = watch, ranks
        self._problems: list[Problem] = []
        self._disk_failed = False

    @property
    def dropped(self) -> set[int]:
        """The pictures that cannot be used."""
        return set(self._lost)

    @property
    def problems(self) -> list[Problem]:
        """What the user should know of it."""
        notes = [Problem(note) for note in self._vae.notes]
        if self._store.failure:
            notes.append(Problem("All encoded pictures stay in memory, because the temporary file cannot be written: "
                                 f"{self._store.failure}."))
        lost = [skipped(self._examples[index], why) for index, why in self._lost.items()]
        return [*lost, *self._problems, *notes]

    def run(self, threads: int) -> None:
        """All of it, pictures being read in so many threads, which end with this call. Errors as `CachedLatents.build`."""
        rounds = list(self._rounds())
        own = [index for numbers in rounds for index in self._share(numbers)]
        with Ahead(own, self._find, threads=threads, most=_AHEAD_A_THREAD * max(1, threads), cost=self._cost,
                   kept=lambda found: found.bytes) as found:
            waiting: list[tuple[int, torch.Tensor]] = []
            for place, numbers in enumerate(rounds):
                self._watch.check()
                for index in self._share(numbers):
                    samples = self._settle(index, next(found))
                    if samples is not None:
                        waiting.append((index, samples))
                bucket = self._placements[numbers[0]].bucket
                last = place + 1 == len(rounds) or self._placements[rounds[place + 1][0]].bucket != bucket
                if self._ranks.world > 1:
                    self._encode(waiting, advance=False)
                    waiting = []
                    self._exchange(numbers)
                    self._watch.advance(len(numbers))
                elif last or len(waiting) >= self._vae.at_once(bucket):
                    self._encode(waiting)
                    waiting = []
        self._lost = all_texts(self._ranks, self._lost)
        self._vae.rest()

    def _rounds(self) -> Iterator[list[int]]:
        """Pictures of one bucket that are dealt with between two questions whether to stop."""
        for _, numbers in by_bucket(self._placements):
            step = 1
            if self._ranks.world > 1:
                # Not what is free on this card: all ranks must count the same rounds.
                step = self._ranks.world * (self._vae.batch_size or _A_ROUND)
            yield from (numbers[start:start + step] for start in range(0, len(numbers), step))

    def _share(self, numbers: Sequence[int]) -> Sequence[int]:
        """This process's pictures of a round."""
        return numbers[share(len(numbers), self._ranks)]

    def _cost(self, index: int) -> int:
        return decoding_bytes(self._placements[index])

    def _find(self, index: int) -> _Found:
        """In a thread: what is on disk, or the samples to encode."""
        example, placement, disk = self._examples[index], self._placements[index], self._store.disk
        if disk is not None:
            if self._ranks.world == 1 and not self._store.has_room(len(self._flips) * latent_bytes(placement)):
                if all(disk.holds(example.path, placement, flipped=flip) for flip in self._flips):
                    return _Found()
            else:
                stored = [disk.load(example.path, placement, flipped=flip) for flip in self._flips]
                if all(latents is not None for latents in stored):
                    parts = torch.stack([part for latents in stored if latents is not None for part in latents])
                    return _Found(latents=parts.unflatten(0, (len(stored), 2)))
            disk.observe(example.path)
        try:
            return _Found(samples=to_samples(scale_and_crop(decoded(example, placement), placement)))
        except DatasetError as error:
            return _Found(error=error)

    def _settle(self, index: int, found: _Found) -> torch.Tensor | None:
        """Keep what was found; the samples where they must be encoded."""
        example, placement = self._examples[index], self._placements[index]
        if found.samples is not None:
            return found.samples
        if found.error is not None:
            self._lost[index] = str(found.error)
        elif found.latents is None:
            self._store.put_cached(index, example.path, placement)
        else:
            self._store.put(index, found.latents, cached=(example.path, placement))
        if self._ranks.world == 1:
            self._watch.advance()
        return None

    def _encode(self, waiting: Sequence[tuple[int, torch.Tensor]], *, advance: bool = True) -> None:
        """Latents of these pictures, which share a bucket, and of their mirror images."""
        if not waiting:
            return
        at_once = self._vae.at_once(self._placements[waiting[0][0]].bucket)
        for start in range(0, len(waiting), at_once):
            part = waiting[start:start + at_once]
            # One synchronisation a batch, before training.
            latents = self._vae.encode([samples for _, samples in part], self._flips).cpu()
            check_finite(latents, [self._examples[index] for index, _ in part])
            for (index, _), own in zip(part, latents, strict=True):
                own = own.clone()  # a view would keep the whole batch in memory
                self._store.put(index, own, cached=self._stored(index, own))
            if advance:
                self._watch.advance(len(part))

    def _stored(self, index: int, latents: torch.Tensor) -> tuple[Path, Placement] | None:
        """Write them to the disk cache, where there is one. Where they are found again; None if nowhere, or not needed."""
        disk, path, placement = self._store.disk, self._examples[index].path, self._placements[index]
        if disk is None or self._disk_failed:
            return None
        for flip, (mean, std) in zip(self._flips, latents, strict=True):
            why = disk.store(path, placement, flipped=flip, latents=(mean, std))
            if why is not None:
                self._disk_failed = True
                self._problems.append(Problem(f"The encoded pictures cannot be kept on disk: {why}."))
                return None
        if self._store.has_room(latents.nbytes):
            return None
        # A picture that changed since it was read is not stored.
        there = all(disk.holds(path, placement, flipped=flip) for flip in self._flips)
        return (path, placement) if there else None

    def _exchange(self, numbers: Sequence[int]) -> None:
        """Every rank gets the latents of the round; which pictures cannot be used, all know at the end."""
        width, height = self._placements[numbers[0]].bucket
        own = {index: torch.stack([self._store.take(index, flipped=flip) for flip in self._flips])
               for index in self._share(numbers) if index not in self._lost}
        shape = (len(self._flips), 2, 4, height // 8, width // 8)
        for index, latents in exchange(self._ranks, numbers, own, shape=shape).items():
            self._store.put(index, latents)


def check_pictures(examples: Sequence[Example], placements: Sequence[Placement], *, watch: Watch, ranks: Ranks, threads: int
                   ) -> dict[int, Problem]:
    """Decode every picture once, in so many threads, each rank its share; what is wrong with which, in their order."""
    def find(index: int) -> str:
        try:
            decoded(examples[index], placements[index])
        except DatasetError as error:
            return str(error)
        return ""

    lost: dict[int, str] = {}
    own = range(ranks.rank, len(examples), ranks.world)
    with Ahead(own, find, threads=threads, most=_AHEAD_A_THREAD * max(1, threads), kept=lambda text: 0,
               cost=lambda index: decoding_bytes(placements[index])) as found:
        for start in range(0, len(examples), ranks.world):
            watch.check()
            index = start + ranks.rank
            text = next(found) if index < len(examples) else ""
            if text:
                lost[index] = text
            watch.advance(min(ranks.world, len(examples) - start))
    return {index: skipped(examples[index], text) for index, text in all_texts(ranks, lost).items()}


def by_bucket(placements: Sequence[Placement]) -> Iterator[tuple[Size, list[int]]]:
    """(size, numbers of the pictures placed there), by size."""
    buckets: dict[Size, list[int]] = {}
    for index, placement in enumerate(placements):
        buckets.setdefault(placement.bucket, []).append(index)
    yield from sorted(buckets.items())


def decoded(example: Example, placement: Placement) -> Image.Image:
    """The picture; DatasetError if it is damaged, or no longer the one that was scanned."""
    picture = read_picture(example.path)
    if picture.size != placement.original:
        raise DatasetError(f"The picture {example.path} cannot be used", why="it changed after the run began")
    return picture


def latent_bytes(placement: Placement) -> int:
    """Size of the mean and the deviation of one picture."""
    width, height = placement.bucket
    return 2 * 4 * 4 * (width // 8) * (height // 8)


def decoding_bytes(placement: Placement) -> int:
    """What decoding and scaling one picture takes, its samples included."""
    (width, height), (across, down) = placement.original, placement.bucket
    return _DECODER_BYTES * width * height + 2 * _DECODER_BYTES * across * down


def skipped(example: Example, why: str) -> Problem:
    """How the user is told of a picture that is left out."""
    return Problem(f"Skipped: {why}", example.path, skipped=True)
