"""One job at a time, on a thread of its own, watched from anywhere.

The runner is what survives: the page may be reloaded, the WebUI's interface may be rebuilt, the browser may be
gone; the state is here and is read back by asking. It knows nothing of pages and of the WebUI.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

from lib_lora_train import events
from lib_lora_train.errors import HostError, Interrupted, LoraTrainError, translated
from lib_lora_train.host.port import Host
from lib_lora_train.run.job import run_job
from lib_lora_train.run.output import checked_name
from lib_lora_train.run.planning import RunPlan
from lib_lora_train.run.record import RunRecord, new_folder, read_events
from lib_lora_train.run.resume import run_folder
from lib_lora_train.settings import Settings, flat

log = logging.getLogger(__name__)
StopKind = Literal["", "stop", "save"]
_MOST_POINTS = 1000
_MOST_WARNINGS = 50
_MOST_SAVED = 200


@dataclasses.dataclass(frozen=True)
class Status:
    """What a watcher wants to know, as plain data.

    `points` are (step, loss, average loss) after the step that the watcher already has; `thinned` says that old
    points were dropped to keep the list short and the curve should be drawn anew from what is here.
    """

    run: str
    name: str
    running: bool
    stopping: StopKind
    started: float
    planned: events.Planned | None
    stage: events.Stage | None
    step: events.Step | None
    saved: tuple[events.Saved, ...]
    warnings: tuple[str, ...]
    finished: events.Finished | None
    points: tuple[tuple[int, float, float], ...]
    every: int

    @property
    def fraction(self) -> float:
        """How far the run is, 0 to 1: its steps; 0 while it prepares."""
        if self.finished and self.finished.outcome == "done":
            return 1.0
        return self.step.step / self.step.total if self.step else 0.0


class _Run:
    """The mutable state of the one run; every access is under the runner's lock."""

    def __init__(self, plan: RunPlan, requested: Settings, record: RunRecord) -> None:
        self.plan, self.requested, self.record = plan, requested, record
        self.started = time.time()
        self.stop: StopKind = ""
        self.planned: events.Planned | None = None
        self.stage: events.Stage | None = None
        self.step: events.Step | None = None
        self.saved: list[events.Saved] = []
        self.warnings: list[str] = []
        self.finished: events.Finished | None = None
        self.points: list[tuple[int, float, float]] = []
        self.every = 1

    def see(self, event: events.Event) -> None:
        if isinstance(event, events.Planned):
            self.planned = event
            # Of a run that goes on, the steps after its state are made again.
            self.points = [point for point in self.points if point[0] <= event.resumed_at]
        elif isinstance(event, events.Stage):
            self.stage = event
        elif isinstance(event, events.Step):
            self.step, self.stage = event, None
            self._add_point(event)
        elif isinstance(event, events.Saved):
            # Every file stays on the disk and in the run's record; a watcher is not sent thousands at each glance.
            self.saved = [*self.saved[-_MOST_SAVED:], event]
        elif isinstance(event, events.Warned):
            if len(self.warnings) < _MOST_WARNINGS:
                self.warnings.append(event.message)
        elif isinstance(event, events.Finished):
            self.finished, self.stage = event, None

    def remember(self, folder: Path) -> None:
        """The curve as far as an interrupted run's folder tells it."""
        for event in read_events(folder):
            if isinstance(event, events.Planned):
                self.points = [point for point in self.points if point[0] <= event.resumed_at]
            elif isinstance(event, events.Step):
                self._add_point(event)

    def _add_point(self, event: events.Step) -> None:
        if event.step % self.every == 0 or event.step == 1:
            self.points.append((event.step, event.loss, event.average_loss))
        if len(self.points) > _MOST_POINTS:
            self.every *= 2
            self.points = [p for p in self.points if p[0] == 1 or p[0] % self.every == 0]


