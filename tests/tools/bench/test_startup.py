"""`bench startup`: every moment counts for one stage, and the trainer is afterwards what it was; no time is scored."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lib_lora_train.errors import SettingError
from tools.bench import startup, stopwatch, true_size
from tools.bench.startup import WATCHED, run_startup
from tools.bench.stopwatch import REST, Spent, Stopwatch, WatchedFunction
from tools.bench.true_size import Model, Text
from tools.checkpoint_shapes import UNetSize

HERE = "tests.tools.bench.test_startup"


class Clock:
    """Goes on when it is told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> Spent:
        return Spent(self.now, 2 * self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(Stopwatch, "_now", staticmethod(clock))
    return clock


class Worker:
    """Something to be watched."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def outer(self) -> str:
        self.clock.now += 1
        self.inner()
        self.clock.now += 2
        return "outer's result"

    def inner(self) -> None:
        self.clock.now += 10

    @staticmethod
    def still(clock: Clock) -> None:
        clock.now += 5


def test_each_moment_counts_for_the_innermost_stage_and_nothing_is_lost(clock: Clock) -> None:
    watch, worker = Stopwatch(), Worker(clock)
    before = dict(vars(Worker))
    with watch.watching([WatchedFunction("out", f"{HERE}:Worker.outer"), WatchedFunction("in", f"{HERE}:Worker.inner"),
                         WatchedFunction("still", f"{HERE}:Worker.still")]):
        clock.now += 100
        assert worker.outer() == "outer's result"
        Worker.still(clock)
        worker.still(clock)
        assert watch.cut() == {REST: Spent(100, 200), "in": Spent(10, 20), "still": Spent(10, 20), "out": Spent(3, 6)}
        worker.inner()
        assert watch.cut() == {"in": Spent(10, 20), REST: Spent(0, 0)}
    assert dict(vars(Worker)) == before


def test_an_error_passes_and_its_time_counts(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(self: Worker) -> None:
        clock.now += 7
        raise ZeroDivisionError
    monkeypatch.setattr(Worker, "inner", failing)
    watch = Stopwatch()
    with pytest.raises(ZeroDivisionError), watch.watching([WatchedFunction("in", f"{HERE}:Worker.inner")]):
        Worker(clock).inner()
    assert Worker.inner is failing
    assert watch.cut()["in"] == Spent(7, 14)


@pytest.fixture
def smaller(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model of the same blocks with a tenth of the weights, and few images."""
    size = Model(UNetSize(160, (1, 1, 2, 2), (1, 1, 1, 0), 1, 256), 128,
                 (Text("cond_stage_model.transformer.text_model.", False, 256, 2),))
    monkeypatch.setitem(true_size._PUBLISHED, "sd1", size)
    monkeypatch.setitem(startup.SIDES, "small", {"cpu": 64, "cuda": 64})
    monkeypatch.setattr(startup, "IMAGES", 3)


def test_the_two_runs_pass_through_every_stage_but_those_that_are_remembered(smaller: None, tmp_path: Path) -> None:
    def functions() -> list[object]:
        return [vars(owner)[name] for owner, name in (watched.find() for watched in WATCHED)]

    originals = functions()
    text = run_startup(size="small", steps=2, output=tmp_path, say=lambda line: None)
    assert functions() == originals
    figures = json.loads((tmp_path / "startup.json").read_text(encoding="utf-8"))
    stages = {watched.stage for watched in WATCHED}
    at_first = set(figures["first"]["start"]) | set(figures["first"]["end"])
    repeated = set(figures["again"]["start"]) | set(figures["again"]["end"])
    assert at_first - {REST} == stages
    assert at_first - repeated == {"reading the checkpoint"}
    assert (tmp_path / "startup.md").read_text(encoding="utf-8") == text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["startup.json", "startup.md"]


@pytest.mark.parametrize("wrong", [{"size": "huge", "steps": 4}, {"size": "small", "steps": 1}])
def test_what_cannot_be_measured_is_refused(tmp_path: Path, wrong: dict[str, object]) -> None:
    with pytest.raises(SettingError):
        run_startup(**wrong, output=tmp_path, say=lambda line: None)


def test_watching_ends_with_the_block_also_where_a_place_does_not_exist() -> None:
    with pytest.raises(AttributeError), Stopwatch().watching([
            WatchedFunction("in", f"{HERE}:Worker.inner"), WatchedFunction("none", f"{HERE}:Worker.absent")]):
        raise AssertionError("nothing runs")
    assert Worker.inner.__qualname__ == "Worker.inner" and not hasattr(Worker.inner, "__wrapped__")
    assert stopwatch.REST not in {watched.stage for watched in startup.WATCHED}
