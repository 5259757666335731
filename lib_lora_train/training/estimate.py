"""How long a run may take and how much memory, before it starts: from the training graph run on shapes alone.

The UNet is run once, forward and backward, on torch's meta device: nothing is computed and no memory is taken, but every
operation is seen. That gives the arithmetic of a step, the number of kernels, and the bytes that autograd keeps.
Seconds follow from the device's measured matrix rate and a cost for each kernel that the host program has to launch;
they are a first guess, right within a factor of about two, that the run itself replaces after a few steps.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from lib_lora_train.model.architecture import Architecture
from lib_lora_train.model.components import unet_tensors
from lib_lora_train.model.unet import UNet
from lib_lora_train.network.network import LoRANetwork
from lib_lora_train.network.targets import find_targets

# Share of the matrix rate that a step reaches, and seconds that a kernel costs at least: launching it, or on a processor
# running a small one (60 µs there makes the demo's 0.3 s a step; on an H100, 18 µs make PEFT's published 0.18 s for SD1).
EFFICIENCY = 0.35
SECONDS_A_KERNEL = {"cuda": 18e-6, "cpu": 60e-6}
# Activations left with gradient checkpointing, and the time it costs: the forward pass once more.
CHECKPOINTED_SHARE, CHECKPOINTED_TIME = 0.25, 4 / 3
# fp32 weight, its gradient and AdamW's two moments.
BYTES_A_PARAMETER = 16


@dataclasses.dataclass(frozen=True)
class Cost:
    """One picture through forward and backward: operations (multiply and add count as two), kernels, and the bytes that
    are kept between the two; and the LoRA's number of weights."""

    operations: float
    kernels: int
    activation_bytes: int
    parameters: int


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Seconds for the whole run, and bytes at the peak: the frozen UNet, the activations and the LoRA."""

    seconds: float
    bytes: int


def picture_cost(tensors: Mapping[str, Tensor], architecture: Architecture, *, width: int, height: int, rank: int,
                 dtype: torch.dtype) -> Cost:
    """The cost of one picture of this size (pixels). `tensors` are the checkpoint's, of which only shapes are used."""
    shapes = {name: torch.empty(t.shape, dtype=t.dtype, device="meta") for name, t in unet_tensors(tensors).items()}
    unet = UNet(shapes, architecture.unet)
    targets = find_targets({"unet": shapes}, family=architecture.family, text_encoder=False)
    network = LoRANetwork.build(targets, rank=rank, alpha=1.0, seed=0)
    parameters = sum(parameter.numel() for parameter in network.parameters())
    adapters = network.to("meta").adapters()["unet"]
    config, factor = architecture.unet, architecture.vae.factor
    x = torch.empty(1, config.in_channels, height // factor, width // factor, device="meta", dtype=dtype)
    context = torch.empty(1, 77, config.context_dim, device="meta", dtype=dtype)
    y = None if config.adm_channels is None else torch.empty(1, config.adm_channels, device="meta", dtype=dtype)
    own = {_storage(tensor) for tensor in (*shapes.values(), *network.parameters())}
    kept: dict[int, Tensor] = {}

    def remember(tensor: Tensor) -> Tensor:
        if _storage(tensor) not in own and not _is_attention_map(tensor):
            kept.setdefault(_storage(tensor), tensor)  # the tensor too: a freed storage's id is given out again
        return tensor

    counter = FlopCounterMode(display=False)
    with torch.enable_grad(), counter, _Kernels() as kernels:
        with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
            prediction = unet(x, torch.zeros(1, device="meta"), context, y, adapters=adapters)
        prediction.float().sum().backward()
    return Cost(counter.get_total_flops(), kernels.count, sum(t.untyped_storage().nbytes() for t in kept.values()), parameters)


def estimate(cost: Cost, *, steps: int, pictures_a_step: int, batch_size: int, checkpointing: bool, model_bytes: int,
             device: torch.device, dtype: torch.dtype) -> Estimate:
    """Time and memory of `steps` steps of `pictures_a_step` pictures, `batch_size` of them at once."""
    passes = -(-pictures_a_step // batch_size)
    seconds = max(cost.operations * pictures_a_step / (EFFICIENCY * matrix_rate(device, dtype)),
                  cost.kernels * SECONDS_A_KERNEL.get(device.type, 60e-6) * passes)
    if checkpointing:
        seconds *= CHECKPOINTED_TIME
    activations = cost.activation_bytes * batch_size * (CHECKPOINTED_SHARE if checkpointing else 1.0)
    return Estimate(seconds * steps, int(model_bytes + activations + cost.parameters * BYTES_A_PARAMETER))


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


class _Kernels(TorchDispatchMode):
    """Counts operations that do work: views do none."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Sequence[type], args: Sequence[Any] = (),
                           kwargs: Mapping[str, Any] | None = None) -> Any:
        if not getattr(func, "is_view", False):
            self.count += 1
        return func(*args, **(kwargs or {}))


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _is_attention_map(tensor: Tensor) -> bool:
    """A [.., n, m] product of queries and keys: kept on the meta device only, since fused attention does not make it."""
    return tensor.ndim >= 3 and tensor.shape[-2] == tensor.shape[-1] and tensor.shape[-1] >= 64 or (
        tensor.ndim >= 3 and tensor.shape[-1] == 77 and tensor.shape[-2] >= 64)
