"""Files that a page sends, on their way into the dataset: streamed to the disk within limits, and
never named by their sender there."""

from __future__ import annotations

import contextlib
import shutil
import threading
from pathlib import Path
from typing import BinaryIO

from lib_lora_train.dataset.images import MAX_BYTES
from lib_lora_train.errors import DatasetError, OutputError, translated
from lib_lora_train.studio.importing.collect import Upload

MOST_FILES = 20_000  # of one batch: images and their captions
MOST_ARCHIVE = 8 << 30
MOST_TOGETHER = 16 << 30
MOST_BATCHES = 16
SPARE = 256 << 20
"""Bytes that stay free on the disk, so that captions can still be saved."""


class Uploads:
    """The files sent so far, in batches that are imported together."""

    def __init__(self, folder: Path) -> None:
        """`folder` is emptied: what an earlier session was sent and did not import is of no use."""
        self._folder, self._lock = folder, threading.Lock()
        self._batches: dict[str, list[Upload]] = {}
        self._count, self._bytes = 0, 0
        shutil.rmtree(folder, ignore_errors=True)

    def begin(self, batch: str, name: str, *, size: int | None = None) -> Receiving:
        """Begin to receive one file of `batch`; `size` is what the sender says, if it says so.

        Raises DatasetError for a file that is no use or too much, OutputError if the disk refuses.
        """
        limit = MOST_ARCHIVE if name.lower().endswith(".zip") else MAX_BYTES
        if size is not None and size > limit:
            raise _too_large(name, limit)
        with self._lock:
            if batch not in self._batches and len(self._batches) >= MOST_BATCHES:
                raise DatasetError("Too many uploads are waiting to be imported", remedy="reload the page and try again")
            if len(self._batches.get(batch, ())) >= MOST_FILES:
                raise DatasetError(f"More than {MOST_FILES} files were sent at once", remedy="send them in several batches, "
                                   "or name the folder they are in")
            self._count += 1
            path = self._folder / str(self._count)
        with translated("a file was received"):
            self._folder.mkdir(parents=True, exist_ok=True)
            return Receiving(self, batch, Upload(name, path), limit, path.open("wb"))

    def grow(self, size: int) -> None:
        """`size` more bytes are about to be written, or were removed where it is below 0.

        Raises DatasetError where that is too much, OutputError where the disk is nearly full.
        """
        with self._lock:
            self._bytes += size
            too_much = self._bytes > MOST_TOGETHER
        if size > 0 and too_much:
            raise DatasetError(f"More than {MOST_TOGETHER >> 30} GiB were sent", remedy="name the folder they are in")
        if size > 0 and shutil.disk_usage(self._folder).free < SPARE + size:
            raise OutputError("The disk is full", remedy="free some space")

    def keep(self, batch: str, upload: Upload) -> int:
        """The file has arrived completely; how many the batch holds now."""
        with self._lock:
            files = self._batches.setdefault(batch, [])
            files.append(upload)
            return len(files)

    def pop(self, batch: str) -> list[Upload]:
        """The files of a batch, which are the caller's to `drop` afterwards. Raises DatasetError where there are none."""
        with self._lock:
            files = self._batches.pop(batch, None)
        if not files:
            raise DatasetError("No file was sent", remedy="choose pictures or a zip file")
        return files

    def drop(self, uploads: list[Upload]) -> None:
        """Remove the files; one that a program holds open is left for the next session to remove."""
        for upload in uploads:
            with contextlib.suppress(OSError):
                size = upload.path.stat().st_size
                upload.path.unlink()
                self.grow(-size)


class Receiving:
    """One file on its way in. `write` as it comes; then `done`, or `abandon`."""

    def __init__(self, uploads: Uploads, batch: str, upload: Upload, limit: int, file: BinaryIO) -> None:
        self._uploads, self._batch, self._upload, self._limit, self._file = uploads, batch, upload, limit, file
        self.path, self._size = upload.path, 0

    def write(self, part: bytes) -> None:
        """The next bytes. Raises DatasetError where it becomes too large, OutputError if the disk refuses."""
        if self._size + len(part) > self._limit:
            raise _too_large(self._upload.name, self._limit)
        with translated("a file was received"):
            self._size += len(part)
            self._uploads.grow(len(part))
            self._file.write(part)

    def flush(self) -> None:
        """All that came is in the file at `path`, which is closed. Raises OutputError if the disk refuses."""
        with translated("a file was received"):
            self._file.close()

    def done(self) -> int:
        """It is all there; how many files the batch holds now."""
        self.flush()
        return self._uploads.keep(self._batch, self._upload)

    def abandon(self) -> None:
        """Forget it."""
        with contextlib.suppress(OSError):
            self._file.close()
        with contextlib.suppress(OSError):
            self.path.unlink()
        self._uploads.grow(-self._size)


def _too_large(name: str, limit: int) -> DatasetError:
    return DatasetError(f"{name} is too large to be sent", why=f"the limit is {limit >> 20} MiB",
                        remedy="name the folder it is in")
