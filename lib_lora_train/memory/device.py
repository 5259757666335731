"""What is asked of a device before a run: bytes that may be taken, what its attention keeps, how long a step may take."""

from __future__ import annotations

import functools
import time

import torch

from lib_lora_train.inputs.vae_batches import free_bytes
from lib_lora_train.memory.estimate import AttentionKernel
from lib_lora_train.memory.plan import CONTEXT, GIGABYTE

EFFICIENCY = 0.35
"""Share of the matrix rate that a step reaches."""
SECONDS_A_BLOCK = {"cuda": 2.3e-3, "cpu": 5e-3}
"""Seconds that a block's forward and backward cost at least, however small it is: about 130 kernels of 18 µs that Python
launches on CUDA, 90 of 60 µs on a CPU (the demo's model takes 0.3 s a step there)."""


def budget_of(wanted: float, device: torch.device, *, ours: int) -> int | None:
    """Bytes that all of a run may take: `wanted` GB (0 for as much as there is), and on a GPU no more than there is.

    `ours` are bytes on the GPU already that the plan counts too: the host's model, the LoRA. None without a GPU, where nothing
    was wanted.
    """
    asked = int(wanted * GIGABYTE) or None
    if device.type != "cuda":
        return asked
    there = free_bytes(device) + min(torch.cuda.memory_allocated(device), ours) + CONTEXT
    there -= there % (GIGABYTE // 4)  # rounded down, so that small changes of the free memory do not change the plan
    return there if asked is None else min(asked, there)


def attention_kernel(device: torch.device, dtype: torch.dtype) -> AttentionKernel:
    """What torch's attention is on this device: whether it keeps the whole map. On ROCm it depends on the GPU and the build of
    torch; the estimate then counts with the map."""
    if device.type != "cuda" or torch.version.hip:
        return "fused" if device.type == "cpu" else "math"
    capability = torch.cuda.get_device_capability(device)
    flash = torch.backends.cuda.flash_sdp_enabled() and capability >= (8, 0) and dtype != torch.float32
    efficient = torch.backends.cuda.mem_efficient_sdp_enabled() and capability >= (5, 3)
    return "fused" if flash or efficient else "math"


def seconds_per_step(flops: float, *, blocks: int, passes: int, device: torch.device, dtype: torch.dtype) -> float:
    """Seconds of a step of so many passes through so many blocks, each pass of so many FLOPs."""
    overhead = SECONDS_A_BLOCK.get(device.type, SECONDS_A_BLOCK["cpu"])
    return passes * max(flops / (EFFICIENCY * matrix_rate(device, dtype)), blocks * overhead)


@functools.lru_cache(maxsize=8)
def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOPs a second that a matrix product reaches on the device; measured once, in some milliseconds."""
    size = 2048 if device.type == "cuda" else 512
    a = torch.ones(size, size, device=device, dtype=dtype)

    def seconds() -> float:
        begin = time.perf_counter()
        (a @ a)[0, 0].item()  # waits for the device
        return time.perf_counter() - begin
    return 2 * size ** 3 / min(seconds() for _ in range(4))
