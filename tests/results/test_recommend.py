"""The recommended save is the most like the held-out pictures of those that keep within bounds."""

from __future__ import annotations

from pathlib import Path

import pytest

from lib_lora_train.evaluation.scores import Spread
from lib_lora_train.events import Measured
from lib_lora_train.results.grid import Column
from lib_lora_train.results.recommend import recommended_by_loss, recommended_by_scores
from lib_lora_train.results.saves import Save
from lib_lora_train.results.scoring import ColumnScores


def column(save: str, likeness: float | None, *, following: float = 0.8, drift: float = 0.05, copies: float = 0.8,
           part: str = "") -> ColumnScores:
    return ColumnScores(Column(save, 1.0, part), Spread(likeness), Spread(following), Spread(), Spread(drift), Spread(copies))


BASE = column("", 0.5)


@pytest.mark.parametrize(("columns", "best"), [
    ([column("a", 0.6), column("b", 0.7), column("c", 0.65)], "b"),
    ([column("a", 0.6), column("deaf", 0.9, following=0.1)], "a"),
    ([column("a", 0.6), column("drifts", 0.9, drift=0.9)], "a"),
    ([column("a", 0.6), column("copies", 0.9, copies=3.0)], "a"),
    ([column("a", 0.6), column("part", 0.9, part="unet")], "a"),
    ([column("a", 0.6, copies=2.0), column("b", 0.7, drift=0.9)], "b")])
def test_the_most_like_of_those_within_bounds_is_recommended(columns: list, best: str) -> None:
    found = recommended_by_scores([BASE, *columns])
    assert found is not None and found.save == best and found.order[0] == (best, 1.0)
    assert found.reason.endswith(".") and found.reason.count(". ") == 0
    assert len(found.order) == sum(not one.column.part for one in columns)


def test_prompts_need_not_be_followed_more_than_by_the_held_out_pictures() -> None:
    columns = [BASE, column("a", 0.6), column("style", 0.9, following=0.3)]
    assert recommended_by_scores(columns).save == "a"
    assert recommended_by_scores(columns, held_out_following=0.35).save == "style"
    columns = [BASE, column("a", 0.6), column("deaf", 0.9, following=0.01)]
    assert recommended_by_scores(columns, held_out_following=-0.1).save == "a"


def test_without_likeness_or_the_base_model_nothing_is_recommended_by_scores() -> None:
    assert recommended_by_scores([BASE, column("a", None)]) is None
    assert recommended_by_scores([column("a", 0.6)]) is None


def measured(step: int, training: float, held_out: float | None) -> Measured:
    losses = () if held_out is None else (held_out,) * 3
    return Measured(step, 1, (training,) * 3, (1.0,) * 3, losses, (2.0,) * 3 if losses else (), {})


@pytest.mark.parametrize(("events", "best", "word"), [
    ([measured(10, 0.9, 1.9), measured(20, 0.8, 1.5), measured(30, 0.1, 1.7), measured(40, 0.1, 0.1)], 20, "held-out"),
    ([measured(10, 0.9, 1.9), measured(20, 0.8, 1.50), measured(30, 0.1, 1.52)], 30, "held-out"),
    ([measured(10, 0.9, 2.2), measured(20, 0.8, 2.1), measured(30, 0.1, 2.3)], 20, "held-out"),
    ([measured(10, 0.9, None), measured(20, 0.8, None), measured(30, 0.7, None)], 30, "training")])
def test_without_a_grid_it_is_the_last_save_near_the_lowest_held_out_loss(events: list, best: int, word: str) -> None:
    saves = [Save(id=f"s{step}", path=Path(f"s{step}"), home=Path(f"s{step}"), step=step, epoch=1, final=False, size=1,
                  exists=step != 40, is_result=False, own=True) for step in (10, 20, 30, 40)]
    found = recommended_by_loss(events, saves)  # that of step 40 is gone
    assert found is not None and (found.save, found.weight) == (f"s{best}", 1.0) and word in found.reason
    assert recommended_by_loss([], saves) is None and recommended_by_loss(events, []) is None
