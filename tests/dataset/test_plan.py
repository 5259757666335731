"""Repeats and steps. Expected values by hand from the rules."""

from __future__ import annotations

import pytest

from lib_lora_train.dataset.plan import balanced_repeats, plain_folder_repeats, plan_run


@pytest.mark.parametrize(("images", "epochs", "repeats"), [
    (10, 10, 15),   # 1500 / 10 = 150 of each, over 10 epochs
    (15, 10, 10),   # exactly 100 of each
    (100, 10, 10),  # more images than needed: still 100 of each
    (1, 1, 1500), (7, 10, 22),  # ⌈1500/7⌉ = 215, ⌈215/10⌉ = 22
    (20, 1000, 1),
])
def test_a_plain_folder_is_seen_100_times_an_image_and_1500_times_in_all(images, epochs, repeats) -> None:
    assert plain_folder_repeats(images, max_train_epochs=epochs) == repeats


def test_repeats_that_were_asked_for_are_taken() -> None:
    assert plain_folder_repeats(10, max_train_epochs=10, num_repeats=3) == 3


def test_steps_are_rounded_up_in_each_bucket_and_in_each_epoch() -> None:
    # ⌈7/4⌉ + ⌈4/4⌉ + ⌈1/4⌉ = 4 batches; ⌈4/3⌉ = 2 steps; 5 epochs
    plan = plan_run({(512, 512): 7, (640, 384): 4, (384, 640): 1}, train_batch_size=4, gradient_accumulation_steps=3,
                    max_train_epochs=5)
    assert (plan.batches_per_epoch, plan.steps_per_epoch, plan.epochs, plan.steps) == (4, 2, 5, 10)
    assert plan.buckets == (((384, 640), 1), ((512, 512), 7), ((640, 384), 4))


@pytest.mark.parametrize(("max_train_steps", "epochs", "steps"), [(0, 2, 6), (1, 1, 1), (3, 1, 3), (7, 3, 7)])
def test_max_train_steps_overrides_the_epochs_exactly(max_train_steps: int, epochs: int, steps: int) -> None:
    plan = plan_run({(512, 512): 3}, train_batch_size=1, gradient_accumulation_steps=1, max_train_epochs=2,
                    max_train_steps=max_train_steps)
    assert (plan.epochs, plan.steps) == (epochs, steps)


@pytest.mark.parametrize(("repeats", "visits", "balanced"), [
    ((1, 1, 1), 8, (3, 3, 2)),   # one more in turn
    ((2, 2), 4, (2, 2)),
    ((1, 1, 1, 1), 2, (1, 1, 0, 0)),  # more than needed: the first ones
    ((5, 5), 7, (5, 2)),         # cut to fit
    ((2, 1), 6, (4, 2)),         # 2, 1, then +1, +1, +1
    ((), 5, ()),
])
def test_regularisation_is_visited_as_often_as_the_images(repeats, visits, balanced) -> None:
    assert balanced_repeats(repeats, visits=visits) == balanced
