"""Progress and stopping of operations that go image by image."""

from __future__ import annotations

from collections.abc import Callable

from lib_lora_train.errors import Interrupted

Progress = Callable[[int, int], None]  # (done, total)
ShouldStop = Callable[[], bool]


class Watch:
    """Counts what is done, reports it, and stops when told to. `doing` completes "stopped while …"."""

    def __init__(self, total: int, *, doing: str, on_progress: Progress | None, should_stop: ShouldStop | None) -> None:
        self._total, self._doing, self._done = total, doing, 0
        self._on_progress, self._should_stop = on_progress, should_stop

    def check(self) -> None:
        """Raises Interrupted if a stop was requested. To be called between two images."""
        if self._should_stop is not None and self._should_stop():
            raise Interrupted(f"The run was stopped while {self._doing}")

    def advance(self, count: int = 1) -> None:
        """`count` more images are done."""
        self._done += count
        if self._on_progress is not None:
            self._on_progress(self._done, self._total)
