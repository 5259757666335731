"""Which save to take, at which weight, and why: from the scores of the grid, or without one from the loss on held-out images.

The rule, of columns that are a save of the run at a weight:

1. Prompt following, drift and copy risk must stay within bounds (below); a column that leaves one goes behind all that do not.
2. Of those within, the one most like the held-out images comes first; what is no nearer to them than the base model is last.

Without a grid it is the save with the lowest loss on held-out images, at weight 1. docs/recommendation.md says how well that does.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from lib_lora_train.events import Measured
from lib_lora_train.results.history import read_history
from lib_lora_train.results.saves import Save, saves_of
from lib_lora_train.results.scoring import ColumnScores, read_scores

FOLLOWING = 0.75
"""Least share of the base model's prompt following."""
DRIFT = 0.25
"""Most drift."""
COPIES = 1.0
"""Most copy risk, or the base model's where that is more."""


@dataclasses.dataclass(frozen=True)
class Recommendation:
    """The save's id, the weight, the reason in one sentence, and all that could be recommended, the best first."""

    save: str
    weight: float
    reason: str
    order: tuple[tuple[str, float], ...]

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        return dataclasses.asdict(self)


def recommend(folder: Path) -> Recommendation | None:
    """What the run in `folder` should be taken as; None where nothing was measured, or all that was measured is gone."""
    saves, scores = saves_of(folder), read_scores(folder)
    by_scores = recommended_by_scores(scores.columns, saves) if scores is not None else None
    return by_scores or recommended_by_loss(read_history(folder).measured, saves)
