"""Encoded images on disk: found again only if everything they were made from is still the same.

One safetensors file for each (image, bucket, crop, view, VAE) in a folder `.lora_train_cache` beside the image. The
file carries a key of all its ingredients (content of the image, scaling, crop, rotation, mirroring, VAE), of which all but the
content are in its name, too: runs with different VAEs do not write over one another's. A file whose key differs, or that is
damaged, is a miss and is written anew. Writing never fails the run.

An image is not read again to see that it is the same: the file also carries the image's stamp (size, time of last
change, and the system's own time: of the last change of anything on Linux and macOS, of creation on Windows). Only where
the stamp differs does the content decide, and the file then gets the new stamp. A change that leaves size and times alone
fools it. On the file systems of Linux and macOS themselves no program can set the system's own time. On Windows, and on FAT,
exFAT and many network drives everywhere, it takes one that writes into the file itself, keeps its length, and sets the time
of last change back; what edits images does none of this, and deleting the folder undoes it. A stamp younger than two
seconds when it was taken, the coarsest clock of a file system (FAT), is not trusted: a change in the same tick could not be
seen.

One file an image and not one for all of them: each is there whole or not at all, several processes may write into one
folder, and an image that is deleted takes nothing else along. 10,000 of them are read in threads. A file is not forced onto
the disk before its name, which would take longer than writing it: what a power cut makes of it shows in its sum.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import secrets
import time
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load, save

from lib_lora_train.dataset.augment import AS_IT_IS, Variant
from lib_lora_train.dataset.buckets import Placement
from lib_lora_train.storage.atomic import replace
from lib_lora_train.storage.checksum import sha256_of
from lib_lora_train.storage.content import header_of

CACHE_FOLDER = ".lora_train_cache"
_VERSION = 1  # raise when the way from image to latent changes
_KEY, _STAMP, _SUM = "lora_train_key", "lora_train_stamp", "lora_train_sum"
_COARSEST_CLOCK = 2 * 10**9  # nanoseconds
_LEFT_BEHIND = 3600.0  # seconds after which a half-written file has no owner any more
_LONGEST_NAME = 100  # bytes of an image's name that are taken into the file's, which may have 143 on some systems
_DAMAGED = (ValueError, LookupError, TypeError, AttributeError, RecursionError, SafetensorError)

MeanAndStd = tuple[torch.Tensor, torch.Tensor]  # each [4, h, w] fp32 on the CPU


@dataclass(frozen=True)
class _Known:
    """An image as the run began with it."""

    stamp: str
    trusted: bool  # the stamp was old enough when it was taken
    content: str  # sha256


class LatentDisk:
    """Latents of images under one VAE. Every method may be called in any thread, for different images at the same time."""

    def __init__(self, *, vae_fingerprint: str, now: Callable[[], int] = time.time_ns) -> None:
        """`now`: the time in nanoseconds since 1970."""
        self.vae_fingerprint, self._now = vae_fingerprint, now
        self._images: dict[Path, _Known] = {}  # read once a run
        self._tidied: set[Path] = set()

    def load(self, image: Path, placement: Placement, *, variant: Variant = AS_IT_IS,
             renew: bool = False) -> torch.Tensor | None:
        """[2, 4, h, w] fp32, mean and standard deviation; None if there is nothing valid on disk.

        With `renew` a valid file without the image's stamp gets it. Raises OSError where what is there cannot be read now: a
        virus scanner has it, too many files are open, a network drive is away.
        """
        # numpy and not torch, whose operations would begin a team of threads in each thread that reads.
        width, height = placement.bucket
        try:
            # Bytes and not a memory map: on Windows a mapped file could not be replaced later.
            data = self._path(image, placement, variant=variant).read_bytes()
            notes = header_of(io.BytesIO(data))["__metadata__"]
            if not self._fits(notes, image, placement, variant=variant):
                return None
            tensors = load(data)
            latents = np.stack([tensors["mean"], tensors["std"]])
        except (FileNotFoundError, *_DAMAGED):
            return None
        whole = latents.dtype == np.float32 and latents.shape == (2, 4, height // 8, width // 8)
        if not whole or notes.get(_SUM) != _sum(latents) or not np.isfinite(latents).all():
            return None
        found = torch.from_numpy(latents)
        known = self._images[image]
        if renew and known.trusted and notes.get(_STAMP) != known.stamp:
            self.store(image, placement, variant=variant, latents=found)  # where it refuses, the next start asks again
        return found

    def observe(self, image: Path) -> None:
        """Take note of what the image is now, before it is decoded: `store` keeps nothing of one that changed since.

        Raises nothing: whoever decodes it finds out why it cannot be read.
        """
        with contextlib.suppress(OSError):
            self._observed(image)

    def store(self, image: Path, placement: Placement, *, latents: torch.Tensor | MeanAndStd,
              variant: Variant = AS_IT_IS) -> str | None:
        """Write atomically. Returns None, or why it was not possible (the run goes on without)."""
        path = self._path(image, placement, variant=variant)
        folder = path.parent
        # A name of its own each time: the same image may be written by another thread or another machine.
        temporary = folder / f"{secrets.token_hex(8)}.tmp"
        try:
            known = self._observed(image)
            if known.stamp != _stamp(image):
                return None  # what was encoded is no longer there: nothing to be found again
            mean, std = (np.ascontiguousarray(tensor.numpy()) for tensor in latents)
            notes = {_KEY: self._key(known.content, placement, variant=variant), _SUM: _sum(np.stack([mean, std]))}
            if known.trusted:
                notes[_STAMP] = known.stamp
            folder.mkdir(parents=True, exist_ok=True)
            self._tidy(folder)
            temporary.write_bytes(save({"mean": mean, "std": std}, metadata=notes))
            replace(temporary, path)
        except OSError as error:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            return f"{folder}: {error.strerror or error}"
        return None

    def _fits(self, notes: Mapping[str, Any], image: Path, placement: Placement, *, variant: Variant) -> bool:
        """Whether a file with these notes was made from exactly this. Raises OSError where the image cannot be read."""
        stored = json.loads(notes[_KEY])["picture"]
        if notes[_KEY] != self._key(stored, placement, variant=variant):
            return False
        if image not in self._images and notes.get(_STAMP) == (stamp := _stamp(image)):
            self._images[image] = _Known(stamp, self._trusted(stamp), stored)
        # The image as the run began with it: one that changes meanwhile changes nothing, here as in memory.
        return self._observed(image).content == stored

    def _observed(self, image: Path) -> _Known:
        known = self._images.get(image)
        if known is None:
            stamp = _stamp(image)
            trusted = self._trusted(stamp)  # asked now: a change after the file was read must show in the stamp
            known = self._images[image] = _Known(stamp, trusted, sha256_of(image))
        return known

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

    def _path(self, image: Path, placement: Placement, *, variant: Variant) -> Path:
        """Where the latents lie. The name tells apart all that the key does, but for the image's content."""
        (width, height), name = placement.bucket, os.fsencode(image.name)
        shown = image.name if len(name) <= _LONGEST_NAME else hashlib.sha256(name).hexdigest()[:32]
        made = hashlib.sha256(self._key("", placement, variant=variant).encode()).hexdigest()[:12]
        return image.parent / CACHE_FOLDER / f"{shown}.{width}x{height}.{made}.safetensors"

    def _key(self, content: str, placement: Placement, *, variant: Variant) -> str:
        turned = {"degrees": variant.degrees} if variant.degrees else {}  # so that others' files stay as they were
        return json.dumps({
            "version": _VERSION, "picture": content, "vae": self.vae_fingerprint,
            "resized": placement.resized, "bucket": placement.bucket, "crop": placement.crop,
            "flipped": variant.flipped, **turned,
        }, sort_keys=True)


def _stamp(image: Path) -> str:
    """What changes with the file's content, without reading it: size, and two times in nanoseconds."""
    known = image.stat()
    return f"{known.st_size} {known.st_mtime_ns} {known.st_ctime_ns}"


def _sum(latents: np.ndarray) -> str:
    """CRC-32 of the numbers: a power cut can leave a file of the right length with a hole of zeros in it."""
    return str(zlib.crc32(latents))
