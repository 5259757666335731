"""What a frozen layer multiplies with: a borrowed tensor, or a weight that is stored in fewer bytes."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class DenseOnDemand(Protocol):
    """A weight that is stored in fewer bytes than it is computed with (`model.ops.quantised`).

    shape    the dense tensor's
    device   where it is stored and computed
    nbytes   as it is stored
    nhwc     whether the dense tensor is a convolution's kernel in NHWC order
    """

    shape: torch.Size
    device: torch.device
    nbytes: int
    nhwc: bool

    def to(self, device: torch.device | str) -> DenseOnDemand:
        """The same on another device."""
        ...

    def dense(self, dtype: torch.dtype) -> Tensor:
        """A new tensor of `shape` in `dtype`, to be dropped after the product it was made for."""
        ...


Weight = Tensor | DenseOnDemand


def dense(weight: Weight, dtype: torch.dtype) -> Tensor:
    """The weight as a tensor in `dtype`, itself where it is one already. The caller keeps no copy of it."""
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
    return is_nhwc(weight) if isinstance(weight, Tensor) else weight.nhwc
