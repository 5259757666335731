"""What must not grow with the length of a run, counted."""

from __future__ import annotations

import gc
from pathlib import Path

import torch
from PIL import Image

from lib_lora_train import events
from lib_lora_train.host.standalone import StandaloneHost
from lib_lora_train.run import runner
from lib_lora_train.run.planning import plan_job
from lib_lora_train.run.record import RunRecord, read_events
from lib_lora_train.run.runner import Runner
from lib_lora_train.settings import parse
from tests.fake_host import FakeHost
from tests.jobs import plan_of
from tools import tiny_checkpoint


def step(number: int, total: int) -> events.Step:
    return events.Step(number, total, 1, 1, 0.5, 0.5, 1e-4, 0.0, 2.0, 10.0)


def test_no_step_and_no_epoch_leaves_a_tensor_or_another_object_behind(tmp_path):
    images = tmp_path / "pictures"
    images.mkdir()
    for number in range(2):
        Image.new("RGB", (64, 64), (90 * number, 80, 120)).save(images / f"{number}.png")
    counts: list[tuple[int, int]] = []

    class CountingHost(StandaloneHost):
        def report(self, event: events.Event) -> None:
            if isinstance(event, events.Step) and event.step % 4 == 0:
                gc.collect()
                known = gc.get_objects()
                counts.append((sum(type(thing) is torch.Tensor for thing in known), len(known)))
    host = CountingHost(tiny_checkpoint.write(tmp_path, size=tiny_checkpoint.SHALLOW), lora_folder=tmp_path / "loras",
                        runs_folder=tmp_path / "runs")
    one = Runner()
    settings = parse({"train_data_dir": str(images), "output_name": "long", "resolution": "64", "min_bucket_reso": 64,
                      "num_repeats": 1, "max_train_steps": 12, "network_dim": 1, "sample_images": False,
                      "save_every_n_epochs": 0})
    one.start(plan_job(settings, host), host)
    assert one.wait(120) and one.status().finished.outcome == "done"
    tensors, objects = zip(*counts[1:], strict=True)
    assert set(tensors) == {tensors[0]}
    # Each step adds a point to the curve (at most a thousand in all) and nothing else: a tuple of numbers.
    assert objects[-1] - objects[0] <= 4 * (len(objects) - 1)


def test_the_event_log_of_a_long_run_stays_short(tmp_path):
    record = RunRecord(tmp_path / "run", parse({"output_name": "long"}))
    for number in range(1, 10_001):
        record.write(step(number, 10_000))
        record.write(events.Stage("Encoding pictures", number, 10_001))
    record.close()
    assert len(list(read_events(tmp_path / "run"))) <= 2001


def test_what_a_watcher_is_sent_stays_short_however_much_happens(monkeypatch, tmp_path):
    def job(settings, host, *, report, stop, sample_now, save_now, paused, folder=None):
        for number in range(1, 3001):
            report(step(number, 3000))
            report(events.Saved(f"{number}.safetensors", number, 1, number == 3000))
            report(events.Warned(f"warning {number}"))
        return events.Finished("done", "ready", "3000.safetensors", 3000)
    monkeypatch.setattr(runner, "run_job", job)
    monkeypatch.setattr(RunRecord, "write", lambda *_: None)
    one = Runner()
    one.start(plan_of(parse({"output_name": "long"})), FakeHost(tmp_path))
    assert one.wait(60)
    status = one.status()
    assert len(status.points) <= 1000 and len(status.warnings) <= 50 and len(status.saved) <= 200
    assert status.saved[-1].path == "3000.safetensors" and Path(status.finished.path).name == "3000.safetensors"
