"""Whether a process works on a run: a file in the run's folder that it keeps locked.

The system takes the lock away when the process ends, however it ends, so a killed run is told from one under way without
asking for process numbers, which are given out again.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from lib_lora_train.errors import HostError

LOCK_NAME = ".lock"
# Somebody who looks holds the lock for an instant.
_TRIES, _PAUSE = 20, 0.05


class RunLock:
    """The lock, from `take` until `release` or the end of the process."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    @classmethod
    def take(cls, folder: Path) -> RunLock | None:
        """Mark the folder's run as under way; None where the drive knows no locks.

        Raises HostError if another process, or this one, works on it; OSError where the folder cannot be written to.
        """
        descriptor = os.open(folder / LOCK_NAME, os.O_RDWR | os.O_CREAT, 0o666)
        for left in reversed(range(_TRIES)):
            locked = _lock(descriptor)
            if locked:
                return cls(descriptor)
            if locked is None or not left:
                break
            time.sleep(_PAUSE)
        os.close(descriptor)
        if locked is None:
            return None
        raise HostError(f"The run {folder.name} is under way", why="another program works on it",
                        remedy="wait for it or stop it first")

    def release(self) -> None:
        """Let go of it. The file stays: to remove it would take it from under somebody who waits for it."""
        os.close(self._descriptor)


def is_locked(folder: Path) -> bool:
    """Whether some process, or this one, works on the folder's run."""
    return _could_lock(folder) is False


def is_abandoned(folder: Path) -> bool:
    """Whether some process worked on the folder's run and surely none does now; False where the drive knows no locks."""
    return _could_lock(folder) is True


def _could_lock(folder: Path) -> bool | None:
    """Whether the mark could be had; None where there is none, or the drive knows no locks."""
    try:
        descriptor = os.open(folder / LOCK_NAME, os.O_RDWR)
    except OSError:
        return None
    try:
        return _lock(descriptor)
    finally:
        os.close(descriptor)  # and lets the lock go


def _lock(descriptor: int) -> bool | None:
    """Whether the lock could be had; None where the drive knows none."""
    if sys.platform == "win32":
        import msvcrt
        try:
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True
    import fcntl
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True
