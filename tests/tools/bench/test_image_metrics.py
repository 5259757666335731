"""Distances between images, against scikit-image and against cases worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tools.bench.image_metrics import feature_distance, nearest_distance, nearest_index, psnr, ssim


def _patterns() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Three images [1, 3, 24, 32]: a pattern, another one, and the first with half the contrast."""
    y, x = np.mgrid[0:24, 0:32]
    one = np.stack([(x * 7 + y * 3) % 32 / 31, (x * y) % 17 / 16, ((x - 16) ** 2 + (y - 12) ** 2 < 80) * 1.0])
    other = np.stack([(x * 7 + y * 3 + 4) % 32 / 31, (x * y) % 13 / 12, ((x - 14) ** 2 + (y - 12) ** 2 < 60) * 0.8])
    images = (one, other, one / 2 + 0.25)
    return tuple(torch.from_numpy(image)[None].float() for image in images)  # type: ignore[return-value]


def test_structural_similarity_is_that_of_scikit_image():
    # scikit-image 0.21: structural_similarity(..., channel_axis=0, data_range=1, gaussian_weights=True, sigma=1.5,
    # use_sample_covariance=False), the variant that its documentation gives for Wang et al. 2004.
    one, other, pale = _patterns()
    assert ssim(one, other).item() == pytest.approx(0.2545903514533447, abs=1e-6)
    assert ssim(one, pale).item() == pytest.approx(0.777367414882799, abs=1e-6)


def test_structural_similarity_of_flat_images_is_the_papers_luminance_term():
    light, dark = torch.full((1, 3, 16, 16), 0.8), torch.full((1, 3, 16, 16), 0.4)
    assert ssim(light, dark).item() == pytest.approx((2 * 0.8 * 0.4 + 1e-4) / (0.64 + 0.16 + 1e-4), abs=1e-6)
    assert ssim(light, light).item() == pytest.approx(1.0, abs=1e-6)


def test_signal_to_noise_ratio_is_that_of_scikit_image_and_of_a_known_difference():
    one, other, pale = _patterns()
    assert psnr(torch.cat([one, one]), torch.cat([other, pale])).tolist() == pytest.approx([8.7881237, 14.2998081], abs=1e-4)
    assert psnr(one, one + 0.1).item() == pytest.approx(20.0, abs=1e-4)  # 10·log10(1/0.01)


def test_feature_distance_is_that_of_directions():
    features = torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 3.0], [-1.0, 0.0], [1.0, 1.0]])
    found = feature_distance(features[:1].expand(5, 2), features)
    assert found.tolist() == pytest.approx([0, 0, 1, 2, 1 - 2 ** -0.5], abs=1e-6)


def test_the_nearest_image_and_how_far_it_is():
    gallery = torch.stack([torch.full((3, 4, 4), value) for value in (0.0, 0.5, 1.0)])
    asked = torch.stack([torch.full((3, 4, 4), value) for value in (0.1, 0.8, 0.5)])
    assert nearest_distance(asked, gallery).tolist() == pytest.approx([0.1, 0.2, 0.0], abs=1e-6)


def test_the_nearest_direction_does_not_depend_on_length():
    assert nearest_index(torch.tensor([[0.1, 0.0], [3.0, 4.0]]), torch.tensor([[9.0, 9.0], [5.0, 1.0]])).tolist() == [1, 0]
