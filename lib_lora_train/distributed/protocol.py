"""The processes that train one LoRA together, as the rooms below see them: `ProcessGroup`, and `SINGLE_PROCESS` for a single one.

Not here: how processes are started (torchrun, accelerate launch, plain environment variables) and joined.
"""

from __future__ import annotations

from typing import Protocol

import torch

from lib_lora_train.errors import TrainingError


class Lost(TrainingError):
    """Another of the processes ended or does not answer: the training cannot go on.

    With `intact` False the weights must not be saved: the step that was under way may have been half summed. `explained`
    is whether the one that left said why, to its user too.
    """

    def __init__(self, what: str, *, why: str = "", remedy: str = "", intact: bool = True, explained: bool = False) -> None:
        super().__init__(what, why=why, remedy=remedy)
        self.intact, self.explained = intact, explained


class ProcessGroup(Protocol):
    """What processes that train together ask of each other. Each method is a meeting: all of them call it, in the same
    order, and where one does not come the others raise Lost (Interrupted where it left because its user stopped it)."""

    @property
    def rank(self) -> int:
        """This process's number, 0 … world - 1. Number 0 saves, records and prints."""

    @property
    def world(self) -> int:
        """How many there are."""

    def sum_(self, tensor: torch.Tensor) -> None:
        """Replace `tensor` in place by its sum over all processes: any shape, contiguous, on any device."""

    def any(self, wanted: bool) -> bool:
        """Whether any of them wants it: all get the same answer. Free where there is one process."""

    def gather(self, text: str) -> tuple[str, ...]:
        """What each of them says, in the order of their numbers."""

    def broadcast_(self, tensor: torch.Tensor, *, source: int) -> None:
        """Replace `tensor` (contiguous, on the CPU) in place by that of the process `source`; shapes and dtypes agree."""


class _SingleProcess:
    """One process: nothing to agree on, nothing to add."""

    rank, world = 0, 1

    def sum_(self, tensor: torch.Tensor) -> None:
        """Nothing."""

    def any(self, wanted: bool) -> bool:
        """`wanted` itself."""
        return wanted

    def gather(self, text: str) -> tuple[str, ...]:
        """`text` alone."""
        return (text,)

    def broadcast_(self, tensor: torch.Tensor, *, source: int) -> None:
        """Nothing."""


SINGLE_PROCESS: ProcessGroup = _SingleProcess()


def share(count: int, ranks: ProcessGroup) -> slice:
    """Which of `count` rows are this process's: parts as equal as can be, in order, that cover all of them.

    Some are empty where there are fewer rows than processes. Of a full global batch each process has train_batch_size rows.
    """
    return slice(count * ranks.rank // ranks.world, count * (ranks.rank + 1) // ranks.world)
