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
    compare,
    compare_runs,
    comparison_data,
    difference,
    spread,
)
from lib_lora_train.run.image_record import FILE_NAME
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


@pytest.mark.parametrize("apart, kind, words", [
    (1.0, "clear", "larger than the spread"), (np.nextafter(1.0, 0), "none", "no difference beyond the spread of seeds"),
    (0.0, "none", "no difference beyond the spread of seeds")])
def test_a_difference_below_the_spread_is_none(apart: float, kind: str, words: str) -> None:
    best = Measure(apart, 1.0, 3)
    assert difference(best, Measure(0.0, 1.0, 3)) == kind
    runs = [run(rate, seed, **{GAIN: mean + off}) for rate, mean in ((1, 8.0), (2, 8.0 + (kind == "clear") * 4))
            for seed, off in enumerate((-1.0, 1.0))]
    assert words in compare_runs(runs).reason


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
        100, 1, (0.2,) * 3, (0.4,) * 3, (0.3, 0.2, 0.1), (0.4, 0.4, 0.4), {}))
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
    # 1 - mean(0.3, 0.2, 0.1) / 0.4
    assert found["rows"][1]["measures"][GAIN]["mean"] == pytest.approx(50) and found["measures"] == [GAIN, "held_out_loss"]
    assert [curve["points"] for curve in found["curves"]] == [[[100, pytest.approx(50)]]] * 3
    sample, = found["samples"]
    assert [picture["run"] for picture in sample["pictures"]] == [folder.name for folder in folders]
    with pytest.raises(SettingError):
        compare(folders[:1] * 2)
