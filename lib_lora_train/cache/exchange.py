"""Encoded pictures among processes that train together: each encodes its part, and all get all of them.

Every process needs every picture sooner or later, since each epoch deals them anew; encoding is what costs, not keeping.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence

import torch

from lib_lora_train.cache.disk import MeanAndStd
from lib_lora_train.dataset.buckets import Placement
from lib_lora_train.ranks import Ranks, share

_AT_ONCE = 1 << 24  # numbers that are sent in one piece: 64 MiB


def own_part(placements: Sequence[Placement], ranks: Ranks) -> frozenset[int]:
    """The pictures, by index, that this process encodes: neighbours in the order of buckets, so that batches stay full."""
    order = sorted(range(len(placements)), key=lambda index: (placements[index].bucket, index))
    return frozenset(order[share(len(order), ranks)])


def exchange(ranks: Ranks, own: dict[int, tuple[MeanAndStd, ...]], dropped: dict[int, str]
             ) -> tuple[dict[int, tuple[MeanAndStd, ...]], dict[int, str]]:
    """What all processes encoded, by index, from what this one did; and the pictures that were dropped, with their sentence.

    The tensors are [4, h, w] fp32 on the CPU. A meeting: see `Ranks`.
    """
    shapes: dict[str, list[int]] = {}
    for index, latents in own.items():
        shapes.setdefault(json.dumps([len(latents), *latents[0][0].shape]), []).append(index)
    told = [json.loads(text) for text in ranks.gather(json.dumps([shapes, list(dropped.items())]))]
    everything, lost = dict(own), dict(dropped)
    for source, (theirs, left_out) in enumerate(told):
        lost.update(dict(left_out))
        for text, indices in theirs.items():
            visits, *shape = json.loads(text)
            for part in _parts(indices, visits, shape):
                packed = torch.empty(len(part), visits, 2, *shape)
                if source == ranks.rank:
                    packed = torch.stack([torch.stack([torch.stack(pair) for pair in own[index]]) for index in part])
                ranks.broadcast_(packed, source=source)
                for row, index in enumerate(part):
                    # Cloned: a view would keep the whole piece in memory.
                    everything[index] = own.get(index) or tuple(
                        (mean.clone(), std.clone()) for mean, std in packed[row])
    return everything, lost


def _parts(indices: Sequence[int], visits: int, shape: Sequence[int]) -> Iterator[Sequence[int]]:
    count = max(1, _AT_ONCE // (visits * 2 * torch.Size(shape).numel()))
    for start in range(0, len(indices), count):
        yield indices[start:start + count]
