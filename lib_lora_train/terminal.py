"""The terminal of the program: who reads it may go away, who sits at it may press Ctrl+C or close it.

Nothing that is only shown ends any work, and SIGTERM and a closed terminal (SIGHUP; on Windows SIGBREAK) do what Ctrl+C does.
Little is imported here: until `set_up` an interrupt ends in Python's own traceback.
"""

from __future__ import annotations

import io
import math
import os
import signal
import sys
import time
from collections.abc import Callable

INTERRUPTED = 130  # the exit code, as shells have it
STOPPING = "Stopping; what was learnt until now is saved. Ctrl+C again ends at once."
_SAME_CTRL_C = 2.0  # seconds


class _Shown:
    """stdout or stderr of the program. Where it cannot be written to any more (its reader has gone, the disk is full, the
    terminal is closed) the rest is thrown away; stderr tells of a stdout that did not just end."""

    def __init__(self, stream: io.TextIOBase) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> object:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """All of `text` counts as written."""
        self._trying(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        """As the stream's own."""
        self._trying(self._stream.flush)

    def _trying(self, act: Callable[[], object]) -> None:
        try:
            act()
        except OSError as error:
            # What is still in its buffer must not be tried again at the end.
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())
            if not isinstance(error, BrokenPipeError):
                say(f"Nothing more can be shown ({error.strerror}); the work goes on.")


def set_up() -> None:
    """Make the program's streams and signals what the text above says."""
    for number, name in ((1, "stdout"), (2, "stderr")):
        # A stream that was closed before the start is none; its number must not become that of a file.
        stream = getattr(sys, name) or os.fdopen(os.dup2(os.open(os.devnull, os.O_WRONLY), number), "w")
        setattr(sys, name, _Shown(stream))
    end_on_interrupt()
    forward = _Forward()
    for name in ("SIGTERM", "SIGHUP", "SIGBREAK"):
        sign = getattr(signal, name, None)
        if sign is not None and signal.getsignal(sign) != signal.SIG_IGN:  # `nohup` wants a closed terminal to mean nothing
            signal.signal(sign, forward)


class _Forward:
    """The handler of signals that are to do what Ctrl+C does. The same end is often told twice within a moment, to the process
    and to its group (`timeout`), or as SIGTERM and SIGHUP: the second time does not count."""

    def __init__(self) -> None:
        self._since = -math.inf

    def __call__(self, *_: object) -> None:
        told, self._since = self._since, time.monotonic()
        if self._since - told > _SAME_CTRL_C:
            signal.raise_signal(signal.SIGINT)


def end_on_interrupt() -> None:
    """From here on Ctrl+C ends the program at once: there is nothing to keep. Imports may swallow an exception."""
    signal.signal(signal.SIGINT, _end)


def raise_on_interrupt() -> None:
    """From here on Ctrl+C is a KeyboardInterrupt, for work that keeps what it has."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def say(text: str) -> None:
    """A line on stderr, from within a signal's handler too, where a stream may be in the middle of another line."""
    try:
        os.write(2, f"\n{text}\n".encode())
    except OSError:
        pass


def _end(*_: object) -> None:
    say("Stopped.")
    os._exit(INTERRUPTED)


class StopRequest:
    """While the block lasts, Ctrl+C asks a job to end and keep what it learnt; a second one ends the program at once.

    One of several processes (`launched`) is told twice of the same Ctrl+C, by the terminal and by what launched it.
    """

    def __init__(self, *, launched: bool, tells: bool) -> None:
        """`tells`: whether this process says on stderr what will happen."""
        self.wanted, self._since = False, 0.0
        self._launched, self._tells = launched, tells

    def __enter__(self) -> StopRequest:
        self._before = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _handle(self, *_: object) -> None:
        if not self.wanted:
            self.wanted, self._since = True, time.monotonic()
            if self._tells:
                say(STOPPING)
        elif not self._launched:
            _end()
        elif time.monotonic() - self._since > _SAME_CTRL_C:
            raise KeyboardInterrupt  # the others are told
