"""One job at a time on a daemon thread, watched, stopped and waited for from any other thread."""

from __future__ import annotations

import logging
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

from lib_lora_train.errors import HostError, Interrupted, LoraTrainError, translated

log = logging.getLogger(__name__)
Result = TypeVar("Result")
StopKind = Literal["", "stop", "save"]


@dataclass(frozen=True)
class Failure:
    """How a job ended that returned nothing: `message` is one sentence, `trace` the traceback, "" of one that was stopped."""

    outcome: Literal["stopped", "failed"]
    message: str
    trace: str = ""

    @classmethod
    def of(cls, error: BaseException, *, name: str) -> Failure:
        """What an error means that ended the job `name` ("The training"). The package's own errors are their sentence; any
        other is a defect, and its traceback goes to the log."""
        trace = "".join(traceback.format_exception(error))
        if isinstance(error, Interrupted):
            return cls("stopped", str(error))
        if isinstance(error, LoraTrainError):
            return cls("failed", str(error), trace)
        if not isinstance(error, Exception):
            return cls("failed", f"{name} was ended from outside.")
        log.error("%s ended unexpectedly\n%s", name, trace)
        return cls("failed", f"{name} ended unexpectedly: {type(error).__name__}: {error}. The log has the details.", trace)


class TaskRunner(Generic[Result]):
    """Starts, stops and waits for one job."""

    def __init__(self, thread_name: str) -> None:
        self._thread_name, self._lock = thread_name, threading.Lock()
        # Not the thread itself: before Python 3.13 it counts as ended once an interrupt came while it was waited for.
        self._ended = threading.Event()
        self._ended.set()
        self._number, self._running = 0, False
        self._stopping: StopKind = ""
        self._ending: Result | Failure | None = None

    def check_idle(self, busy: str) -> None:
        """Raise HostError with the sentence `busy` while a job runs."""
        if self._running:
            raise HostError(busy, remedy="wait for it or stop it first")

    def start(self, job: Callable[[], Result], *, name: str, doing: str, busy: str,
              ended: Callable[[Result | Failure], None] = lambda ending: None) -> int:
        """Run `job` and return its number, counted from 1. `ended` is told how it ended, in its thread and before all others.
        `name` as for `Failure.of`, `doing` completes "while …", `busy` as for `check_idle`. Raises HostError."""
        with self._lock:
            self.check_idle(busy)
            self._number, self._stopping, self._ending = self._number + 1, "", None
            # A daemon: closing the WebUI must not wait for it. Files are written atomically, so none is torn.
            thread = threading.Thread(target=self._run, args=(job, name, doing, ended), name=self._thread_name, daemon=True)
            self._running = True  # before the thread, whose job may ask for it at once
            self._ended.clear()
            try:
                thread.start()
            except BaseException:
                self._running = False
                self._ended.set()
                raise
            return self._number

    def _run(self, job: Callable[[], Result], name: str, doing: str, ended: Callable[[Result | Failure], None]) -> None:
        ending: Result | Failure
        try:
            with translated(doing):
                ending = job()
        except BaseException as error:  # noqa: BLE001 - the thread's last handler: without it, watchers would wait for ever
            ending = Failure.of(error, name=name)
        try:
            ended(ending)
        finally:
            with self._lock:
                self._ending, self._running = ending, False
                self._ended.set()

    def stop(self, kind: StopKind = "stop") -> bool:
        """Ask the running job to end, which it sees as `stopping`; False if none runs."""
        with self._lock:
            if self._running:
                self._stopping = kind
            return self._running

    @property
    def stopping(self) -> StopKind:
        """The kind of stop that the current job was asked for, "" for none."""
        return self._stopping

    @property
    def running(self) -> bool:
        """Whether a job is under way."""
        return self._running

    @property
    def ending(self) -> Result | Failure | None:
        """What the last job returned, or why it returned nothing; None while one runs and before the first."""
        return self._ending

    def wait(self, timeout: float | None = None) -> bool:
        """Wait for the job to end, at most `timeout` seconds; whether it has, or there was none."""
        return self._ended.wait(timeout)
