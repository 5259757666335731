"""Where the latents of a visit come from: encoded once (`CachedLatents`) or anew each time (`FreshLatents`).

The training loop sees only `LatentSource`. Both keep mean and standard deviation of the VAE's
posterior and not a sample, so that each step can draw a fresh one. Both decode every image once before
training starts; an image that fails then is dropped from `source.dataset` and named in its problems, so
whoever counted batches before must count again from `source.dataset` and `source.placements`.

What needs no model (`prepare`: reading, decoding, varying) may be done in any thread and ahead of time; what does
(`finish`) belongs to the thread that trains.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from PIL import ImageOps

from lib_lora_train.dataset.augment import (
    Variant,
    draw_crop,
    draw_degrees,
    draw_flip,
    scale_and_crop,
    to_samples,
    variants_of,
    vary_colour,
)
from lib_lora_train.dataset.buckets import Placement
from lib_lora_train.dataset.examples import Dataset, Problem
from lib_lora_train.dataset.prefetch import reading_threads
from lib_lora_train.dataset.progress import Progress, ShouldStop, Watch
from lib_lora_train.distributed import SINGLE_PROCESS, ProcessGroup
from lib_lora_train.errors import DatasetError
from lib_lora_train.inputs.latent_encoder import LatentEncoding, check_images, decoded, decoding_bytes, stop_of_any
from lib_lora_train.inputs.latent_files import LatentDisk
from lib_lora_train.inputs.latent_store import MOST_LATENT_BYTES, LatentStore
from lib_lora_train.inputs.vae_batches import Encoder, EncodingBudget, VaeBatches, check_finite


class Visit(NamedTuple):
    """A visit to an image as far as it goes without the model, and how the image was varied."""

    latents: torch.Tensor  # or what they are made from
    flipped: bool  # whether it is mirrored
    crop: tuple[int, int]  # (left, top) in the scaled image
    degrees: float = 0.0  # how far it is turned


class LatentSource(Protocol):
    """Latents of the examples of `dataset`, by index."""

    dataset: Dataset  # without the images that could not be decoded; those are among its problems
    placements: tuple[Placement, ...]  # one for each of dataset.examples

    def prepare(self, index: int, rng: random.Random) -> Visit:
        """What can be done without the model for a visit, in any thread; `rng` is all the visit's randomness."""

    def finish(self, indices: Sequence[int], prepared: Sequence[torch.Tensor]) -> torch.Tensor:
        """The rest, in the thread that trains, for visits to images that share a bucket: [B, 2, 4, h, w] unscaled fp32, the
        posterior's mean, then its standard deviation."""

    def size_of(self, indices: Sequence[int]) -> int:
        """Bytes that preparing these takes at most, its results included; 0 where nothing is to be gained from doing it
        ahead."""

    def close(self) -> None:
        """Remove what lies on disk for this run only."""


