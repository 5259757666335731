"""Where the latents of a visit come from: encoded once (`CachedLatents`) or anew each time (`FreshLatents`).

The training loop sees only `LatentSource`. Both keep mean and standard deviation of the VAE's
posterior and not a sample, so that each step can draw a fresh one. Both decode every picture once before
training starts; a picture that fails then is dropped from `source.dataset` and named in its problems, so
whoever counted batches before must count again from `source.dataset` and `source.placements`.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from PIL import Image

from lib_lora_train.cache.disk import LatentDisk, MeanAndStd
from lib_lora_train.cache.exchange import exchange, own_part
from lib_lora_train.dataset.augment import draw_crop, draw_flip, scale_and_crop, to_tensor, vary_colour
from lib_lora_train.dataset.buckets import Placement, Size
from lib_lora_train.dataset.folder import Dataset, Example, Problem
from lib_lora_train.dataset.pictures import read_picture
from lib_lora_train.dataset.watch import Progress, ShouldStop, Watch
from lib_lora_train.errors import DatasetError, TrainingError, is_out_of_memory
from lib_lora_train.ranks import ALONE, Ranks


class Encoder(Protocol):
    """The part of the VAE that is needed here."""

    def encode(self, pixels: torch.Tensor) -> MeanAndStd:
        """pixels [B, 3, H, W] in [-1, 1] → (mean, std), each [B, 4, H/8, W/8], unscaled."""


@dataclass(frozen=True, eq=False)
class Latents:
    """Posterior of a batch of pictures of one bucket, unscaled fp32."""

    mean: torch.Tensor  # [B, 4, h, w]
    std: torch.Tensor  # [B, 4, h, w]
    flipped: tuple[bool, ...]  # [B], which of them are mirrored


class LatentSource(Protocol):
    """Latents of the examples of `dataset`, by index."""

    dataset: Dataset  # without the pictures that could not be decoded; those are among its problems
    placements: tuple[Placement, ...]  # one for each of dataset.examples

    def get(self, indices: Sequence[int], rngs: Sequence[random.Random]) -> Latents:
        """Latents of examples that share a bucket; `rngs[i]` is all the randomness of visit i."""


class CachedLatents:
    """Latents computed once and kept on the CPU, mirrored ones too where `flip_aug` asks for them."""

    def __init__(self, dataset: Dataset, placements: Sequence[Placement], *, flip_aug: bool,
                 latents: Sequence[tuple[MeanAndStd, ...]]) -> None:
        """`latents[i]` holds (mean, std) of example i, and with `flip_aug` those of its mirror image."""
        self.dataset, self.placements, self.flip_aug = dataset, tuple(placements), flip_aug
        self._latents = tuple(latents)

    @classmethod
    def build(
        cls, vae: Encoder, dataset: Dataset, placements: Sequence[Placement], *, flip_aug: bool = False,
        vae_batch_size: int = 1, device: torch.device | str = "cpu", disk: LatentDisk | None = None,
        on_progress: Progress | None = None, should_stop: ShouldStop | None = None, ranks: Ranks = ALONE,
    ) -> CachedLatents:
        """Encode every picture, bucket by bucket, in batches of `vae_batch_size`; each of `ranks` its part of them.

        Raises TrainingError naming the picture whose latent is not finite, DatasetError if no picture can
        be decoded, Interrupted when `should_stop()` says so (asked before each picture).
        """
        work = _Building(vae, dataset, placements=placements, flip_aug=flip_aug, device=torch.device(device), disk=disk)
        mine = own_part(placements, ranks)
        watch = Watch(len(mine), doing="the pictures were encoded", on_progress=on_progress, should_stop=should_stop)
        for bucket in _by_bucket(placements):
            waiting: list[tuple[int, torch.Tensor]] = []
            for index in filter(mine.__contains__, bucket):
                watch.check()
                pixels = work.from_disk_or_pixels(index)
                if pixels is not None:
                    waiting.append((index, pixels))
                if len(waiting) == vae_batch_size:
                    work.encode(waiting)
                    waiting = []
                watch.advance()
            if waiting:
                work.encode(waiting)
        if ranks.world > 1:
            work.exchange(ranks)
        kept, kept_placements = _without(dataset, placements, problems=work.problems, dropped=work.dropped)
        latents = [work.done[i] for i in range(len(dataset.examples)) if i not in work.dropped]
        return cls(kept, kept_placements, flip_aug=flip_aug, latents=latents)

    def get(self, indices: Sequence[int], rngs: Sequence[random.Random]) -> Latents:
        """See `LatentSource.get`. On the CPU."""
        flipped = tuple(self.flip_aug and draw_flip(rng) for rng in rngs)
        chosen = [self._latents[index][int(flip)] for index, flip in zip(indices, flipped, strict=True)]
        return Latents(torch.stack([mean for mean, _ in chosen]), torch.stack([std for _, std in chosen]), flipped)


class FreshLatents:
    """Pictures opened, varied and encoded anew at each visit: for colour changes and random crops."""

    def __init__(
        self, vae: Encoder, dataset: Dataset, placements: Sequence[Placement], *, flip_aug: bool, color_aug: bool,
        random_crop: bool, vae_batch_size: int, device: torch.device,
    ) -> None:
        self.dataset, self.placements = dataset, tuple(placements)
        self._vae, self._device, self._vae_batch_size = vae, device, vae_batch_size
        self._flip_aug, self._color_aug, self._random_crop = flip_aug, color_aug, random_crop

    @classmethod
    def build(
        cls, vae: Encoder, dataset: Dataset, placements: Sequence[Placement], *, flip_aug: bool = False,
        color_aug: bool = False, random_crop: bool = False, vae_batch_size: int = 1,
        device: torch.device | str = "cpu", on_progress: Progress | None = None,
        should_stop: ShouldStop | None = None,
    ) -> FreshLatents:
        """Decode every picture once, to find the damaged ones before training. Errors as in `CachedLatents.build`."""
        watch = Watch(len(dataset.examples), doing="the pictures were encoded", on_progress=on_progress,
                      should_stop=should_stop)
        problems: list[Problem] = []
        dropped: set[int] = set()
        for index, (example, placement) in enumerate(zip(dataset.examples, placements, strict=True)):
            watch.check()
            try:
                _decoded(example, placement)
            except DatasetError as error:
                problems.append(_skipped(example, error))
                dropped.add(index)
            watch.advance()
        kept, kept_placements = _without(dataset, placements, problems=problems, dropped=dropped)
        return cls(vae, kept, kept_placements, flip_aug=flip_aug, color_aug=color_aug, random_crop=random_crop,
                   vae_batch_size=vae_batch_size, device=torch.device(device))

    def get(self, indices: Sequence[int], rngs: Sequence[random.Random]) -> Latents:
        """See `LatentSource.get`. On the VAE's device.

        Raises DatasetError if a picture vanished or changed since the start, TrainingError naming a picture
        whose latent is not finite.
        """
        flipped = tuple(self._flip_aug and draw_flip(rng) for rng in rngs)
        pixels = torch.stack([
            self._pixels(index, rng, flip=flip) for index, rng, flip in zip(indices, rngs, flipped, strict=True)])
        parts = [_encoded(self._vae, part.to(self._device)) for part in pixels.split(self._vae_batch_size)]
        mean, std = (torch.cat([part[i] for part in parts]) for i in (0, 1))
        # One device synchronisation a batch; this path waits for the decoder anyway.
        _check_finite((mean, std), [self.dataset.examples[index] for index in indices])
        return Latents(mean, std, flipped)

    def _pixels(self, index: int, rng: random.Random, *, flip: bool) -> torch.Tensor:
        placement = self.placements[index]
        crop = draw_crop(placement, rng) if self._random_crop else placement.crop
        picture = scale_and_crop(_decoded(self.dataset.examples[index], placement), placement, crop=crop)
        tensor = to_tensor(vary_colour(picture, rng) if self._color_aug else picture)
        return tensor.flip(-1) if flip else tensor


class _Building:
    """What `CachedLatents.build` has so far."""

    def __init__(self, vae: Encoder, dataset: Dataset, *, placements: Sequence[Placement], flip_aug: bool,
                 device: torch.device, disk: LatentDisk | None) -> None:
        self.vae, self.examples, self.placements = vae, dataset.examples, placements
        self.flips = (False, True) if flip_aug else (False,)
        self.device, self.disk = device, disk
        self.done: dict[int, tuple[MeanAndStd, ...]] = {}
        self.dropped: set[int] = set()
        self.problems: list[Problem] = []
        self.disk_failed = False
        self.most = len(dataset.examples)  # pictures that the memory may suffice for at once

    def from_disk_or_pixels(self, index: int) -> torch.Tensor | None:
        """The pixels [3, H, W] to encode; None if the latents were on disk or the picture was dropped."""
        example, placement = self.examples[index], self.placements[index]
        if self.disk is not None:
            stored = [self.disk.load(example.path, placement, flipped=flip) for flip in self.flips]
            if all(latents is not None for latents in stored):
                self.done[index] = tuple(latents for latents in stored if latents is not None)
                return None
        try:
            return to_tensor(scale_and_crop(_decoded(example, placement), placement))
        except DatasetError as error:
            self.problems.append(_skipped(example, error))
            self.dropped.add(index)
            return None

    def encode(self, waiting: Sequence[tuple[int, torch.Tensor]]) -> None:
        """Latents of these pictures; half as many at once, from then on, where the memory does not suffice."""
        while waiting:
            part = waiting[:self.most]
            if self._fits(part):
                waiting = waiting[len(part):]
                continue
            self.most = len(part) // 2
            self.problems.append(Problem(
                f"The memory does not suffice to encode {len(part)} pictures at once (vae_batch_size); it goes on with "
                f"{self.most}."))
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def _fits(self, part: Sequence[tuple[int, torch.Tensor]]) -> bool:
        """Encode; False where more than one picture was too much. What the attempt held is free when this returns."""
        try:
            self._encode(part)
        except (MemoryError, RuntimeError) as error:
            if len(part) > 1 and is_out_of_memory(error):
                return False
            raise
        return True

    def _encode(self, waiting: Sequence[tuple[int, torch.Tensor]]) -> None:
        """Latents of these pictures, and of their mirror images; the VAE is not symmetric, so both are encoded."""
        pixels = torch.stack([tensor for _, tensor in waiting]).to(self.device)
        encoded = [_encoded(self.vae, pixels.flip(-1) if flip else pixels) for flip in self.flips]
        on_cpu = [(mean.cpu(), std.cpu()) for mean, std in encoded]  # one synchronisation a batch, before training
        for row, (index, _) in enumerate(waiting):
            latents = tuple((mean[row].clone(), std[row].clone()) for mean, std in on_cpu)
            for mean, std in latents:
                _check_finite((mean[None], std[None]), [self.examples[index]])
            self.done[index] = latents
            self._store(index)

    def exchange(self, ranks: Ranks) -> None:
        """Give the other processes what this one encoded, and take what they did. All know of all damaged pictures then."""
        own = {problem.path: problem.text for problem in self.problems if problem.skipped}
        self.done, texts = exchange(ranks, self.done, {i: own[self.examples[i].path] for i in self.dropped})
        others = [Problem(text, self.examples[i].path, skipped=True) for i, text in texts.items() if i not in self.dropped]
        self.problems, self.dropped = [*self.problems, *others], set(texts)

    def _store(self, index: int) -> None:
        if self.disk is None or self.disk_failed:
            return
        for flip, latents in zip(self.flips, self.done[index], strict=True):
            why = self.disk.store(self.examples[index].path, self.placements[index], flipped=flip, latents=latents)
            if why is not None:
                self.disk_failed = True
                self.problems.append(Problem(f"The encoded pictures cannot be kept on disk: {why}."))
                return


def _by_bucket(placements: Sequence[Placement]) -> Iterator[list[int]]:
    buckets: dict[Size, list[int]] = {}
    for index, placement in enumerate(placements):
        buckets.setdefault(placement.bucket, []).append(index)
    for size in sorted(buckets):
        yield buckets[size]


def _decoded(example: Example, placement: Placement) -> Image.Image:
    """The picture; DatasetError if it is damaged, or no longer the one that was scanned."""
    picture = read_picture(example.path)
    if picture.size != placement.original:
        raise DatasetError(f"The picture {example.path} cannot be used", why="it changed after the run began")
    return picture


@torch.no_grad()
def _encoded(vae: Encoder, pixels: torch.Tensor) -> MeanAndStd:
    mean, std = vae.encode(pixels)
    return mean.to(torch.float32), std.to(torch.float32)


def _check_finite(latents: MeanAndStd, examples: Sequence[Example]) -> None:
    """Each picture by itself: one bad picture in a batch would otherwise hide among the good ones."""
    mean, std = latents
    finite = (torch.isfinite(mean) & torch.isfinite(std)).flatten(1).all(dim=1).tolist()
    for example, fine in zip(examples, finite, strict=True):
        if not fine:
            raise TrainingError(
                f"The VAE turns the picture {example.path} into numbers that are not finite",
                why="the VAE's weights are damaged or overflow", remedy="choose another VAE, or remove this picture")


def _skipped(example: Example, error: DatasetError) -> Problem:
    return Problem(f"Skipped: {error}", example.path, skipped=True)


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
