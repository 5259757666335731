"""A turn in the WebUI's queue that can be given up.

The WebUI's lock is handed on in the order in which threads asked for it, and asking for it has no end but getting it: a
generation in front may take an hour. So a helper thread asks, and hands the lock over, or back if nobody wants it
any more.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

from lib_lora_train.errors import Interrupted


class Turn:
    """One wait for `lock`, which any thread may release (as the WebUI's FIFOLock)."""

    def __init__(self, lock: Any) -> None:
        self._lock = lock
        self._guard, self._settled = threading.Lock(), threading.Event()
        self._outcome = ""

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Wait for the lock and hold it. Raises Interrupted, holding nothing, where `give_up` came first."""
        threading.Thread(target=self._ask, name="lora-train-queue", daemon=True).start()
        self._settled.wait()
        if self._outcome == "given up":
            raise Interrupted("The run was stopped while it waited for other work of the WebUI")
        try:
            yield
        finally:
            self._lock.release()

    def waiting(self) -> bool:
        """Whether the lock has neither come nor been given up."""
        return not self._settled.is_set()

    def give_up(self) -> None:
        """End the wait; without effect once the lock is held."""
        self._settle("given up")

    def _ask(self) -> None:
        self._lock.acquire()
        if not self._settle("held"):
            self._lock.release()

    def _settle(self, outcome: str) -> bool:
        with self._guard:
            if not self._outcome:
                self._outcome = outcome
                self._settled.set()
            return self._outcome == outcome
