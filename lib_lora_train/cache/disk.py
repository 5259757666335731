"""Encoded pictures on disk: found again only if everything they were made from is still the same.

One safetensors file for each (picture, bucket, mirrored) in a folder `.lora_train_cache` beside the
picture, or in one given folder. The file carries a key of all its ingredients (content of the picture,
scaling, crop, mirroring, VAE); a file whose key differs, or that cannot be read, is a miss and is
written anew. Reading and writing never fail the run.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import struct
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from lib_lora_train.dataset.buckets import Placement

CACHE_FOLDER = ".lora_train_cache"
_VERSION = 1  # raise when the way from picture to latent changes
_KEY = "lora_train_key"

MeanAndStd = tuple[torch.Tensor, torch.Tensor]  # each [4, h, w] fp32 on the CPU


class LatentDisk:
    """Latents of pictures under one VAE. `folder=None`: beside each picture."""

    def __init__(self, *, vae_fingerprint: str, folder: Path | None = None) -> None:
        self.vae_fingerprint, self.folder = vae_fingerprint, folder
        self._pictures: dict[Path, str] = {}  # path -> sha256 of its content, read once a run

    def load(self, picture: Path, placement: Placement, *, flipped: bool) -> MeanAndStd | None:
        """(mean, std), or None if there is nothing valid on disk."""
        try:
            # Bytes and not a memory map: on Windows a mapped file could not be replaced later.
            data = self._path(picture, placement, flipped=flipped).read_bytes()
            length = struct.unpack("<Q", data[:8])[0]
            header = json.loads(data[8:8 + length])
            if header["__metadata__"][_KEY] != self._key(picture, placement, flipped=flipped):
                return None
            tensors = load(data)
            mean, std = tensors["mean"], tensors["std"]
        except (OSError, ValueError, LookupError, TypeError, struct.error, SafetensorError):
            return None
        sound = mean.dtype == std.dtype == torch.float32 and mean.shape == std.shape and mean.ndim == 3
        return (mean, std) if sound and bool(torch.isfinite(mean).all() and torch.isfinite(std).all()) else None

    def store(self, picture: Path, placement: Placement, *, flipped: bool, latents: MeanAndStd) -> str | None:
        """Write atomically. Returns None, or why it was not possible (the run goes on without)."""
        path = self._path(picture, placement, flipped=flipped)
        temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        try:
            key = self._key(picture, placement, flipped=flipped)
            path.parent.mkdir(parents=True, exist_ok=True)
            mean, std = latents
            # Cloned: safetensors refuses tensors that share memory or are not contiguous.
            tensors = {"mean": mean.clone(memory_format=torch.contiguous_format),
                       "std": std.clone(memory_format=torch.contiguous_format)}
            temporary.write_bytes(save(tensors, metadata={_KEY: key}))
            temporary.replace(path)
        except OSError as error:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            return f"{path.parent}: {error.strerror or error}"
        return None

    def _path(self, picture: Path, placement: Placement, *, flipped: bool) -> Path:
        width, height = placement.bucket
        name = f"{picture.name}.{width}x{height}{'.flipped' if flipped else ''}.safetensors"
        if self.folder is None:
            return picture.parent / CACHE_FOLDER / name
        # Pictures of the same name from different folders must not overwrite one another.
        origin = hashlib.sha256(str(picture.parent.resolve()).encode("utf-8", "surrogateescape")).hexdigest()[:12]
        return self.folder / f"{origin}.{name}"

    def _key(self, picture: Path, placement: Placement, *, flipped: bool) -> str:
        if picture not in self._pictures:
            self._pictures[picture] = hashlib.sha256(picture.read_bytes()).hexdigest()
        return json.dumps({
            "version": _VERSION, "picture": self._pictures[picture], "vae": self.vae_fingerprint,
            "resized": placement.resized, "bucket": placement.bucket, "crop": placement.crop, "flipped": flipped,
        }, sort_keys=True)


def tensor_fingerprint(tensors: Mapping[str, torch.Tensor]) -> str:
    """sha256 over names, shapes, dtypes and all bytes of a model's tensors, e.g. those of the VAE.

    Each tensor is copied to the CPU in turn (a VAE is 160 to 335 MB; under a second).
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
