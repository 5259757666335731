"""Learning rate schedules by kohya's names."""

from __future__ import annotations

import math


def learning_rate_factor(schedule: str, step: int, *, total: int, warmup: int, cycles: int = 1) -> float:
    """What the learning rate is multiplied by in step `step` (from 0) of `total`.

    The formulas are those of transformers' `get_scheduler`, which kohya uses, so that curves can be compared.
    """
    if step < warmup:
        return step / max(1, warmup)
    if schedule == "constant":
        return 1.0
    if schedule == "linear":
        return max(0.0, (total - step) / max(1, total - warmup))
    progress = (step - warmup) / max(1, total - warmup)
    if schedule == "cosine":
        return max(0.0, 0.5 * (1.0 + math.cos(math.pi * progress)))
    if schedule == "cosine_with_restarts":
        return 0.0 if progress >= 1.0 else max(0.0, 0.5 * (1.0 + math.cos(math.pi * ((cycles * progress) % 1.0))))
    raise AssertionError(f"no schedule {schedule!r}")
