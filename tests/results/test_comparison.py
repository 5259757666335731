"""Runs compared: what differs, numbers as numpy has them, and what is called chance."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest

from lib_lora_train import events
from lib_lora_train.errors import SettingError
from lib_lora_train.results.comparison import (
    GAIN,
    ComparedRun,
    Measure,
    chance,
    compare,
    compare_runs,
    comparison_data,
    difference,
    spread,
    student,
)
from lib_lora_train.run.image_record import FILE_NAME
from lib_lora_train.settings import flat, parse
from tests.fake_host import FakeHost
from tests.results.written_run import Run


def run(rate: float, seed: int, **values: float) -> ComparedRun:
    name = f"r{rate:g}-s{seed}"
    return ComparedRun(name, name, seed, "done", "healthy", "learning",
                       {"learning_rate": rate, "network_dim": 8, "seed": seed, "output_name": name}, "save", values=values)


def test_runs_that_differ_in_their_seed_are_one_row_with_mean_and_standard_deviation() -> None:
    gains = {1e-4: [10.0, 12.5, 11.0], 3e-4: [20.0, 23.0, 24.5]}
    found = compare_runs([run(rate, seed, **{GAIN: gain, "likeness": gain / 50}) for rate, of in gains.items()
                          for seed, gain in enumerate(of)])
    assert [row.settings for row in found.rows] == [{"learning_rate": 1e-4}, {"learning_rate": 3e-4}]
    for row, of in zip(found.rows, gains.values(), strict=True):
        assert row.measures[GAIN].mean == pytest.approx(np.mean(of)) and row.measures[GAIN].count == 3
        assert row.measures[GAIN].deviation == pytest.approx(np.std(of, ddof=1))
    assert (found.measure, [row.best for row in found.rows]) == ("likeness", [False, True])
    assert found.rows[0].difference == "clear" and "larger than the spread" in found.reason


def test_the_spread_of_two_rows_is_pooled_by_degrees_of_freedom() -> None:
    one, other = [1.0, 2.0, 4.0], [3.0, 3.5]
    pooled = np.sqrt((2 * np.var(one, ddof=1) + np.var(other, ddof=1)) / 3)
    assert spread(Measure.of(one), Measure.of(other)) == pytest.approx(pooled)
    assert spread(Measure.of(one), Measure.of([3.0])) == pytest.approx(np.std(one, ddof=1))
    assert spread(Measure.of([1.0]), Measure.of([3.0])) is None
    assert Measure.of([None, math.nan]) == Measure()


@pytest.mark.parametrize("freedom, expected", [(1, 12.706205), (4, 2.776445), (10, 2.228139), (30, 2.042272), (40, 2.021075),
                                               (120, 1.979930)])
def test_students_t_is_that_of_scipy(freedom: int, expected: float) -> None:
    assert student(freedom) == pytest.approx(expected, abs=6e-4)  # scipy.stats.t.ppf(0.975, freedom)


@pytest.mark.parametrize("apart, kind, words", [
    (2.3, "clear", "larger than the spread"), (2.2, "none", "no difference beyond the spread of seeds"),
    (0.0, "none", "no difference beyond the spread of seeds")])
def test_a_difference_that_chance_makes_of_the_spread_is_none(apart: float, kind: str, words: str) -> None:
    # 2.776 * 1 * sqrt(2 / 3) = 2.267
    assert difference(Measure(apart, 1.0, 3), Measure(0.0, 1.0, 3)) == kind
    assert difference(Measure(0.6, 0.0, 2), Measure(0.6, 0.0, 2)) == "none"
    runs = [run(rate, seed, **{GAIN: mean + off}) for rate, mean in ((1, 8.0), (2, 8.0 + apart))
            for seed, off in enumerate((-1.0, 0.0, 1.0))]
    assert words in compare_runs(runs).reason


def test_two_rows_of_the_same_are_called_different_once_in_twenty() -> None:
    drawn = np.random.default_rng(1).normal(size=(4000, 5))
    clear = sum(difference(Measure.of(row[:3].tolist()), Measure.of(row[3:].tolist())) == "clear" for row in drawn)
    assert 0.04 < clear / len(drawn) < 0.06
    assert chance(Measure.of([1.0]), Measure.of([3.0])) is None


def test_the_best_within_the_bounds_is_compared_with_the_next_within_them() -> None:
    runs = [run(rate, 1, likeness=value) for rate, value in ((1, 0.601), (2, 0.702), (3, 0.55))]
    runs[1] = dataclasses.replace(runs[1], leaves=("it copies",))
    reason = compare_runs(runs).reason
    assert "among those that stay within all bounds: 0.601, the next 0.550" in reason and "0.702" not in reason
    assert compare_runs(runs[:2]).reason == "Of 2 settings it is the only one that stays within all bounds."


def test_a_ruined_seed_counts_in_no_mean() -> None:
    runs = [run(1, 1, likeness=0.6), run(1, 2, likeness=0.62), run(2, 1, likeness=0.55),
            dataclasses.replace(run(2, 2, likeness=0.9), verdict="ruined")]
    found = compare_runs(runs)
    assert found.rows[0].best and found.rows[1].measures["likeness"] == Measure(0.55, None, 1)


def test_trackers_and_settings_that_an_older_record_lacks_make_no_other_row() -> None:
    one, other = run(1e-4, 1, likeness=0.6), run(1e-4, 2, likeness=0.62)
    other = dataclasses.replace(other, settings={**flat(parse(dict(other.settings))), "log_with": "wandb",
                                                 "wandb_run_name": "x", "logging_dir": "x",
                                                 "log_prefix": "x", "log_tracker_name": "x"})
    row, = compare_runs([dataclasses.replace(one, settings={"learning_rate": 1e-4, "seed": 1, "network_dim": 8}), other]).rows
    assert len(row.runs) == 2


def test_with_one_seed_no_spread_is_known_and_a_ruined_run_is_never_the_best() -> None:
    runs = [run(1, 1, **{GAIN: 5.0}), run(2, 1, **{GAIN: 9.0}), run(3, 1, **{GAIN: 99.0})]
    found = compare_runs([*runs[:2], dataclasses.replace(runs[2], verdict="ruined")])
    assert [row.best for row in found.rows] == [False, True, False]
    assert found.rows[0].difference == "not known" and "no spread is known" in found.reason
    # A run that leaves a bound comes after all that do not.
    found = compare_runs([runs[0], dataclasses.replace(runs[1], leaves=("it copies",))])
    assert found.rows[0].best


def written(host: FakeHost, number: int, images: dict, **values: object) -> Path:
    made = Run(host.lora_folder.parent, host, run=f"zzk{number}-20261121-12000{number}",
               values={"output_name": f"zzk{number}", "seed": number, "sample_prompts": str(number), **values})
    made.tell(events.HeldOut(("9.png",), False), events.Measured(
        100, 1, (0.2,) * 3, (0.4,) * 3, (0.4, 0.2, 0.1), (0.4, 0.4, 0.4), {}))
    made.save(f"zzk{number}", 100, final=True)
    made.sample(100, prompt="zzk girl")
    made.tell(events.Finished("done", "", "", 100, "healthy"))
    made.record.close()
    (made.folder / FILE_NAME).write_text(json.dumps({"images": images}), encoding="utf-8")
    return made.folder


def test_what_differs_is_read_from_the_records_and_drawn_beside_each_other(tmp_path: Path) -> None:
    host = FakeHost(tmp_path)
    same = {"a.png": ["1", "a cat"], "b.png": ["2", "a dog"]}
    folders = [written(host, 1, same, network_dim=4), written(host, 2, same, network_dim=4),
               written(host, 3, {"b.png": ["3", "a wolf"], "c.png": ["4", ""]}, network_dim=32)]
    found = comparison_data(folders)
    json.dumps(found, allow_nan=False)
    assert [[one["seed"] for one in row["runs"]] for row in found["rows"]] == [[1, 2], [3]]
    assert [row["settings"] for row in found["rows"]] == [{"network_dim": 4}, {"network_dim": 32}]
    assert found["rows"][0]["changes"] == {"added": [], "removed": [], "changed": [], "captions": []}
    assert found["rows"][1]["changes"] == {
        "added": ["c.png"], "removed": ["a.png"], "changed": ["b.png"], "captions": ["b.png"]}
    # 1, a half and a quarter of the base model's loss: in the mean of the logarithms a half.
    assert found["rows"][1]["measures"][GAIN]["mean"] == pytest.approx(50) and found["measures"] == [GAIN, "held_out_loss"]
    assert [curve["points"] for curve in found["curves"]] == [[[100, pytest.approx(50)]]] * 3
    sample, = found["samples"]
    assert [picture["run"] for picture in sample["pictures"]] == [folder.name for folder in folders]
    with pytest.raises(SettingError):
        compare(folders[:1] * 2)
