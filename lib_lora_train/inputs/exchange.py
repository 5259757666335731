"""Encoded pictures among processes that train together: each encodes its share, and all get all of them.

Every process needs every picture sooner or later, since each epoch deals them anew; encoding is what costs, not keeping.
They meet after every few pictures, so that nobody holds more at once than those, and nobody waits long.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

import torch

from lib_lora_train.dataset.progress import ShouldStop
from lib_lora_train.distributed import ProcessGroup


def exchange(ranks: ProcessGroup, numbers: Sequence[int], own: Mapping[int, torch.Tensor], *, shape: Sequence[int]
             ) -> dict[int, torch.Tensor]:
    """What the other processes have of the pictures `numbers`, which share a bucket, from what this one has of them.

    Tensors of `shape`, fp32 on the CPU. Each process puts in its own and zeros for the rest: the sum is everybody's, to the
    last bit. What nobody has is missing. A meeting: see `ProcessGroup`.
    """
    values, present = torch.zeros(len(numbers), *shape), torch.zeros(len(numbers))
    for row, number in enumerate(numbers):
        if number in own:
            values[row], present[row] = own[number], 1
    ranks.sum_(present)
    ranks.sum_(values)
    # Cloned: a view would keep the whole round in memory.
    return {number: values[row].clone() for row, number in enumerate(numbers) if present[row] and number not in own}


def all_texts(ranks: ProcessGroup, own: Mapping[int, str]) -> dict[int, str]:
    """What all processes say, by picture. A meeting: see `ProcessGroup`."""
    if ranks.world == 1:
        return dict(own)
    told = [json.loads(text) for text in ranks.gather(json.dumps(list(own.items())))]
    return dict(sorted((number, text) for texts in told for number, text in texts))


def shared_stop(should_stop: ShouldStop | None, ranks: ProcessGroup) -> ShouldStop | None:
    """Whether any of the processes was asked to stop; each of them must ask as often as the others."""
    if ranks.world == 1:
        return should_stop
    return lambda: ranks.any(should_stop is not None and should_stop())
