"""From a decoded image to the network's input: scaling, crop, colour, tensor. Randomness is passed in.

The strengths are kohya's (sd-scripts, `AugHelper`): flip 0.5; colour 0.33, of which half hue ±8 of 180
and half gamma 0.95…1.05.
"""

from __future__ import annotations

import random

import numpy as np
import torch
from PIL import Image

from lib_lora_train.dataset.buckets import Placement

FLIP_PROBABILITY = 0.5
COLOUR_PROBABILITY = 0.33
_HUE_SHIFT = 8 / 180  # of the whole circle
_GAMMA = (0.95, 1.05)


def scale_and_crop(image: Image.Image, placement: Placement, *, crop: tuple[int, int] | None = None,
                   resampling: Image.Resampling = Image.Resampling.LANCZOS) -> Image.Image:
    """The image at bucket size, cut at `crop` (left, top in the scaled image; default: its centre).

    Only the part that is kept is computed: scaling a strip of 100000×10 to cover a bucket would
    otherwise take gigabytes.
    """
    assert image.size == placement.original, f"placed as {placement.original}, decoded as {image.size}"
    crop = placement.crop if crop is None else crop
    if placement.resized == placement.original:
        return image.crop((*crop, crop[0] + placement.bucket[0], crop[1] + placement.bucket[1]))
    return image.resize(placement.bucket, resampling, box=placement.source_box(crop))


def draw_flip(rng: random.Random) -> bool:
    """Whether this visit sees the image mirrored."""
    return rng.random() < FLIP_PROBABILITY


def draw_crop(placement: Placement, rng: random.Random) -> tuple[int, int]:
    """(left, top) anywhere the bucket fits inside the scaled image."""
    return rng.randint(0, placement.slack[0]), rng.randint(0, placement.slack[1])


def vary_colour(image: Image.Image, rng: random.Random) -> Image.Image:
    """In one of three visits a slightly different hue or gamma; otherwise the image itself."""
    if rng.random() >= COLOUR_PROBABILITY:
        return image
    if rng.random() < 0.5:
        return _turn_hue(image, rng.uniform(-_HUE_SHIFT, _HUE_SHIFT))
    gamma = rng.uniform(*_GAMMA)
    return image.point([round(255 * (i / 255) ** gamma) for i in range(256)] * 3)


def to_tensor(image: Image.Image) -> torch.Tensor:
    """RGB image → [3, H, W] float32 in [-1, 1]."""
    return to_network(to_samples(image))


def to_samples(image: Image.Image) -> torch.Tensor:
    """RGB image → [H, W, 3] uint8 on the CPU ([H, W] of a mask): a quarter of the size of the network's input."""
    return torch.from_numpy(np.array(image, dtype=np.uint8))


def to_network(samples: torch.Tensor) -> torch.Tensor:
    """[…, H, W, 3] uint8 → […, 3, H, W] float32 in [-1, 1], contiguous, on the samples' device."""
    pixels = samples.movedim(-1, -3).to(torch.float32, memory_format=torch.contiguous_format)
    return pixels.div_(127.5).sub_(1.0)


def _turn_hue(image: Image.Image, part_of_circle: float) -> Image.Image:
    hue, saturation, value = image.convert("HSV").split()
    shift = round(part_of_circle * 256)
    turned = hue.point([(i + shift) % 256 for i in range(256)])
    return Image.merge("HSV", (turned, saturation, value)).convert("RGB")
