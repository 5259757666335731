"""This process's rank among those that train together, read from the variables that torchrun and accelerate launch set."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from lib_lora_train.errors import SettingError

_HOW = ("start the processes with torchrun or accelerate launch, or set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and "
        "MASTER_PORT")


@dataclass(frozen=True)
class LaunchEnvironment:
    """Process `rank` of `world_size`, number `local_rank` on its machine; process 0 listens at `address`:`port`."""

    rank: int
    world_size: int
    local_rank: int
    address: str
    port: int

    @classmethod
    def read(cls, environ: Mapping[str, str]) -> LaunchEnvironment | None:
        """The variables' values; None for a single process. Raises SettingError where they are incomplete or wrong."""
        def number(name: str) -> int:
            text = environ.get(name, "")
            if not (text.isascii() and text.isdigit()):
                raise SettingError(f"{name} is {text!r}, which is not a number" if text else f"{name} is not set", remedy=_HOW)
            return int(text)

        if not environ.get("WORLD_SIZE") or number("WORLD_SIZE") <= 1:
            return None
        found = cls(number("RANK"), number("WORLD_SIZE"), number("LOCAL_RANK"), environ.get("MASTER_ADDR", ""),
                    number("MASTER_PORT"))
        if found.rank >= found.world_size:
            raise SettingError(f"RANK is {found.rank} and WORLD_SIZE is {found.world_size}", why="ranks are counted from 0",
                               remedy=_HOW)
        if not found.address:
            raise SettingError("MASTER_ADDR is not set", remedy=_HOW)
        return found

    def device(self) -> torch.device:
        """This process's GPU, made the current one; the CPU on a machine without GPUs.

        Raises SettingError where the machine has fewer GPUs than processes.
        """
        if not torch.cuda.is_available():
            return torch.device("cpu")
        if self.local_rank >= torch.cuda.device_count():
            raise SettingError(
                f"Process {self.rank} would need GPU {self.local_rank} of its machine, which has {torch.cuda.device_count()}",
                remedy="start no more processes on a machine than it has GPUs")
        device = torch.device("cuda", self.local_rank)
        torch.cuda.set_device(device)  # NCCL uses the current GPU
        return device
