"""Where encoded pictures wait for their visits: in memory up to a bound, the others on disk.

10,000 pictures at 1024² are 5 GB of latents (4 × 128 × 128 numbers of 4 bytes, mean and deviation: 0.5 MB each), and as
much again mirrored. The first ones stay in memory, the others lie in the disk cache where there is one, else in one
temporary file. The numbers are the same wherever they lay.
"""

from __future__ import annotations

import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch

from lib_lora_train.dataset.buckets import Placement
from lib_lora_train.errors import TrainingError
from lib_lora_train.inputs.latent_files import LatentDisk
from lib_lora_train.storage.atomic import RETRY_SECONDS

MOST_LATENT_BYTES = 2 << 30  # in memory; 4000 pictures at 1024², 16,000 at 512²


@dataclass(frozen=True)
class InFile:
    """A tensor in the temporary file."""

    offset: int
    shape: torch.Size
    dtype: torch.dtype


@dataclass(frozen=True)
class _InCache:
    """Latents in the disk cache, as they were found or written there."""

    image: Path
    placement: Placement


class DiskOverflow:
    """Tensors in one temporary file, which is gone when it is closed or this process ends, however it ends.

    `folder`: where it lies; None is the system's own place for such files. The file has no name that could be left
    behind: Linux and macOS remove it at once, Windows when its last handle is closed.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder, self._end = folder, 0
        self._lock = threading.Lock()
        self._file: BinaryIO | None = None

    def write(self, tensor: torch.Tensor) -> InFile:
        """Keep a contiguous tensor on the CPU; raises OSError as the disk does."""
        data = memoryview(tensor.view(-1).view(torch.uint8).numpy())
        with self._lock:
            if self._file is None:
                folder = self._folder if self._folder is not None and self._folder.is_dir() else None
                self._file = tempfile.TemporaryFile(dir=folder, buffering=0)
            place = InFile(self._end, tensor.shape, tensor.dtype)
            self._file.seek(place.offset)
            while data:
                data = data[self._file.write(data):]
            self._end = self._file.tell()
        return place

    def read(self, place: InFile, row: int | None = None) -> torch.Tensor:
        """The tensor, or only `tensor[row]`; from any thread. Raises TrainingError where the disk refuses."""
        shape = place.shape if row is None else place.shape[1:]
        tensor = torch.empty(shape, dtype=place.dtype)
        data = memoryview(tensor.view(-1).view(torch.uint8).numpy())
        try:
            with self._lock:
                self._read_into(data, place.offset + (row or 0) * len(data))
        except OSError as error:
            raise TrainingError("What was encoded before the training can no longer be read",
                                why=error.strerror or str(error), remedy="start the run again") from error
        return tensor

    def _read_into(self, data: memoryview, offset: int) -> None:
        if self._file is None:
            raise OSError("the temporary file is closed")
        self._file.seek(offset)
        while data:
            count = self._file.readinto(data)  # type: ignore[attr-defined]
            if not count:
                raise OSError("the temporary file is shorter than what was written to it")
            data = data[count:]

    def close(self) -> None:
        """Remove the file."""
        with self._lock:
            file, self._file = self._file, None
        if file is not None:
            file.close()


class LatentStore:
    """Latents of pictures, [flips, 2, 4, h, w] fp32 each (mirrored ones second; mean, then deviation), by number."""

    def __init__(self, *, disk: LatentDisk | None = None, max_bytes: int = MOST_LATENT_BYTES,
                 folder: Path | None = None) -> None:
        """At most `max_bytes` stay in memory. `folder`: where the temporary file lies, see `DiskOverflow`."""
        self.disk, self._max_bytes = disk, max_bytes
        self._overflow = DiskOverflow(folder)
        self._entries: dict[int, torch.Tensor | InFile | _InCache] = {}
        self._bytes = 0
        self.failure = ""  # why latents stay in memory that should not

    def has_room(self, size: int) -> bool:
        """Whether so many bytes more may stay in memory."""
        return self._bytes + size <= self._max_bytes

    def put(self, number: int, latents: torch.Tensor, *, cached: tuple[Path, Placement] | None = None) -> None:
        """Keep them: in memory while there is room, else where they are `cached`, else in the temporary file.

        A disk that refuses costs memory and not the run; `failure` then says why.
        """
        entry: torch.Tensor | InFile | _InCache = latents
        if not self.has_room(latents.nbytes):
            if cached is not None:
                entry = _InCache(*cached)
            elif not self.failure:
                try:
                    entry = self._overflow.write(latents)
                except OSError as error:
                    self.failure = error.strerror or str(error)
        if isinstance(entry, torch.Tensor):
            self._bytes += entry.nbytes
        self._entries[number] = entry

    def in_memory(self, number: int) -> bool:
        """Whether `take` reads no disk."""
        return isinstance(self._entries[number], torch.Tensor)

    def take(self, number: int, *, flipped: bool) -> torch.Tensor:
        """[2, 4, h, w] of one picture; from any thread. Raises TrainingError where the disk no longer has it."""
        entry = self._entries[number]
        if isinstance(entry, torch.Tensor):
            return entry[int(flipped)]
        if isinstance(entry, InFile):
            return self._overflow.read(entry, int(flipped))
        return self._from_cache(entry, flipped=flipped)

    def _from_cache(self, entry: _InCache, *, flipped: bool) -> torch.Tensor:
        """Read with patience: one moment in which the disk does not answer shall not end a long run."""
        assert self.disk is not None
        what, refused = f"The encoded picture of {entry.image} can no longer be read", OSError()
        for pause in (0.0, *RETRY_SECONDS):
            time.sleep(pause)
            try:
                latents = self.disk.load(entry.image, entry.placement, flipped=flipped)
            except OSError as error:
                refused = error
                continue
            if latents is None:
                raise TrainingError(what, why="its file in the cache vanished, was damaged or changed after the run began",
                                    remedy="start the run again: it is encoded anew")
            return latents
        raise TrainingError(what, why=refused.strerror or str(refused), remedy="start the run again") from refused

    def close(self) -> None:
        """Remove the temporary file and forget everything."""
        self._entries.clear()
        self._bytes = 0
        self._overflow.close()
