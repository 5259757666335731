"""Aspect buckets: each image is scaled and cropped to one of a few sizes, as kohya's trainer does it.

The sizes and the choice follow sd-scripts (`make_bucket_resolutions`, `BucketManager.select_bucket`),
so a folder falls into the same buckets here as there. All sizes are (width, height) in pixels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from lib_lora_train.errors import DatasetError, SettingError
from lib_lora_train.settings import DatasetSettings, named, resolution_of

Size = tuple[int, int]


@dataclass(frozen=True)
class TrainingSizes:
    """What a model's family says about training sizes, in pixels.

    default        the resolution where the settings leave it open
    largest_side   up to which there are buckets at least, whatever `max_bucket_reso` says
    multiple       both sides are multiples of it: the pixels a latent element
    """

    default: int = 512
    largest_side: int = 0
    multiple: int = 8


DEFAULT_SIZES = TrainingSizes()


@dataclass(frozen=True)
class Placement:
    """How one image becomes one training size: scale to `resized`, cut `bucket` at `crop`."""

    bucket: Size  # (width, height), what the network sees
    resized: Size  # (width, height) after scaling, covers the bucket
    crop: tuple[int, int]  # (left, top) of the centre crop inside `resized`
    original: Size  # (width, height) of the upright image

    @property
    def slack(self) -> tuple[int, int]:
        """How far the crop can move: the largest (left, top)."""
        return self.resized[0] - self.bucket[0], self.resized[1] - self.bucket[1]

    @property
    def aspect_error(self) -> float:
        """Aspect ratio of the bucket minus that of the image."""
        return self.bucket[0] / self.bucket[1] - self.original[0] / self.original[1]

    def source_box(self, crop: tuple[int, int]) -> tuple[float, float, float, float]:
        """(left, top, right, bottom) in the image's own pixels of what is cut at `crop` (left, top in the scaled image)."""
        across, down = self.original[0] / self.resized[0], self.original[1] / self.resized[1]
        return (crop[0] * across, crop[1] * down, min((crop[0] + self.bucket[0]) * across, self.original[0]),
                min((crop[1] + self.bucket[1]) * down, self.original[1]))

    def size_condition_crop(self, *, flipped: bool = False) -> tuple[int, int]:
        """(top, left) for SDXL's size conditioning, as sd-scripts computes it (`get_crop_ltrb`).

        It describes the image fitted *inside* the bucket, not the crop that was cut: 1920×1080 in
        640×384 gives top 12 although nothing is cut there. Kept because every SDXL LoRA trained with
        kohya's trainer has learnt these numbers. A random crop does not change them there, nor here.
        """
        width, height = self.bucket
        aspect = self.original[0] / self.original[1]
        if width / height > aspect:
            fitted_width, fitted_height = height * aspect, float(height)
        else:
            fitted_width, fitted_height = float(width), width / aspect
        left = (width - fitted_width) // 2
        top = (height - fitted_height) // 2
        if flipped:
            left = width - (left + fitted_width)
        return int(top), int(left)


