"""What a run says of itself in words: when, once, and that it costs no LoRA."""

from __future__ import annotations

import dataclasses
import json
import types
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lib_lora_train import events
from lib_lora_train.distributed import SINGLE_PROCESS
from lib_lora_train.run import diagnosing
from lib_lora_train.settings import parse
from tests.jobs import plan_of
from tests.run.test_job import of, run, settings


def test_what_is_wrong_with_the_pictures_is_said_before_the_first_step_once_and_at_the_end(images, host):
    finished, seen = run(settings(images, validation=True, validate_every_n_steps=2), host)
    said = of(events.Diagnosed, seen)
    assert [event.finding for event in said] == ["words"]  # four pictures
    assert seen.index(said[0]) < seen.index(of(events.Step, seen)[0])
    assert finished.verdict == "healthy" and finished.path in finished.message and said[0].message in finished.message


def test_a_rate_that_ruins_it_is_named_and_the_two_verdicts_agree(images, host):
    finished, seen = run(settings(images, validation=True, learning_rate=5, max_train_steps=4), host)
    last = of(events.Diagnosed, seen)[-1]
    assert finished.verdict == "ruined" and (last.finding, last.setting) == ("ruined", "learning_rate")
    assert float(last.value) < 5 and last.message in finished.message


@pytest.mark.parametrize("name", ["check_words", "diagnose"])
def test_a_look_that_fails_is_told_and_changes_no_weight(images, host, monkeypatch, name):
    monkeypatch.setattr(diagnosing, "MOST_PASSES", 1)  # so short a run's words are not asked about else
    untouched = load_file(run(settings(images, max_train_steps=2, validation=False), host)[0].path)
    monkeypatch.setattr(diagnosing, name, lambda *rest, **more: (_ for _ in ()).throw(RuntimeError("broken")))
    finished, seen = run(settings(images, validation=True, max_train_steps=2, overwrite=True), host)
    assert finished.outcome == "done" and any("broken" in event.message for event in of(events.Warned, seen))
    found = load_file(Path(finished.path))
    assert all(torch.equal(found[key], tensor) for key, tensor in untouched.items())


def test_a_measurement_that_cannot_be_read_ends_nothing(tmp_path):
    damaged = events.Measured(1, 1, (0.1,), (0.2, 0.3), (), (), {})
    (tmp_path / "events.jsonl").write_text(json.dumps(events.to_dict(damaged)), encoding="utf-8")
    plan = dataclasses.replace(plan_of(parse({"output_name": "zzk"})), resume_point=types.SimpleNamespace(step=1))
    told: list[events.Event] = []
    resumed = diagnosing.Diagnosing(plan, None, None, group=SINGLE_PROCESS, folder=tmp_path, report=told.append)
    resumed(damaged)
    assert told.count(damaged) == 1 and resumed.end(("healthy", "")) == ""
