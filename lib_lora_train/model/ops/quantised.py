"""Frozen kernels in eight bits: half of fp16's memory for a small error in each layer.

Each output channel has a scale of its own, so that one large weight does not coarsen the others:

    int8   q = round(w / s), s = max|w| / 127: |w - s·q| ≤ s/2, an even error over the channel
    fp8    e4m3 (1 sign, 4 exponent, 3 mantissa bits; Micikevicius et al. 2022, arXiv 2209.05433), s = max|w| / 448:
           |w - s·q| ≤ |w|/16 (s/1024 where w is below s/64), an error that is small where the weight is

Only the kernels of linear layers and convolutions are replaced, which are nearly all of a UNet's bytes; norms, biases and
the few input and output layers stay as they are. A LoRA trained on such a base is an ordinary one: it is used with the
exact weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal

import torch
from torch import Tensor

from lib_lora_train.errors import SettingError
from lib_lora_train.model.ops.weights import Quantised, Weight
from lib_lora_train.settings import named

Kind = Literal["int8", "fp8"]

# The input and output layers: the first and the last convolution, timestep and vector condition. Their error would
# reach every layer, and all of them together are below one percent of the bytes.
_KEPT = ("input_blocks.0.0.", "out.", "time_embed.", "label_emb.")
_LARGEST = {"int8": 127.0, "fp8": 448.0}
# A channel of zeros has the scale 1 and stays zero. Smaller scales than this are no numbers of fp32's normal range.
_SMALLEST_SCALE = torch.finfo(torch.float32).tiny


def check_kind(kind: Kind) -> None:
    """Raises SettingError where this torch has no such numbers."""
    if kind == "fp8" and not hasattr(torch, "float8_e4m3fn"):
        raise SettingError(f"{named('base_weights')} = fp8 is not possible",
                           why=f"torch {torch.__version__} has no such numbers", remedy="use int8")


@torch.no_grad()
def quantise(tensor: Tensor, kind: Kind) -> Quantised:
    """`tensor` [out, …] of any float type in eight bits, on its device; takes one fp32 copy of it meanwhile.

    Raises SettingError where this torch has no fp8.
    """
    check_kind(kind)
    exact, within = tensor.detach().to(torch.float32, copy=True), tuple(range(1, tensor.ndim))
    largest = torch.maximum(exact.amax(dim=within, keepdim=True), exact.amin(dim=within, keepdim=True).neg_())
    scale = torch.where(largest > 0, largest / _LARGEST[kind], 1.0).clamp_(min=_SMALLEST_SCALE)
    exact.div_(scale).clamp_(-_LARGEST[kind], _LARGEST[kind])
    return Quantised(exact.round_().to(torch.int8) if kind == "int8" else exact.to(torch.float8_e4m3fn), scale)


def is_kernel(name: str, ndim: int) -> bool:
    """Whether the UNet's tensor of this local name and number of dimensions is one that is replaced."""
    return name.endswith(".weight") and ndim in (2, 4) and not name.startswith(_KEPT)


def quantised(tensors: Mapping[str, Tensor], kind: Kind, *, device: torch.device,
              channels_last: bool = False) -> Iterator[tuple[str, Weight]]:
    """A UNet's tensors (local names) for `Layers.replace`: kernels in eight bits, and a copy of what is not on `device` yet.

    Kernels are made on `device` one after another: no more than one of them is there in full.
    `channels_last` lays those of convolutions out as NHWC, which costs nothing here.
    """
    for name, tensor in tensors.items():
        there = tensor.to(device)
        if is_kernel(name, tensor.ndim):
            if channels_last and tensor.ndim == 4:
                there = there.contiguous(memory_format=torch.channels_last)
            yield name, quantise(there, kind)
        elif there is not tensor:
            yield name, there
