"""A sweep becomes ordinary runs of the queue, all of them or none, each with a name and a file of its own."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from lib_lora_train.api.queue import QueueRequest, enqueue_sweep, queue_for
from lib_lora_train.errors import OutputError, SettingError
from lib_lora_train.run import queue as queue_module
from lib_lora_train.run.output import checked_name
from lib_lora_train.run.queue import RunQueue
from lib_lora_train.run.runner import Runner
from lib_lora_train.run.sweep import MOST_RUNS, expand, read_sweep
from tests.fake_host import FakeHost, FakeJob, images

BASE = {"output_name": "zorbi", "trigger_word": "zorbi"}


def test_a_grid_is_the_product_and_a_list_is_the_list() -> None:
    runs = expand(BASE, axes={"learning_rate": ["1e-4", 0.0003], "seed": [1, 2, 3]})
    assert [(run.settings.optimizer.learning_rate, run.settings.optimizer.seed) for run in runs] == [
        (rate, seed) for rate in (1e-4, 3e-4) for seed in (1, 2, 3)]
    assert all(run.settings.dataset.trigger_word == "zorbi" for run in runs)
    sets = [{"network_dim": 4, "network_alpha": 1}, {"optimizer_type": "Lion"}]
    runs = expand(BASE, axes={"seed": [1, 2]}, overrides=sets)
    assert [(r.settings.network.network_dim, r.settings.optimizer.optimizer_type, r.settings.optimizer.seed) for r in runs] == [
        (4, "AdamW", 1), (4, "AdamW", 2), (16, "Lion", 1), (16, "Lion", 2)]


@pytest.mark.parametrize("values", [
    ["1e-4", "3e-4"], ["0.1234567890123", "0.1234567890124"], [float(number) / 7 for number in range(1, 60)]])
@pytest.mark.parametrize("name", ["zorbi", "z" * 110])
def test_names_are_distinct_also_without_regard_to_case_and_can_be_files_and_stand_in_a_prompt(name: str, values: list) -> None:
    for axes in ({"learning_rate": values}, {"training_comment": [f"a/b:{v}=<é>" for v in values]},
                 {"training_comment": ["x", "X"]}):
        names = [run.name for run in expand({**BASE, "output_name": name}, axes=axes)]
        assert len({one.lower() for one in names}) == len(names)
        # The WebUI takes what stands before a "=" in <lora:…> for the name of an argument.
        assert [checked_name(one) for one in names] == names and not any("=" in one for one in names)


@pytest.mark.parametrize("axes, word", [
    ({"seed": list(range(MOST_RUNS + 1))}, "101"), ({"learning_rat": [1]}, "learning_rate"), ({"seed": ["1", 1]}, "twice"),
    ({"network_dim": [4, "many"]}, "network_dim"), ({"output_name": ["a"]}, "output_name"), ({"seed": []}, "seed"),
    ({}, "no values"),
    ({"learning_rate": [1e-4, 0]}, "zorbi-learning_rate_0:")])
def test_what_cannot_be_swept_is_one_sentence(axes: dict, word: str) -> None:
    with pytest.raises(SettingError) as refused:
        expand(BASE, axes=axes)
    assert word in str(refused.value) and str(refused.value).count(". ") == 0


@pytest.fixture
def fake_host(tmp_path: Path) -> FakeHost:
    return FakeHost(tmp_path)


@pytest.fixture
def queue(fake_host: FakeHost, monkeypatch: pytest.MonkeyPatch, job: FakeJob) -> Iterator[RunQueue]:
    monkeypatch.setattr(queue_module, "_POLL_SECONDS", 1e6)  # the test takes each look itself
    queue_for.cache_clear()
    queue = queue_for(fake_host, Runner())
    yield queue
    queue.runner.stop(save=False)
    assert queue.runner.wait(60)
    queue.close()


def test_all_runs_are_queued_or_none_and_each_run_knows_its_sweep(
        queue: RunQueue, fake_host: FakeHost, tmp_path: Path) -> None:
    settings = {**BASE, "train_data_dir": str(images(tmp_path / "data")), "resolution": "64", "min_bucket_reso": 64}

    def ask(seeds: list[int]) -> None:
        enqueue_sweep(QueueRequest(settings=settings, axes={"seed": seeds}), queue=queue, host=fake_host)

    (fake_host.lora_folder / "zorbi-seed_2.safetensors").write_bytes(b"another LoRA")
    with pytest.raises(OutputError) as refused:
        ask([1, 2, 3])
    assert "zorbi-seed_2" in str(refused.value) and queue.entries() == ()
    ask([4, 3])
    with pytest.raises(OutputError) as refused:
        ask([5, 4])  # one that waits writes the file of the second
    assert "zorbi-seed_4" in str(refused.value)
    first, second = queue.entries()
    assert (first.name, second.name, first.sweep.id) == ("zorbi-seed_4", "zorbi-seed_3", second.sweep.id)
    queue.check()
    folder = fake_host.runs_folder / queue.entries()[0].run
    assert read_sweep(folder) == first.sweep and first.sweep.values == {"seed": "4"}


def test_a_sweep_with_a_rate_that_its_optimizer_cannot_have_is_refused(
        queue: RunQueue, fake_host: FakeHost, tmp_path: Path) -> None:
    settings = {**BASE, "train_data_dir": str(images(tmp_path / "data")), "optimizer_type": "Prodigy", "learning_rate": 1.0}
    with pytest.raises(SettingError) as refused:
        enqueue_sweep(QueueRequest(settings=settings, axes={"learning_rate": [1.0, 1e-4]}), queue=queue, host=fake_host)
    assert "zorbi-learning_rate_0.0001" in str(refused.value) and queue.entries() == ()


def test_a_queue_of_before_sweeps_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queue_module, "_POLL_SECONDS", 1e6)
    old = {"id": "1", "name": "one", "checkpoint": "", "not_before": 0.0, "idle_minutes": 0.0, "state": "done", "run": "",
           "resumes": False, "recorded": 0, "message": "", "settings": {"output_name": "one"}}
    runs = tmp_path / "runs"
    runs.mkdir()
    (runs / "queue.json").write_text(json.dumps({"held": False, "entries": [old]}), encoding="utf-8")
    (tmp_path / "host").mkdir()
    queue = RunQueue(FakeHost(tmp_path / "host"), Runner(), runs, start=lambda *_: None)
    queue.open()
    assert [(entry.name, entry.sweep) for entry in queue.entries()] == [("one", None)]
    queue.close()
