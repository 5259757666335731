"""One job at a time, on a thread of its own, watched from anywhere.

The runner is what survives: the page may be reloaded, the WebUI's interface may be rebuilt, the browser may be
gone; the state is here and is read back by asking. It knows nothing of pages and of the WebUI.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from lib_lora_train import events, terminal
from lib_lora_train.errors import HostError
from lib_lora_train.host.port import Host
from lib_lora_train.run.background import Failure, StopKind, TaskRunner
from lib_lora_train.run.job import run_job
from lib_lora_train.run.output import checked_name
from lib_lora_train.run.planning import RunPlan
from lib_lora_train.run.record import RunRecord, new_folder, read_events
from lib_lora_train.run.resume import run_folder
from lib_lora_train.settings import Settings, flat

_BUSY = "A training is running already"
_MOST_POINTS = 1000
_MOST_WARNINGS = 50
_MOST_SAVED = 200


@dataclasses.dataclass(frozen=True)
class Status:
    """What a watcher wants to know, as plain data.

    `points` are (step, loss, average loss) after the step that the watcher already has; `thinned` says that old
    points were dropped to keep the list short and the curve should be drawn anew from what is here. `evaluated` counts
    measurements and samples: the run's results are worth another look when it has changed.
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
    evaluated: int = 0
    diagnosed: events.Diagnosed | None = None

    @property
    def fraction(self) -> float:
        """How far the run is, 0 to 1: its steps; 0 while it prepares."""
        if self.finished and self.finished.outcome == "done":
            return 1.0
        return self.step.step / self.step.total if self.step else 0.0


class _Run:
    """The mutable state of the one run; every access is under the runner's lock."""

    def __init__(self, name: str, requested: Settings, record: RunRecord, *, saves: bool) -> None:
        self.name, self.requested, self.record, self.saves = name, requested, record, saves
        self.started = time.time()
        self.planned: events.Planned | None = None
        self.stage: events.Stage | None = None
        self.step: events.Step | None = None
        self.saved: list[events.Saved] = []
        self.warnings: list[str] = []
        self.finished: events.Finished | None = None
        self.points: list[tuple[int, float, float]] = []
        self.every = 1
        self.evaluated = 0
        self.diagnosed: events.Diagnosed | None = None

    def see(self, event: events.Event) -> None:
        if isinstance(event, events.Planned):
            if self.planned is None or event.resumed_at != self.planned.resumed_at:
                # Of a run that goes on, the steps after its state are made again.
                self.points = [point for point in self.points if point[0] <= event.resumed_at]
            self.planned = event
        elif isinstance(event, events.Stage):
            self.stage = event
        elif isinstance(event, events.Step):
            self.step, self.stage = event, None
            self._add_to_curve(event)
        elif isinstance(event, events.Saved):
            # Every file stays on the disk and in the run's record; a watcher is not sent thousands at each glance.
            self.saved = [*self.saved, event][-_MOST_SAVED:]
        elif isinstance(event, events.Warned):
            if len(self.warnings) < _MOST_WARNINGS:
                self.warnings.append(event.message)
        elif isinstance(event, events.Finished):
            self.finished, self.stage = event, None
        elif isinstance(event, (events.HeldOut, events.Measured, events.ImageLosses, events.Sampled)):
            self.evaluated += 1
        elif isinstance(event, events.Diagnosed):
            self.diagnosed = event

    def remember(self, folder: Path) -> None:
        """The curve as far as an interrupted run's folder tells it."""
        for event in read_events(folder):
            if isinstance(event, (events.Planned, events.Step)):
                self.see(event)
        self.planned = self.step = None

    def _add_to_curve(self, event: events.Step) -> None:
        if event.step % self.every == 0 or event.step == 1:
            self.points.append((event.step, event.loss, event.average_loss))
        if len(self.points) > _MOST_POINTS:
            self.every *= 2
            self.points = [p for p in self.points if p[0] == 1 or p[0] % self.every == 0]


def _requested(wanted: threading.Event) -> bool:
    """Whether it was asked for since the last time."""
    was = wanted.is_set()
    wanted.clear()
    return was


