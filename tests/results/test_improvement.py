"""Which training images stand out by their own losses."""

from __future__ import annotations

import math

import pytest

from lib_lora_train.evaluation.diagnosis import Gains
from lib_lora_train.events import ImageLosses, Measured
from lib_lora_train.results.improvement import ImageGains, improvement


def gains_of(*shares: float) -> ImageGains:
    """Of images a, b, … whose loss is so many times the base model's, 0.5."""
    names = tuple("abcdefghijklmnopqrstuvwxyz"[:len(shares)])
    return ImageGains.of(ImageLosses(9, names, tuple(share / 2 for share in shares), (0.5,) * len(shares)))


def names(images: object) -> str:
    return "".join(image.name for image in images)


def test_what_gained_less_than_a_quarter_or_more_than_twice_the_median_stands_out() -> None:
    found = gains_of(0.79, 0.959, 0.8, 0.59, 0.961, 1.2, 0.61)  # gains of 21, 4.1, 20, 41, 3.9, -20 and 39 per cent
    assert names(found.images) == "febcagd" and found.images[0].gain == pytest.approx(-20)
    assert (names(found.never), names(found.at_once)) == ("feb", "d")


def test_losses_of_several_bands_are_better_by_what_the_verdict_says() -> None:
    """Of an eighth, a half and the base model's own loss, the mean of the logarithms is a quarter to the power of 2/3."""
    losses, unadapted = (0.1, 0.2, 0.2), (0.8, 0.4, 0.2)
    assert improvement(losses, unadapted) == pytest.approx(100 * (1 - 0.25 ** (2 / 3)))
    assert Gains.of(Measured(1, 1, losses, unadapted, (), (), {}), spent=1.0).training == pytest.approx(1 - 0.25 ** (2 / 3))
    assert improvement((None, 0.2, 0.2), unadapted) is None and improvement((), ()) is None


def test_the_most_conspicuous_eight_are_named() -> None:
    found = gains_of(*[1 + number / 100 for number in range(9)], *[0.8] * 11)
    assert names(found.never) == "ihgfedcb"


@pytest.mark.parametrize("shares", [(0.1, 0.9, 0.8), (1.0, 1.1, 1.2, 0.1, 1.3)])
def test_of_three_images_or_where_half_of_them_gained_nothing_none_stands_out(shares: tuple[float, ...]) -> None:
    found = gains_of(*shares)
    assert len(found.images) == len(shares) and not found.never and not found.at_once


def test_losses_that_are_no_numbers_are_left_out() -> None:
    assert names(gains_of(math.nan, math.inf, 0.5).images) == "c"
    assert not ImageGains.of(ImageLosses(9, ("a",), (0.5,), (0.0,))).images
