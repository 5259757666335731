"""Buckets are kohya's. Expected values: the numbers published with the format, hand calculation, numpy."""

from __future__ import annotations

import random

import numpy as np
import pytest

from lib_lora_train.dataset.buckets import Buckets
from lib_lora_train.errors import DatasetError, SettingError

KOHYA_512 = {  # 512², 256…1024, step 64
    (256, 832), (256, 896), (256, 960), (256, 1024), (320, 704), (320, 768), (384, 640), (448, 576), (512, 512),
    (576, 448), (640, 384), (704, 320), (768, 320), (832, 256), (896, 256), (960, 256), (1024, 256)}


def buckets(
    resolution=(512, 512), *, enable_bucket=True, min_bucket_reso=256, max_bucket_reso=1024, bucket_reso_steps=64,
    bucket_no_upscale=False,
) -> Buckets:
    return Buckets(resolution, enable_bucket=enable_bucket, min_bucket_reso=min_bucket_reso,
                   max_bucket_reso=max_bucket_reso, bucket_reso_steps=bucket_reso_steps,
                   bucket_no_upscale=bucket_no_upscale)


def test_512_has_the_seventeen_buckets_of_kohya() -> None:
    assert set(buckets().sizes) == KOHYA_512
    assert len(buckets().sizes) == 17


def test_full_hd_goes_where_kohya_puts_it() -> None:
    placement = buckets().assign(1920, 1080)
    assert (placement.bucket, placement.resized) == ((640, 384), (683, 384))
    assert placement.crop == (21, 0)
    assert placement.slack == (43, 0)


def test_sdxl_crop_is_that_of_the_image_fitted_inside_the_bucket() -> None:
    # 1920×1080 fitted into 640×384 is 640×360: 12 rows above. 1080×1920 in 384×640: 360 wide, 12 left.
    assert buckets().assign(1920, 1080).size_condition_crop() == (12, 0)
    assert buckets().assign(1080, 1920).size_condition_crop() == (0, 12)
    assert buckets().assign(1080, 1920).size_condition_crop(flipped=True) == (0, 12)
    narrow = buckets().assign(300, 511)  # fitted 375.73 wide: left ⌊4.13⌋, mirrored ⌊384 − (4 + 375.73)⌋
    assert narrow.bucket == (384, 640)
    assert narrow.size_condition_crop() == (0, 4)
    assert narrow.size_condition_crop(flipped=True) == (0, 4)


@pytest.mark.parametrize("size", sorted(KOHYA_512))
def test_an_exact_size_is_neither_scaled_nor_cropped(size: tuple[int, int]) -> None:
    placement = buckets().assign(*size)
    assert (placement.bucket, placement.resized, placement.crop) == (size, size, (0, 0))


def test_the_closest_aspect_ratio_wins_and_the_first_of_equals() -> None:
    sizes = sorted(KOHYA_512)
    ratios = np.array([w / h for w, h in sizes])
    rng = random.Random(0)
    for _ in range(500):
        width, height = rng.randint(1, 4000), rng.randint(1, 4000)
        if (width, height) in KOHYA_512:
            continue
        placement = buckets().assign(width, height)
        assert placement.bucket == sizes[int(np.abs(ratios - width / height).argmin())]
        # covers, and touches on one side
        assert placement.resized[0] >= placement.bucket[0] and placement.resized[1] >= placement.bucket[1]
        assert 0 in placement.slack


def test_without_upscaling_a_small_image_keeps_its_size_but_for_the_crop() -> None:
    placement = buckets(bucket_no_upscale=True).assign(500, 300)
    assert (placement.resized, placement.bucket, placement.crop) == ((500, 300), (448, 256), (26, 22))


def test_without_upscaling_a_large_image_shrinks_to_the_area() -> None:
    # √(512²·16/9) = 682.67 × 384. Width in steps 640 → height 360 → 320: ratio 2.0, off by 0.222.
    # Height in steps 384 → width 682.67 → 640: ratio 1.667, off by 0.111: the height decides.
    placement = buckets(bucket_no_upscale=True).assign(1920, 1080)
    assert (placement.resized, placement.bucket) == ((683, 384), (640, 384))
    # √(512²·3/2) = 627.07 × 418.05. 576 → 384 : 1.5, off by 0; 384 → 576: off by 0 too: height decides.
    placement = buckets(bucket_no_upscale=True).assign(3000, 2000)
    assert (placement.resized, placement.bucket) == ((576, 384), (576, 384))


def test_without_upscaling_an_image_narrower_than_a_step_is_refused() -> None:
    with pytest.raises(DatasetError, match="100×63.*too small"):
        buckets(bucket_no_upscale=True).assign(100, 63)
    assert buckets().assign(100, 63).bucket == (640, 384)  # 1.587: 640/384 is 1.667, 576/448 is 1.286


def test_without_buckets_every_image_is_centre_cropped_to_the_one_resolution() -> None:
    fixed = buckets((768, 512), enable_bucket=False)
    wide, tall = fixed.assign(1920, 1080), fixed.assign(500, 1000)
    assert (wide.bucket, wide.resized, wide.crop) == ((768, 512), (910, 512), (71, 0))
    assert (tall.bucket, tall.resized, tall.crop) == ((768, 512), (768, 1536), (0, 512))


@pytest.mark.parametrize("wrong", [
    {"min_bucket_reso": 768}, {"max_bucket_reso": 448}, {"bucket_reso_steps": 0}, {"bucket_reso_steps": 60},
    {"resolution": (32, 32)}, {"resolution": (510, 512), "enable_bucket": False}, {"min_bucket_reso": 0},
])
def test_contradictory_settings_are_refused(wrong: dict) -> None:
    with pytest.raises(SettingError):
        buckets(**wrong)


def test_bounds_off_the_grid_are_widened_to_it() -> None:
    assert buckets(min_bucket_reso=300, max_bucket_reso=1000).sizes == buckets().sizes
