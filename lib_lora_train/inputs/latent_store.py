"""Where encoded images wait for their visits: in memory up to a bound, the others in one temporary file.

10,000 images at 1024² are 5 GB of latents (4 × 128 × 128 numbers of 4 bytes, mean and deviation: 0.5 MB each), and as much
again mirrored. The numbers are the same wherever they lay.
"""

from __future__ import annotations

import os
import tempfile
import threading
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch

from lib_lora_train.errors import TrainingError

MOST_LATENT_BYTES = 2 << 30  # in memory; 4000 images at 1024², 16,000 at 512²


class _InFile(NamedTuple):
    """Latents in the temporary file."""

    offset: int
    shape: torch.Size


class LatentStore:
    """Latents of images, [variants, 2, 4, h, w] fp32 each (mean, then deviation), by number.

    The temporary file has no name that could be left behind: Linux and macOS remove it at once, Windows when it is closed or
    this process ends, however it ends.
    """

    def __init__(self, *, max_bytes: int = MOST_LATENT_BYTES, folder: Path | None = None) -> None:
        """At most `max_bytes` stay in memory. `folder`: where the temporary file lies; where there is none, in the system's
        own place for such files."""
        self._max_bytes, self._folder = max_bytes, folder
        self._entries: dict[int, torch.Tensor | _InFile] = {}
        self._bytes = 0
        self._file: BinaryIO | None = None
        self._lock = threading.Lock()
        self.failure = ""  # why latents stay in memory that should not

    def put(self, number: int, latents: torch.Tensor) -> None:
        """Keep them: in memory while there is room, else in the temporary file.

        A disk that refuses costs memory and not the run; `failure` then says why.
        """
        entry: torch.Tensor | _InFile = latents
        if self._bytes + latents.nbytes > self._max_bytes and not self.failure:
            try:
                entry = _InFile(self._append(memoryview(latents.numpy()).cast("B")), latents.shape)
            except OSError as error:
                self.failure = error.strerror or str(error)
        if isinstance(entry, torch.Tensor):
            self._bytes += entry.nbytes
        self._entries[number] = entry

    def _append(self, data: memoryview) -> int:
        with self._lock:
            if self._file is None:
                folder = self._folder if self._folder is not None and self._folder.is_dir() else None
                self._file = tempfile.TemporaryFile(dir=folder, buffering=0)
            offset = self._file.seek(0, os.SEEK_END)
            while data:
                data = data[self._file.write(data):]
        return offset

    def bytes_on_disk(self, number: int) -> int:
        """What `load` reads from the disk for one image; 0 where its latents are in memory."""
        entry = self._entries[number]
        return 0 if isinstance(entry, torch.Tensor) else entry.shape[1:].numel() * 4

    def load(self, number: int, *, variant: int = 0) -> torch.Tensor:
        """[2, 4, h, w] of one image; from any thread. Raises TrainingError where the disk refuses."""
        entry = self._entries[number]
        if isinstance(entry, torch.Tensor):
            return entry[variant]
        latents = torch.empty(entry.shape[1:])
        data = memoryview(latents.numpy()).cast("B")
        try:
            with self._lock:
                assert self._file is not None
                self._file.seek(entry.offset + variant * len(data))
                if self._file.readinto(data) != len(data):  # type: ignore[attr-defined]
                    raise OSError("the temporary file is shorter than what was written to it")
        except OSError as error:
            raise TrainingError("What was encoded before the training can no longer be read",
                                why=error.strerror or str(error), remedy="start the run again") from error
        return latents

    def close(self) -> None:
        """Remove the temporary file and forget everything."""
        self._entries.clear()
        self._bytes = 0
        with self._lock:
            file, self._file = self._file, None
        if file is not None:
            file.close()
