"""Where the latents of a visit come from: encoded once (`CachedLatents`) or anew each time (`FreshLatents`).

The training loop sees only `LatentSource`. Both keep mean and standard deviation of the VAE's
posterior and not a sample, so that each step can draw a fresh one. Both decode every picture once before
training starts; a picture that fails then is dropped from `source.dataset` and named in its problems, so
whoever counted batches before must count again from `source.dataset` and `source.placements`.

What needs no model (`prepare`: reading, decoding, varying) may be done in any thread and ahead of time; what does
(`finish`) belongs to the thread that trains.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import torch
from PIL import ImageOps

from lib_lora_train.dataset.augment import draw_crop, draw_flip, scale_and_crop, to_samples, vary_colour
from lib_lora_train.dataset.buckets import Placement
from lib_lora_train.dataset.folder import Dataset, Problem
from lib_lora_train.dataset.prefetch import reading_threads
from lib_lora_train.dataset.progress import Progress, ShouldStop, Watch
from lib_lora_train.distributed import SINGLE_PROCESS, ProcessGroup
from lib_lora_train.errors import DatasetError
from lib_lora_train.inputs.exchange import stop_of_any
from lib_lora_train.inputs.latent_encoder import LatentEncoding, check_images, decoded, decoding_bytes, latent_bytes
from lib_lora_train.inputs.latent_files import LatentDisk
from lib_lora_train.inputs.overflow import MOST_LATENT_BYTES, LatentStore
from lib_lora_train.inputs.vae_batches import Encoder, Room, VaeWork, check_finite


@dataclass(frozen=True, eq=False)
class Latents:
    """Posterior of a batch of pictures of one bucket, unscaled fp32."""

    mean: torch.Tensor  # [B, 4, h, w]
    std: torch.Tensor  # [B, 4, h, w]
    flipped: tuple[bool, ...]  # [B], which of them are mirrored


@dataclass(frozen=True, eq=False)
class Prepared:
    """A batch as far as it goes without the model: latents or samples of each picture, on the CPU."""

    indices: tuple[int, ...]
    flipped: tuple[bool, ...]
    parts: tuple[torch.Tensor, ...]

    @property
    def bytes(self) -> int:
        """What it takes while it waits."""
        return sum(part.nbytes for part in self.parts)


class LatentSource(Protocol):
    """Latents of the examples of `dataset`, by index."""

    dataset: Dataset  # without the pictures that could not be decoded; those are among its problems
    placements: tuple[Placement, ...]  # one for each of dataset.examples

    def prepare(self, indices: Sequence[int], rngs: Sequence[random.Random]) -> Prepared:
        """What can be done without the model for examples that share a bucket, in any thread; `rngs[i]` is all the
        randomness of visit i."""

    def finish(self, prepared: Prepared) -> Latents:
        """The rest, in the thread that trains."""

    def size_of(self, indices: Sequence[int]) -> int:
        """Bytes that `prepare` takes at most, its result included; 0 where nothing is to be gained from doing it ahead."""

    def close(self) -> None:
        """Remove what lies on disk for this run only."""


class CachedLatents:
    """Latents computed once, mirrored ones too where `flip_aug` asks for them; in memory, and on disk what is too much."""

    def __init__(self, dataset: Dataset, placements: Sequence[Placement], *, flip_aug: bool, store: LatentStore,
                 numbers: Sequence[int]) -> None:
        """`numbers[i]` is what `store` calls example i; the store is closed with this object."""
        self.dataset, self.placements, self.flip_aug = dataset, tuple(placements), flip_aug
        self._store, self._numbers = store, tuple(numbers)

    @classmethod
    def build(
        cls, vae: Encoder, dataset: Dataset, placements: Sequence[Placement], *, flip_aug: bool = False,
        vae_batch_size: int = 1, device: torch.device | str = "cpu", disk: LatentDisk | None = None,
        on_progress: Progress | None = None, should_stop: ShouldStop | None = None, threads: int | None = None,
        max_bytes: int = MOST_LATENT_BYTES, folder: Path | None = None, group: ProcessGroup = SINGLE_PROCESS,
        room: Room | None = None) -> CachedLatents:
        """Encode every picture, bucket by bucket, in batches of `vae_batch_size` (0: see `VaeWork`, also for `room`).

        Pictures are read and decoded in `threads` (None: see `reading_threads`; 0: none) while the VAE works; the result
        does not depend on them. At most `max_bytes` of latents stay in memory; the others lie in the disk cache where
        there is one, else in a temporary file in `folder` (see `DiskOverflow`). With several processes each encodes its
        share and gets the others'; all of them must say the same dataset and settings.
        Raises TrainingError naming the picture whose latent is not finite, DatasetError if no picture can
        be decoded, Interrupted when `should_stop()` says so (asked before each picture). No thread outlives the call.
        """
        store = LatentStore(disk=disk, max_bytes=max_bytes, folder=folder)
        try:
            work = LatentEncoding(
                VaeWork(vae, device=torch.device(device), batch_size=vae_batch_size, room=room), dataset.examples,
                placements=placements, flip_aug=flip_aug, store=store, group=group,
                watch=Watch(len(dataset.examples), doing="the pictures were encoded", on_progress=on_progress,
                            should_stop=stop_of_any(should_stop, group)))
            work.run(reading_threads() if threads is None else threads)
            problems = work.problems
            kept, kept_placements = _without(dataset, placements, problems=problems, dropped=work.dropped)
        except BaseException:
            store.close()
            raise
        numbers = [i for i in range(len(dataset.examples)) if i not in work.dropped]
        return cls(kept, kept_placements, flip_aug=flip_aug, store=store, numbers=numbers)

    def prepare(self, indices: Sequence[int], rngs: Sequence[random.Random]) -> Prepared:
        """See `LatentSource.prepare`. Raises TrainingError where the disk no longer has what was put there."""
        flipped = tuple(self.flip_aug and draw_flip(rng) for rng in rngs)
        parts = tuple(self._store.take(self._numbers[index], flipped=flip)
                      for index, flip in zip(indices, flipped, strict=True))
        return Prepared(tuple(indices), flipped, parts)

    def finish(self, prepared: Prepared) -> Latents:
        """See `LatentSource.finish`. On the CPU."""
        return Latents(torch.stack([part[0] for part in prepared.parts]), torch.stack([part[1] for part in prepared.parts]),
                       prepared.flipped)

    def size_of(self, indices: Sequence[int]) -> int:
        """See `LatentSource.size_of`."""
        return sum(latent_bytes(self.placements[index]) for index in indices
                   if not self._store.in_memory(self._numbers[index]))

    def close(self) -> None:
        """See `LatentSource.close`. Nothing can be had from it afterwards."""
        self._store.close()


class FreshLatents:
    """Pictures opened, varied and encoded anew at each visit: for colour changes and random crops."""

    def __init__(
        self, vae: Encoder, dataset: Dataset, placements: Sequence[Placement], *, flip_aug: bool, color_aug: bool,
        random_crop: bool, vae_batch_size: int, device: torch.device, warn: Callable[[str], None] = lambda text: None,
    ) -> None:
        """`warn` is told in a sentence what the user should know of the encoding, while it goes on."""
        self.dataset, self.placements = dataset, tuple(placements)
        self._work = VaeWork(vae, device=device, batch_size=vae_batch_size)
        self._flip_aug, self._color_aug, self._random_crop, self._warn = flip_aug, color_aug, random_crop, warn

    @classmethod
    def build(
        cls, vae: Encoder, dataset: Dataset, placements: Sequence[Placement], *, flip_aug: bool = False,
        color_aug: bool = False, random_crop: bool = False, vae_batch_size: int = 1,
        device: torch.device | str = "cpu", on_progress: Progress | None = None,
        should_stop: ShouldStop | None = None, threads: int | None = None, group: ProcessGroup = SINGLE_PROCESS,
        warn: Callable[[str], None] = lambda text: None,
    ) -> FreshLatents:
        """Decode every picture once, to find the damaged ones before training. Parameters and errors as in
        `CachedLatents.build`."""
        watch = Watch(len(dataset.examples), doing="the pictures were checked", on_progress=on_progress,
                      should_stop=stop_of_any(should_stop, group))
        problems = check_images(dataset.examples, placements, watch=watch, group=group,
                                  threads=reading_threads() if threads is None else threads)
        kept, kept_placements = _without(dataset, placements, problems=list(problems.values()), dropped=set(problems))
        return cls(vae, kept, kept_placements, flip_aug=flip_aug, color_aug=color_aug, random_crop=random_crop,
                   vae_batch_size=vae_batch_size, device=torch.device(device), warn=warn)

    def prepare(self, indices: Sequence[int], rngs: Sequence[random.Random]) -> Prepared:
        """See `LatentSource.prepare`. Raises DatasetError if a picture vanished or changed since the start."""
        flipped = tuple(self._flip_aug and draw_flip(rng) for rng in rngs)
        return Prepared(tuple(indices), flipped, tuple(
            self._samples(index, rng, flip=flip) for index, rng, flip in zip(indices, rngs, flipped, strict=True)))

    def finish(self, prepared: Prepared) -> Latents:
        """See `LatentSource.finish`. On the VAE's device. Raises TrainingError naming a picture whose latent is not
        finite."""
        most = self._work.at_once(self.placements[prepared.indices[0]].bucket)
        latents = torch.cat([self._work.encode(prepared.parts[start:start + most], (False,))[:, 0]
                             for start in range(0, len(prepared.parts), most)])
        while self._work.notes:
            self._warn(self._work.notes.pop(0))
        # One device synchronisation a batch; this path waits for the decoder anyway.
        check_finite(latents, [self.dataset.examples[index] for index in prepared.indices])
        return Latents(latents[:, 0].contiguous(), latents[:, 1].contiguous(), prepared.flipped)

    def size_of(self, indices: Sequence[int]) -> int:
        """See `LatentSource.size_of`. One picture is decoded at a time; the samples of the others wait."""
        placements = [self.placements[index] for index in indices]
        return max(decoding_bytes(self.dataset.examples[index], self.placements[index]) for index in indices) + sum(
            3 * placement.bucket[0] * placement.bucket[1] for placement in placements)

    def close(self) -> None:
        """See `LatentSource.close`. There is nothing."""

    def _samples(self, index: int, rng: random.Random, *, flip: bool) -> torch.Tensor:
        placement = self.placements[index]
        crop = draw_crop(placement, rng) if self._random_crop else placement.crop
        image = scale_and_crop(decoded(self.dataset.examples[index], placement), placement, crop=crop)
        image = vary_colour(image, rng) if self._color_aug else image
        return to_samples(ImageOps.mirror(image) if flip else image)


def _without(dataset: Dataset, placements: Sequence[Placement], *, problems: Sequence[Problem], dropped: set[int]
             ) -> tuple[Dataset, tuple[Placement, ...]]:
    """Dataset and placements without the dropped examples; DatasetError if nothing to learn from is left."""
    kept = [i for i in range(len(dataset.examples)) if i not in dropped]
    if all(dataset.examples[i].is_regularisation for i in kept):
        raise DatasetError(
            f"No picture in {dataset.folder} can be used", why=" | ".join(p.text.rstrip(".") for p in problems[:3]),
            remedy="replace or remove the damaged pictures")
    examples = tuple(dataset.examples[i] for i in kept)
    return (replace(dataset, examples=examples, problems=(*dataset.problems, *problems)),
            tuple(placements[i] for i in kept))
