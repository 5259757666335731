"""Likeness follows the subject wherever it is; a layout does not."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from lib_lora_train.evaluation.likeness import grid_of, layout_distance, layout_of, likeness, subject_weights


def features(patches: int, seed: int) -> torch.Tensor:
    return torch.randn(patches, 6, generator=torch.Generator().manual_seed(seed))


def test_likeness_is_the_weighted_mean_of_each_patchs_best_cosine() -> None:
    reference, generated, weights = features(5, 0), features(7, 1), torch.tensor([0.0, 1.0, 0.5, 0.0, 0.25])
    total = 0.0
    for row, weight in zip(reference.numpy(), weights.tolist(), strict=True):
        cosines = [np.dot(row, other) / (np.linalg.norm(row) * np.linalg.norm(other)) for other in generated.numpy()]
        total += weight * max(cosines)
    assert likeness(reference, weights, generated) == pytest.approx(total / 1.75, abs=1e-6)


def test_a_subject_that_is_elsewhere_on_another_background_is_as_like() -> None:
    reference, weights = features(16, 0), torch.zeros(16)
    weights[5:9] = 1
    moved = features(16, 1)
    moved[torch.tensor([15, 0, 7, 3])] = 3 * reference[5:9]
    assert likeness(reference, weights, moved) == pytest.approx(1, abs=1e-6)
    assert likeness(reference, weights, features(16, 1)) < 0.99
    assert layout_distance(reference, moved) > 0.1


def test_a_layout_is_at_its_place_at_any_size() -> None:
    across, down = 24, 16
    image = torch.arange(across * down, dtype=torch.float32)[:, None]
    layout = layout_of(image, (across * 32, down * 32))
    means = [np.arange(across * down).reshape(8, down // 8, 8, across // 8)[y, :, x].mean() for y in range(8) for x in range(8)]
    assert layout[:, 0].tolist() == pytest.approx(means)
    assert layout_distance(layout, layout) == pytest.approx(0, abs=1e-6)
    assert layout_distance(layout, -layout) == pytest.approx(2, abs=1e-6)


@pytest.mark.parametrize(("size", "patches", "expected"), [
    ((512, 512), 256, (16, 16)), ((768, 512), 384, (24, 16)), ((64, 128), 2, (1, 2))])
def test_patches_lie_as_the_image_does(size: tuple, patches: int, expected: tuple) -> None:
    assert grid_of(size, patches) == expected


def test_the_subject_is_what_the_mask_says_or_what_differs_from_a_plain_background() -> None:
    image = Image.new("RGB", (64, 64), "white")
    ImageDraw.Draw(image).rectangle((16, 16, 31, 47), fill="blue")
    mask = Image.new("L", (64, 64), 0)
    ImageDraw.Draw(mask).rectangle((48, 0, 63, 63), fill=255)
    expected = torch.zeros(4, 4)
    expected[1:3, 1] = 1
    assert torch.equal(subject_weights(image, 16).reshape(4, 4), expected)
    assert torch.equal(subject_weights(image, 16, mask=mask).reshape(4, 4), torch.tensor([0.0, 0, 0, 1]).expand(4, 4))
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    for all_alike in (noise, Image.new("RGB", (64, 64), "white")):
        assert torch.equal(subject_weights(all_alike, 16), torch.ones(16))
    assert torch.equal(subject_weights(image, 16, mask=Image.new("L", (64, 64), 0)), torch.ones(16))