class Runner:
    """Starts, watches and stops the one job."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._tasks: TaskRunner[events.Finished] = TaskRunner("lora-train")
        self._run: _Run | None = None
        self._guards: list[Callable[[Settings], None]] = []
        self._model_guards: list[Callable[[], None]] = []
        self._model_changes = False
        self._samples_wanted, self._save_wanted, self._paused = threading.Event(), threading.Event(), threading.Event()

    def guard(self, check: Callable[[Settings], None]) -> None:
        """Have `check` asked before each start: it raises HostError where something else is under way that must end first."""
        self._guards.append(check)

    def guard_model(self, check: Callable[[], None]) -> None:
        """Have `check` asked before the queue has the host hold another model: it raises HostError where this must wait."""
        self._model_guards.append(check)

    def refuse(self, settings: Settings) -> None:
        """Raise HostError where a guard objects to a run with these settings."""
        for check in self._guards:
            check(settings)

    @contextlib.contextmanager
    def other_model(self) -> Iterator[None]:
        """While the host is given another model; nothing begins meanwhile that needs one. Raises HostError where something is
        under way that needs the model that is held."""
        with self._lock:
            for check in self._model_guards:
                check()
            self._model_changes = True
        try:
            yield
        finally:
            self._model_changes = False

    def with_model(self, begin: Callable[[], int]) -> int:
        """`begin` other work that needs the model that is held, of which a guard knows from then on. Raises HostError while the
        host is given another one."""
        with self._lock:
            if self._model_changes:
                raise HostError("The model is in use", why="the checkpoint of a queued run is being loaded",
                                remedy="wait for it, or hold the queue")
            return begin()

    def start(self, plan: RunPlan, host: Host, *, requested: Settings | None = None, folder: Path | None = None,
              recorded: Callable[[Path], None] | None = None, job: Callable[..., events.Finished] | None = None) -> str:
        """Start a job and return its run's id: that of the run it resumes, if that one is in the host's folder of runs.

        `requested` are the settings as the user chose them; None: those of the plan. `folder` is a new run's; None makes one.
        `recorded` is called with the run's folder once all is written there. `job` is called as `run_job` is, and in its place.
        Raises HostError while another is running or a guard objects, OutputError for a bad name.
        """
        settings = plan.settings
        checked_name(settings.save.output_name)  # it names the run's folder
        self.refuse(settings)
        with self._lock:
            self._tasks.check_idle(_BUSY)
            # It goes on where it was, unless that is somebody else's folder: there only the state is read.
            old = run_folder(settings.save.resume, host.runs_folder) if settings.save.resume else None
            folder = old or folder or new_folder(host.runs_folder, settings.save.output_name)
            record = RunRecord(folder, settings)
            run = _Run(settings.save.output_name, requested or settings, record, saves=plan.saves)
            job = functools.partial(job or run_job, plan, host, report=functools.partial(self._report, run, host),
                                    stop=functools.partial(self._stop_wanted, host), folder=folder,
                                    sample_now=functools.partial(_requested, self._samples_wanted),
                                    save_now=functools.partial(_requested, self._save_wanted), paused=self._paused.is_set)
            for wanted in (self._samples_wanted, self._save_wanted, self._paused):
                wanted.clear()
            try:
                if old:
                    run.remember(old)
                self._tasks.start(job, name="The training", doing="training", busy=_BUSY,
                                  ended=functools.partial(self._ended, run, host, recorded))
            except Exception:
                record.close()
                raise
            self._run = run
            return folder.name

    def stop(self, *, save: bool) -> bool:
        """Ask the running job to end within a step, keeping what it learnt if `save`. False if nothing runs."""
        with self._lock:
            return self._tasks.stop("save" if save else "stop")

    def sample_now(self) -> bool:
        """Have the running job sample its prompts before its next step. False if nothing runs, or it samples nothing."""
        with self._lock:
            samples = self._run is not None and self._tasks.running and self._run.requested.evaluation.sample_images
            if samples:
                self._samples_wanted.set()
            return samples

    def save_now(self) -> bool:
        """Have the running job save what it has learnt before its next step, and go on. False if nothing runs."""
        with self._lock:
            if self._tasks.running:
                self._save_wanted.set()
            return self._tasks.running

    def pause(self, paused: bool) -> bool:
        """Have the running job stand still before its next step, or go on. False if nothing runs."""
        with self._lock:
            if self._tasks.running:
                self._paused.set() if paused else self._paused.clear()
            return self._tasks.running

    def running(self) -> bool:
        """Whether a job is under way: until its last word is written and the next one may start."""
        return self._tasks.running

    def finish(self) -> None:
        """As the program ends: have the running job end and keep what it learnt, and wait for it."""
        if self.stop(save=True):
            terminal.say(terminal.STOPPING)
            while not self.wait(timeout=0.5):  # on Windows a wait without end hears no Ctrl+C
                pass

    def wait(self, timeout: float | None = None) -> bool:
        """Wait for the job to end; whether it has."""
        return self._tasks.wait(timeout)

    def status(self, *, after: int = 0) -> Status | None:
        """The current run, or the last one; None before the first. Points up to step `after` are left out."""
        with self._lock:
            run, running = self._run, self._tasks.running
            if run is None:
                return None
            return Status(
                run=run.record.folder.name, name=run.name, running=running,
                stopping=self._tasks.stopping, started=run.started, planned=run.planned, stage=run.stage, step=run.step,
                saved=tuple(run.saved), warnings=tuple(run.warnings), finished=None if running else run.finished,
                points=tuple(p for p in run.points if p[0] > after), every=run.every, evaluated=run.evaluated,
                diagnosed=run.diagnosed)

    def settings(self) -> dict[str, object]:
        """The settings that the user chose for the current or last run, by name; {} before the first."""
        with self._lock:
            return dict(flat(self._run.requested)) if self._run else {}

    def saves(self) -> bool:
        """Whether the current or last run writes a LoRA; the search for a learning rate does not."""
        with self._lock:
            return self._run is not None and self._run.saves

    def _report(self, run: _Run, host: Host, event: events.Event) -> None:
        with self._lock:
            run.see(event)
        run.record.write(event)
        host.report(event)

    def _stop_wanted(self, host: Host) -> StopKind:
        if not self._tasks.stopping and host.interrupted():
            # The host's own stop button means "enough": what was learnt so far is worth keeping.
            self._tasks.stop("save")
        return self._tasks.stopping

    def _ended(self, run: _Run, host: Host, recorded: Callable[[Path], None] | None,
               ending: events.Finished | Failure) -> None:
        if isinstance(ending, Failure):
            if ending.trace:
                run.record.keep_failure(ending.trace)
            ending = events.Finished(ending.outcome, ending.message, "", run.step.step if run.step else 0)
        try:
            self._report(run, host, ending)
        finally:
            run.record.close()
            if recorded:
                recorded(run.record.folder)


RUNNER = Runner()
"""The process's one runner. It lives in the package, which the WebUI keeps when it reloads its interface."""