class Runner:
    """Starts, watches and stops the one job."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._run: _Run | None = None
        self._thread: threading.Thread | None = None
        self._guards: list[Callable[[Settings], None]] = []

    def guard(self, check: Callable[[Settings], None]) -> None:
        """Have `check` asked before each start: it raises HostError where something else is under way that must end first."""
        self._guards.append(check)

    def start(self, plan: RunPlan, host: Host, *, requested: Settings | None = None) -> str:
        """Start a job and return its run's id: that of the run it resumes, if that one is in the host's folder of runs.

        `requested` are the settings as the user chose them; None: those of the plan.
        Raises HostError while another is running or a guard objects, OutputError for a bad name.
        """
        settings = plan.settings
        checked_name(settings.save.output_name)  # it names the run's folder
        for check in self._guards:
            check(settings)
        with self._lock:
            if self._thread is not None and self._thread.is_alive():
                raise HostError("A training is running already", remedy="wait for it or stop it first")
            # It goes on where it was, unless that is somebody else's folder: there only the state is read.
            old = run_folder(settings.save.resume, host.runs_folder) if settings.save.resume else None
            folder = old or new_folder(host.runs_folder, settings.save.output_name)
            record = RunRecord(folder, settings)
            self._run = _Run(plan, requested or settings, record)
            if old:
                self._run.remember(old)
            # A daemon: closing the WebUI must not wait for hours of training. Saves are atomic, so nothing is torn.
            self._thread = threading.Thread(target=self._work, args=(self._run, host), name="lora-train", daemon=True)
            self._thread.start()
            return record.folder.name

    def stop(self, *, save: bool) -> bool:
        """Ask the running job to end within a step, keeping what it learnt if `save`. False if nothing runs."""
        with self._lock:
            if self._run is None or self._run.finished is not None:
                return False
            self._run.stop = "save" if save else "stop"
            return True

    def running(self) -> bool:
        """Whether a job is under way."""
        with self._lock:
            return self._run is not None and self._run.finished is None

    def wait(self, timeout: float | None = None) -> bool:
        """Wait for the job's thread to end; whether it has."""
        thread = self._thread
        if thread is not None:
            thread.join(timeout)
            return not thread.is_alive()
        return True

    def status(self, *, after: int = 0) -> Status | None:
        """The current run, or the last one; None before the first. Points up to step `after` are left out."""
        with self._lock:
            run = self._run
            if run is None:
                return None
            return Status(
                run=run.record.folder.name, name=run.plan.settings.save.output_name, running=run.finished is None,
                stopping=run.stop, started=run.started, planned=run.planned, stage=run.stage, step=run.step,
                saved=tuple(run.saved), warnings=tuple(run.warnings), finished=run.finished,
                points=tuple(p for p in run.points if p[0] > after), every=run.every)

    def settings(self) -> dict[str, object]:
        """The settings that the user chose for the current or last run, by name; {} before the first."""
        with self._lock:
            return dict(flat(self._run.requested)) if self._run else {}

    def _work(self, run: _Run, host: Host) -> None:
        def report(event: events.Event) -> None:
            with self._lock:
                run.see(event)
            run.record.write(event)
            host.report(event)

        def stop() -> StopKind:
            if not run.stop and host.interrupted():
                # The host's own stop button means "enough": what was learnt so far is worth keeping.
                run.stop = "save"
            return run.stop

        def steps() -> int:
            return run.step.step if run.step else 0

        try:
            with reported(report=report, steps=steps, failed=run.record.keep_failure) as ending:
                ending.finished = run_job(run.plan, host, report=report, stop=stop, folder=run.record.folder)
        finally:
            if run.finished is None:
                # Something asked this very thread to end; nobody must wait for the run any more.
                report(events.Finished("failed", "The training was ended from outside.", "", steps()))
            run.record.close()


@dataclasses.dataclass
class Ending:
    """How a job ended; None until it has."""

    finished: events.Finished | None = None


@contextlib.contextmanager
def reported(*, report: events.Report, steps: Callable[[], int],
             failed: Callable[[str], None] = lambda trace: None) -> Iterator[Ending]:
    """Report how the block ended, whatever happens; the block puts what its job returned into the `Ending`.

    Our own errors become their sentence; anything else is a defect of ours, and its traceback goes to the log. `failed` is
    told where either came from.
    """
    ending = Ending()
    try:
        with translated("training"):
            yield ending
    except Interrupted as error:
        ending.finished = events.Finished("stopped", str(error), "", steps())
    except LoraTrainError as error:
        failed(traceback.format_exc())
        ending.finished = events.Finished("failed", str(error), "", steps())
    except Exception as error:  # noqa: BLE001 - the last line of defence of the thread: without it the page would wait for ever
        log.error("The training ended unexpectedly\n%s", traceback.format_exc())
        failed(traceback.format_exc())
        ending.finished = events.Finished(
            "failed", f"The training ended unexpectedly: {type(error).__name__}: {error}. The log has the details.", "",
            steps())
    assert ending.finished is not None, "a job returns how it ended"
    report(ending.finished)


RUNNER = Runner()
"""The process's one runner. It lives in the package, which the WebUI keeps when it reloads its interface."""
