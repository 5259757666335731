"""How much better than the base model a LoRA is by its losses on fixed noise, over all and for each training image."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from lib_lora_train.evaluation import diagnosis
from lib_lora_train.events import ImageLosses

_FEW, _LITTLE, _MUCH = 4, 0.25, 2.0
"""From so many images on, one that gained less or more than so many times the median stands out."""
_MOST = 8


def improvement(losses: Sequence[float | None], unadapted: Sequence[float | None]) -> float | None:
    """By how many per cent the losses are below those of the base model, as the verdict and the page say it; None where a
    number is missing."""
    if len(losses) != len(unadapted):
        return None
    found = diagnosis.gain([math.nan if loss is None else loss for loss in losses],
                           [math.nan if loss is None else loss for loss in unadapted])
    return 100 * found if math.isfinite(found) else None


@dataclasses.dataclass(frozen=True)
class ImageGain:
    """By how many per cent of the base model's loss that of the image `name` (its path in the dataset) is lower."""

    name: str
    gain: float


@dataclasses.dataclass(frozen=True)
class ImageGains:
    """The images by gain, the least first; those whose loss is not a number are left out. `never` learnt and learnt `at_once`
    are those at the two ends that stand out from the rest, at most eight each, the most conspicuous first."""

    images: tuple[ImageGain, ...]
    never: tuple[ImageGain, ...] = ()
    at_once: tuple[ImageGain, ...] = ()

    @classmethod
    def of(cls, found: ImageLosses) -> ImageGains:
        """Those that the event tells of."""
        rated = tuple(sorted((ImageGain(name, gain) for name, loss, unadapted in zip(
            found.images, found.losses, found.unadapted, strict=False)
            if (gain := improvement([loss], [unadapted])) is not None), key=lambda image: (image.gain, image.name)))
        middle = rated[len(rated) // 2].gain if len(rated) >= _FEW else 0.0
        if middle <= 0:
            return cls(rated)
        return cls(rated, _first(rated, [image.gain < _LITTLE * middle for image in rated]),
                   _first(rated[::-1], [image.gain > _MUCH * middle for image in rated[::-1]]))


def _first(images: Sequence[ImageGain], stand_out: Sequence[bool]) -> tuple[ImageGain, ...]:
    return tuple(image for image, holds in zip(images, stand_out, strict=True) if holds)[:_MOST]
