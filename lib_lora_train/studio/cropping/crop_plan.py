"""What is cut of an image and how it is scaled and mirrored, computed before anything is written.

With the focus on the centre an image is cut exactly as the trainer would cut it. Nothing here writes; `crop.py` does.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Literal

import pydantic.dataclasses
from PIL import Image
from pydantic import StrictBool, confloat, conint

from lib_lora_train.dataset.buckets import Buckets, TrainingSizes, buckets_for
from lib_lora_train.model.family import FAMILIES, training_sizes
from lib_lora_train.settings import DatasetSettings
from lib_lora_train.studio.cropping.subject import SubjectBox, subject_box

Share = confloat(ge=0, le=1)
Edges = tuple[float, float, float, float]  # left, top, right, bottom in pixels


@pydantic.dataclasses.dataclass(frozen=True)
class Shape:
    """How an image is to be shaped.

    mode "buckets": cut to the training size of its own proportions whose area is about `side` squared; "square": to `side`
    by `side`; "keep": nothing is cut, it is only made smaller to that area. `focus` says what a cut keeps: the centre, the
    subject, or a point (across, down) as shares of the image. Small images are cut, but enlarged only with `enlarge`.
    """

    mode: Literal["buckets", "square", "keep"] = "buckets"
    side: conint(strict=True, ge=64, le=4096, multiple_of=8) = 512
    focus: Literal["centre", "subject"] | tuple[Share, Share] = "centre"
    flip: StrictBool = False
    enlarge: StrictBool = False


@dataclasses.dataclass(frozen=True)
class Box:
    """What is cut out of the upright image, in its pixels and parts of them, and the size it is then given."""

    edges: Edges
    size: tuple[int, int]  # (width, height) of the result

    @property
    def enlarged(self) -> float:
        """How many times larger it is made; at most 1 where it is not."""
        left, top, right, bottom = self.edges
        return max(self.size[0] / (right - left), self.size[1] / (bottom - top))

    def lost(self, size: tuple[int, int]) -> float:
        """Which share of the area of an image of `size` is cut off, 0 to 1."""
        left, top, right, bottom = self.edges
        return max(0.0, 1 - (right - left) * (bottom - top) / (size[0] * size[1]))


def plan_shape(size: tuple[int, int], shape: Shape, *, subject: SubjectBox | None = None, region: Edges | None = None,
               family: str = "") -> Box:
    """What `shape` cuts of an image of (width, height) `size`.

    `subject` is where its subject is (see `find_subject`); the centre is used where it is None. With a `region`, the cut is
    made within it, as if it were the image. `family` is the model's. Raises DatasetError if nothing is left.
    """
    left, top, right, bottom = region or (0.0, 0.0, float(size[0]), float(size[1]))
    width, height = max(1, round(right - left)), max(1, round(bottom - top))
    if shape.mode == "keep":
        scale = shape.side / math.sqrt(width * height)
        scale = scale if shape.enlarge else min(1.0, scale)
        return Box((left, top, right, bottom), (max(1, round(width * scale)), max(1, round(height * scale))))
    placement = _buckets(shape, family).assign(width, height)
    across, down = (right - left) / placement.resized[0], (bottom - top) / placement.resized[1]
    crop_left, crop_top = placement.crop
    if shape.focus != "centre":
        at = _cut_centre(shape.focus, subject, (left, top, right, bottom))
        if at is not None:
            crop_left = _centred((at[0] - left) / across, placement.bucket[0], slack=placement.slack[0])
            crop_top = _centred((at[1] - top) / down, placement.bucket[1], slack=placement.slack[1])
    cut = (left + crop_left * across, top + crop_top * down,
           min(right, left + (crop_left + placement.bucket[0]) * across),
           min(bottom, top + (crop_top + placement.bucket[1]) * down))
    if shape.enlarge or max(1 / across, 1 / down) <= 1:
        return Box(cut, placement.bucket)
    # Whole pixels: cut, and otherwise left as it is.
    size = (max(1, round(cut[2] - cut[0])), max(1, round(cut[3] - cut[1])))
    left, top = (min(math.floor(start + 0.5), limit - side) for start, limit, side in
                 ((cut[0], math.floor(right), size[0]), (cut[1], math.floor(bottom), size[1])))
    return Box((float(left), float(top), float(left + size[0]), float(top + size[1])), size)


def find_subject(image: Image.Image, shape: Shape, *, mask: Image.Image | None = None,
                 models_folder: Path | None = None) -> SubjectBox | None:
    """The subject's box where `shape` needs it."""
    if shape.focus != "subject" or shape.mode == "keep":
        return None
    return subject_box(image, mask=mask, models_folder=models_folder)


def render(image: Image.Image, box: Box, *, flip: bool) -> Image.Image:
    """The part of `image` that `box` says at its size, mirrored with `flip`; Lanczos for colours, softer for masks."""
    pixels = tuple(map(round, box.edges))
    if pixels == box.edges and (pixels[2] - pixels[0], pixels[3] - pixels[1]) == box.size:
        made = image.crop(pixels)
    else:
        # Lanczos swings over at hard edges: a mask would get a grey rim.
        smooth = Image.Resampling.BILINEAR if image.mode == "L" else Image.Resampling.LANCZOS
        made = image.resize(box.size, smooth, box=box.edges)
    return made.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else made


def _buckets(shape: Shape, family: str) -> Buckets:
    # Where no model is known, the side tells whose buckets are meant.
    known = [training_sizes(family)] if family else [one.sizes for one in FAMILIES.values() if one.sizes.default <= shape.side]
    sizes = max(known, key=lambda one: one.default, default=TrainingSizes())
    settings = DatasetSettings(resolution=str(shape.side), enable_bucket=shape.mode == "buckets")
    return buckets_for(settings, sizes=sizes)


def _cut_centre(focus: str | tuple[float, float], subject: SubjectBox | None, region: Edges) -> tuple[float, float] | None:
    """The point that comes to the middle of the cut as far as possible, in pixels of the image; None is the centre."""
    if isinstance(focus, tuple):
        return region[0] + focus[0] * (region[2] - region[0]), region[1] + focus[1] * (region[3] - region[1])
    return None if subject is None else ((subject[0] + subject[2]) / 2, (subject[1] + subject[3]) / 2)


def _centred(middle: float, length: int, *, slack: int) -> float:
    """Where a cut of `length` around `middle` begins, within 0 to `slack`."""
    return min(max(middle - length / 2, 0.0), float(slack))
