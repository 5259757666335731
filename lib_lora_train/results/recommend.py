"""Which save to take, at which weight, and why: from the scores of the grid, or without one from the loss on held-out images.

The rule, for the columns that are a save of the run at a weight:

1. Prompt following, drift and copy risk must stay within the bounds below. One that leaves a bound comes after all others.
2. Among those, the more like the held-out images, the better.

Without likeness it is the last save whose loss on held-out images is near the lowest, at weight 1: images go on to improve
after it. docs/recommendation.md tells how well the two do.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lib_lora_train.errors import counted
from lib_lora_train.events import Measured
from lib_lora_train.results.history import read_history
from lib_lora_train.results.improvement import improvement
from lib_lora_train.results.saves import Save, saves_of
from lib_lora_train.results.scoring import ColumnScores, read_scores

FOLLOWING, LEAST_FOLLOWING = 0.75, 0.1
"""Least share of the prompt following of the base model's images, or of the held-out ones where that is less: in a style that
it does not know, the base model sees less of what a caption says. And at least the second share of the base model's."""
DRIFT = 0.5
"""Most drift; pictures that have nothing to do with each other are about that far apart."""
COPIES = 1.5
"""Most copy risk, times that of the base model's images or 1, whichever is more: with more images trained than held out, one of
them is nearer by chance, the more so where all show one subject."""
NEAR = 0.75
"""Of the loss's greatest improvement over the base model, the share that counts as near it."""


@dataclasses.dataclass(frozen=True)
class Recommendation:
    """The save's id, the weight, the reason in one sentence, and all that could be recommended, the best first."""

    save: str
    weight: float
    reason: str
    order: tuple[tuple[str, float], ...]

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        return {**dataclasses.asdict(self), "order": [list(one) for one in self.order]}


def recommend(folder: Path) -> Recommendation | None:
    """What to take of the run in `folder`; None where nothing was measured, or all that was measured is gone."""
    there = {save.id for save in saves_of(folder) if save.exists}
    scores = read_scores(folder)
    by_scores = recommended_by_scores([one for one in scores.columns if one.column.save in there | {""}],
                                      held_out_following=scores.held_out_following) if scores else None
    return by_scores or recommended_by_loss(read_history(folder).measured, saves_of(folder))


def recommended_by_scores(columns: Sequence[ColumnScores], *, held_out_following: float | None = None) -> Recommendation | None:
    """By the scores of columns, the base model's among them, and those of the held-out images themselves; None where no save's
    likeness was measured."""
    unadapted = next((one for one in columns if not one.column.save), None)
    found = [one for one in columns if one.column.save and not one.column.part and one.likeness.mean is not None]
    if unadapted is None or not found:
        return None
    bounds = {one.column: leaves(one, unadapted, held_out_following) for one in found}
    ordered = sorted(found, key=lambda one: (bool(bounds[one.column]), -(one.likeness.mean or 0)))
    best = ordered[0]
    best_of = (f"Of {counted(len(ordered), 'save and weight', 'saves and weights')} it is the most like the held-out pictures "
               f"({best.likeness.mean:.3f}, the base model {unadapted.likeness.mean or 0:.3f})")
    if left := bounds[best.column]:
        reason = f"{best_of}, though none stays within all bounds: {' and '.join(left)}."
    elif any(bounds.values()):
        reason = f"{best_of} among those that follow the prompt, do not drift and do not copy."
    else:
        reason = f"{best_of}."
    return Recommendation(best.column.save, best.column.weight, reason,
                          tuple((one.column.save, one.column.weight) for one in ordered))


def leaves(one: ColumnScores, unadapted: ColumnScores, held_out_following: float | None = None) -> list[str]:
    """Which bounds a column leaves, in words."""
    found = []
    following, usual = one.prompt_following.mean, unadapted.prompt_following.mean
    if following is not None and usual is not None:
        least = FOLLOWING * (usual if held_out_following is None else min(usual, held_out_following))
        if following < max(least, LEAST_FOLLOWING * usual):
            found.append("it follows the prompt too little")
    if one.drift.mean is not None and one.drift.mean > DRIFT:
        found.append("it changes what its trigger word does not call")
    if one.copy_risk.mean is not None and one.copy_risk.mean > COPIES * max(1, unadapted.copy_risk.mean or 0):
        found.append("it is nearer to pictures it was trained on")
    return found


def recommended_by_loss(measured: Sequence[Measured], saves: Sequence[Save]) -> Recommendation | None:
    """By the loss on fixed noise beside the base model's, of held-out pictures where there are some; None where no save that
    is there was measured."""
    there = {save.step: save.id for save in saves if save.exists}
    losses = {event.step: loss for event in measured if event.step in there and (loss := _relative_loss(event)) is not None}
    if not losses:
        return None
    lowest = min(losses.values())
    near = {step for step, loss in losses.items() if loss == lowest or 1 - loss >= NEAR * (1 - lowest)}
    order = sorted(losses, key=lambda step: (step not in near, -step if step in near else losses[step]))
    images = "held-out" if all(event.held_out for event in measured) else "training"
    reason = (f"Of {counted(len(order), 'save')} it is the last whose loss on {images} pictures is near the lowest, "
              f"{100 * losses[order[0]]:.0f} % of the base model's.")
    return Recommendation(there[order[0]], 1.0, reason, tuple((there[step], 1.0) for step in order))


def _relative_loss(event: Measured) -> float | None:
    """The loss as a share of the base model's, the mean over the bands of timesteps."""
    found = improvement(event.held_out, event.unadapted_held_out) if event.held_out else improvement(
        event.training, event.unadapted_training)
    return None if found is None else 1 - found / 100
