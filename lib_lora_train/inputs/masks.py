"""What of each image is learnt, as weights for its latents.

A mask goes the way of its image: scaled, cut and mirrored alike, then averaged over the pixels of each latent. It is no part of
the latents: they are the same with any mask, in memory and on disk.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from lib_lora_train.dataset.augment import scale_and_crop, to_samples
from lib_lora_train.dataset.buckets import Placement
from lib_lora_train.dataset.examples import Dataset, Masked
from lib_lora_train.dataset.masks import read_mask
from lib_lora_train.dataset.prefetch import Prefetch
from lib_lora_train.errors import DatasetError
from lib_lora_train.inputs.latents import Visit

_MOST_CUT = 4096  # cut masks that are kept where visits vary, of 16 kB at 1024²


class Masks:
    """The masks of a dataset, by the number of the example; images without one are learnt whole."""

    def __init__(self, dataset: Dataset, placements: Sequence[Placement], paths: Mapping[Masked, Path], *, factor: int,
                 unmasked_weight: float, prior_weight: float, threads: int, warn: Callable[[str], None]) -> None:
        """Read each mask once, in so many threads (0: none). `paths` are those of `masks_of`; `factor` pixels are a
        latent; `unmasked_weight` is that of what a mask leaves out, `prior_weight` what it counts towards the base model's
        prediction. `warn` is told of a mask that cannot be used."""
        self._dataset, self._placements, self._paths, self._factor = dataset, placements, paths, factor
        self._unmasked_weight, self._prior_weight = unmasked_weight, prior_weight
        self._cut_again = functools.lru_cache(maxsize=_MOST_CUT)(self._cut)
        self._read: dict[int, Tensor] = {}  # [1, h, w] uint8 each, cut as without random crop
        wanted = [index for index, example in enumerate(dataset.examples) if example.masked in paths]
        with Prefetch(wanted, self._try, threads=threads, most=16 * max(1, threads), cost=self._bytes,
                      kept=lambda found: 0) as found:
            for index, mask in zip(wanted, found, strict=True):
                if isinstance(mask, str):
                    warn(f"{mask.rstrip('.')}: all of its picture {dataset.examples[index].path.name} is learnt.")
                else:
                    self._read[index] = mask

    def weights(self, indices: Sequence[int], visits: Sequence[Visit]) -> dict[str, Tensor]:
        """{"mask", "prior"} of a batch (see `Batch`) for visits to images that share a bucket, "prior" only where it counts. In
        any thread. Raises DatasetError if a mask vanished since the start."""
        white = torch.stack([self._white(index, visit) for index, visit in zip(indices, visits, strict=True)])
        weights = {"mask": self._unmasked_weight + (1 - self._unmasked_weight) * white}
        return {**weights, "prior": self._prior_weight * (1 - white)} if self._prior_weight else weights

    def _white(self, index: int, visit: Visit) -> Tensor:
        """[1, h, w] fp32: how much of each latent is learnt."""
        placement = self._placements[index]
        if index not in self._read:
            width, height = placement.bucket
            return torch.ones(1, height // self._factor, width // self._factor)
        as_read = visit.crop == placement.crop and not visit.degrees
        white = self._read[index] if as_read else self._cut_again(index, visit.crop, degrees=visit.degrees)
        return (white.flip(-1) if visit.flipped else white).float() / 255

    def _try(self, index: int) -> Tensor | str:
        try:
            return self._cut(index, self._placements[index].crop)
        except DatasetError as error:
            return str(error)

    def _cut(self, index: int, crop: tuple[int, int], *, degrees: float = 0.0) -> Tensor:
        """[1, h, w] uint8: the mask at the latents' size, cut at `crop` and turned."""
        example, placement = self._dataset.examples[index], self._placements[index]
        mask = read_mask(example.path, self._paths[example.masked])
        if mask.size != placement.original:
            mask = mask.resize(placement.original, Image.Resampling.BILINEAR)
        cut = scale_and_crop(mask, placement, crop=crop, degrees=degrees, resampling=Image.Resampling.BILINEAR)
        return F.avg_pool2d(to_samples(cut)[None].float(), self._factor).round().to(torch.uint8)

    def _bytes(self, index: int) -> int:
        width, height = self._placements[index].original
        return 8 * width * height
