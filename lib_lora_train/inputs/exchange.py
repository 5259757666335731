"""What processes that train together exchange while each encodes its part of the images. Both functions are collectives."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from lib_lora_train.dataset.progress import ShouldStop
from lib_lora_train.distributed import ProcessGroup

T = TypeVar("T")


def merged(group: ProcessGroup, own: Mapping[int, T]) -> dict[int, T]:
    """What all processes have, by image number; `own` is this process's part."""
    return dict(sorted(item for part in group.all_gather(dict(own)) for item in part.items()))


def stop_of_any(should_stop: ShouldStop | None, group: ProcessGroup) -> ShouldStop | None:
    """Whether any of the processes was asked to stop."""
    if group.world_size == 1:
        return should_stop
    return lambda: group.any(should_stop is not None and should_stop())
