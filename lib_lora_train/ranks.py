"""The processes that train one LoRA together, as the rooms below see them: `Ranks`, and `ALONE` for a single one.

Not here: how processes are started (torchrun, accelerate launch, plain environment variables) and joined.
"""

from __future__ import annotations

from typing import Protocol

import torch


class Ranks(Protocol):
    """What processes that train together ask of each other. Each method is a meeting: all of them call it, in the same
    order, and where one does not come the others raise a LoraTrainError within the timeout."""

    @property
    def rank(self) -> int:
        """This process's number, 0 … world - 1. Number 0 saves, records and prints."""

    @property
    def world(self) -> int:
        """How many there are."""

    def sum_(self, tensor: torch.Tensor) -> None:
        """Replace `tensor` in place by its sum over all processes: any shape and device of this process, contiguous."""

    def any(self, wanted: bool) -> bool:
        """Whether any of them wants it: all get the same answer. Free where there is one process."""


class _Alone:
    """One process: nothing to agree on, nothing to add."""

    rank, world = 0, 1

    def sum_(self, tensor: torch.Tensor) -> None:
        """Nothing."""

    def any(self, wanted: bool) -> bool:
        """`wanted` itself."""
        return wanted


ALONE: Ranks = _Alone()
