"""A place in the WebUI's queue whose wait can be ended, and that lets others go first.

The WebUI's lock serves threads in the order in which they asked for it, and asking blocks without a timeout: a
generation in front may take an hour. So a helper thread asks, and releases the lock again if nobody waits for it any
more.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NotYet
from typing import Any

from lib_lora_train.dataset.progress import ShouldStop
from lib_lora_train.errors import Interrupted
from lib_lora_train.host.port import never

_POLL_SECONDS = 0.5
"""Between two questions whether a wait is to end."""
_QUEUED_SECONDS = 1.0
"""What a helper may take to stand in the queue: a thread's start, on a busy machine."""


class QueueLock:
    """One holder of `lock`, which any thread may release (as the WebUI's FIFOLock)."""

    def __init__(self, lock: Any) -> None:
        self._lock = lock
        self._request: Future[None] | None = None
        """Done when the lock is held, cancelled when the wait was ended; None before it is asked for and after release."""

    @contextlib.contextmanager
    def held(self, *, stop: ShouldStop = never) -> Iterator[None]:
        """Wait for the lock and hold it. Raises as `acquire`.

        Inside, the lock may be released and acquired again; it is free in any case at the end.
        """
        self.acquire(stop=stop)
        try:
            yield
        finally:
            self.release()

    def acquire(self, *, stop: ShouldStop = never) -> None:
        """Wait for the lock. Raises Interrupted, holding nothing, where `stop()` says so first."""
        self._wait(self._ask(), stop)

    def release(self) -> None:
        """Free the lock, if it is held, and end the wait for it otherwise."""
        request, self._request = self._request, None
        if request is not None and not request.cancel():
            request.result()
            self._lock.release()

    def yield_to_others(self, *, stop: ShouldStop) -> None:
        """Let everybody who waits now have the lock first, then wait for it again. Raises as `acquire`."""
        queue = getattr(self._lock, "_pending_threads", ())
        others, end = len(queue), time.monotonic() + _QUEUED_SECONDS
        request = self._ask()
        # The lock does not always go to the first of the queue: whoever asks in the moment it is free gets it. So that
        # this is not us again, we stand in the queue before it is free.
        while len(queue) <= others and time.monotonic() < end:
            time.sleep(0.001)
        self._lock.release()
        self._wait(request, stop)

    def others_waiting(self) -> bool:
        """Whether others wait for the lock; False for locks that do not tell."""
        return bool(getattr(self._lock, "_pending_threads", ()))

    def holding(self) -> bool:
        """Whether the lock is held."""
        return self._request is not None and self._request.done() and not self._request.cancelled()

    def waiting(self) -> bool:
        """Whether the lock is asked for and neither held nor cancelled yet."""
        return self._request is not None and not self._request.done()

    def _ask(self) -> Future[None]:
        self._request = request = Future[None]()
        threading.Thread(target=self._fulfil, args=(request,), name="lora-train-queue", daemon=True).start()
        return request

    def _fulfil(self, request: Future[None]) -> None:
        self._lock.acquire()
        if request.set_running_or_notify_cancel():
            request.set_result(None)
        else:
            self._lock.release()

    def _wait(self, request: Future[None], stop: ShouldStop) -> None:
        while True:
            try:
                return request.result(_POLL_SECONDS)
            except NotYet:
                if stop() and request.cancel():
                    raise Interrupted("The run was stopped while it waited for other work") from None
