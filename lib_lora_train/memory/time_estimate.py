"""How long a run may take, before it starts: from the training step rehearsed on shapes alone.

The rehearsal tells the arithmetic of a step and its number of kernels. Seconds follow from the device's measured matrix rate
and a cost for each kernel that the host program has to launch; they are a first guess, right within a factor of about two,
that the run itself replaces after a few steps. Memory is the plan's: `memory_plan`.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Mapping

import torch
from torch import Tensor

from lib_lora_train.memory.dry_run import Scene, Way, layers_for, rehearse
from lib_lora_train.model.architecture import Architecture

# Share of the matrix rate that a step reaches, and seconds that a kernel costs at least: launching it, or on a processor
# running a small one (60 µs there makes the demo's 0.3 s a step). Recorded steps are launched as a whole.
EFFICIENCY = 0.35
SECONDS_A_KERNEL = {"cuda": 18e-6, "cpu": 60e-6}
SECONDS_A_RECORDED_KERNEL = 2e-6


@dataclasses.dataclass(frozen=True)
class Cost:
    """One picture through forward and backward: operations (multiply and add count as two), kernels, and the bytes that
    are kept between the two; and the LoRA's number of weights."""

    operations: float
    kernels: int
    activation_bytes: int
    parameters: int


def image_cost(tensors: Mapping[str, Tensor], architecture: Architecture, *, width: int, height: int, rank: int,
                 dtype: torch.dtype) -> Cost:
    """The cost of one picture of this size (pixels) on a card, nothing recomputed. `tensors` are the checkpoint's, of which
    only shapes are used."""
    layers = layers_for(tensors, architecture, rank=rank, text_encoder=False)
    scene = Scene(width, height, dtype, layers, min_snr_gamma=0.0)
    outcome = rehearse(tensors, architecture, scene, Way(batch=1))
    return Cost(outcome.operations, outcome.kernels, outcome.kept.get("activations", 0), scene.weights)


def seconds(operations: float, kernels: int, *, passes: int, device: torch.device, dtype: torch.dtype,
            recorded: bool = False) -> float:
    """Time of a step of so many `passes`, each of so many operations and kernels; `recorded` steps are CUDA graphs."""
    kernel = SECONDS_A_RECORDED_KERNEL if recorded and device.type == "cuda" else SECONDS_A_KERNEL.get(device.type, 60e-6)
    return passes * max(operations / (EFFICIENCY * matrix_rate(device, dtype)), kernels * kernel)


@functools.lru_cache(maxsize=8)
def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second that a matrix product reaches on the device; measured once, in some milliseconds."""
    size = 2048 if device.type == "cuda" else 512
    a = torch.ones(size, size, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(4):
        begin = time.perf_counter()
        result = a @ a
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # a measurement, before any step
        best = min(best, time.perf_counter() - begin)
        del result
    return 2 * size ** 3 / best
