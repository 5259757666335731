"""A second device on a machine that has none: its tensors are copies that are known by their memory, so that a move is as real
as between a GPU and the CPU. Needs nothing but the package and torch, so that a running WebUI can load it, too."""

from __future__ import annotations

import torch
from torch import Tensor

CARD, CPU = torch.device("cuda", 0), torch.device("cpu")


class PretendedCard:
    """Every tensor is on the GPU unless it was moved to the CPU. `gpu` and `cpu` are what these two are called."""

    def __init__(self, *, gpu: torch.device = CARD, cpu: torch.device = CPU) -> None:
        self.gpu, self.cpu = gpu, cpu
        self.on_cpu: dict[int, Tensor] = {}  # held, so that no other tensor comes to lie in its memory
        self.moves: list[torch.device] = []

    def device_of(self, tensor: Tensor) -> torch.device:
        """In the place of `host.placement.device_of`."""
        return self.cpu if tensor.untyped_storage().data_ptr() in self.on_cpu else self.gpu

    def copy_to(self, tensor: Tensor, device: torch.device) -> Tensor:
        """In the place of `host.placement.copy_to`."""
        self.moves.append(device)
        copy = tensor.clone()
        if device == self.cpu:
            self.on_cpu[copy.untyped_storage().data_ptr()] = copy
        return copy