def bucket_sizes(resolution: Size, *, min_bucket_reso: int, max_bucket_reso: int, bucket_reso_steps: int
                 ) -> tuple[Size, ...]:
    """All bucket sizes for an area, sorted. 512², 256…1024 by 64 gives 17."""
    area, step = resolution[0] * resolution[1], bucket_reso_steps
    square = int(math.sqrt(area) // step) * step
    sizes = {(square, square)}
    for width in range(min_bucket_reso, max_bucket_reso + 1, step):
        height = min(max_bucket_reso, area // width // step * step)
        if height >= min_bucket_reso:
            sizes |= {(width, height), (height, width)}
    return tuple(sorted(sizes))


class Buckets:
    """Chooses the training size of an image. Settings carry kohya's names; `resolution` is (width, height).

    `enable_bucket=False`: one fixed size, scale to cover and centre crop. `bucket_no_upscale`: images
    are only made smaller; the size is the image's own, cut down to multiples of `bucket_reso_steps`
    (then `min_bucket_reso` and `max_bucket_reso` play no part, as in kohya's trainer).
    Both sides are multiples of `multiple`. Raises SettingError for contradictory settings.
    """

    def __init__(
        self, resolution: Size, *, enable_bucket: bool, min_bucket_reso: int, max_bucket_reso: int,
        bucket_reso_steps: int, bucket_no_upscale: bool, multiple: int = 8,
    ) -> None:
        self.resolution = resolution
        self.steps = bucket_reso_steps
        self.no_upscale = enable_bucket and bucket_no_upscale
        _check(self.resolution, step=bucket_reso_steps if enable_bucket else multiple, enable_bucket=enable_bucket,
               multiple=multiple)
        if not enable_bucket:
            self.sizes: tuple[Size, ...] = (self.resolution,)
            return
        # Bounds are widened to multiples of the step, as sd-scripts does, or the square bucket could fall outside.
        smallest = min_bucket_reso // self.steps * self.steps
        largest = -(-max_bucket_reso // self.steps) * self.steps
        if not self.no_upscale and not 0 < smallest <= min(self.resolution) <= max(self.resolution) <= largest:
            raise SettingError(
                f"{named('resolution')} = {self.resolution[0]}×{self.resolution[1]} does not lie between "
                f"{named('min_bucket_reso')} = {min_bucket_reso} and {named('max_bucket_reso')} = {max_bucket_reso}",
                remedy="widen those two, or change the resolution")
        self.sizes = () if self.no_upscale else bucket_sizes(
            self.resolution, min_bucket_reso=smallest, max_bucket_reso=largest, bucket_reso_steps=self.steps)

    def assign(self, width: int, height: int) -> Placement:
        """The training size of an image of this upright size. Raises DatasetError if nothing of it would be left."""
        bucket, resized = self._shrunk(width, height) if self.no_upscale else self._covering(width, height)
        if min(bucket) <= 0:
            raise DatasetError(
                f"a picture of {width}×{height} pixels is too small or too narrow",
                why=f"without enlarging it, less than {self.steps} pixels of a side would be left",
                remedy=f"switch {named('bucket_no_upscale')} off or lower {named('bucket_reso_steps')}")
        crop = ((resized[0] - bucket[0]) // 2, (resized[1] - bucket[1]) // 2)
        return Placement(bucket=bucket, resized=resized, crop=crop, original=(width, height))

    def _covering(self, width: int, height: int) -> tuple[Size, Size]:
        """An exact size if there is one, else the closest aspect ratio (the first wins); scaled to cover."""
        aspect = width / height
        if (width, height) in self.sizes:
            bucket = (width, height)
        else:
            bucket = min(self.sizes, key=lambda size: abs(size[0] / size[1] - aspect))
        scale = bucket[1] / height if aspect > bucket[0] / bucket[1] else bucket[0] / width
        return bucket, (int(width * scale + 0.5), int(height * scale + 0.5))

    def _shrunk(self, width: int, height: int) -> tuple[Size, Size]:
        """Shrunk to the area if larger, with one side a multiple of the step; then cut to multiples of the step."""
        area = self.resolution[0] * self.resolution[1]
        resized = (width, height)
        if width * height > area:
            aspect = width / height
            ideal_width = math.sqrt(area * aspect)
            by_width = self._round_to_steps(ideal_width)
            by_height = self._round_to_steps(area / ideal_width)
            width_error = _aspect_error(by_width, self._round_to_steps(by_width / aspect), aspect)
            height_error = _aspect_error(self._round_to_steps(by_height * aspect), by_height, aspect)
            if width_error < height_error:
                resized = (by_width, int(by_width / aspect + 0.5))
            else:
                resized = (int(by_height * aspect + 0.5), by_height)
        return (resized[0] // self.steps * self.steps, resized[1] // self.steps * self.steps), resized

    def _round_to_steps(self, length: float) -> int:
        return int(length + 0.5) // self.steps * self.steps


def buckets_for(settings: DatasetSettings, *, sizes: TrainingSizes) -> Buckets:
    """The buckets that `settings` ask for with a model of these sizes; SettingError as `Buckets`."""
    resolution = resolution_of(settings.resolution, default=sizes.default)
    return Buckets(
        resolution, enable_bucket=settings.enable_bucket,
        min_bucket_reso=min(settings.min_bucket_reso, *resolution),
        max_bucket_reso=max(settings.max_bucket_reso, *resolution, sizes.largest_side),
        bucket_reso_steps=settings.bucket_reso_steps, bucket_no_upscale=settings.bucket_no_upscale,
        multiple=sizes.multiple)


def _aspect_error(width: int, height: int, aspect: float) -> float:
    return abs(width / height - aspect) if height > 0 else math.inf


def _check(resolution: Size, *, step: int, enable_bucket: bool, multiple: int) -> None:
    shown = f"{named('resolution')} = {resolution[0]}×{resolution[1]}"
    if step <= 0 or step % multiple:
        raise SettingError(
            f"{named('bucket_reso_steps')} is {step}", why=f"the VAE works on blocks of {multiple} pixels", remedy="take 64")
    if enable_bucket and min(resolution) < step:
        raise SettingError(
            f"{shown} is smaller than {named('bucket_reso_steps')} = {step}",
            remedy="raise the first or lower the second")
    if not enable_bucket and (resolution[0] % multiple or resolution[1] % multiple):
        raise SettingError(
            f"{shown} is not a multiple of {multiple}",
            why=f"the VAE works on blocks of {multiple}",
            remedy=f"take a multiple of 64, or switch {named('enable_bucket')} on")
