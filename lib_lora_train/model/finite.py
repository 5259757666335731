"""Which weights hold values that are not numbers."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """The names of the tensors that hold a NaN or an infinity, in order.

    The smallest and the largest number of each are enough, since both are NaN where one is: two passes, no copy and one
    synchronisation.
    """
    floating = {name: tensor.detach() for name, tensor in tensors.items() if tensor.is_floating_point() and tensor.numel()}
    if not floating:
        return []
    # torch cannot compare numbers of eight bits.
    wide = (tensor.half() if tensor.element_size() == 1 else tensor for tensor in floating.values())
    extremes = [torch.stack((tensor.min(), tensor.max())).float() for tensor in wide]
    fine = torch.stack([pair.to(extremes[0].device) for pair in extremes]).isfinite().all(dim=1).tolist()
    return [name for name, good in zip(floating, fine, strict=True) if not good]
