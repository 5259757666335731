"""The two styles that are drawn here, seen on shapes whose outcome is plain."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from tools.bench.styled_images import blueprint, sticker

WHITE = (255, 255, 255)


@pytest.fixture(scope="module")
def square() -> Image.Image:
    """Red, 32 of 64 pixels wide, in the middle of nothing."""
    image = Image.new("RGBA", (64, 64))
    image.paste("red", (16, 16, 48, 48))
    return image


def test_a_blueprint_is_blue_inside_and_outside_and_white_along_the_outline(square):
    drawn = blueprint(square)
    row = drawn[64].astype(int)
    blue = (row[:, 2] - row[:, 0] > 60)
    assert blue[0] and blue[64] and blue[-1]
    # Two lines, at a quarter and three quarters of the 114 pixels that the image takes.
    white = np.flatnonzero(row.min(axis=1) > 230)
    assert len(white) and all(min(abs(x - 35.5), abs(x - 92.5)) < 5 for x in white)
    assert (drawn[:4] == drawn[0, 0]).all()


def test_a_sticker_keeps_the_thing_in_a_white_border_with_a_shadow_below_on_a_ground_that_is_not_white(square):
    drawn = sticker(square)
    assert tuple(drawn[64, 64]) == (255, 0, 0)
    assert tuple(drawn[64, 40 - 2]) == WHITE and tuple(drawn[40 - 2, 64]) == WHITE
    ground = drawn[2, 2].astype(int)
    assert (drawn[:4] == ground).all() and ground.min() < 240
    above, below = drawn[40 - 7, 64].astype(int), drawn[88 + 7, 64].astype(int)
    assert below.sum() < ground.sum() - 60 < above.sum()
