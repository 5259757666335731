"""`bench memory`: what is predicted and what is measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tools.bench import memory
from tools.bench.memory import Compared, MemoryPlanned, _Booked, planned, run_memory
from tools.bench.speed import PUBLISHED, Case
from tools.bench.true_size import true_size_shapes

SMALL = Case("sd1", 64, 1)


def test_an_error_is_relative_to_what_was_measured() -> None:
    assert Compared(SMALL, "a", predicted=110, measured=100).error == pytest.approx(0.1)
    assert Compared(SMALL, "a", predicted=90, measured=100).error == pytest.approx(-0.1)


def test_the_booked_peak_is_that_of_the_largest_step_from_the_second_to_the_last() -> None:
    with _Booked(last=3) as booked:
        torch.empty(9_000_000, dtype=torch.uint8)  # in the first
        booked.between(1)
        held = torch.empty(1_000_000, dtype=torch.uint8)
        short = torch.empty(3_000_000, dtype=torch.uint8)
        del short
        after = torch.empty(500_000, dtype=torch.uint8)
        booked.between(2)
        torch.empty(2_000_000, dtype=torch.uint8)
        booked.between(3)
        torch.empty(9_000_000, dtype=torch.uint8)  # after it
    assert booked.peak == 4_000_000 and len(held) and len(after)


def test_a_real_step_takes_what_was_predicted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "every block recomputed"  # tests/memory/test_estimate.py has others
    monkeypatch.setattr(memory, "PLANS", {name: memory.PLANS[name]})
    text = run_memory(MemoryPlanned(tmp_path, torch.device("cpu"), (SMALL,), small=True, precision="no", rank=2,
                                    predict=False),
                      say=lambda line: None)
    row, = json.loads((tmp_path / "memory.json").read_text(encoding="utf-8"))["compared"]
    assert row["name"] == name and abs(row["predicted"] / row["measured"] - 1) < 0.1, row
    assert name in text and (tmp_path / "memory.md").read_text(encoding="utf-8") == text


def test_sd1_is_planned_into_four_gigabytes_from_its_shapes_alone() -> None:
    shapes = {name: torch.empty(shape, dtype=torch.float16, device="meta") for name, shape in true_size_shapes("sd1").items()}
    made = planned(shapes, PUBLISHED[0], settings={}, device_type="cuda", precision="fp16", rank=16, budget=4 << 30)
    # The UNet's 859,520,964 weights in two bytes each are part of it, and all of it fits.
    assert made.missing == 0 and 2 * 859_520_964 < made.bytes <= 4 << 30
