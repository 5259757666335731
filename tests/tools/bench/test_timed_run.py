"""What a measured run tells of a GPU's memory, with a GPU that only counts."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import pytest
import torch

from lib_lora_train.events import Planned, Step
from lib_lora_train.memory.plan import CONTEXT
from tools.bench import timed_run
from tools.bench.timed_run import GpuMemory, limited_gpu

CARD = torch.device("cuda", 0)


class Counting:
    """A GPU's memory as torch tells it: `take` bytes, `free` them; what was free is given back where torch is asked to."""

    def __init__(self) -> None:
        self.allocated = self.reserved = self.most_allocated = self.most_reserved = 0
        self.fractions: list[float] = []

    def take(self, size: int) -> None:
        self.allocated += size
        self.reserved = max(self.reserved, self.allocated)
        self.most_allocated, self.most_reserved = (
            max(self.most_allocated, self.allocated), max(self.most_reserved, self.reserved))

    def empty_cache(self) -> None:
        self.reserved = self.allocated

    def reset_peak_memory_stats(self) -> None:
        self.most_allocated, self.most_reserved = self.allocated, self.reserved


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Counting:
    gpu = Counting()
    for name, value in {
            "empty_cache": gpu.empty_cache, "reset_peak_memory_stats": gpu.reset_peak_memory_stats,
            "max_memory_allocated": lambda device: gpu.most_allocated, "memory_reserved": lambda device: gpu.reserved,
            "max_memory_reserved": lambda device: gpu.most_reserved, "synchronize": lambda device: None,
            "device": lambda device: contextlib.nullcontext(), "mem_get_info": lambda device: (900 - gpu.reserved, 1000),
            "get_device_properties": lambda device: SimpleNamespace(total_memory=16 << 30),
            "set_per_process_memory_fraction": lambda share, device: gpu.fractions.append(share)}.items():
        monkeypatch.setattr(torch.cuda, name, value)
    return gpu


def test_the_steps_memory_is_counted_without_what_was_needed_before_them(gpu: Counting) -> None:
    watch = timed_run._Watch(CARD, total=3, stretch=1, each=lambda step: None)
    gpu.take(500)   # the model and the VAE's work
    watch.report(Planned(1, 1, 1, 1, 3, "", "", "", 0))
    gpu.take(-400)  # set aside
    for step in (1, 2, 3):
        gpu.take(60)
        gpu.take(-60)
        watch.report(Step(step, 3, 1, 1, 0.5, 0.5, 1e-4, 0.0, None, None))
    assert watch.gpu() == GpuMemory(run_allocated=500, run_reserved=500, steps_allocated=160, steps_reserved=160, outside=100)


def test_a_small_gpu_gives_torch_what_cuda_leaves_and_ends_with_the_block(gpu: Counting) -> None:
    with pytest.raises(ZeroDivisionError), limited_gpu(CARD, 4):
        raise ZeroDivisionError
    assert gpu.fractions == [(4 * 2**30 - CONTEXT) / 2**34, 1.0]
