"""Augmentations and tensors. References: PIL resize-then-crop, numpy, colorsys."""

from __future__ import annotations

import colorsys
import random

import numpy as np
import pytest
import torch
from PIL import Image

from lib_lora_train.dataset.augment import Variant, draw_crop, draw_flip, scale_and_crop, to_tensor, variants_of, vary_colour
from lib_lora_train.dataset.buckets import Buckets, Placement
from lib_lora_train.settings import parse


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("size", [(192, 108), (108, 192), (90, 40), (64, 64), (301, 299), (1000, 3)])
@pytest.mark.parametrize("corner", ["centre", "start", "end"])
def test_scaling_only_what_is_kept_equals_scaling_all_and_cropping(size: tuple[int, int], corner: str) -> None:
    buckets = Buckets((64, 64), enable_bucket=True, min_bucket_reso=32, max_bucket_reso=128, bucket_reso_steps=8,
                      bucket_no_upscale=False)
    placement = buckets.assign(*size)
    crop = {"centre": placement.crop, "start": (0, 0), "end": placement.slack}[corner]
    whole = noise(*size).resize(placement.resized, Image.Resampling.LANCZOS)
    expected = whole.crop((*crop, crop[0] + placement.bucket[0], crop[1] + placement.bucket[1]))
    result = scale_and_crop(noise(*size), placement, crop=crop)
    assert result.size == placement.bucket
    assert np.abs(np.array(result, dtype=int) - np.array(expected, dtype=int)).max() <= 1


def smooth(width: int, height: int) -> Image.Image:
    return noise(7, 5).resize((width, height), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("degrees", [-45, -7, 3, 30])
def test_a_turned_picture_is_pillows_where_nothing_has_to_be_cut_smaller(degrees: float) -> None:
    placement = Placement(bucket=(64, 48), resized=(200, 160), crop=(68, 56), original=(200, 160))
    image = smooth(200, 160)
    expected = image.rotate(degrees, resample=Image.Resampling.BICUBIC, center=(100, 80)).crop((68, 56, 132, 104))
    result = scale_and_crop(image, placement, degrees=degrees)
    assert np.abs(np.array(result, dtype=int) - np.array(expected, dtype=int)).max() <= 3


@pytest.mark.parametrize("size", [(192, 108), (64, 64), (301, 299), (40, 400)])
@pytest.mark.parametrize("corner", ["centre", "start", "end"])
@pytest.mark.parametrize("degrees", [-45, 11.5, 30])
def test_a_turned_picture_shows_no_empty_corner_and_no_more_is_cut_than_must_be(size, corner: str, degrees: float) -> None:
    placement = Buckets((64, 64), enable_bucket=True, min_bucket_reso=32, max_bucket_reso=128, bucket_reso_steps=8,
                        bucket_no_upscale=False).assign(*size)
    crop = {"centre": placement.crop, "start": (0, 0), "end": placement.slack}[corner]
    white = scale_and_crop(Image.new("L", size, 255), placement, crop=crop, degrees=degrees)
    assert white.size == placement.bucket and np.array(white).min() == 255
    # Where the picture's own coordinates are its colours, the frame's corners tell how large it is.
    left, top, right, bottom = placement.source_box(crop)
    along = [np.broadcast_to(np.arange(size[0]) + 0.5, (size[1], size[0])), np.broadcast_to(np.arange(size[1])[:, None] + 0.5,
                                                                                          (size[1], size[0]))]
    x, y = (np.array(scale_and_crop(Image.fromarray(one.astype(np.float32)), placement, crop=crop, degrees=degrees))
            for one in along)
    width, height = np.hypot(x[0, -1] - x[0, 0], y[0, -1] - y[0, 0]), np.hypot(x[-1, 0] - x[0, 0], y[-1, 0] - y[0, 0])
    scale = width * placement.bucket[0] / (placement.bucket[0] - 1) / (right - left)
    assert height * placement.bucket[1] / (placement.bucket[1] - 1) / (bottom - top) == pytest.approx(scale, rel=0.04)
    margin = min(x.min(), y.min(), size[0] - x.max(), size[1] - y.max())
    assert -1 < margin and (scale == pytest.approx(1, abs=0.04) or margin < 0.04 * max(size)), "as large as it can be"
    assert (x.mean(), y.mean()) == pytest.approx(((left + right) / 2, (top + bottom) / 2), abs=0.02 * max(size))


def test_the_turns_share_the_range_evenly_and_follow_from_seed_and_name() -> None:
    chosen = parse({"rotate_aug_degrees": 10, "rotate_aug_variants": 5, "flip_aug": True}).dataset
    variants = variants_of(chosen, seed=1, name="a.png")
    turns = [variant.degrees for variant in variants[::2]]
    assert [int((turn + 10) // 4) for turn in turns] == [0, 1, 2, 3, 4]
    assert variants == tuple(Variant(turn, flip) for turn in turns for flip in (False, True))
    assert variants == variants_of(chosen, seed=1, name="a.png")
    assert len({variants, variants_of(chosen, seed=2, name="a.png"), variants_of(chosen, seed=1, name="b.png")}) == 3
    assert variants_of(parse({}).dataset, seed=1, name="a.png") == (Variant(),)


def test_a_tensor_is_channels_first_from_minus_one_to_one() -> None:
    image = noise(5, 3)
    tensor = to_tensor(image)
    expected = np.array(image, dtype=np.float64).transpose(2, 0, 1) / 255 * 2 - 1
    assert tensor.shape == (3, 3, 5) and tensor.dtype == torch.float32
    assert np.allclose(tensor, expected, atol=1e-6)
    assert tensor.min() >= -1 and tensor.max() <= 1


def test_half_of_the_visits_are_flipped() -> None:
    rng = random.Random(0)
    assert abs(sum(draw_flip(rng) for _ in range(4000)) / 4000 - 0.5) < 0.03


def test_a_random_crop_reaches_every_place_and_never_leaves_the_image() -> None:
    placement = Placement(bucket=(64, 32), resized=(67, 32), crop=(1, 0), original=(134, 64))
    rng = random.Random(0)
    assert {draw_crop(placement, rng) for _ in range(200)} == {(0, 0), (1, 0), (2, 0), (3, 0)}


def test_a_third_of_the_visits_change_colour_and_only_slightly() -> None:
    rng, image = random.Random(0), noise(16, 16)
    before = np.array(image, dtype=int)
    changed = 0
    for _ in range(600):
        varied = vary_colour(image, rng)
        changed += not np.array_equal(varied, image)
        value = np.array(varied, dtype=int).max(-1) - before.max(-1)  # hue keeps the value, gamma ±5 % moves it < 6
        assert np.abs(value).max() <= 6
    assert 0.25 < changed / 600 < 0.4


def test_hue_moves_by_at_most_eight_of_180() -> None:
    image = Image.new("RGB", (1, 1), (200, 60, 60))  # red: hue 0
    rng, hues = random.Random(0), []
    for _ in range(600):
        red, green, blue = (channel / 255 for channel in vary_colour(image, rng).getpixel((0, 0)))
        hue = colorsys.rgb_to_hsv(red, green, blue)[0]
        hues.append(min(hue, 1 - hue))
    assert 0.03 < max(hues) <= 8 / 180 + 1 / 256
