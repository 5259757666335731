"""A run within a memory budget learns what it learns without one."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file

from lib_lora_train import events
from lib_lora_train.model.ops.block_swap import BlockSwap, spread
from lib_lora_train.model.sd.unet import swappable
from lib_lora_train.run import job
from lib_lora_train.settings import parse
from tests.jobs import run_settings

SAME = 0.05  # of what is learnt: where a gradient is next to nothing, AdamW follows its rounding error


class Ran(NamedTuple):
    """What a run learnt and said: `losses` are those of its steps."""

    learnt: dict[str, torch.Tensor]
    memory: str
    warnings: list[str]
    losses: list[float]


def run(images: Path, host, name: str, **changes: object) -> Ran:
    seen: list[events.Event] = []
    finished = run_settings(parse({
        "train_data_dir": str(images), "output_name": name, "resolution": "64", "min_bucket_reso": 64, "num_repeats": 1,
        "max_train_steps": 3, "network_dim": 4, "sample_images": False, "validation": False, "network_alpha": 2,
        "save_precision": "float", "learning_rate": 1e-3, "save_state": False, **changes}), host, report=seen.append,
        stop=lambda: "")
    planned, = (event for event in seen if isinstance(event, events.Planned))
    return Ran(load_file(finished.path), planned.memory, [event.message for event in seen if isinstance(event, events.Warned)],
               [event.loss for event in seen if isinstance(event, events.Step)])


def difference(one: Ran, other: Ran) -> float:
    """Of all that was zero at the beginning, relative to its length."""
    ups = sorted(key for key in one.learnt if key.endswith("lora_up.weight"))
    first, second = (torch.cat([ran.learnt[key].flatten() for key in ups]) for ran in (one, other))
    return ((first - second).norm() / first.norm()).item()


def test_whatever_a_plan_chooses_the_lora_is_the_same(images, host):
    free = run(images, host, "free", train_batch_size=2)
    assert free.memory.endswith("GB of memory") and not any("memory" in warning for warning in free.warnings)
    tight = run(images, host, "tight", train_batch_size=2, memory_budget=0.001)
    assert "computed twice" in tight.memory and "in 2 parts" in tight.memory
    assert any("more than there is" in warning for warning in tight.warnings)
    assert difference(free, tight) < SAME
    turned = run(images, host, "turned", train_batch_size=2, channels_last="on")
    assert "laid out anew" in turned.memory and difference(free, turned) < SAME


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_on_weights_in_eight_bits_it_is_nearly_the_same_and_the_lenders_are_untouched(images, host, kind):
    if kind == "fp8" and not hasattr(torch, "float8_e4m3fn"):
        pytest.skip("this torch has no fp8")
    free = run(images, host, "free")
    with host.lease() as lent:
        before = {name: tensor.clone() for name, tensor in lent.tensors.items()}
    held = run(images, host, "held", base_weights=kind)
    assert f"held in {kind}" in held.memory
    # In its first steps AdamW goes as far whatever the gradient's size, so that small ones follow the weights' error: what is
    # learnt differs. A LoRA that learnt nothing would differ by 1, one that learnt something else by the root of 2.
    assert 0 < difference(free, held) < 1
    # No further off than one kernel: by a maximum / 127 / √12 where the maximum is 3.5 times the root mean square; by a unit in
    # the last of three places / √12, which over all mantissas is 0.21 / 8.
    error = {"int8": 3.5 / 127 / 12 ** 0.5, "fp8": 0.21 / 8}[kind]
    assert held.losses == pytest.approx(free.losses, rel=error) and held.losses != free.losses
    with host.lease() as lent:
        assert all(torch.equal(tensor, before[name]) for name, tensor in lent.tensors.items())


def test_what_has_no_effect_without_a_gpu_is_said(images, host):
    warnings = run(images, host, "zzk", cpu_offload_checkpointing=True, cuda_graphs="on", blocks_to_swap=9).warnings
    for name in ("cpu_offload_checkpointing", "cuda_graphs", "blocks_to_swap"):
        assert any(f"({name}) has no effect: there is no GPU" in warning for warning in warnings)


def test_with_swapped_blocks_it_is_the_same_to_the_bit_and_they_are_given_back(images, host, monkeypatch):
    free = run(images, host, "free", train_batch_size=2)
    with host.lease() as lent:
        before = {name: tensor.clone() for name, tensor in lent.tensors.items()}
    plan_memory, released = job.memory_plan, []

    def swapped(*arguments, **options):  # as the plan of a GPU has it
        plan = plan_memory(*arguments, **options)
        blocks = swappable(arguments[1].architecture.unet)
        return dataclasses.replace(plan, swappable=len(blocks), config=dataclasses.replace(
            plan.config, swapped=spread(blocks, 5), parts_on_cpu=frozenset({"unet"})))

    class Watched(BlockSwap):
        def release(self) -> None:
            released.append(self.device_bytes)
            super().release()

    monkeypatch.setattr(job, "memory_plan", swapped)
    monkeypatch.setattr("lib_lora_train.run.memory.BlockSwap", Watched)
    held = run(images, host, "swapped", train_batch_size=2, validation=True)
    assert "5 of" in held.memory and difference(free, held) == 0 and held.losses == free.losses
    assert released and released[0] > 0
    with host.lease() as lent:
        assert all(torch.equal(tensor, before[name]) for name, tensor in lent.tensors.items())
