"""Where this process stands among those that train together, as the environment says.

torchrun and accelerate launch set the variables of torch.distributed; a user's own script may set them too. Without them
there is one process, and nothing of torch.distributed is touched.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from lib_lora_train.errors import SettingError

_HOW = ("start the processes with torchrun or accelerate launch, or set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and "
        "MASTER_PORT")


@dataclass(frozen=True)
class Place:
    """Process `rank` of `world`, the `local` one on its machine; they meet at `address`:`port`, where process 0 is."""

    rank: int
    world: int
    local: int
    address: str
    port: int

    def device(self) -> torch.device:
        """The card this process computes on, made the current one; the CPU where there is none. Raises SettingError where
        the machine has fewer cards than processes."""
        if not torch.cuda.is_available():
            return torch.device("cpu")
        cards = torch.cuda.device_count()
        if self.local >= cards:
            raise SettingError(
                f"Process {self.rank} would need card {self.local} of its machine, which has {cards}",
                remedy="start no more processes on a machine than it has cards")
        device = torch.device("cuda", self.local)
        torch.cuda.set_device(device)  # NCCL looks at the current card; this process is ours alone
        return device


def place_of(environment: Mapping[str, str]) -> Place | None:
    """This process's place, None where there is one process only. Raises SettingError where the variables are incomplete
    or make no sense."""
    world = _number(environment, "WORLD_SIZE", default=1)
    if world <= 1:
        return None
    rank = _number(environment, "RANK")
    if rank >= world:
        raise SettingError(f"RANK is {rank} and WORLD_SIZE is {world}", why="ranks are counted from 0", remedy=_HOW)
    address = environment.get("MASTER_ADDR", "")
    if not address:
        raise SettingError(f"WORLD_SIZE is {world} but MASTER_ADDR is not set", remedy=_HOW)
    return Place(rank, world, _number(environment, "LOCAL_RANK"), address, _number(environment, "MASTER_PORT"))


def _number(environment: Mapping[str, str], name: str, *, default: int | None = None) -> int:
    text = environment.get(name, "")
    if not text and default is not None:
        return default
    if not text:
        raise SettingError(f"WORLD_SIZE is {environment['WORLD_SIZE']} but {name} is not set", remedy=_HOW)
    if not (text.isascii() and text.isdigit()):
        raise SettingError(f"{name} is {text!r}, which is no number", remedy=_HOW)
    return int(text)
