"""How a training step is made within the memory of its device, and what to do when the memory runs out."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Collection
from typing import Literal

import torch

BaseDtype = Literal["", "int8", "fp8"]
"""What the UNet's weights are held in; "" for the host's own tensors."""
Part = Literal["unet", "vae", "text"]


@dataclasses.dataclass(frozen=True)
class StepConfig:
    """How a step is made.

    microbatch      images that are computed at once
    checkpointed    the UNet's blocks (`UNet.checkpointable`) that backward computes again instead of keeping their activations
    offload         whether activations wait in the CPU's memory between forward and backward
    base_dtype      what the UNet's weights are held in
    channels_last   whether the convolutions' weights are copied into NHWC order
    parts_on_cpu    parts of the model that are off the device while steps are made
    swapped         the UNet's blocks (`swappable`), in the order of computation, whose weights wait on the CPU until they are
                    computed; the host's own UNet is then among `parts_on_cpu`
    """

    microbatch: int
    checkpointed: frozenset[str] = frozenset()
    offload: bool = False
    base_dtype: BaseDtype = ""
    channels_last: bool = False
    parts_on_cpu: frozenset[Part] = frozenset()
    swapped: tuple[str, ...] = ()

    def step_down(self, *, largest: int, blocks: Collection[str], device_type: str) -> StepConfig | None:
        """What to try after an out-of-memory error with `largest` images in a micro-batch: half as many down to one, then
        activation checkpointing of all `blocks`, then offloading on a GPU. None where nothing is left."""
        images = min(self.microbatch, largest)
        if images > 1:
            return dataclasses.replace(self, microbatch=-(-images // 2))
        # A block inside a checkpointed one is computed again with it.
        if not all(self.checkpointed & {block, block.rpartition(".")[0]} for block in blocks):
            return dataclasses.replace(self, checkpointed=frozenset(blocks))
        if device_type == "cuda" and not self.offload:
            return dataclasses.replace(self, offload=True)
        return None


def offloaded() -> contextlib.AbstractContextManager[object]:
    """Inside, what autograd saves is kept in the CPU's memory until backward (torch.autograd.graph.save_on_cpu).

    Not in pinned memory: torch keeps that, rounded up to powers of two, until the process ends. The price is that each copy
    waits for the device.
    """
    return torch.autograd.graph.save_on_cpu()
