"""From a decoded image or its mask to the network's input: scaling, crop, rotation, colour, tensor. Randomness is passed in.

The strengths are kohya's (sd-scripts, `AugHelper`): flip 0.5; colour 0.33, of which half hue ±8 of 180
and half gamma 0.95…1.05.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from lib_lora_train.dataset.buckets import Placement, Size
from lib_lora_train.settings import DatasetSettings

FLIP_PROBABILITY = 0.5
COLOUR_PROBABILITY = 0.33
_HUE_SHIFT = 8 / 180  # of the whole circle
_GAMMA = (0.95, 1.05)


@dataclass(frozen=True)
class Variant:
    """One of the fixed views of an image: turned by so many degrees, then mirrored or not."""

    degrees: float = 0.0
    flipped: bool = False


AS_IT_IS = Variant()


def variants_of(chosen: DatasetSettings, *, seed: int, name: str) -> tuple[Variant, ...]:
    """The views that are encoded of an image of this name, each turn with its mirrored one behind it.

    The turns share the range evenly, one drawn in each n-th part of it.
    """
    flips = (False, True) if chosen.flip_aug else (False,)
    most, count = chosen.rotate_aug_degrees, chosen.rotate_aug_variants
    if not most:
        return tuple(Variant(flipped=flip) for flip in flips)
    rng = random.Random(f"{seed}/rotation/{name}")
    turns = [round(most * (2 * (part + rng.random()) / count - 1), 3) for part in range(count)]
    return tuple(Variant(degrees, flip) for degrees in turns for flip in flips)


def scale_and_crop(image: Image.Image, placement: Placement, *, crop: tuple[int, int] | None = None, degrees: float = 0.0,
                   resampling: Image.Resampling = Image.Resampling.LANCZOS) -> Image.Image:
    """The image, or its mask, at bucket size, cut at `crop` (left, top in the scaled image; default: its centre). Turned by
    `degrees` (anticlockwise) around the middle of that, and cut smaller where corners would be empty.

    Only the part that is kept is computed: scaling a strip of 100000×10 to cover a bucket would
    otherwise take gigabytes.
    """
    assert image.size == placement.original, f"placed as {placement.original}, decoded as {image.size}"
    crop = placement.crop if crop is None else crop
    if degrees:
        return _turned(image, placement.source_box(crop), size=placement.bucket, degrees=degrees, resampling=resampling)
    if placement.resized == placement.original:
        return image.crop((*crop, crop[0] + placement.bucket[0], crop[1] + placement.bucket[1]))
    return image.resize(placement.bucket, resampling, box=placement.source_box(crop))


def _turned(image: Image.Image, box: tuple[float, float, float, float], *, size: Size, degrees: float,
            resampling: Image.Resampling) -> Image.Image:
    """What a frame shows that is turned around the middle of `box` (in the image's pixels), as large as that or as large as
    the image holds, at `size`."""
    across, down = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))

    def extent(width: float, height: float) -> tuple[float, float]:
        """Of a turned frame, half its width and height."""
        return (width * abs(cos) + height * abs(sin)) / 2, (width * abs(sin) + height * abs(cos)) / 2

    wide, high = extent(box[2] - box[0], box[3] - box[1])
    shrunk = min(1.0, min(across, image.width - across) / wide, min(down, image.height - down) / high)
    width, height, wide, high = (shrunk * length for length in (box[2] - box[0], box[3] - box[1], wide, high))
    # Scaled first, with a filter that sees all pixels, then turned at about the final size.
    part_size = math.ceil(2 * wide * size[0] / width), math.ceil(2 * high * size[1] / height)
    part = image.resize(part_size, resampling, box=(
        max(0.0, across - wide), max(0.0, down - high), min(image.width, across + wide), min(image.height, down + high)))
    x, y = part.width / (2 * wide), part.height / (2 * high)  # the part's pixels for one of the image
    a, b, d, e = (x * cos * width / size[0], -x * sin * height / size[1], y * sin * width / size[0], y * cos * height / size[1])
    return part.transform(size, Image.Transform.AFFINE, (
        a, b, (part.width - a * size[0] - b * size[1]) / 2, d, e, (part.height - d * size[0] - e * size[1]) / 2),
        resample=Image.Resampling.BICUBIC if resampling == Image.Resampling.LANCZOS else resampling)


def draw_flip(rng: random.Random) -> bool:
    """Whether this visit sees the image mirrored."""
    return rng.random() < FLIP_PROBABILITY


def draw_crop(placement: Placement, rng: random.Random) -> tuple[int, int]:
    """(left, top) anywhere the bucket fits inside the scaled image."""
    return rng.randint(0, placement.slack[0]), rng.randint(0, placement.slack[1])


def draw_degrees(most: float, rng: random.Random) -> float:
    """How far this visit's image is turned."""
    return rng.uniform(-most, most)


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
