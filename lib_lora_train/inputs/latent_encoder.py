"""The pass over all pictures before training starts: read and decoded in threads, encoded bucket by bucket."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from lib_lora_train.dataset.augment import scale_and_crop, to_samples
from lib_lora_train.dataset.buckets import Placement, Size
from lib_lora_train.dataset.folder import Example, Problem
from lib_lora_train.dataset.images import read_image
from lib_lora_train.dataset.prefetch import Prefetch
from lib_lora_train.dataset.progress import Watch
from lib_lora_train.distributed import ProcessGroup, rows_of
from lib_lora_train.errors import DatasetError
from lib_lora_train.inputs.exchange import merged
from lib_lora_train.inputs.overflow import LatentStore
from lib_lora_train.inputs.vae_batches import VaeWork, check_finite

# At the most, for each pixel, as measured: Pillow has the picture twice, 4 bytes each time, while it makes it RGB or turns it
# upright. A progressive JPEG waits in its decoder with 6 more, a WebP with 12.
_DECODER_BYTES = {".jpg": 10, ".jpeg": 10, ".jfif": 10, ".png": 10}
_OTHER_DECODER_BYTES = 17
_PREFETCH_PER_THREAD = 4  # pictures that may be ready, for each thread that makes them
_A_ROUND = 4  # images that each of several processes encodes before an exchange, where the device decides the batch size


@dataclass(frozen=True, eq=False)
class _Found:
    """What a thread has found out about one picture: one of these."""

    samples: torch.Tensor | None = None  # [H, W, 3] uint8, to be encoded
    latents: torch.Tensor | None = None  # [flips, 2, 4, h, w], from the disk cache
    error: DatasetError | None = None

    @property
    def bytes(self) -> int:
        return sum(tensor.nbytes for tensor in (self.samples, self.latents) if tensor is not None)


class LatentEncoding:
    """The latents of all pictures into a store. With several processes each encodes its part of every
    round: as many images of one bucket as there are processes times the batch size; the round ends with their exchange."""

    def __init__(self, vae: VaeWork, examples: Sequence[Example], *, placements: Sequence[Placement], flip_aug: bool,
                 store: LatentStore, watch: Watch, group: ProcessGroup) -> None:
        self._lost: dict[int, str] = {}  # which pictures cannot be used, and why
        self._vae, self._examples, self._placements, self._store = vae, examples, placements, store
        self._flips = (False, True) if flip_aug else (False,)
        self._watch, self._group = watch, group
        self._starved: list[int] = []  # pictures that the memory did not suffice for beside others
        self._unkept: dict[str, int] = {}  # why pictures are not in the disk cache, and how many

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
        unkept = [Problem(f"{count} encoded picture(s) cannot be kept on disk: {why}.") for why, count in self._unkept.items()]
        return [*lost, *unkept, *notes]

    def run(self, threads: int) -> None:
        """All of it, pictures being read in so many threads, which end with this call. Errors as `CachedLatents.build`."""
        rounds = list(self._rounds())
        own = [index for numbers in rounds for index in self._share(numbers)]
        with Prefetch(own, self._find, threads=threads, most=_PREFETCH_PER_THREAD * max(1, threads), cost=self._cost,
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
                if self._group.world_size > 1:
                    self._encode(waiting, advance=False)
                    waiting = []
                    self._exchange(numbers)
                    self._watch.advance(len(numbers))
                elif last or 0 < len(waiting) >= self._vae.at_once(bucket):
                    self._encode(waiting)
                    waiting = []
        for index in self._starved:
            self._watch.check()
            samples = self._settle(index, self._find(index), alone=True)
            self._encode([] if samples is None else [(index, samples)])
        self._lost = merged(self._group, self._lost)
        self._vae.rest()

    def _rounds(self) -> Iterator[list[int]]:
        """Pictures of one bucket that are dealt with between two questions whether to stop."""
        for _, numbers in by_bucket(self._placements):
            step = 1
            if self._group.world_size > 1:
                # Not what is free on this GPU: all processes must count the same rounds.
                step = self._group.world_size * (self._vae.batch_size or _A_ROUND)
            yield from (numbers[start:start + step] for start in range(0, len(numbers), step))

    def _share(self, numbers: Sequence[int]) -> Sequence[int]:
        """This process's pictures of a round."""
        return numbers[rows_of(len(numbers), self._group)]

    def _cost(self, index: int) -> int:
        return decoding_bytes(self._examples[index], self._placements[index])

    def _find(self, index: int) -> _Found:
        """In a thread: what is on disk, or the samples to encode."""
        example, placement, disk = self._examples[index], self._placements[index], self._store.disk
        if disk is not None:
            latents = self._on_disk(index, renew=True)
            if latents is not None:
                return _Found(latents=latents)
            disk.observe(example.path)
        try:
            return _Found(samples=to_samples(scale_and_crop(decoded(example, placement), placement)))
        except DatasetError as error:
            return _Found(error=error)

    def _on_disk(self, index: int, *, renew: bool = False) -> torch.Tensor | None:
        """[flips, 2, 4, h, w] from the disk cache; what cannot be read there now is encoded. In any thread."""
        disk, parts = self._store.disk, []
        assert disk is not None
        for flip in self._flips:
            try:
                part = disk.load(self._examples[index].path, self._placements[index], flipped=flip, renew=renew)
            except OSError:
                return None
            if part is None:
                return None
            parts.append(part.numpy())
        return torch.from_numpy(np.stack(parts))

    def _settle(self, index: int, found: _Found, *, alone: bool = False) -> torch.Tensor | None:
        """Keep what was found; the samples where they must be encoded."""
        if starved(found.error) and not alone:
            if self._group.world_size == 1:
                self._starved.append(index)  # its turn comes when no thread is at work
                return None
            found = self._find(index)  # the others wait for this round
        if found.samples is not None:
            return found.samples
        if found.error is not None:
            self._lost[index] = str(found.error)
        elif found.latents is not None:
            self._store.put(index, found.latents, cached=(self._examples[index].path, self._placements[index]))
        if self._group.world_size == 1:
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
                self._write(index, own)
                self._put(index, own)
            if advance:
                self._watch.advance(len(part))

    def _write(self, index: int, latents: torch.Tensor) -> None:
        """Into the disk cache, where there is one."""
        for flip, own in zip(self._flips, latents, strict=True):
            why = None if self._store.disk is None else self._store.disk.store(
                self._examples[index].path, self._placements[index], flipped=flip, latents=own)
            if why is not None:
                self._unkept[why] = self._unkept.get(why, 0) + 1
                return

    def _put(self, index: int, latents: torch.Tensor) -> None:
        """Into the store; where it has no room, they are read from the disk cache if just these are there (a picture that
        changed since it was read is not, nor is what another machine encoded)."""
        cached = None
        if self._store.disk is not None and not self._store.has_room(latents.nbytes):
            found = self._on_disk(index)
            if found is not None and torch.equal(found, latents):
                cached = self._examples[index].path, self._placements[index]
        self._store.put(index, latents, cached=cached)

    def _exchange(self, numbers: Sequence[int]) -> None:
        """Every process gets the latents of the round; which images cannot be used, all know at the end."""
        own = {index: torch.stack([self._store.take(index, flipped=flip) for flip in self._flips])
               for index in self._share(numbers) if index not in self._lost}
        for index, latents in merged(self._group, own).items():
            if index not in own:
                self._put(index, latents)


