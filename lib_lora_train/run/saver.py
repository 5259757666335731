"""What a run leaves on the disk: its LoRA files, and the one training state it can be resumed from.

A failed save on the way is told and does not end the run; a failed run keeps what was learnt, where it can.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from lib_lora_train.adapters import file
from lib_lora_train.distributed import ProcessLost
from lib_lora_train.errors import LoraTrainError, OutputError, TrainingError, is_out_of_memory, translated
from lib_lora_train.events import Report, Saved, Warned
from lib_lora_train.host.port import never
from lib_lora_train.run import resume
from lib_lora_train.run.output import epoch_path, step_path
from lib_lora_train.run.planning import RunPlan
from lib_lora_train.run.provenance import Provenance
from lib_lora_train.settings import SaveSettings
from lib_lora_train.training import checkpoint
from lib_lora_train.training.checkpoint import TrainingState
from lib_lora_train.training.loop import Progress

Snapshot = Callable[[], TrainingState | None]
Weights = contextlib.AbstractContextManager[Mapping[str, Tensor]]

# A state is not written more often than this many times as long as writing it takes: two per cent of a run at most.
_LEAST_PAUSE = 50


class Checkpointer:
    """Keeps the newest training state in the run's folder; with `folder` None, none."""

    def __init__(self, folder: Path | None, chosen: SaveSettings, metadata: Mapping[str, Any], report: Report, *,
                 clock: Callable[[], float] = time.monotonic) -> None:
        self._path = None if folder is None else folder / checkpoint.FILE_NAME
        self._on_the_way, self._minutes = chosen.save_state, chosen.save_state_every_n_minutes
        self._at_the_end = chosen.save_state_on_train_end
        self._metadata, self._report, self._clock = metadata, report, clock
        self._next = clock() + 60 * self._minutes
        self._failing = False

    def save_if_due(self, snapshot: Snapshot) -> None:
        """Keep the state if the last one is old enough; to be called after every step."""
        if self._minutes and self._clock() >= self._next:
            self.save(snapshot)

    def save(self, snapshot: Snapshot) -> None:
        """Keep the state now, if any is wanted. That it cannot be written is told once and ends nothing."""
        if self._on_the_way:
            self._write(snapshot)

    def end(self, snapshot: Snapshot | None, *, complete: bool) -> None:
        """After the result was saved: keep the last state, or remove it where the run needs none any more."""
        if snapshot is not None and (self._at_the_end if complete else self._on_the_way or self._at_the_end):
            self._write(snapshot)
        elif complete and self._path is not None:
            with contextlib.suppress(OSError):
                self._path.unlink(missing_ok=True)

    def _write(self, snapshot: Snapshot) -> None:
        if self._path is None:
            return
        begin = self._clock()
        current = snapshot()
        if current is None:
            return
        try:
            with translated("keeping the resume point"):
                checkpoint.write(self._path, current, self._metadata)
            self._failing = False
        except LoraTrainError as error:
            if not self._failing:
                self._report(Warned(f"No resume point was kept at step {current.step}; an older one stays as it is. {error}"))
            self._failing = True
        end = self._clock()
        self._next = end + max(60 * self._minutes, _LEAST_PAUSE * (end - begin))


