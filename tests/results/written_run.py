"""A run as it stands on the disk, written event by event without training."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path

import torch
from PIL import Image

from lib_lora_train import events
from lib_lora_train.adapters import file
from lib_lora_train.results.overview import overview
from lib_lora_train.run.record import RunRecord
from lib_lora_train.settings import flat, parse
from tests.fake_host import FakeHost

SETTINGS = parse({"output_name": "zzk", "trigger_word": "zzk girl"})
PLANNED = events.Planned(3, 1, 10, 10, 100, "3 pictures", "64x64", "model", 42)


def step(number: int, total: int = 100, loss: float = 0.5) -> events.Step:
    return events.Step(number, total, 1, 10, loss, loss, 1e-4, 5e-5, 2.0, 10.0, gradient_norm=0.25)


def measured(number: int) -> events.Measured:
    return events.Measured(number, 1, (0.1, 0.2, 0.3), (0.2, 0.3, 0.4), (), (), {"unet": math.nan})


class Run:
    """A run of the LoRA "zzk", which is under way until its record is closed."""

    def __init__(self, folder: Path, host: FakeHost | None = None, *, run: str = "zzk-20261121-120000",
                 values: dict[str, object] | None = None) -> None:
        """`values` are settings besides those that each has."""
        self.host = host or FakeHost(folder)
        self.folder = self.host.runs_folder / run
        self.settings = parse({**flat(SETTINGS), **(values or {})})
        self.record = RunRecord(self.folder, self.settings)
        self.tell(PLANNED)

    def tell(self, *told: events.Event) -> None:
        for event in told:
            self.record.write(event)

    def save(self, stem: str, at: int, *, final: bool = False, value: float = 1.0) -> Path:
        path = self.host.lora_folder / f"{stem}.safetensors"
        file.save(path, {"lora_unet_a.lora_down.weight": torch.full((4, 2), value)}, {
            "ss_output_name": stem, "ss_steps": str(at), "ss_epoch": "1", "ss_base_model_version": "sd_v1",
            "ss_training_finished_at": str(time.time()), "modelspec.title": stem, "modelspec.sai_model_spec": "1.0.0"},
            dtype=torch.float16)
        self.tell(events.Saved(str(path), at, 1, final))
        return path

    def sample(self, at: int, index: int = 0, *, prompt: str = "") -> str:
        name = f"samples/{index}-{at}.png"
        target = self.folder / name
        target.parent.mkdir(exist_ok=True)
        Image.new("RGB", (64, 32), (at, 0, 0)).save(target)
        self.tell(events.Sampled(at, 1, index, prompt or f"prompt {index}", 1, name))
        return name

    def overview(self) -> dict:
        self.record.close()
        found = overview(self.folder)
        json.dumps(found, allow_nan=False)
        return found