def check_images(examples: Sequence[Example], placements: Sequence[Placement], *, watch: Watch, group: ProcessGroup,
                 threads: int) -> dict[int, Problem]:
    """Decode every picture once, in so many threads, each rank its share; what is wrong with which, in their order."""
    def find(index: int) -> tuple[str, bool]:
        """What is wrong with it ("": nothing), and whether it is only that the memory did not suffice."""
        try:
            decoded(examples[index], placements[index])
        except DatasetError as error:
            return str(error), starved(error)
        return "", False

    found: dict[int, tuple[str, bool]] = {}
    own = range(group.rank, len(examples), group.world_size)
    with Prefetch(own, find, threads=threads, most=_PREFETCH_PER_THREAD * max(1, threads), kept=lambda text: 0,
               cost=lambda index: decoding_bytes(examples[index], placements[index])) as ahead:
        for start in range(0, len(examples), group.world_size):
            watch.check()
            if start + group.rank < len(examples):
                found[start + group.rank] = next(ahead)
            watch.advance(min(group.world_size, len(examples) - start))
    found |= {index: find(index) for index, (_, hungry) in found.items() if hungry}  # alone now
    lost = {index: text for index, (text, _) in found.items() if text}
    return {index: skipped(examples[index], text) for index, text in merged(group, lost).items()}


def by_bucket(placements: Sequence[Placement]) -> Iterator[tuple[Size, list[int]]]:
    """(size, numbers of the pictures placed there), by size."""
    buckets: dict[Size, list[int]] = {}
    for index, placement in enumerate(placements):
        buckets.setdefault(placement.bucket, []).append(index)
    yield from sorted(buckets.items())


def decoded(example: Example, placement: Placement) -> Image.Image:
    """The picture; DatasetError if it is damaged, or no longer the one that was scanned."""
    image = read_image(example.path)
    if image.size != placement.original:
        raise DatasetError(f"The picture {example.path} cannot be used", why="it changed after the run began")
    return image


def latent_bytes(placement: Placement) -> int:
    """Size of the mean and the deviation of one picture."""
    width, height = placement.bucket
    return 2 * 4 * 4 * (width // 8) * (height // 8)


def decoding_bytes(example: Example, placement: Placement) -> int:
    """What decoding and scaling one picture takes, its samples included."""
    (width, height), (across, down) = placement.original, placement.bucket
    a_pixel = _DECODER_BYTES.get(example.path.suffix.lower(), _OTHER_DECODER_BYTES)
    return a_pixel * width * height + 16 * across * down


def starved(error: DatasetError | None) -> bool:
    """Whether a picture may well be decoded once there is more memory."""
    return error is not None and isinstance(error.__cause__, MemoryError)


def skipped(example: Example, why: str) -> Problem:
    """How the user is told of a picture that is left out."""
    return Problem(f"Skipped: {why}", example.path, skipped=True)
