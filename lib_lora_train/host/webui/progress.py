"""The WebUI's own progress display (`shared.state` and the list of tasks) and its stop buttons, for one job."""

from __future__ import annotations

import contextlib
import secrets
import time
from collections.abc import Iterator

from modules import progress, shared

from lib_lora_train.events import Event, Planned, Stage, Step


class ProgressDisplay:
    """One job as the WebUI shows it. `task` is its id there.

    Any call of the page that ends, of any kind, wipes most of `shared.state`. So each event sets everything again, and
    a stop that was seen once is remembered here.
    """

    def __init__(self) -> None:
        # The WebUI's own way of making one draws from Python's random state, which is not ours.
        self.task = f"task(lora-train-{secrets.token_hex(4)})"
        self._steps, self._step = 0, 0
        self._stopped = self._running = False

    @contextlib.contextmanager
    def queued(self) -> Iterator[None]:
        """Listed as waiting, until it runs or the wait for it ends."""
        progress.add_task_to_queue(self.task)
        if self.task in progress.finished_tasks:  # it ran before others were let through
            progress.finished_tasks.remove(self.task)
        try:
            yield
        finally:
            progress.pending_tasks.pop(self.task, None)

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Shown as what the WebUI is doing, as often as others were let through. To be entered with the queue's lock held."""
        shared.state.begin(job=self.task)
        progress.start_task(self.task)
        self._running = True
        try:
            yield
        finally:
            self.interrupted()
            self._running = False
            progress.finish_task(self.task)
            shared.state.end()
            # Left over, they would stop the next work in the queue.
            shared.state.interrupted = shared.state.stopping_generation = False

    def interrupted(self) -> bool:
        """Whether Interrupt or Stop was pressed while the job ran; what others are told in between is not for it."""
        if self._running:
            self._stopped = self._stopped or shared.state.interrupted or shared.state.stopping_generation
        return self._stopped

    def show(self, event: Event) -> None:
        """Make the display say what `event` says."""
        self.interrupted()
        state = shared.state
        state.sampling_step = state.sampling_steps = 0
        if isinstance(event, Planned):
            self._steps = event.steps
            state.textinfo = event.summary
        elif isinstance(event, Stage):
            state.sampling_step, state.sampling_steps = event.done, event.total
            state.textinfo = f"{event.name} {event.done}/{event.total}"
        elif isinstance(event, Step):
            if self._step == 0:
                state.time_start = time.time()  # the time left is reckoned from the steps, not from the preparation
            self._steps, self._step = event.total, event.step
            state.textinfo = f"Training: step {event.step}/{event.total}, loss {event.average_loss:.4f}"
        state.job, state.job_count, state.job_no = self.task, self._steps, self._step