class Saver:
    """The callback that writes the LoRA files and the state of a run, and reports each file."""

    def __init__(self, plan: RunPlan, provenance: Provenance, checkpointer: Checkpointer, *, report: Report,
                 spare: Path | None, wanted: Callable[[], bool] = never,
                 weights: Callable[[Progress], Weights] = Progress.weights) -> None:
        """`spare` is a folder for what the output folder refuses. `wanted()` says, once, that somebody wants a save now.
        `weights` gives what is saved: those of `Progress.weights`, or others."""
        self._plan, self._provenance, self._checkpointer = plan, provenance, checkpointer
        self._report, self._spare, self._weights, self._wanted = report, spare, weights, wanted
        self._progress: Progress | None = None
        self.saved: list[str] = []

    def before_step(self, progress: Progress) -> bool:
        """See `Callback`: a LoRA and the state where somebody wants them, unless they were saved after this very step."""
        if progress.step and self._wanted() and not _due(self._plan, progress.step):
            self._save_now(step_path(self._plan.target, progress.step), progress)
        return True

    def _save_now(self, path: Path, progress: Progress) -> None:
        progress.flush()
        self._save_intermediate(path, progress)
        self._checkpointer.save(progress.snapshot)

    def after_step(self, progress: Progress) -> None:
        """See `Callback`: a LoRA and the state where they are due."""
        self._progress = progress
        if path := _due(self._plan, progress.step):
            self._save_now(path, progress)
        else:
            self._checkpointer.save_if_due(progress.snapshot)

    def _save_intermediate(self, path: Path, progress: Progress) -> None:
        try:
            self._save(path, progress, final=False)
        except (OutputError, TrainingError) as error:
            if isinstance(error, TrainingError) and not is_out_of_memory(error.__cause__):
                raise
            # A full disk, a full memory or a locked file may be free again when the result is due; the hours until then are
            # not lost.
            self._report(Warned(f"{path.name} was not kept. {error}"))

    def _save(self, path: Path, progress: Progress, *, final: bool) -> str:
        """Write one file, whole or not at all."""
        path = self._free(path)
        step, epoch = progress.step, self._plan.epoch_of(progress.step)
        with translated(f"saving {path.name}"), self._weights(progress) as weights:
            file.save(path, weights, self._provenance.metadata(path.stem, step=step, epoch=epoch),
                      dtype=file.SAVE_PRECISIONS[self._plan.settings.save.save_precision])
        self.saved.append(str(path))
        self._report(Saved(str(path), step, epoch, final))
        return str(path)

    def _free(self, path: Path) -> Path:
        """`path`; or another name, which is told, where a LoRA is there that this run neither wrote nor may replace."""
        if (self._plan.settings.save.overwrite or not os.path.lexists(path)
                or resume.wrote(path, started_at=self._provenance.started_at)):
            return path
        names = (path.with_name(f"{path.stem}-{number}{path.suffix}") for number in itertools.count(2))
        free = next(name for name in names if not os.path.lexists(name))
        self._report(Warned(f"{path.name} is another LoRA, which stays. This one is called {free.name}."))
        return free

    def save_result(self, progress: Progress, *, complete: bool) -> str:
        """The run's result under its name, and the state that belongs to it."""
        path = self._save(self._plan.target, progress, final=True)
        self._checkpointer.end(progress.snapshot, complete=complete)
        return path

    @contextlib.contextmanager
    def rescue(self) -> Iterator[None]:
        """Whatever fails inside, what was learnt until then is kept under a step's name, which the error tells, and the state
        with it unless the failure left it half changed. Steps that overflowed were never applied, so the weights are good."""
        try:
            yield
        except LoraTrainError as error:
            kept = "" if isinstance(error, ProcessLost) and not error.intact else self._kept()
            if not kept:
                raise
            remedy = f"{error.remedy}; " if error.remedy else ""
            raise type(error)(
                error.what, why=error.why, remedy=f"{remedy}what was learnt until then is in {kept}") from error
        except Exception:
            # A defect of ours, which keeps its traceback; it must not cost hours either.
            self._kept()
            raise

    def _kept(self) -> str:
        progress = self._progress
        if progress is None:
            return ""
        with contextlib.suppress(LoraTrainError):  # the first failure says more than this one
            self._checkpointer.save(progress.snapshot)
        path = step_path(self._plan.target, progress.step)
        # Where the output folder refuses, the run's own folder may not, nor the system's for temporary files, which mostly is
        # on another disk.
        for folder in (lambda: path.parent, lambda: self._spare, tempfile.gettempdir):
            with contextlib.suppress(LoraTrainError, OSError):
                if place := folder():
                    return self._save(Path(place, path.name), progress, final=False)
        return ""


class NoSaver:
    """In place of `Saver` where nothing is saved: in the processes of rank 1 and above, and in a run without a result."""

    saved: tuple[str, ...] = ()

    def before_step(self, progress: Progress) -> bool:
        """See `Callback`."""
        return True

    def after_step(self, progress: Progress) -> None:
        """Nothing is saved."""

    def save_result(self, progress: Progress, *, complete: bool) -> str:
        """Nothing is saved: ""."""
        return ""

    def rescue(self) -> contextlib.AbstractContextManager[None]:
        """Nothing is kept here."""
        return contextlib.nullcontext()


def save_steps(plan: RunPlan) -> tuple[int, ...]:
    """The steps of a run after which a LoRA is to be saved; the last one's is the result."""
    steps, saves = plan.schedule.steps, plan.settings.save
    intervals = (saves.save_every_n_epochs * plan.schedule.steps_per_epoch, saves.save_every_n_steps)
    return tuple(sorted({steps, *(step for every in intervals if every for step in range(every, steps, every))}))


def _due(plan: RunPlan, step: int) -> Path | None:
    """The file to save after this step: under the epoch's name where an epoch's save is due, else under the step's. None after
    the last step: that is the result."""
    chosen, per_epoch = plan.settings.save, plan.schedule.steps_per_epoch
    if step == plan.schedule.steps:
        return None
    if chosen.save_every_n_epochs and step % (chosen.save_every_n_epochs * per_epoch) == 0:
        return epoch_path(plan.target, plan.epoch_of(step))
    if chosen.save_every_n_steps and step % chosen.save_every_n_steps == 0:
        return step_path(plan.target, step)
    return None
