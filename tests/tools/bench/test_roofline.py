"""The roofline of a step, against figures worked out by hand."""

from __future__ import annotations

import pytest
import torch

from tools.bench import roofline as roofline_module
from tools.bench.host import RandomHost
from tools.bench.roofline import Rates, Roofline, measured_rates, moved_bytes, step_roofline
from tools.bench.speed import Case, case_roofline


def test_bytes_that_must_move_are_counted_once_in_each_direction() -> None:
    # Weights forward and backward: 2 x 1000. Activations written and read: 2 x 300. A LoRA weight in fp32: read forward
    # and backward (8) and its gradient written (4), then all four read or written by AdamW: 36 in all.
    assert moved_bytes(weights=1000, activations=300, parameters=10) == 2000 + 600 + 360


def test_the_roofline_is_the_longer_of_arithmetic_and_traffic() -> None:
    # 4e12 operations at 1e12 a second; 143,600 bytes at 1000 a second.
    roofline = step_roofline(operations=4e12, moved=143_600, rates=Rates(operations=1e12, bytes=1000))
    assert roofline == Roofline(arithmetic=4.0, traffic=143.6)
    assert roofline.seconds == 143.6
    assert roofline.times(287.2) == "2.0 times the roofline"
    assert step_roofline(operations=4e12, moved=143_600, rates=Rates(operations=1e12, bytes=1e9)).seconds == 4.0


def test_rates_of_this_machine_are_positive(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roofline_module, "TIMES", 1)
    rates = measured_rates(torch.device("cpu"), torch.float32)
    assert rates.operations > 0 and rates.bytes > 0


def test_the_roofline_of_true_size_sd1_is_that_of_its_published_arithmetic(tmp_path) -> None:
    # 0.34 T multiply-adds are published for SD1.5's UNet at 512², 0.68 TFLOP forward; its attention maps are 0.12 more.
    # Backward asks for the activations' gradients only: as much again, fused attention more. And a little for the LoRA.
    host = RandomHost("sd1", folder=tmp_path, device=torch.device("cpu"), dtype=torch.float16)
    case, rates = Case("sd1", 512, 1), Rates(operations=1e12, bytes=1e9)
    roofline = case_roofline(host, case, rank=16, dtype=torch.float16, rates=rates)
    assert 1.6 < roofline.arithmetic < 2.0
    # 859,520,964 weights are read forward and backward, in two bytes each or in one.
    eight_bits = case_roofline(host, case, rank=16, dtype=torch.float16, rates=rates, quantized=True)
    assert roofline.traffic - eight_bits.traffic == pytest.approx(2 * 859_520_964 / 1e9)
