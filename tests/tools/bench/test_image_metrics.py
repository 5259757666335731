"""Distances between images, against cases worked out by hand."""

from __future__ import annotations

import pytest
import torch

from tools.bench.image_metrics import nearest_distance, nearest_index


def test_the_nearest_image_and_how_far_it_is():
    gallery = torch.stack([torch.full((3, 4, 4), value) for value in (0.0, 0.5, 1.0)])
    asked = torch.stack([torch.full((3, 4, 4), value) for value in (0.1, 0.8, 0.5)])
    assert nearest_distance(asked, gallery).tolist() == pytest.approx([0.1, 0.2, 0.0], abs=1e-6)


def test_the_nearest_direction_does_not_depend_on_length():
    assert nearest_index(torch.tensor([[0.1, 0.0], [3.0, 4.0]]), torch.tensor([[9.0, 9.0], [5.0, 1.0]])).tolist() == [1, 0]