class CachedLatents:
    """Latents computed once, for each of an image's `variants_of`; in memory, and on disk what is too much."""

    def __init__(self, dataset: Dataset, placements: Sequence[Placement], *, store: LatentStore,
                 numbers: Sequence[int], variants: Sequence[Sequence[Variant]]) -> None:
        """`numbers[i]` is what `store` calls example i, `variants[i]` are its views there; the store is closed with this
        object."""
        self.dataset, self.placements = dataset, tuple(placements)
        self._store, self._numbers, self._variants = store, tuple(numbers), tuple(variants)

    @classmethod
    def build(
        cls, vae: Encoder, dataset: Dataset, placements: Sequence[Placement], *, seed: int = 0, vae_batch_size: int = 1,
        device: torch.device | str = "cpu", disk: LatentDisk | None = None, on_progress: Progress | None = None,
        should_stop: ShouldStop | None = None, threads: int | None = None,
        max_bytes: int = MOST_LATENT_BYTES, folder: Path | None = None, group: ProcessGroup = SINGLE_PROCESS,
        budget: EncodingBudget | None = None) -> CachedLatents:
        """Encode every image, bucket by bucket, in batches of `vae_batch_size` (0: see `VaeBatches`, also for `budget`). How
        far images are turned follows from `seed`.

        Images are read and decoded in `threads` (None: see `reading_threads`; 0: none) while the VAE works; the result
        does not depend on them. At most `max_bytes` of latents stay in memory; the others lie in a temporary
        file in `folder` (see `LatentStore`). With several processes each encodes its share and gets the others'; all of them
        must say the same dataset and settings.
        Raises TrainingError naming the image whose latent is not finite, DatasetError if no image can
        be decoded, Interrupted when `should_stop()` says so (asked before each image). No thread outlives the call.
        """
        notes: list[str] = []
        variants = [variants_of(example.subset.dataset, seed=seed, name=example.path.name) for example in dataset.examples]
        store = LatentStore(max_bytes=max_bytes, folder=folder)
        try:
            encoding = LatentEncoding(
                VaeBatches(vae, device=torch.device(device), batch_size=vae_batch_size, budget=budget, warn=notes.append),
                dataset.examples, placements, variants=variants, store=store, disk=disk)
            lost = encoding.run(
                threads=reading_threads() if threads is None else threads, group=group,
                watch=Watch(len(dataset.examples), doing="the pictures were encoded", on_progress=on_progress,
                            should_stop=stop_of_any(should_stop, group)))
            kept, kept_placements = _without(dataset, placements, lost, [*encoding.problems, *map(Problem, notes)])
        except BaseException:
            store.close()
            raise
        numbers = [i for i in range(len(dataset.examples)) if i not in lost]
        return cls(kept, kept_placements, store=store, numbers=numbers, variants=[variants[i] for i in numbers])

    def prepare(self, index: int, rng: random.Random) -> Visit:
        """See `LatentSource.prepare`: [2, 4, h, w]. Raises TrainingError where the disk refuses."""
        variants = self._variants[index]
        flips = 1 + variants[-1].flipped  # how many views each turn has
        flipped = flips == 2 and draw_flip(rng)
        turn = rng.randrange(len(variants) // flips) if len(variants) > flips else 0
        number = turn * flips + flipped
        latents = self._store.load(self._numbers[index], variant=number)
        return Visit(latents, flipped, self.placements[index].crop, variants[number].degrees)

    def finish(self, indices: Sequence[int], prepared: Sequence[torch.Tensor]) -> torch.Tensor:
        """See `LatentSource.finish`. On the CPU."""
        return torch.stack(list(prepared))

    def size_of(self, indices: Sequence[int]) -> int:
        """See `LatentSource.size_of`."""
        return sum(self._store.bytes_on_disk(self._numbers[index]) for index in indices)

    def close(self) -> None:
        """See `LatentSource.close`. Nothing can be had from it afterwards."""
        self._store.close()


class FreshLatents:
    """Images opened, varied and encoded anew at each visit: for colour changes and random crops."""

    def __init__(
        self, vae: Encoder, dataset: Dataset, placements: Sequence[Placement], *, vae_batch_size: int,
        device: torch.device, warn: Callable[[str], None] = lambda text: None,
    ) -> None:
        """`warn` is told in a sentence what the user should know of the encoding, while it goes on."""
        self.dataset, self.placements = dataset, tuple(placements)
        self._vae_batches = VaeBatches(vae, device=device, batch_size=vae_batch_size, warn=warn)

    @classmethod
    def build(
        cls, vae: Encoder, dataset: Dataset, placements: Sequence[Placement], *, vae_batch_size: int = 1,
        device: torch.device | str = "cpu", on_progress: Progress | None = None, should_stop: ShouldStop | None = None,
        threads: int | None = None, group: ProcessGroup = SINGLE_PROCESS,
        warn: Callable[[str], None] = lambda text: None,
    ) -> FreshLatents:
        """Decode every image once, to find the damaged ones before training. Parameters and errors as in
        `CachedLatents.build`."""
        watch = Watch(len(dataset.examples), doing="the pictures were checked", on_progress=on_progress,
                      should_stop=stop_of_any(should_stop, group))
        lost = check_images(dataset.examples, placements, watch=watch, group=group,
                            threads=reading_threads() if threads is None else threads)
        kept, kept_placements = _without(dataset, placements, lost, [])
        return cls(vae, kept, kept_placements, vae_batch_size=vae_batch_size, device=torch.device(device), warn=warn)

    def prepare(self, index: int, rng: random.Random) -> Visit:
        """See `LatentSource.prepare`: samples [H, W, 3] uint8. Raises DatasetError if an image vanished or changed since the
        start."""
        example, placement = self.dataset.examples[index], self.placements[index]
        chosen = example.subset.dataset
        flipped = chosen.flip_aug and draw_flip(rng)
        crop = draw_crop(placement, rng) if chosen.random_crop else placement.crop
        degrees = draw_degrees(chosen.rotate_aug_degrees, rng) if chosen.rotate_aug_degrees else 0.0
        image = scale_and_crop(decoded(example, placement), placement, crop=crop, degrees=degrees)
        image = vary_colour(image, rng) if chosen.color_aug else image
        return Visit(to_samples(ImageOps.mirror(image) if flipped else image), flipped, crop, degrees)

    def finish(self, indices: Sequence[int], prepared: Sequence[torch.Tensor]) -> torch.Tensor:
        """See `LatentSource.finish`. On the VAE's device. Raises TrainingError naming an image whose latent is not finite."""
        latents = self._vae_batches.encode(prepared, (False,))[:, 0]
        # One device synchronisation a batch; this path waits for the decoder anyway.
        check_finite(latents, [self.dataset.examples[index] for index in indices])
        return latents

    def size_of(self, indices: Sequence[int]) -> int:
        """See `LatentSource.size_of`. One image is decoded at a time; the samples of the others wait."""
        placements = [self.placements[index] for index in indices]
        return max(decoding_bytes(self.dataset.examples[index], self.placements[index]) for index in indices) + sum(
            3 * placement.bucket[0] * placement.bucket[1] for placement in placements)

    def close(self) -> None:
        """See `LatentSource.close`. There is nothing."""


def _without(dataset: Dataset, placements: Sequence[Placement], lost: Mapping[int, Problem], others: Sequence[Problem]
             ) -> tuple[Dataset, tuple[Placement, ...]]:
    """Dataset and placements without the lost examples; DatasetError if nothing to learn from is left. `others` are more
    problems of the dataset."""
    kept = [i for i in range(len(dataset.examples)) if i not in lost]
    problems = (*lost.values(), *others)
    if all(dataset.examples[i].is_regularisation for i in kept):
        raise DatasetError(
            f"No picture in {dataset.folder} can be used", why=" | ".join(p.text.rstrip(".") for p in problems[:3]),
            remedy="replace or remove the damaged pictures")
    examples = tuple(dataset.examples[i] for i in kept)
    return (replace(dataset, examples=examples, problems=(*dataset.problems, *problems)),
            tuple(placements[i] for i in kept))
