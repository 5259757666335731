"""Files that are there whole or not at all.

What is written goes to a name beside the file that no program takes for a model, reaches the disk, and takes the file's
place in one step. A kill, a power cut or a full disk leaves the old file or the new one, never a part.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

RETRY_SECONDS = (0.05, 0.1, 0.2, 0.4, 0.8)
"""Pauses before a file that is locked is tried again. On Windows a virus scanner or a program that reads the file keeps
it from being replaced, mostly for a moment."""


@contextlib.contextmanager
def replacing(path: Path, *, one_of_many: bool = False) -> Iterator[BinaryIO]:
    """An open file whose contents become `path` when the block is left without an exception.

    The folder is made again if it has vanished. What an earlier process of ours, killed in the middle of this very file,
    left behind is removed. Raises OSError as the disk does; `path` is then what it was.

    Where thousands of files go into one folder, going through the folder for each of them takes longer than writing it:
    with `one_of_many` that is left to one `remove_parts` before the first.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if not one_of_many:
        _remove_leftovers(path)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.part")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())  # the bytes are on the disk before the name is
        replace(temporary, path)
        if not one_of_many:
            keep_name(path.parent)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_atomic(path: Path, data: bytes, *, one_of_many: bool = False) -> None:
    """`data` becomes the file at `path`; raises OSError, and `path` is then what it was. `one_of_many` as for `replacing`."""
    with replacing(path, one_of_many=one_of_many) as file:
        file.write(data)


def remove_parts(folder: Path) -> None:
    """Remove what other processes of ours left half-written in a folder that nobody else writes to; this one's own stay."""
    part = re.compile(rf"\..+\.(?!{os.getpid()}\.)\d+\.part", re.DOTALL)
    with contextlib.suppress(FileNotFoundError):
        for leftover in [entry for entry in folder.iterdir() if part.fullmatch(entry.name)]:
            with contextlib.suppress(OSError):
                leftover.unlink()


def replace(temporary: Path, path: Path) -> None:
    """`temporary` takes the place of `path`, with patience for a program that holds it for a moment. Raises OSError."""
    _patiently(lambda: os.replace(temporary, path))


def remove(path: Path) -> None:
    """The file is gone, also after a power cut; likewise with patience. Raises OSError."""
    _patiently(lambda: path.unlink(missing_ok=True))
    keep_name(path.parent)


def _patiently(act: Callable[[], None]) -> None:
    for pause in RETRY_SECONDS:
        try:
            act()
            return
        except PermissionError:
            time.sleep(pause)
    act()


def _remove_leftovers(path: Path) -> None:
    """Parts of this file by processes that ended too soon. Should one be alive after all, its own write fails loudly and
    nothing is torn."""
    part = re.compile(rf"\.{re.escape(path.stem)}\.\d+\.part")
    for leftover in (entry for entry in path.parent.iterdir() if part.fullmatch(entry.name)):
        with contextlib.suppress(OSError):
            leftover.unlink()


def keep_name(folder: Path) -> None:
    """Have the folder's entries on the disk too. Windows has no such call and needs none."""
    if sys.platform == "win32":
        return
    with contextlib.suppress(OSError):  # some network drives refuse; the file itself is safe
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
