"""When a run is looked at, and at how many images, so that it costs a small share of the run. Pure functions."""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TypeVar

from lib_lora_train.evaluation.fixed_loss import BANDS

_SHARE = 0.04  # of the UNet's passes in training: a quarter of it at most for the images' own losses
_FLOOR, _MOST_SHARE = 60, 0.1  # so many passes are spent on a short run too, if they are no more than this share of it
_MOST_IMAGES = 4
_MOST_TIMES, _LEAST_TIMES = 40, 8
_MOST_LOOKED_AT = 50

T = TypeVar("T")


@dataclass(frozen=True)
class Measurements:
    """What is measured of a run, planned before it starts.

    steps       after which steps, in order; the last one of the run is always among them
    training    so many training images, and `held_out` held-out ones, at a timestep in each band
    looked_at   so many training images have their own loss told at the end, at `levels` timesteps
    """

    steps: tuple[int, ...]
    training: int
    held_out: int
    looked_at: int
    levels: int

    @property
    def passes(self) -> int:
        """Passes of the UNet with one image that all of it takes, the model without the LoRA included."""
        return BANDS * (self.training + self.held_out) * (1 + len(self.steps)) + 2 * self.levels * self.looked_at


def plan_measurements(*, passes: int, steps: int, saves: Collection[int], training: int, held_out: int,
                      every: int = 0) -> Measurements:
    """The measurements of a run of so many steps that saves after `saves`, with so many images of each kind.

    `passes` are those of the UNet in training with one image: a forward is one, forward and backward are three. With `every`
    (the user's) it is measured after every so many steps and every save; else as often as about 4 % of `passes` allow in all,
    after saves first, at most 40 times.
    """
    most = max(_SHARE * passes, min(_FLOOR, _MOST_SHARE * passes))
    looked_at = min(training, _MOST_LOOKED_AT, int(most / 4))
    levels = BANDS if 2 * BANDS * looked_at <= most / 4 else 1
    saves = sorted({*saves, steps})
    if every:
        images = _MOST_IMAGES
        due = {*saves, *range(every, steps, every)}
    else:
        left, wanted = most - 2 * levels * looked_at, max(_LEAST_TIMES, min(len(saves), _MOST_TIMES // 2))
        for images in range(_MOST_IMAGES, 0, -1):
            times = int(left / (BANDS * (min(images, training) + min(images, held_out)))) - 1
            if times >= min(wanted if images > 2 else _LEAST_TIMES // 2, steps):  # fewer images rather than fewer times
                break
        due = set(_times(min(max(1, times), _MOST_TIMES), steps=steps, saves=saves))
    return Measurements(tuple(sorted(due)), min(images, training), min(images, held_out), looked_at, levels)


def _times(times: int, *, steps: int, saves: Sequence[int]) -> Sequence[int]:
    """At most so many steps with the last one: saves, and steps evenly between them where there are more times than saves."""
    if times <= len(saves):
        return [saves[-1 - number * len(saves) // times] for number in range(times)]
    every = -(-steps // (times - len(saves) + 1))
    return [*saves, *range(every, steps, every)]


def spread(items: Sequence[T], count: int, *, seed: int) -> tuple[T, ...]:
    """So many of the items in their order, one of each of as many equal parts, drawn by the seed."""
    rng = random.Random(f"{seed}/spread/{len(items)}")
    count = min(count, len(items))
    bounds = [number * len(items) // count for number in range(count + 1)] if count else []
    return tuple(items[rng.randrange(low, high)] for low, high in zip(bounds, bounds[1:], strict=False))
