"""The results page is told what a run made, whatever became of its folder."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from pathlib import Path

import pytest
import torch

from lib_lora_train import events
from lib_lora_train.adapters import file
from lib_lora_train.results.overview import overview
from lib_lora_train.results.saves import saves_of
from tests.results.written_run import PLANNED, Run, measured, step


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path)


def test_a_run_is_told_in_the_words_of_the_page(run: Run) -> None:
    run.record.write(events.HeldOut(("a.png", "b.png"), derived=False))
    run.record.write(step(50, loss=math.nan))
    run.record.write(measured(50))
    first = run.save("zzk-step00000050", 50)
    image = run.sample(50)
    run.sample(50, 1)
    run.record.write(events.Diagnosed(50, "learning", "It learns."))
    run.record.write(events.ImageLosses(100, ("a.png",), (math.inf,), (0.5,)))
    result = run.save("zzk", 100, final=True)
    found = run.overview()
    assert (found["run"], found["name"], found["trigger_word"]) == (run.folder.name, "zzk", "zzk girl")
    assert found["held_out"] == {"pictures": ["a.png", "b.png"], "derived": False}
    assert found["measured"][0] == {
        "step": 50, "epoch": 1, "training": [0.1, 0.2, 0.3], "unadapted_training": [0.2, 0.3, 0.4], "held_out": [],
        "unadapted_held_out": [], "strength": {"unet": None}, "path": "", "better": {
            # 1 - 1/2, 1 - 2/3, 1 - 3/4; before them 1 - the geometric mean of the three ratios.
            "training": pytest.approx([100 * (1 - (1 / 2 * 2 / 3 * 3 / 4) ** (1 / 3)), 50, 100 / 3, 25]), "held_out": [None]}}
    assert found["samples"] == [
        {"prompt": f"prompt {index}", "index": index,
         "pictures": [{"step": 50, "epoch": 1, "file": f"samples/{index}-50.png", "seed": 1}]} for index in (0, 1)]
    assert found["image_losses"] == {"step": 100, "images": ["a.png"], "losses": [None], "unadapted": [0.5]}
    assert found["diagnosed"] == {"step": 50, "finding": "learning", "message": "It learns.", "setting": "", "value": ""}
    assert found["steps"] == [[50, None, None, 1e-4, 5e-5, 0.25]]
    assert found["result"] == {"path": str(result), "lora_text": "<lora:zzk:1>"}
    assert (found["grid"], found["task"]) == (None, None)
    assert (found["recommended"]["save"], found["recommended"]["weight"]) == ("zzk-step00000050", 1)
    common = {"epoch": 1, "exists": True}
    assert found["saves"] == [
        {"id": "zzk-step00000050", "path": str(first), "step": 50, "final": False, "size": first.stat().st_size,
         "is_result": False, "lora_text": "<lora:zzk-step00000050:1>", "preview": image, **common},
        {"id": "zzk", "path": str(result), "step": 100, "final": True, "size": result.stat().st_size, "is_result": True,
         "lora_text": "<lora:zzk:1>", "preview": "", **common}]


def test_what_is_missing_damaged_or_of_another_version_is_left_out(run: Run, tmp_path: Path) -> None:
    run.record.write(step(1))
    gone = run.save("zzk-step00000050", 50)
    gone.unlink()
    (run.folder / run.sample(50)).unlink()
    with open(run.folder / "events.jsonl", "a", encoding="utf-8") as lines:
        lines.write('{"event": "of a later version", "x": 1}\n[1]\n{"event": "step", "st')
    found = run.overview()
    assert [(save["exists"], save["size"], save["preview"]) for save in found["saves"]] == [(False, 0, "")]
    assert found["samples"] == [] and len(found["steps"]) == 1
    assert (found["result"], found["held_out"], found["measured"], found["diagnosed"]) == (None, None, [], None)
    nothing = overview(tmp_path / "nothing")
    assert nothing["saves"] == nothing["steps"] == [] and nothing["name"] == ""


@pytest.mark.parametrize("name", ["../secret.png", "samples/../../secret.png", "/secret.png", "secret.png", "samples/a/b.png",
                                  "samples\\..\\secret.png", "C:secret.png", "samples/x.txt", "samples/\0.png",
                                  "samples/link.png"])
def test_an_image_elsewhere_is_no_sample_of_the_run(run: Run, name: str) -> None:
    (run.folder / "samples" / "a").mkdir(parents=True)
    for path in (run.folder / "secret.png", run.folder.parent / "secret.png", run.folder / "samples" / "a" / "b.png",
                 run.folder / "samples" / "x.txt"):
        path.write_bytes(b"secret")
    with contextlib.suppress(OSError):  # Windows lets few users make one
        (run.folder / "samples" / "link.png").symlink_to(run.folder / "secret.png")
    run.record.write(events.Sampled(1, 1, 0, "a prompt", 1, name))
    assert run.overview()["samples"] == []


def test_what_is_made_again_after_an_interruption_counts_once(run: Run) -> None:
    for number in range(1, 31):
        run.record.write(step(number, loss=1.0))
    for number in (10, 25, 30):
        run.record.write(measured(number))
        run.sample(number)
    run.save("zzk-step00000010", 10, value=1.0)
    run.record.write(dataclasses.replace(PLANNED, resumed_at=20))
    for number in range(21, 26):
        run.record.write(step(number, loss=2.0))
    run.record.write(dataclasses.replace(PLANNED, resumed_at=20, memory="about 3 GB"))
    run.save("zzk-step00000010", 10, value=2.0)
    found = run.overview()
    assert [(number, loss) for number, loss, *_ in found["steps"]] == [
        *((number, 1.0) for number in range(1, 21)), *((number, 2.0) for number in range(21, 26))]
    assert [entry["step"] for entry in found["measured"]] == [10]
    assert [entry["step"] for entry in found["samples"][0]["pictures"]] == [10]
    assert len(found["saves"]) == 1


def test_a_long_run_is_told_in_at_most_500_points_with_its_end(run: Run) -> None:
    for number in range(1, 798):
        run.record.write(step(number, 797))
    points = run.overview()["steps"]
    numbers = [number for number, *_ in points]
    assert 250 <= len(points) <= 500
    assert numbers[-1] == 797 and numbers == list(range(numbers[0], 798, numbers[1] - numbers[0]))


def test_a_file_of_another_run_in_its_place_is_not_a_save_of_this_one(run: Run) -> None:
    path = run.save("zzk-step00000050", 50)
    run.save("zzk", 100, final=True)
    file.save(path, {"a": torch.ones(1)}, {"ss_steps": "50", "ss_training_finished_at": str(time.time() + 3600)},
              dtype=torch.float16)
    assert [(save.id, save.exists, save.own) for save in saves_of(run.folder)] == [
        ("zzk-step00000050", False, False), ("zzk", True, True)]
    path.write_bytes(b"not a LoRA")
    assert [(save.exists, save.own) for save in saves_of(run.folder)] == [(True, False), (True, True)]
