"""Rank correlations, and how far a recommended save is below the best."""

from __future__ import annotations

import pytest

from lib_lora_train.results.recommend import Recommendation
from tools.bench.recommend import SaveFigures, compared, spearman


@pytest.mark.parametrize(("xs", "ys", "rho"), [
    ([1, 2, 3, 4, 5], [5, 6, 7, 8, 7], 0.8207826816681233),  # scipy.stats.spearmanr's own example
    ([1, 2, 3], [10, 20, 30], 1.0), ([1, 2, 3], [3, 2, 1], -1.0), ([1, 2, 3], [4, 4, 4], 0.0)])
def test_spearmans_rank_correlation(xs: list, ys: list, rho: float) -> None:
    assert spearman(xs, ys) == pytest.approx(rho)


def test_numbers_and_orders_are_compared_with_the_points() -> None:
    figures = [SaveFigures(name, step, {"likeness": likeness, "loss": loss}, points) for name, step, likeness, loss, points in (
        ("a", 1, 0.5, 0.9, 10.0), ("b", 2, 0.7, 0.8, 30.0), ("c", 3, 0.6, 0.7, 20.0))]
    order = Recommendation("c", 1.0, "", (("c", 1.0), ("b", 1.0), ("a", 1.0)))
    correlations, recommended, below = compared(figures, {"by scores": order, "by loss": None})
    # The lower the loss, the better.
    assert correlations == pytest.approx({"likeness": 1.0, "loss": 0.5, "by scores": 0.5})
    assert recommended == {"by scores": "c"} and below == {"by scores": 10.0}
