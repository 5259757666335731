"""One background task with its progress and problems: the studio's, and that of the results page. It goes on when the page is
reloaded or closed, and how it ended is kept until the next one starts."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable
from typing import Any

from lib_lora_train.errors import printable
from lib_lora_train.run.background import Failure, TaskRunner

_MOST_PROBLEMS = 200


@dataclasses.dataclass
class Task:
    """A task as a page shows it; its function reports here, from its own thread, and asks whether to go on."""

    name: str
    should_stop: Callable[[], bool]
    id: int = 0
    done: int = 0
    total: int = 0
    seconds_left: float | None = None  # None until the speed is known
    running: bool = True
    stopping: bool = False
    outcome: str = "running"  # "running", "done", "stopped" or "failed"
    message: str = ""  # how it ended, "" before
    problems: tuple[tuple[str, str], ...] = ()  # (image, sentence)
    more_problems: int = 0
    result: dict[str, Any] = dataclasses.field(default_factory=dict)
    _began: tuple[float, float] | None = None  # the first progress: when, and its share

    def progress(self, done: int, total: int, *, share: float | None = None) -> None:
        """`done` of `total` images are done; `share`, 0 to 1, is that of the work where not all take the same time."""
        self.done, self.total = done, total
        now, share = time.monotonic(), done / max(1, total) if share is None else share
        began, before = self._began = self._began or (now, share)
        if share > before:
            self.seconds_left = (now - began) / (share - before) * (1 - share)

    def begin(self, name: str) -> None:
        """Another part of the task begins, called `name`, with a progress of its own."""
        self.name, self.done, self.total, self.seconds_left, self._began = name, 0, 0, None, None

    def problem(self, image: str, text: str) -> None:
        """Something about one image that the task goes on without; "" for the task itself. The first 200 are kept."""
        if len(self.problems) < _MOST_PROBLEMS:
            self.problems = (*self.problems, (printable(image), printable(text)))
        else:
            self.more_problems += 1

    def add_result(self, values: dict[str, Any]) -> None:
        """Plain data for the page, also while the task goes on."""
        self.result = {**self.result, **values}


TaskFunction = Callable[[Task], str]
"""Returns one sentence about what was done. Raises Interrupted where it was stopped and has nothing to say."""


class Tasks:
    """Starts, watches and stops the one task."""

    def __init__(self, thread_name: str = "lora-train-studio", *, owner: str = "The studio") -> None:
        """`owner` is who is busy while a task runs."""
        self._lock, self._owner = threading.Lock(), owner
        self._runner: TaskRunner[tuple[str, str]] = TaskRunner(thread_name)
        self._task: Task | None = None
        self._id, self._with_model = 0, False

    def start(self, name: str, function: TaskFunction, *, interrupted: Callable[[], bool] = lambda: False,
              ended: Callable[[], None] = lambda: None, with_model: bool = False) -> int:
        """Run `function` in the background and return the task's number.

        `interrupted` is another way of being stopped (the host's button), `ended` is called when it is over, however it ended;
        `with_model` says that it uses the host's model. Raises HostError while another task runs.
        """
        task = Task(name, should_stop=lambda: bool(self._runner.stopping) or interrupted())

        def job() -> tuple[str, str]:
            message = function(task)
            return "stopped" if task.should_stop() else "done", message

        with self._lock:
            self._id = self._runner.start(job, name=name, doing=name.lower(), busy=f"{self._owner} is busy ({self.name()})",
                                          ended=lambda ending: ended())
            self._task, self._with_model = task, with_model
            return self._id

    def stop(self) -> bool:
        """Ask the running task to end. False if nothing runs."""
        return self._runner.stop()

    def running(self) -> bool:
        """Whether a task is under way."""
        return self._runner.running

    def with_model(self) -> bool:
        """Whether the running task uses the host's model."""
        return self.running() and self._with_model

    def name(self) -> str:
        """The running task's name, "" for none."""
        task = self._task
        return task.name if task is not None and self.running() else ""

    def status(self) -> Task | None:
        """The current task, or the last one; None before the first."""
        with self._lock:
            if self._task is None:
                return None
            ending, stopping = self._runner.ending, bool(self._runner.stopping)
            status = dataclasses.replace(self._task, id=self._id, stopping=stopping)
        if ending is None:
            return status
        outcome, message = (ending.outcome, ending.message) if isinstance(ending, Failure) else ending
        return dataclasses.replace(status, running=False, outcome=outcome, message=printable(message))

    def wait(self, timeout: float | None = None) -> bool:
        """Wait for the task's thread to end; whether it has."""
        return self._runner.wait(timeout)
