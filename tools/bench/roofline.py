"""The roofline of a training step: an estimate of the time of arithmetic and memory traffic at the device's best rates.

    arithmetic    operations of forward and backward ÷ the matrix rate that the device reaches in this dtype
    traffic       bytes that must move ÷ the bandwidth that the device reaches

The longer of the two is the roofline. Nothing is counted that is recomputed. Convolutions are counted as direct ones: a faster
algorithm can go below the roofline (Winograd's takes 4/9 of the multiplications of a 3×3 kernel; GPUs that compute convolutions
in TF32 do more of them a second than fp32 products). The bytes are each frozen weight read once forward and once backward,
each activation that is kept written once and read once, and the LoRA with its optimiser (see `moved_bytes`). Savings
by a CPU's cache, and tensors between kernels that are not kept, are left out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch

from tools.bench.stopwatch import shortest

BYTES_A_PARAMETER = 4 * (2 + 1 + 3 + 3)
"""A LoRA weight in fp32: read forward and backward, its gradient written; then AdamW reads the gradient and two moments and
writes the weight and the moments."""
TIMES = 5


@dataclasses.dataclass(frozen=True)
class Rates:
    """What a device reaches: operations a second in matrix products (multiply and add are two), bytes a second copied."""

    operations: float
    bytes: float


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Seconds that arithmetic and traffic of a step take, each at the device's best rate."""

    arithmetic: float
    traffic: float

    @property
    def seconds(self) -> float:
        """The longer of the two."""
        return max(self.arithmetic, self.traffic)

    def times(self, seconds: float) -> str:
        """How often the roofline fits into a measured step, in words."""
        return f"{seconds / self.seconds:.1f} times the roofline"


def moved_bytes(*, weights: int, activations: int, parameters: int) -> int:
    """Bytes a step must move at least. `weights` and `activations` are bytes, `parameters` is the LoRA's number of
    weights."""
    return 2 * weights + 2 * activations + BYTES_A_PARAMETER * parameters


def step_roofline(*, operations: float, moved: int, rates: Rates) -> Roofline:
    """The roofline of a step of so many operations (multiply and add are two) that moves so many bytes."""
    return Roofline(operations / rates.operations, moved / rates.bytes)


def measured_rates(device: torch.device, dtype: torch.dtype) -> Rates:
    """The device's best matrix product and its best copy, with as many threads as torch uses now; a second or two."""
    large = device.type == "cuda"
    size, length = (8192, 1 << 30) if large else (1536, 1 << 28)
    a = torch.randn(size, size, device=device).to(dtype)
    product = torch.empty_like(a)
    operations = 2 * size ** 3 / _shortest(lambda: torch.mm(a, a, out=product), device)
    source = torch.empty(length, dtype=torch.uint8, device=device).fill_(1)
    target = torch.empty_like(source).fill_(0)
    return Rates(operations, 2 * length / _shortest(lambda: target.copy_(source), device))


def _shortest(function: Callable[[], object], device: torch.device) -> float:
    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return shortest(lambda: (function(), wait()), TIMES, before=wait)
