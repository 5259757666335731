"""What a frozen layer multiplies with: a borrowed tensor, or what is made one when it is used (eight bits, swapped blocks)."""

from __future__ import annotations

import dataclasses
from typing import Protocol

import torch
from torch import Tensor


class Held(Protocol):
    """A weight that is made a tensor when a layer computes with it."""

    @property
    def shape(self) -> torch.Size:
        """The kernel's."""

    @property
    def device(self) -> torch.device:
        """Where what is held lies."""

    @property
    def nbytes(self) -> int:
        """Of what is held."""

    @property
    def values(self) -> Tensor:
        """What has the kernel's shape and memory layout."""

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The kernel in `dtype`. It is valid until a weight of another block is asked for."""

    def to(self, device: torch.device | str) -> Weight:
        """The same on another device."""


@dataclasses.dataclass(frozen=True, eq=False)
class Quantised:
    """A kernel in eight bits (`model.ops.quantised`), as `values · scale`. It holds no gradient and shares no memory.

    values   int8 or float8_e4m3fn, of the kernel's shape [out, …] and memory layout
    scale    fp32 [out, 1, …]
    """

    values: Tensor
    scale: Tensor

    @property
    def shape(self) -> torch.Size:
        """The kernel's."""
        return self.values.shape

    @property
    def device(self) -> torch.device:
        """Of values and scale."""
        return self.values.device

    @property
    def nbytes(self) -> int:
        """Of values and scale."""
        return self.values.nbytes + self.scale.nbytes

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The kernel in `dtype`, new at each call: on a GPU one elementwise kernel from int8, two from fp8.

        The product is made in fp32 and rounded once; a scale rounded to fp16 would add an error of its own.
        """
        if self.values.dtype == torch.int8 and not self.values.is_cpu:  # there it would make an fp32 copy of the values first
            return torch.mul(self.values, self.scale, out=torch.empty_like(self.values, dtype=dtype))
        return self.values.to(dtype).mul_(self.scale)

    def to(self, device: torch.device | str) -> Quantised:
        """The same on another device."""
        return Quantised(self.values.to(device), self.scale.to(device))


Weight = Tensor | Held


def dense(weight: Weight, dtype: torch.dtype) -> Tensor:
    """The weight as a tensor in `dtype`, itself where it is one already. The caller keeps no copy of it: see `Held.dense`."""
    return weight.to(dtype) if isinstance(weight, Tensor) else weight.dense(dtype)


def borrowed(tensor: Tensor) -> Tensor:
    """A detached tensor over the same storage: same `data_ptr`, never a gradient, safe to save for backward.

    An inference tensor (made under `torch.inference_mode`, as Forge does) cannot be saved for backward and stays
    one through `detach`; there a normal tensor is laid over its storage.
    """
    if not tensor.is_inference():
        return tensor.detach()
    plain = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    return plain.set_(tensor.untyped_storage(), tensor.storage_offset(), tensor.size(), tensor.stride())


def is_nhwc(image: Tensor) -> bool:
    """Whether [B, C, h, w] has its channels side by side in memory, and not its pixels as well."""
    return image.is_contiguous(memory_format=torch.channels_last) and not image.is_contiguous()


def is_nhwc_kernel(weight: Weight) -> bool:
    """Whether a convolution's kernel is in NHWC order, or is made in it."""
    return is_nhwc(weight if isinstance(weight, Tensor) else weight.values)
