"""One LoRA trained the ordinary way (`run_job`), with saves on the way."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

from lib_lora_train import events
from lib_lora_train.errors import SettingError, TrainingError
from lib_lora_train.host.port import Host
from lib_lora_train.run.job import run_job
from lib_lora_train.run.planning import plan_job
from lib_lora_train.settings import parse
from lib_lora_train.settings.field import Value

Say = Callable[[str], None]
Stop = Callable[[], Literal["", "stop", "save"]]

REFERENCE: dict[str, Value] = {
    "optimizer_type": "AdamW", "learning_rate": 1e-4, "network_dim": 8, "network_alpha": 4.0, "lr_scheduler": "cosine",
    "train_batch_size": 4, "seed": 42, "resolution": "128"}
"""The line that other methods are compared with; what it does not name has its default."""
_TRAINING_ALONE: dict[str, Value] = {
    "validation_split": 0.0, "validation": False, "sample_images": False, "save_every_n_epochs": 0}
FIXED = ("output_name", "output_dir", "overwrite", "train_data_dir", "trigger_word", "max_train_steps", "save_every_n_steps")
"""What the benchmark sets itself."""


def settings_of(changes: Mapping[str, object]) -> dict[str, object]:
    """The reference line with `changes`. Raises SettingError for a setting that is the benchmark's own, or unknown."""
    for name in FIXED:
        if name in changes:
            raise SettingError(f"{name} cannot be set here", why="the benchmark always uses its own value",
                               remedy="--steps sets the number of steps" if name == "max_train_steps" else "leave it out")
    chosen = {**REFERENCE, **changes}
    parse(chosen)
    return chosen


def run_training(settings: Mapping[str, object], host: Host, *, report: events.Report,
                 stop: Stop = lambda: "") -> events.Finished:
    """One ordinary run, on all of the given images and without measurements and samples unless `settings` name them; raises
    what `run_job` raises."""
    return run_job(plan_job(parse({**_TRAINING_ALONE, **settings}), host), host, report=report, stop=stop)


def train_lora(host: Host, *, settings: Mapping[str, object], data: Path, trigger_word: str, name: str, steps: int,
               wanted: tuple[int, ...], say: Say) -> dict[int, Path]:
    """Train for `steps` steps; {step: file} for each of `wanted`, which holds the last step. Saves between are deleted.

    All files come from one run, whose schedule is that of all its steps: a file at step 100 is what the run had learnt
    by then, not what a run of 100 steps learns.
    """
    saved: dict[int, Path] = {}

    def report(event: events.Event) -> None:
        if isinstance(event, events.Saved):
            saved[event.step] = Path(event.path)
        elif isinstance(event, events.Step) and event.step % 50 == 0:
            say(f"  step {event.step}/{event.total}   loss {event.average_loss:.3f}")
        elif isinstance(event, events.Warned):
            say(f"  note: {event.message}")

    run_training({
        **settings, "output_name": name, "overwrite": True, "train_data_dir": str(data), "trigger_word": trigger_word,
        "max_train_steps": steps, "save_every_n_steps": math.gcd(*wanted)}, host, report=report)
    missing = [step for step in wanted if step not in saved]
    if missing:
        raise TrainingError(f"The LoRA of step {missing[0]} was not kept", remedy="make room on the disk and start again")
    for step in saved.keys() - set(wanted):
        saved[step].unlink()
    return {step: saved[step] for step in wanted}
