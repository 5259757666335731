"""Whether all processes are about to train the same thing, asked before they begin: a difference would go unnoticed for
hours and spoil the result."""

from __future__ import annotations

import json
from collections.abc import Mapping

from lib_lora_train.distributed.protocol import ProcessGroup
from lib_lora_train.errors import SettingError

SAME_COMMAND = "start all of them with the same command, on the same files"
_MOST = 3  # differences that one sentence tells


class Disagreement(SettingError):
    """The processes were started with different settings, pictures, models or resume points. All of them raise it."""


def agree(ranks: ProcessGroup, *, shown: Mapping[str, object], digests: Mapping[str, str], remedy: str = SAME_COMMAND) -> None:
    """Raise Disagreement with this `remedy` unless `shown` (values a user knows) and `digests` (of what is too long to tell)
    are the same everywhere. Values are compared as JSON has them."""
    if ranks.world == 1:
        return
    told = [json.loads(text) for text in ranks.gather(json.dumps([dict(shown), dict(digests)], default=str))]
    first = told[0]
    found = []
    for name in sorted({name for values, _ in told for name in values}):
        other = _other([values.get(name) for values, _ in told])
        if other:
            found.append(f"{name} is {first[0].get(name)!r} in process 0 and {told[other][0].get(name)!r} in process {other}")
    for name in sorted({name for _, values in told for name in values}):
        other = _other([values.get(name) for _, values in told])
        if other:
            found.append(f"{name} of process 0 and of process {other} differ")
    if found:
        more = f", and {len(found) - _MOST} more" if len(found) > _MOST else ""
        raise Disagreement(
            "The processes do not train the same thing", why=", ".join(found[:_MOST]) + more,
            remedy=remedy)


def _other(values: list[object]) -> int:
    """The first process whose value is not process 0's; 0 if there is none."""
    return next((rank for rank, value in enumerate(values) if value != values[0]), 0)
