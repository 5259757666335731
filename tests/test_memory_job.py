"""A run within a memory budget learns what it learns without one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lib_lora_train import events
from lib_lora_train.job import run_job
from lib_lora_train.settings import parse


def run(pictures: Path, host, name: str, **changes: object):
    seen: list[events.Event] = []
    finished = run_job(parse({
        "train_data_dir": str(pictures), "output_name": name, "resolution": "64", "min_bucket_reso": 64, "num_repeats": 1,
        "max_train_steps": 3, "network_dim": 4, "network_alpha": 2, "save_precision": "float", "learning_rate": 1e-3,
        "save_state": False, **changes}), host, report=seen.append, stop=lambda: "")
    planned, = (event for event in seen if isinstance(event, events.Planned))
    return load_file(finished.path), planned.memory, [event.message for event in seen if isinstance(event, events.Warned)]


def difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """Of all weights together, relative to their length."""
    first, second = (torch.cat([tensors[key].flatten() for key in sorted(a)]) for tensors in (a, b))
    return ((first - second).norm() / first.norm()).item()


def test_whatever_a_plan_chooses_the_lora_is_the_same(pictures, host):
    free, memory, warnings = run(pictures, host, "free", train_batch_size=2)
    assert memory.endswith("GB of memory") and not any("memory" in warning for warning in warnings)
    tight, memory, warnings = run(pictures, host, "tight", train_batch_size=2, memory_budget=0.001)
    assert "computed twice" in memory and "in 2 parts" in memory
    assert any("more than there is" in warning for warning in warnings)
    assert difference(free, tight) < 1e-3
    turned, memory, _ = run(pictures, host, "turned", train_batch_size=2, channels_last="on")
    assert "laid out anew" in memory and difference(free, turned) < 1e-3


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_on_weights_in_eight_bits_it_is_nearly_the_same_and_the_lenders_are_untouched(pictures, host, kind):
    if kind == "fp8" and not hasattr(torch, "float8_e4m3fn"):
        pytest.skip("this torch has no fp8")
    free, _, _ = run(pictures, host, "free")
    with host.borrow() as lent:
        before = {name: tensor.clone() for name, tensor in lent.tensors.items()}
    held, memory, _ = run(pictures, host, "held", base_weights=kind)
    assert f"held in {kind}" in memory
    assert 0 < difference(free, held) < 0.5
    with host.borrow() as lent:
        assert all(torch.equal(tensor, before[name]) for name, tensor in lent.tensors.items())


def test_what_has_no_effect_without_a_card_is_said(pictures, host):
    _, _, warnings = run(pictures, host, "zzk", cpu_offload_checkpointing=True)
    assert any("cpu_offload_checkpointing has no effect" in warning for warning in warnings)
