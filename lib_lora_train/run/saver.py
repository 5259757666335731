"""What a run leaves on the disk: its LoRA files, and the one training state it can be resumed from.

A failed save on the way is told and does not end the run; a failed run keeps what was learnt, where it can.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from lib_lora_train.adapters import file
from lib_lora_train.adapters.network import LoRANetwork
from lib_lora_train.distributed import ProcessLost
from lib_lora_train.errors import LoraTrainError, OutputError, TrainingError, is_out_of_memory, translated
from lib_lora_train.events import Event, Report, Saved, Step, Warned
from lib_lora_train.run.output import epoch_path, step_path
from lib_lora_train.run.provenance import Provenance
from lib_lora_train.settings import SaveSettings
from lib_lora_train.training import checkpoint
from lib_lora_train.training.loop import Snapshot

# A state is not written more often than this many times as long as writing it takes: two per cent of a run at most.
_LEAST_PAUSE = 50


class Checkpointer:
    """Keeps the newest training state in the run's folder; with `folder` None, none."""

    def __init__(self, folder: Path | None, chosen: SaveSettings, facts: Mapping[str, Any], report: Report, *,
                 clock: Callable[[], float] = time.monotonic) -> None:
        self._path = None if folder is None else folder / checkpoint.FILE_NAME
        self._on_the_way, self._minutes = chosen.save_state, chosen.save_state_every_n_minutes
        self._at_the_end = chosen.save_state_on_train_end
        self._facts, self._report, self._clock = facts, report, clock
        self._next = clock() + 60 * self._minutes
        self._failing = False

    def keep_if_due(self, snapshot: Snapshot) -> None:
        """Keep the state if the last one is old enough; to be called after every step."""
        if self._minutes and self._clock() >= self._next:
            self.keep(snapshot)

    def keep(self, snapshot: Snapshot) -> None:
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
                checkpoint.write(self._path, current, self._facts)
            self._failing = False
        except LoraTrainError as error:
            if not self._failing:
                self._report(Warned(f"No resume point was kept at step {current.step}; an older one stays as it is. {error}"))
            self._failing = True
        end = self._clock()
        self._next = end + max(60 * self._minutes, _LEAST_PAUSE * (end - begin))


class Saver:
    """Writes the LoRA files of a run and reports each; passes the loop's events on and remembers the last step."""

    def __init__(self, target: Path, chosen: SaveSettings, network: LoRANetwork, provenance: Provenance, checkpointer: Checkpointer,
                 *, report: Report, spare: Path | None) -> None:
        self._target, self._chosen, self._network = target, chosen, network
        self._provenance, self._checkpointer, self._report, self._spare = provenance, checkpointer, report, spare
        self._last: Step | None = None
        self._snapshot: Snapshot | None = None
        self.saved: list[str] = []

    def report(self, event: Event) -> None:
        """The loop's `report`."""
        if isinstance(event, Step):
            self._last = event
        self._report(event)

    def save_on_the_way(self, step: int, epoch: int, snapshot: Snapshot) -> None:
        """The loop's `save`: under the epoch's name where an epoch's save is due, else under the step's."""
        chosen = self._chosen
        by_epoch = chosen.save_every_n_epochs and self._provenance.ends_epoch(step) and (
            epoch % chosen.save_every_n_epochs == 0)
        path = epoch_path(self._target, epoch) if by_epoch else step_path(self._target, step)
        try:
            self.save(path, step=step, epoch=epoch, final=False)
        except (OutputError, TrainingError) as error:
            if isinstance(error, TrainingError) and not is_out_of_memory(error.__cause__):
                raise
            # A full disk, a full memory or a locked file may be free again when the result is due; the hours until then are
            # not lost.
            self._report(Warned(f"{path.name} was not kept. {error}"))
        self._checkpointer.keep(snapshot)

    def keep(self, step: int, epoch: int, snapshot: Snapshot) -> None:
        """The loop's `keep`."""
        self._snapshot = snapshot
        self._checkpointer.keep_if_due(snapshot)

    def save(self, path: Path, *, step: int, epoch: int, final: bool) -> str:
        """Write one file, whole or not at all."""
        with translated(f"saving {path.name}"):
            file.save(path, self._network.state_dict(), self._provenance.metadata(path.stem, step=step, epoch=epoch),
                      dtype=file.SAVE_PRECISIONS[self._chosen.save_precision])
        self.saved.append(str(path))
        self._report(Saved(str(path), step, epoch, final))
        return str(path)

    def save_result(self, *, step: int, epoch: int, complete: bool) -> str:
        """The run's result under its name, and the state that belongs to it."""
        path = self.save(self._target, step=step, epoch=epoch, final=True)
        self._checkpointer.end(self._snapshot, complete=complete)
        return path

    @contextlib.contextmanager
    def rescue(self) -> Iterator[None]:
        """Whatever fails inside, what was learnt until then is kept under a step's name, which the error tells, and the
        state with it unless the failure left it half changed.

        Steps that overflowed were never applied, so the weights are good.
        """
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
        if self._snapshot is not None:
            with contextlib.suppress(LoraTrainError):  # the first failure says more than this one
                self._checkpointer.keep(self._snapshot)
        if self._last is None:
            return ""
        path = step_path(self._target, self._last.step)
        # Where the output folder refuses, the run's own folder may not.
        for place in (path, *([self._spare / path.name] if self._spare else [])):
            with contextlib.suppress(LoraTrainError):
                return self.save(place, step=self._last.step, epoch=self._last.epoch, final=False)
        return ""


class Onlooker:
    """A `Saver`'s place in the processes that train along and save nothing."""

    saved: tuple[str, ...] = ()

    def __init__(self, report: Report) -> None:
        self.report = report

    def save_on_the_way(self, step: int, epoch: int, snapshot: Snapshot) -> None:
        """Process 0 saves."""

    def keep(self, step: int, epoch: int, snapshot: Snapshot) -> None:
        """Process 0 keeps the state."""

    def save_result(self, *, step: int, epoch: int, complete: bool) -> str:
        """Process 0 saves it: "" here."""
        return ""

    def rescue(self) -> contextlib.AbstractContextManager[None]:
        """Nothing is kept here."""
        return contextlib.nullcontext()
