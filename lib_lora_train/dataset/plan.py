"""Arithmetic of a run: how often each image is seen, and how many steps that makes. Pure functions.

A *visit* is one image in one batch; a *batch* goes through the network at once; a *step* is one
update of the weights, after `gradient_accumulation_steps` batches.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lib_lora_train.dataset.buckets import Size

MIN_VISITS_PER_IMAGE = 100
MIN_VISITS = 1500


@dataclass(frozen=True)
class Plan:
    """What will run, known before it starts."""

    batches_per_epoch: int
    steps_per_epoch: int
    epochs: int  # the last one is cut short where max_train_steps says so
    steps: int  # exactly that many run
    buckets: tuple[tuple[Size, int], ...]  # ((width, height), visits in an epoch), sorted by size


def plain_folder_repeats(images: int, *, max_train_epochs: int, num_repeats: int = 0) -> int:
    """Repeats of each image of a plain folder in one epoch.

    Over all epochs at least 100 visits an image and 1500 visits in all, unless `num_repeats` (> 0) says so.
    """
    if num_repeats > 0:
        return num_repeats
    visits_of_each = max(MIN_VISITS_PER_IMAGE, -(-MIN_VISITS // max(1, images)))
    return -(-visits_of_each // max(1, max_train_epochs))


def balanced_repeats(repeats: Sequence[int], *, visits: int) -> tuple[int, ...]:
    """Repeats of the regularisation images so that they are visited as often as the others.

    As sd-scripts does it: images are used in order with their own repeats until `visits` is reached
    (those after that get 0), and while too few, each gets one more in turn. Unlike there, the last one
    used is cut so that the sum is exactly `visits`.
    """
    result, left = [], visits
    for count in repeats:
        result.append(min(count, left))
        left -= result[-1]
    if result and left > 0:
        every, extra = divmod(left, len(result))
        result = [count + every + (1 if i < extra else 0) for i, count in enumerate(result)]
    return tuple(result)


def plan_run(
    visits_by_bucket: Mapping[Size, int], *, train_batch_size: int, gradient_accumulation_steps: int,
    max_train_epochs: int, max_train_steps: int = 0,
) -> Plan:
    """Batches in an epoch = Σ over buckets ⌈visits / batch⌉; steps = ⌈batches / accumulation⌉ × epochs.

    `max_train_steps` > 0 overrides `max_train_epochs`: exactly that many steps.
    """
    batches = sum(-(-visits // train_batch_size) for visits in visits_by_bucket.values())
    steps_per_epoch = -(-batches // gradient_accumulation_steps)
    epochs, steps = max_train_epochs, steps_per_epoch * max_train_epochs
    if max_train_steps > 0:
        epochs, steps = -(-max_train_steps // max(1, steps_per_epoch)), max_train_steps
    return Plan(batches_per_epoch=batches, steps_per_epoch=steps_per_epoch, epochs=epochs, steps=steps,
                buckets=tuple(sorted(visits_by_bucket.items())))
