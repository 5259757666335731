"""TensorBoard and Weights & Biases, behind what `tracking.py` asks of a tracker. Their packages are imported where a run begins
to use them."""

from __future__ import annotations

import dataclasses
import secrets
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from lib_lora_train.run.planning import RunPlan
from lib_lora_train.settings import Value

if TYPE_CHECKING:
    from lib_lora_train.run.tracking import TrackerEntry


@dataclasses.dataclass(frozen=True)
class TrackerStart:
    """What a tracker begins with. `folder` is for its files, of this run alone; `resumed_at` steps were made before."""

    folder: Path
    project: str
    name: str
    settings: Mapping[str, Value]
    resumed_at: int = 0

    @classmethod
    def of(cls, plan: RunPlan, *, folder: Path | None, settings: Mapping[str, Value]) -> TrackerStart:
        """That of a run in `folder`. In a tracker folder that was named, each run has kohya's: prefix and time, project."""
        chosen = plan.settings.tracking
        if folder is not None and not chosen.logging_dir:
            own = folder / "logs"
        else:
            root = Path(chosen.logging_dir) if chosen.logging_dir else plan.target.parent / "logs"
            own = root / f"{chosen.log_prefix}{time.strftime('%Y%m%d%H%M%S')}" / chosen.log_tracker_name
        return cls(own, chosen.log_tracker_name, chosen.wandb_run_name or plan.settings.save.output_name, settings,
                   plan.resume_point.step if plan.resume_point else 0)


class TensorBoard:
    """Event files for TensorBoard, by torch's own writer."""

    def __init__(self, start: TrackerStart) -> None:
        self._start, self._writer = start, None

    def begin(self) -> None:
        """See `Tracker`."""
        from torch.utils.tensorboard import SummaryWriter

        # Of an earlier part of the run, what came after its state is hidden there.
        purge = self._start.resumed_at + 1 if self._start.resumed_at else None
        self._writer: Any = SummaryWriter(str(self._start.folder), purge_step=purge)
        table = "\n".join(f"| {name} | {value} |" for name, value in self._start.settings.items())
        self._writer.add_text("settings", f"| setting | value |\n|---|---|\n{table}", self._start.resumed_at)
        self._writer.add_hparams(dict(self._start.settings), {}, run_name=".")
        self._writer.flush()

    def write(self, entry: TrackerEntry) -> None:
        """See `Tracker`."""
        import numpy

        for tag, value in entry.scalars.items():
            self._writer.add_scalar(tag, value, entry.step)
        for tag, text in entry.texts.items():
            self._writer.add_text(tag, text, entry.step)
        for tag, (path, _) in entry.images.items():
            with Image.open(path) as image:
                self._writer.add_image(tag, numpy.asarray(image.convert("RGB")), entry.step, dataformats="HWC")

    def end(self) -> None:
        """See `Tracker`."""
        self._writer.close()


class WeightsAndBiases:
    """A run at Weights & Biases. Of this machine it is told nothing: no host, no user, no command line, no code."""

    def __init__(self, start: TrackerStart) -> None:
        self._start, self._run = start, None

    def begin(self) -> None:
        """See `Tracker`."""
        import wandb

        wanted = {"console": "off", "silent": True, "save_code": False, "disable_code": True, "disable_git": True,
                  "disable_job_creation": True, "x_disable_meta": True, "x_disable_stats": True, "x_disable_machine_info": True,
                  "x_save_requirements": False, "host": "-", "username": "-", "program": "-"}
        known = getattr(wandb.Settings, "model_fields", None) or getattr(wandb.Settings, "__fields__", {})
        self._start.folder.mkdir(parents=True, exist_ok=True)
        hooks = sys.exit, sys.excepthook
        self._run: Any = wandb.init(
            project=self._start.project or None, name=self._start.name, id=secrets.token_hex(4), dir=str(self._start.folder),
            config=dict(self._start.settings), reinit="create_new",
            settings=wandb.Settings(**{name: value for name, value in wanted.items() if name in known}))
        sys.exit, sys.excepthook = hooks  # which wandb replaces for good
        self._run.define_metric("*", step_metric="step")

    def write(self, entry: TrackerEntry) -> None:
        """See `Tracker`."""
        import wandb

        values: dict[str, Any] = {"step": entry.step, **entry.scalars}
        for tag, text in entry.texts.items():
            self._run.summary[tag] = text
        for tag, (path, prompt) in entry.images.items():
            with Image.open(path) as image:
                values[tag] = wandb.Image(image.convert("RGB"), caption=prompt)
        self._run.log(values)

    def end(self) -> None:
        """See `Tracker`."""
        self._run.finish()
