"""A host without a model and a job without training, for tests of what starts and shows runs."""

from __future__ import annotations

import queue
from pathlib import Path

import torch
from PIL import Image

from lib_lora_train import events
from lib_lora_train.host.port import Checkpoint, Host
from lib_lora_train.run.planning import RunPlan
from lib_lora_train.run.record import RunRecord
from lib_lora_train.settings import Settings, flat
from lib_lora_train.training import checkpoint as checkpoint_module


class FakeHost(Host):
    """Holds an SD1 checkpoint by name only, lends nothing and is `busy` with other work where a test says so."""

    allowed = None

    def __init__(self, folder: Path) -> None:
        self.lora_folder, self.runs_folder = folder / "loras", folder / "runs"
        self.datasets_folder, self.models_folder = folder / "datasets", folder / "models"
        self.presets_folder = folder / "presets"
        self.taggers_folder = self.lora_folder / "taggers"
        self.lora_folder.mkdir()
        self.busy = False

    def checkpoint(self) -> Checkpoint:
        return Checkpoint("dreamshaper_8", "dreamshaper_8.safetensors", "sd1", sha256="879db523c3" + 54 * "0")

    def outline(self) -> None:
        return None

    def waiting(self) -> bool:
        return self.busy


class FakeJob:
    """Stands in for `run_job`: goes as far as the test says, and ends when it is told or asked to.

    The loss of step n is 1 / n, so that a test knows the curve. `report` tells of what a test adds.
    """

    TOTAL = 100

    def __init__(self) -> None:
        self._steps: queue.Queue[int] = queue.Queue()
        self.warning = ""
        self.verdict: events.Verdict = "healthy"
        self.stage = events.Stage("Encoding pictures", 1, 3)
        self.seen: Settings | None = None

    def advance(self, steps: int) -> None:
        """Let that many steps happen."""
        for _ in range(steps):
            self._steps.put(1)

    def __call__(self, plan: RunPlan, host: Host, *, report: events.Report, stop, folder=None,
                 sample_now=lambda: False, save_now=lambda: False, paused=lambda: False) -> events.Finished:
        self.seen, self.report = plan.settings, report
        settings = plan.settings
        report(events.Planned(3, 1, 10, 10, self.TOTAL, "3 pictures", "512×768", "dreamshaper_8", 42))
        report(self.stage)
        if self.warning:
            report(events.Warned(self.warning))
        path, step = host.lora_folder / f"{settings.save.output_name}.safetensors", 0
        while step < self.TOTAL and not stop():
            try:
                self._steps.get(timeout=0.02)
            except queue.Empty:
                continue
            step += 1
            report(events.Step(step, self.TOTAL, 1 + (step - 1) // 10, 10, 1 / step, 1 / step, 1e-4, 0.0, 2.0,
                               (self.TOTAL - step) / 2))
        if stop() == "stop":
            return events.Finished("stopped", "Stopped after 0 steps; nothing was saved.", "", step)
        path.write_bytes(b"a LoRA")
        report(events.Saved(str(path), step, 1, True))
        worth = "ruined" if self.verdict == "ruined" else "ready"
        return events.Finished("stopped" if stop() else "done", f"{path.stem} is {worth}.", str(path), step, self.verdict)


def interrupted_run(host: FakeHost, settings: Settings, *, step: int, total: int = FakeJob.TOTAL) -> str:
    """A run that was cut off two steps after its state was kept; returns its id."""
    folder = host.runs_folder / f"{settings.save.output_name}-20261121-120000"
    record = RunRecord(folder, settings)
    record.write(events.Planned(3, 1, 10, 10, total, "3 pictures", "64x64", "dreamshaper_8", 42))
    for number in range(1, step + 3):
        record.write(events.Step(number, total, 1, 10, 1 / number, 1 / number, 1e-4, 0.0, 2.0, 1.0))
    record.close()
    scaler = {"scale": torch.ones(1), "good_steps": torch.ones(1)}
    state = checkpoint_module.TrainingState(step, {"a": torch.ones(1)}, {}, scaler, (), 0)
    checkpoint_module.write(folder / checkpoint_module.FILE_NAME, state, {
                 "settings": flat(settings), "started_at": 1.0, "steps": total, "dataset": "", "checkpoint": {}})
    return folder.name


def images(folder: Path, count: int = 3) -> Path:
    """A new folder of plain images."""
    folder.mkdir()
    for number in range(count):
        Image.new("RGB", (64, 64), (40 * number, 80, 120)).save(folder / f"{number}.png")
    return folder
