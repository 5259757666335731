"""The run lock: a file in a run's folder that the process which works on the run keeps locked.

The system releases the lock when the process ends, however it ends, so a killed run is told from a running one.
"""

from __future__ import annotations

from pathlib import Path

from filelock import BaseFileLock, FileLock, Timeout

from lib_lora_train.errors import HostError

LOCK_NAME = ".lock"
ACQUIRE_TIMEOUT = 1.0  # seconds; `is_locked` in another process holds the lock for an instant


def lock_run(folder: Path) -> BaseFileLock | None:
    """Lock the folder's run until the lock's `release` or the end of the process; None where the drive has no locks or the
    folder cannot be written to.

    Raises HostError if another process, or this one, works on the run.
    """
    lock = FileLock(folder / LOCK_NAME, thread_local=False)
    try:
        lock.acquire(timeout=ACQUIRE_TIMEOUT)
    except Timeout:
        raise HostError(f"The run {folder.name} is under way", why="another program works on it",
                        remedy="wait for it or stop it first") from None
    except (OSError, NotImplementedError):
        return None
    return lock


def is_locked(folder: Path) -> bool:
    """Whether a process, this one included, works on the folder's run."""
    return (folder / LOCK_NAME).exists() and _lockable(folder) is False


def is_abandoned(folder: Path) -> bool:
    """Whether no process works on the run of this run's folder any more; False where the drive has no locks.

    On Windows the lock's file goes when the lock is released: that there is none says nothing.
    """
    return _lockable(folder) is True


def _lockable(folder: Path) -> bool | None:
    """Whether the lock is free; None where the drive has no locks."""
    try:
        with FileLock(folder / LOCK_NAME, timeout=0, thread_local=False):
            return True
    except Timeout:
        return False
    except (OSError, NotImplementedError):
        return None
