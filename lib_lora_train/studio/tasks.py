"""One piece of long work at a time, on a thread of its own, watched and stopped from anywhere.

What it needs from a page is nothing: the page may be reloaded or gone. How it ended is kept until the next one begins.
"""

from __future__ import annotations

import dataclasses
import logging
import threading
import traceback
from collections.abc import Callable
from typing import Any

from lib_lora_train.errors import HostError, Interrupted, LoraTrainError, printable, translated

log = logging.getLogger(__name__)
_MOST_PROBLEMS = 200


@dataclasses.dataclass(frozen=True)
class TaskStatus:
    """What a watcher sees. `problems` are (picture, sentence), `message` is how it ended, "" before."""

    id: int
    name: str
    done: int
    total: int
    running: bool
    stopping: bool
    outcome: str  # "running", "done", "stopped" or "failed"
    message: str
    problems: tuple[tuple[str, str], ...]
    more_problems: int
    result: dict[str, Any]


class Task:
    """What the work itself holds: it reports through this and asks whether to go on."""

    def __init__(self, number: int, name: str, *, interrupted: Callable[[], bool]) -> None:
        self._lock, self._interrupted = threading.Lock(), interrupted
        self._stop = threading.Event()
        self._status = TaskStatus(number, name, 0, 0, True, False, "running", "", (), 0, {})

    def progress(self, done: int, total: int) -> None:
        """`done` of `total` pieces are done."""
        with self._lock:
            self._status = dataclasses.replace(self._status, done=done, total=total)

    def should_stop(self) -> bool:
        """Whether somebody asked the work to end."""
        return self._stop.is_set() or self._interrupted()

    def problem(self, image: str, text: str) -> None:
        """Something about one picture that the work goes on without; "" for the work as a whole."""
        with self._lock:
            kept = self._status.problems
            if len(kept) < _MOST_PROBLEMS:
                self._status = dataclasses.replace(self._status, problems=(*kept, (printable(image), printable(text))))
            else:
                self._status = dataclasses.replace(self._status, more_problems=self._status.more_problems + 1)

    def result(self, values: dict[str, Any]) -> None:
        """Plain data for the watcher, also while the work goes on."""
        with self._lock:
            self._status = dataclasses.replace(self._status, result={**self._status.result, **values})

    def status(self) -> TaskStatus:
        """As it is now."""
        with self._lock:
            return self._status

    def stop(self) -> None:
        """Ask the work to end."""
        self._stop.set()
        with self._lock:
            self._status = dataclasses.replace(self._status, stopping=True)

    def end(self, outcome: str, message: str) -> None:
        """The work is over."""
        with self._lock:
            self._status = dataclasses.replace(self._status, running=False, outcome=outcome, message=printable(message))


Work = Callable[[Task], str]
"""Does it and returns one sentence about what was done. Raises Interrupted where it was stopped with nothing to say."""


class Tasks:
    """Starts, watches and stops the one task."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._task: Task | None = None
        self._thread: threading.Thread | None = None
        self._on_stop: Callable[[], None] = lambda: None
        self._with_model = False
        self._number = 0

    def start(self, name: str, work: Work, *, interrupted: Callable[[], bool] = lambda: False,
              on_stop: Callable[[], None] = lambda: None, ended: Callable[[], None] = lambda: None,
              with_model: bool = False) -> int:
        """Begin `work` and return its number.

        `interrupted` is another way of being stopped (the host's button), `on_stop` wakes work that waits, `ended` is
        called when it is over, however it ended; `with_model` says that it borrows the host's model. Raises HostError while
        another task runs.
        """
        with self._lock:
            if self.running():
                raise HostError(f"The studio is busy ({self._task.status().name})", remedy="wait for it or stop it first")
            self._number += 1
            task = self._task = Task(self._number, name, interrupted=interrupted)
            self._on_stop, self._with_model = on_stop, with_model
            # A daemon: closing the WebUI must not wait for it. What it writes is written whole.
            self._thread = threading.Thread(target=_work, args=(task, work, ended), name="lora-train-studio", daemon=True)
            self._thread.start()
            return self._number

    def stop(self) -> bool:
        """Ask the running task to end. False if nothing runs."""
        task, on_stop = self._task, self._on_stop
        if task is None or not task.status().running:
            return False
        task.stop()
        on_stop()
        return True

    def running(self) -> bool:
        """Whether a task is under way."""
        return self._task is not None and self._task.status().running

    def with_model(self) -> bool:
        """Whether what is under way borrows the host's model."""
        return self.running() and self._with_model

    def name(self) -> str:
        """What is under way, "" for nothing."""
        status = self.status()
        return status.name if status and status.running else ""

    def status(self) -> TaskStatus | None:
        """The current task, or the last one; None before the first."""
        task = self._task
        return None if task is None else task.status()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait for the task's thread to end; whether it has."""
        thread = self._thread
        if thread is not None:
            thread.join(timeout)
            return not thread.is_alive()
        return True


def _work(task: Task, work: Work, ended: Callable[[], None]) -> None:
    name = task.status().name
    try:
        with translated(name.lower()):
            outcome, message = "done", work(task)
        if task.should_stop():
            outcome = "stopped"
    except Interrupted as error:
        outcome, message = "stopped", str(error)
    except LoraTrainError as error:
        outcome, message = "failed", str(error)
    except Exception as error:  # noqa: BLE001 - the last line of defence of the thread: without it the page would wait for ever
        log.error("%s ended unexpectedly\n%s", name, traceback.format_exc())
        outcome, message = "failed", f"{name} ended unexpectedly: {type(error).__name__}: {error}. The log has the details."
    try:
        ended()
    finally:
        task.end(outcome, message)
