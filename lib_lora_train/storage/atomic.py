"""Atomic writes: after a kill, a power cut or a full disk a file is the old one or the new one, never a part.

The data goes to a temporary file beside the target (".<stem>.<process>.part", which no program takes for a model), reaches
the disk, and replaces the target in one step.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

RETRY_SECONDS = (0.05, 0.1, 0.2, 0.4, 0.8)
"""Pauses before a locked file is tried again. On Windows a virus scanner or a program that reads the file keeps it from being
replaced, mostly for a moment."""
_NO_FSYNC = (errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS)


@contextlib.contextmanager
def replacing(path: Path, *, one_of_many: bool = False) -> Iterator[BinaryIO]:
    """Yield an open temporary file that replaces `path` when the block ends without an exception.

    A missing folder is created, and what killed processes left half-written of this file is removed. Raises OSError; `path`
    is then unchanged. `one_of_many` skips the two scans and flushes of the folder that cost more than writing a small file:
    for thousands of files in one folder, call `remove_parts` once instead.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if not one_of_many:
        remove_parts(path.parent, stem=path.stem)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.part")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            _fsync(file.fileno())  # the data is on the disk before the name is
        replace(temporary, path)
        if not one_of_many:
            sync_folder(path.parent)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_atomic(path: Path, data: bytes, *, one_of_many: bool = False) -> None:
    """Write `data` to `path`. Raises OSError; `path` is then unchanged. `one_of_many` as for `replacing`."""
    with replacing(path, one_of_many=one_of_many) as file:
        file.write(data)


def copy_atomic(source: Path, target: Path, *, one_of_many: bool = False) -> None:
    """Copy a file's bytes to `target`. Raises OSError; `target` is then unchanged. `one_of_many` as for `replacing`."""
    with source.open("rb") as read, replacing(target, one_of_many=one_of_many) as file:
        shutil.copyfileobj(read, file, 1 << 20)


def remove_parts(folder: Path, *, stem: str = "") -> None:
    """Remove the temporary files that other processes left in `folder`: those of files called `stem`, by default all. Should
    such a process be alive after all, its own write fails loudly and no file is damaged."""
    part = re.compile(rf"\.{re.escape(stem) or '.+'}\.(?!{os.getpid()}\.)\d+\.part", re.DOTALL)
    with contextlib.suppress(FileNotFoundError):
        for leftover in [entry for entry in folder.iterdir() if part.fullmatch(entry.name)]:
            with contextlib.suppress(OSError):
                leftover.unlink()


def replace(temporary: Path, path: Path) -> None:
    """Rename `temporary` to `path`, and try again while another program holds `path` open. Raises OSError."""
    _retrying(lambda: os.replace(temporary, path))


def remove(path: Path) -> None:
    """Remove the file for good, also after a power cut, and try again while another program holds it. Raises OSError."""
    _retrying(lambda: path.unlink(missing_ok=True))
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Flush the folder's entries to the disk. Windows has no such call and needs none."""
    if sys.platform == "win32":
        return
    with contextlib.suppress(OSError):  # some network drives refuse; the file itself is safe
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _retrying(act: Callable[[], None]) -> None:
    for pause in RETRY_SECONDS:
        try:
            act()
            return
        except PermissionError:
            time.sleep(pause)
    act()


def _fsync(descriptor: int) -> None:
    """Flush a file to the disk. Passed over on drives that do not offer it (some FUSE and network drives); a full or failing
    disk raises OSError."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_FSYNC:
            raise
