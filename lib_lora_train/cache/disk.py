"""Encoded pictures on disk: found again only if everything they were made from is still the same.

One safetensors file for each (picture, bucket, mirrored) in a folder `.lora_train_cache` beside the
picture, or in one given folder. The file carries a key of all its ingredients (content of the picture,
scaling, crop, mirroring, VAE); a file whose key differs, or that cannot be read, is a miss and is
written anew. Reading and writing never fail the run.

A picture is not read again to see that it is the same: the file also carries the picture's stamp (size, time of last
change, and the system's own time: of the last change of anything on Linux and macOS, of creation on Windows). Only where
the stamp differs does the content decide, and the file then gets the new stamp. A change that leaves size and times alone
fools it. On Linux and macOS no program can set the system's own time. On Windows it takes one that writes into the file
itself, keeps its length, and sets the time of last change back; what edits pictures does none of this, and deleting the
folder undoes it. A stamp younger than two seconds when it was taken, the coarsest clock of a file system (FAT), is not
trusted: a change in the same tick could not be seen.

One file a picture and not one for all of them: each is there whole or not at all, several processes may write into one
folder, and a picture that is deleted takes nothing else along. 10,000 of them are read in threads.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import struct
import time
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from lib_lora_train.dataset.buckets import Placement
from lib_lora_train.whole_file import replace

CACHE_FOLDER = ".lora_train_cache"
_VERSION = 1  # raise when the way from picture to latent changes
_KEY, _STAMP, _SUM = "lora_train_key", "lora_train_stamp", "lora_train_sum"
_COARSEST_CLOCK = 2 * 10**9  # nanoseconds
_LARGEST_HEADER = 1 << 16  # ours have less than 1 KB
_LEFT_BEHIND = 3600.0  # seconds after which a half-written file has no owner any more
_UNREADABLE = (OSError, ValueError, LookupError, TypeError, AttributeError, struct.error, SafetensorError)

MeanAndStd = tuple[torch.Tensor, torch.Tensor]  # each [4, h, w] fp32 on the CPU


class LatentDisk:
    """Latents of pictures under one VAE. `folder=None`: beside each picture. Every method may be called in any thread,
    for different pictures at the same time."""

    def __init__(self, *, vae_fingerprint: str, folder: Path | None = None, now: Callable[[], int] = time.time_ns) -> None:
        """`now`: the time in nanoseconds since 1970."""
        self.vae_fingerprint, self.folder, self._now = vae_fingerprint, folder, now
        self._pictures: dict[Path, tuple[str, str]] = {}  # path -> (stamp, sha256 of the content), read once a run
        self._tidied: set[Path] = set()

    def load(self, picture: Path, placement: Placement, *, flipped: bool) -> MeanAndStd | None:
        """(mean, std), or None if there is nothing valid on disk."""
        try:
            path = self._path(picture, placement, flipped=flipped)
            # Bytes and not a memory map: on Windows a mapped file could not be replaced later.
            data = path.read_bytes()
            length = struct.unpack("<Q", data[:8])[0]
            notes = json.loads(data[8:8 + length])["__metadata__"]
            if not self._fits(notes, picture, placement, flipped=flipped):
                return None
            tensors = load(data)
            mean, std = tensors["mean"], tensors["std"]
            sound = mean.dtype == std.dtype == torch.float32 and mean.shape == std.shape and mean.ndim == 3
            # A sum is not finite where one number is not: faster than asking each of them.
            if not sound or not math.isfinite(float(mean.sum()) + float(std.sum())):
                return None
            if _SUM in notes and notes[_SUM] != _sum(mean, std):
                return None
        except _UNREADABLE:
            return None
        self._refresh(notes, picture, placement, flipped=flipped, latents=(mean, std))
        return mean, std

    def holds(self, picture: Path, placement: Placement, *, flipped: bool) -> bool:
        """Whether `load` would find something, told by the file's header and length: a thousandth of its bytes is read."""
        try:
            with self._path(picture, placement, flipped=flipped).open("rb") as file:
                length = struct.unpack("<Q", file.read(8))[0]
                if length > _LARGEST_HEADER:
                    return False
                header = json.loads(file.read(length))
                end = max(entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__")
                whole = os.fstat(file.fileno()).st_size == 8 + length + end
            return whole and self._fits(header["__metadata__"], picture, placement, flipped=flipped)
        except _UNREADABLE:
            return False

    def observe(self, picture: Path) -> None:
        """Take note of what the picture is now, before it is decoded: `store` keeps nothing of one that changed since.

        Raises nothing: whoever decodes it finds out why it cannot be read.
        """
        with contextlib.suppress(OSError):
            self._content(picture, _stamp(picture))

    def store(self, picture: Path, placement: Placement, *, flipped: bool, latents: MeanAndStd) -> str | None:
        """Write atomically. Returns None, or why it was not possible (the run goes on without)."""
        path = self._path(picture, placement, flipped=flipped)
        temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        try:
            stamp, known = _stamp(picture), self._pictures.get(picture)
            if known is not None and known[0] != stamp:
                return None  # what was encoded is no longer there: nothing to be found again
            key = self._key(self._content(picture, stamp), placement, flipped=flipped)
            path.parent.mkdir(parents=True, exist_ok=True)
            self._tidy(path.parent)
            # Cloned: safetensors refuses tensors that share memory or are not contiguous.
            mean, std = (tensor.clone(memory_format=torch.contiguous_format) for tensor in latents)
            notes = {_KEY: key, _SUM: _sum(mean, std)}
            if self._trusted(stamp):
                notes[_STAMP] = stamp
            temporary.write_bytes(save({"mean": mean, "std": std}, metadata=notes))
            replace(temporary, path)
        except OSError as error:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            return f"{path.parent}: {error.strerror or error}"
        return None

    def forget(self, picture: Path, placement: Placement, *, flipped: bool) -> None:
        """Remove what is on disk, if it can be removed."""
        with contextlib.suppress(OSError):
            self._path(picture, placement, flipped=flipped).unlink(missing_ok=True)

    def _fits(self, notes: Mapping[str, Any], picture: Path, placement: Placement, *, flipped: bool) -> bool:
        """Whether a file with these notes was made from exactly this. Raises OSError where the picture cannot be read."""
        stored = json.loads(notes[_KEY])["picture"]
        if notes[_KEY] != self._key(stored, placement, flipped=flipped):
            return False
        known = self._pictures.get(picture)
        if known is not None:
            # The picture as the run began with it: one that changes meanwhile changes nothing, here as in memory.
            return known[1] == stored
        stamp = _stamp(picture)
        if notes.get(_STAMP) == stamp:
            self._pictures[picture] = stamp, stored
            return True
        return self._content(picture, stamp) == stored

    def _refresh(self, notes: Mapping[str, Any], picture: Path, placement: Placement, *, flipped: bool,
                 latents: MeanAndStd) -> None:
        """Give a valid file the picture's stamp, where it has none or an older one."""
        stamp = self._pictures[picture][0]
        if notes.get(_STAMP) != stamp and self._trusted(stamp):
            self.store(picture, placement, flipped=flipped, latents=latents)  # where it refuses, the next start asks again

    def _content(self, picture: Path, stamp: str) -> str:
        """sha256 of the picture's file, which has this stamp."""
        known = self._pictures.get(picture)
        if known is None:
            known = self._pictures[picture] = stamp, _digest(picture)
        return known[1]

    def _trusted(self, stamp: str) -> bool:
        return self._now() - max(map(int, stamp.split()[1:])) > _COARSEST_CLOCK

    def _tidy(self, folder: Path) -> None:
        """Once a folder: remove what processes that were killed had half written."""
        if folder in self._tidied:
            return
        self._tidied.add(folder)
        for leftover in folder.glob("*.tmp"):
            with contextlib.suppress(OSError):
                if self._now() / 1e9 - leftover.stat().st_mtime > _LEFT_BEHIND:
                    leftover.unlink()

    def _path(self, picture: Path, placement: Placement, *, flipped: bool) -> Path:
        width, height = placement.bucket
        name = f"{picture.name}.{width}x{height}{'.flipped' if flipped else ''}.safetensors"
        if self.folder is None:
            return picture.parent / CACHE_FOLDER / name
        # Pictures of the same name from different folders must not overwrite one another.
        origin = hashlib.sha256(str(picture.parent.resolve()).encode("utf-8", "surrogateescape")).hexdigest()[:12]
        return self.folder / f"{origin}.{name}"

    def _key(self, content: str, placement: Placement, *, flipped: bool) -> str:
        return json.dumps({
            "version": _VERSION, "picture": content, "vae": self.vae_fingerprint,
            "resized": placement.resized, "bucket": placement.bucket, "crop": placement.crop, "flipped": flipped,
        }, sort_keys=True)


def _stamp(picture: Path) -> str:
    """What changes with the file's content, without reading it: size, and two times in nanoseconds."""
    known = picture.stat()
    return f"{known.st_size} {known.st_mtime_ns} {known.st_ctime_ns}"


def _digest(picture: Path) -> str:
    """sha256 of all its bytes; hashing and reading leave Python's lock to others."""
    digest = hashlib.sha256()
    with picture.open("rb") as file:
        while part := file.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()


def _sum(mean: torch.Tensor, std: torch.Tensor) -> str:
    """CRC-32 of the numbers: a power cut can leave a file of the right length with a hole of zeros in it."""
    return str(zlib.crc32(memoryview(std.contiguous().numpy()).cast("B"),
                          zlib.crc32(memoryview(mean.contiguous().numpy()).cast("B"))))


def tensor_fingerprint(tensors: Mapping[str, torch.Tensor]) -> str:
    """sha256 over names, shapes, dtypes and all bytes of a model's tensors, e.g. those of the VAE.

    Each tensor is copied to the CPU in turn (a VAE is 160 to 335 MB; under a second).
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(memoryview(tensor.reshape(-1).view(torch.uint8).numpy()))
    return digest.hexdigest()
