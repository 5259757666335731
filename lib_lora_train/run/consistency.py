"""What processes that train together must have in common: a difference would spoil the result unnoticed."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from lib_lora_train import __version__
from lib_lora_train.distributed import ProcessGroup
from lib_lora_train.errors import SettingError
from lib_lora_train.model.fingerprint import sampled_fingerprint
from lib_lora_train.settings import DECLARATIONS, Settings, flat, named

_MOST = 3  # differences that the error lists


class ProcessesDiffer(SettingError):
    """The processes were started with different settings, images, models or resume points. All of them raise it."""


def agree_on_settings(group: ProcessGroup, settings: Settings) -> None:
    """Raise ProcessesDiffer unless all processes have the same settings. Paths may differ between machines."""
    values = flat(settings)
    known = {d.name: bool(values[d.name]) if d.is_path else values[d.name] for d in DECLARATIONS.values()}
    require_equal(group, {**known, "the version": __version__})


def agree_on_data(group: ProcessGroup, *, dataset: str, checkpoint: str, step: int, weights: Mapping[str, torch.Tensor],
                  dtype: torch.dtype) -> None:
    """Raise ProcessesDiffer unless all processes have the same images, model and resume point. `dataset` and `checkpoint` are
    fingerprints; `step` and `weights` (empty for new ones) are those that the run starts from."""
    require_equal(
        group, {f"the number format computed in, {named('mixed_precision')},": str(dtype), "the step to go on from": step},
        fingerprints={"the pictures, captions or repeats": dataset,
                      "the checkpoints": checkpoint, "the weights to go on from": sampled_fingerprint(weights)})


def require_equal(group: ProcessGroup, values: Mapping[str, object], *, fingerprints: Mapping[str, str] | None = None,
                  remedy: str = "start all of them with the same command, on the same files") -> None:
    """Raise ProcessesDiffer unless all processes have the same `values`, which the error shows, and `fingerprints`, of which it
    shows the names."""
    if group.world_size == 1:
        return
    everywhere = group.all_gather((dict(values), dict(fingerprints or {})))
    found = []
    for kind, show in ((0, True), (1, False)):
        first, *others = [both[kind] for both in everywhere]
        for name in sorted({name for values in (first, *others) for name in values}):
            for rank, other in enumerate(others, 1):
                if other.get(name) != first.get(name):
                    found.append(f"{name} is {first.get(name)!r} in process 0 and {other.get(name)!r} in process {rank}" if show
                                 else f"{name} of process 0 and of process {rank} differ")
                    break
    if found:
        more = f", and {len(found) - _MOST} more" if len(found) > _MOST else ""
        raise ProcessesDiffer("The processes do not train the same thing", why=", ".join(found[:_MOST]) + more, remedy=remedy)
