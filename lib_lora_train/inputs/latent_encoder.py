"""The pass over all images before training starts: read and decoded in threads, encoded bucket by bucket.

Of several processes each takes every n-th image and receives what the others made of theirs.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeVar

import numpy as np
import torch
from PIL import Image

from lib_lora_train.dataset.augment import Variant, scale_and_crop, to_samples
from lib_lora_train.dataset.buckets import Placement, Size
from lib_lora_train.dataset.examples import Example, Problem
from lib_lora_train.dataset.images import read_image
from lib_lora_train.dataset.prefetch import Prefetch
from lib_lora_train.dataset.progress import ShouldStop, Watch
from lib_lora_train.distributed import ProcessGroup
from lib_lora_train.errors import DatasetError, counted
from lib_lora_train.inputs.latent_files import LatentDisk
from lib_lora_train.inputs.latent_store import LatentStore
from lib_lora_train.inputs.vae_batches import VaeBatches, check_finite

# At the most, for each pixel, as measured: Pillow has the image twice, 4 bytes each time, while it makes it RGB or turns it
# upright. A progressive JPEG waits in its decoder with 6 more, a WebP with 12.
_DECODER_BYTES = {".jpg": 10, ".jpeg": 10, ".jfif": 10, ".png": 10}
_OTHER_DECODER_BYTES = 17
_PREFETCH_PER_THREAD = 4  # images that may be ready, for each thread that makes them
_EXCHANGED = 16  # images of each process that are sent to the others together

T = TypeVar("T")


class LatentEncoding:
    """The latents of all images into a store; `problems` are what the user should know of it."""

    def __init__(self, vae: VaeBatches, examples: Sequence[Example], placements: Sequence[Placement], *,
                 variants: Sequence[Sequence[Variant]], store: LatentStore, disk: LatentDisk | None) -> None:
        """`variants[i]` are the views of example i that are encoded (see `variants_of`)."""
        self._vae, self._examples, self._placements, self._store, self._disk = vae, examples, placements, store, disk
        self._variants = variants
        self._unkept: Counter[str] = Counter()  # why images are not in the disk cache, and how many

    def run(self, *, threads: int, watch: Watch, group: ProcessGroup) -> dict[int, Problem]:
        """All of it; returns which images cannot be used, and why. Threads and errors as `CachedLatents.build`."""
        lost: dict[int, str] = {}
        order = sorted(range(len(self._examples)), key=self._group)
        waiting: list[tuple[int, torch.Tensor]] = []  # images of one bucket and their samples
        with contextlib.closing(pass_over(
                order, self._find, cost=lambda index: decoding_bytes(self._examples[index], self._placements[index]),
                kept=lambda found: found.nbytes, threads=threads, watch=watch, group=group)) as results:
            for index, found in results:
                if waiting and self._group(waiting[0][0]) != self._group(index):
                    self._encode(waiting)
                if isinstance(found, DatasetError):
                    lost[index] = str(found)
                elif found.dtype != torch.uint8:
                    self._store.put(index, found)
                else:
                    waiting.append((index, found))
                    if len(waiting) >= self._vae.at_once(self._placements[index].bucket):
                        self._encode(waiting)
        self._encode(waiting)
        if self._vae.device.type == "cuda":
            torch.cuda.empty_cache()  # what torch keeps for more of it is in pieces of other sizes than those of a step
        self._exchange(order, lost, group)
        return {index: _skipped(self._examples[index], why) for index, why in _merged(group, lost).items()}

    @property
    def problems(self) -> list[Problem]:
        """What else the user should know of."""
        unkept = [Problem(f"{counted(count, 'encoded picture')} cannot be kept on disk: {why}.")
                  for why, count in self._unkept.items()]
        if self._store.failure:
            unkept.append(Problem("All encoded pictures stay in memory, because the temporary file cannot be written: "
                                  f"{self._store.failure}."))
        return unkept

    def _find(self, index: int) -> torch.Tensor:
        """In a thread: latents [variants, 2, 4, h, w] fp32 from the disk cache, or samples [turns, H, W, 3] uint8 to encode."""
        example, placement = self._examples[index], self._placements[index]
        if self._disk is not None:
            with contextlib.suppress(OSError):  # what cannot be read there now is encoded
                parts = [self._disk.load(example.path, placement, variant=variant, renew=True)
                         for variant in self._variants[index]]
                found = [part.numpy() for part in parts if part is not None]
                if len(found) == len(parts):
                    return torch.from_numpy(np.stack(found))
            self._disk.observe(example.path)
        image = decoded(example, placement)
        return torch.stack([to_samples(scale_and_crop(image, placement, degrees=degrees))
                            for degrees in dict.fromkeys(variant.degrees for variant in self._variants[index])])

    def _group(self, index: int) -> tuple[Size, int, int]:
        """What images that are encoded together share: bucket, views, and mirrored ones among them."""
        variants = self._variants[index]
        return self._placements[index].bucket, len(variants), sum(variant.flipped for variant in variants)

    def _encode(self, waiting: list[tuple[int, torch.Tensor]]) -> None:
        """Latents of these images, which share a `_group`, and of their mirror images. Empties the list."""
        if not waiting:
            return
        flips = (False, True) if self._variants[waiting[0][0]][-1].flipped else (False,)
        # One synchronisation a batch, before training.
        latents = self._vae.encode([turn for _, samples in waiting for turn in samples], flips).cpu()
        latents = latents.unflatten(0, (len(waiting), -1)).flatten(1, 2)  # [images, turns · flips, 2, 4, h, w]
        check_finite(latents, [self._examples[index] for index, _ in waiting])
        for (index, _), own in zip(waiting, latents, strict=True):
            own = own.clone()  # a view would keep the whole batch in memory
            self._write(index, own)
            self._store.put(index, own)
        waiting.clear()

    def _write(self, index: int, latents: torch.Tensor) -> None:
        """Into the disk cache, where there is one."""
        for variant, own in zip(self._variants[index], latents, strict=True):
            why = None if self._disk is None else self._disk.store(
                self._examples[index].path, self._placements[index], variant=variant, latents=own)
            if why is not None:
                self._unkept[why] += 1
                return

    def _exchange(self, order: Sequence[int], lost: Mapping[int, str], group: ProcessGroup) -> None:
        """Every process gets the latents of the others, a few at a time."""
        step = _EXCHANGED * group.world_size
        for start in range(0, len(order) if group.world_size > 1 else 0, step):
            own = {index: torch.stack([self._store.load(index, variant=number) for number in range(len(self._variants[index]))])
                   for index in order[start:start + step][group.rank::group.world_size] if index not in lost}
            for index, latents in _merged(group, own).items():
                if index not in own:
                    self._store.put(index, latents)


def check_images(examples: Sequence[Example], placements: Sequence[Placement], *, watch: Watch, group: ProcessGroup,
                 threads: int) -> dict[int, Problem]:
    """Decode every image once; what is wrong with which, in their order."""
    def find(index: int) -> None:
        decoded(examples[index], placements[index])

    lost: dict[int, str] = {}
    with contextlib.closing(pass_over(
            range(len(examples)), find, cost=lambda index: decoding_bytes(examples[index], placements[index]),
            kept=lambda nothing: 0, threads=threads, watch=watch, group=group)) as results:
        for index, error in results:
            if error is not None:
                lost[index] = str(error)
    return {index: _skipped(examples[index], why) for index, why in _merged(group, lost).items()}


def pass_over(order: Sequence[int], find: Callable[[int], T], *, cost: Callable[[int], int], kept: Callable[[T], int],
              threads: int, watch: Watch, group: ProcessGroup) -> Iterator[tuple[int, T | DatasetError]]:
    """(index, find(index) or why the image cannot be used) of this process's images in their order; the others' are waited
    for, so that all notice a stop. What the memory did not suffice for in a thread is tried once more when its turn comes.
    `cost` and `kept` as for `Prefetch`. To be closed."""
    world, rank = group.world_size, group.rank
    with Prefetch(order[rank::world], find, threads=threads, most=_PREFETCH_PER_THREAD * max(1, threads), cost=cost,
                  kept=kept) as prefetch:
        for start in range(0, len(order), world):
            watch.check()
            for index in order[start:start + world][rank:rank + 1]:
                found = _result(lambda: next(prefetch))
                if isinstance(found, DatasetError) and isinstance(found.__cause__, MemoryError):
                    found = _result(lambda index=index: find(index))
                yield index, found
            watch.advance(len(order[start:start + world]))


def _result(call: Callable[[], T]) -> T | DatasetError:
    try:
        return call()
    except DatasetError as error:
        return error


def _merged(group: ProcessGroup, own: Mapping[int, T]) -> dict[int, T]:
    """What all processes have, by image number; `own` is this process's part."""
    return dict(sorted(item for part in group.all_gather(dict(own)) for item in part.items()))


def stop_of_any(should_stop: ShouldStop | None, group: ProcessGroup) -> ShouldStop | None:
    """Whether any of the processes was asked to stop."""
    if group.world_size == 1:
        return should_stop
    return lambda: group.any(should_stop is not None and should_stop())


def decoded(example: Example, placement: Placement) -> Image.Image:
    """The image; DatasetError if it is damaged, or no longer the one that was scanned."""
    image = read_image(example.path)
    if image.size != placement.original:
        raise DatasetError(f"The picture {example.path} cannot be used", why="it changed after the run began")
    return image


def decoding_bytes(example: Example, placement: Placement) -> int:
    """What decoding and scaling one image takes, its samples included."""
    (width, height), (across, down) = placement.original, placement.bucket
    a_pixel = _DECODER_BYTES.get(example.path.suffix.lower(), _OTHER_DECODER_BYTES)
    return a_pixel * width * height + 16 * across * down


def _skipped(example: Example, why: str) -> Problem:
    """How the user is told of an image that is left out."""
    return Problem(f"Skipped: {why}", example.path, skipped=True)
