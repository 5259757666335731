"""Learning rate schedules by kohya's names.

The formulas are those of transformers' `get_scheduler` (4.54), which kohya uses, so that curves can be compared; REX is that of
its paper (Chen et al. 2021, arXiv 2107.04197).
"""

from __future__ import annotations

import dataclasses
import math

DECAY_SHARE, TIMESCALE = 0.1, 10_000
"""Where nothing is chosen: the share of the run in which warmup_stable_decay decays, and inverse_sqrt's without warm-up."""


@dataclasses.dataclass(frozen=True)
class ScheduleConfig:
    """How the learning rate changes over a run of `steps`.

    warmup        steps over which it rises from zero
    cycles        of cosine_with_restarts; half waves of cosine_with_min_lr and of the decay of warmup_stable_decay
    power         of polynomial
    min_lr_ratio  the share of the rate that cosine_with_min_lr, warmup_stable_decay and polynomial end with
    decay         steps of the decay of warmup_stable_decay; 0 for a tenth of the run
    timescale     of inverse_sqrt; 0 for the warm-up, or 10,000
    """

    name: str = "constant"
    steps: int = 1
    warmup: int = 0
    cycles: int = 1
    power: float = 1.0
    min_lr_ratio: float = 0.0
    decay: int = 0
    timescale: int = 0


def learning_rate_factor(schedule: ScheduleConfig, step: int) -> float:
    """What the learning rate is multiplied by in step `step`, from 0."""
    warmup, least = schedule.warmup, schedule.min_lr_ratio
    if step < warmup:
        rising = step / max(1, warmup)
        return least + (1 - least) * rising if schedule.name == "warmup_stable_decay" else rising
    progress = min(1.0, (step - warmup) / max(1, schedule.steps - warmup))
    if schedule.name in ("constant", "constant_with_warmup", "adafactor"):
        return 1.0
    if schedule.name == "linear":
        return max(0.0, (schedule.steps - step) / max(1, schedule.steps - warmup))
    if schedule.name == "cosine":
        return _cosine(progress)
    if schedule.name == "cosine_with_restarts":
        return 0.0 if progress >= 1.0 else _cosine((schedule.cycles * progress) % 1.0)
    if schedule.name == "cosine_with_min_lr":
        return least + (1 - least) * _cosine(schedule.cycles * progress)
    if schedule.name == "polynomial":
        return least + (1 - least) * (1.0 - progress) ** schedule.power
    if schedule.name == "rex":
        return (1.0 - progress) / (0.5 + 0.5 * (1.0 - progress))
    if schedule.name == "inverse_sqrt":
        timescale = schedule.timescale or warmup or TIMESCALE
        return 1.0 / math.sqrt((step - warmup + timescale) / timescale)
    if schedule.name == "warmup_stable_decay":
        decay = schedule.decay or max(1, round(DECAY_SHARE * schedule.steps))
        decayed = (step - (schedule.steps - decay)) / decay
        return 1.0 if decayed < 0 else least if decayed >= 1 else least + (1 - least) * _cosine(schedule.cycles * decayed)
    raise AssertionError(f"no schedule {schedule.name!r}")


def _cosine(waves: float) -> float:
    """Half a wave from 1 to 0, and on."""
    return max(0.0, 0.5 * (1.0 + math.cos(math.pi * waves)))
