"""A turn in the WebUI's queue that can be given up, and handed on to those who wait.

The WebUI's lock is handed on in the order in which threads asked for it, and asking for it has no end but getting it: a
generation in front may take an hour. So a helper thread asks, and hands the lock over, or back if nobody wants it
any more.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from lib_lora_train.errors import Interrupted

_LOOK_AGAIN = 0.5
"""Seconds between two questions whether a wait is to end."""
_QUEUED = 1.0
"""Seconds that a helper may take to stand in the queue: a thread's start, on a busy machine."""


class Turn:
    """One holder of `lock`, which any thread may release (as the WebUI's FIFOLock)."""

    def __init__(self, lock: Any) -> None:
        self._lock = lock
        self._guard, self._settled = threading.Lock(), threading.Event()
        self._outcome = ""
        self._attempt = 0

    @contextlib.contextmanager
    def held(self, *, stop: Callable[[], bool] = lambda: False) -> Iterator[None]:
        """Wait for the lock and hold it. Raises as `take`.

        Inside, the lock may be left for others and taken again; it is free in any case at the end.
        """
        self.take(stop=stop)
        try:
            yield
        finally:
            self.leave()

    def take(self, *, stop: Callable[[], bool] = lambda: False) -> None:
        """Wait for the lock. Raises Interrupted, holding nothing, where `stop_waiting` came first or `stop()` says so."""
        self._ask_anew()
        self._wait(stop)

    def leave(self) -> None:
        """Free the lock, if it is held."""
        with self._guard:
            held = self.holding()
            self._outcome = "" if held else self._outcome
        if held:
            self._lock.release()

    def pass_on(self, *, stop: Callable[[], bool]) -> None:
        """Let everybody who waits now have the lock first, then wait for it again. Raises as `take`."""
        queue = getattr(self._lock, "_pending_threads", ())
        others, end = len(queue), time.monotonic() + _QUEUED
        self._ask_anew()
        # The lock is not always handed to the first of the queue: who asks in the moment it is free gets it. So that this
        # is not us again, we stand in the queue before it is free.
        while len(queue) <= others and time.monotonic() < end:
            time.sleep(0.001)
        self._lock.release()
        self._wait(stop)

    def others_waiting(self) -> bool:
        """Whether others wait for the lock; locks that do not tell are never wanted."""
        return bool(getattr(self._lock, "_pending_threads", ()))

    def holding(self) -> bool:
        """Whether the lock is held."""
        return self._outcome == "held"

    def waiting(self) -> bool:
        """Whether the lock is asked for and has neither come nor been given up."""
        return not self._settled.is_set()

    def stop_waiting(self) -> None:
        """End the wait, and every later one; without effect while the lock is held."""
        self._settle("given up", self._attempt)

    def given_up(self) -> bool:
        """Whether nobody wants the lock any more."""
        return self._outcome == "given up"

    def _ask_anew(self) -> None:
        with self._guard:
            if self._outcome == "given up":
                return
            self._outcome, self._attempt = "", self._attempt + 1
            self._settled.clear()
        threading.Thread(target=self._ask, args=(self._attempt,), name="lora-train-queue", daemon=True).start()

    def _ask(self, attempt: int) -> None:
        self._lock.acquire()
        if not self._settle("held", attempt):
            self._lock.release()

    def _wait(self, stop: Callable[[], bool]) -> None:
        while not self._settled.wait(_LOOK_AGAIN):
            if stop():
                self.stop_waiting()
        if self._outcome == "given up":
            raise Interrupted("The run was stopped while it waited for other work")

    def _settle(self, outcome: str, attempt: int) -> bool:
        """Whether the attempt ended so; a helper of an earlier attempt, which was given up, changes nothing."""
        with self._guard:
            if attempt == self._attempt and not self._outcome:
                self._outcome = outcome
                self._settled.set()
            return attempt == self._attempt and self._outcome == outcome
