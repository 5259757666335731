"""The average of a run's last saves, an exponential moving average after the fact.

The mean of weights along one training is often better than any one of them (Izmailov et al. 2018, arXiv 1803.05407); the
factors of a LoRA are averaged, as trainers with a moving average do. It is kept in the run's folder. The host finds LoRAs in
its own folder only, so while the grid samples it lies there too, in a folder that is removed afterwards.
"""

from __future__ import annotations

import contextlib
import glob
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import torch

from lib_lora_train.adapters import file
from lib_lora_train.errors import LoraFileError, counted, some_of, translated
from lib_lora_train.storage.atomic import copy_atomic, remove

SAVES = 4
"""How many of the last saves are averaged."""
SUBFOLDER = "lora-train-grid"
"""Of the host's LoRA folder, for as long as a grid is sampled."""


class LoraHost(Protocol):
    """The part of a host that knows its LoRAs."""

    lora_folder: Path

    def refresh_loras(self) -> None:
        """See `Display.refresh_loras`."""


def write_average(paths: Sequence[Path], target: Path) -> Path:
    """Write the mean of these LoRAs of one run to `target`, described as the last of them; returns `target`.

    Raises LoraFileError where there are fewer than two, or one cannot be read or is of another shape, and OutputError.
    """
    if len(paths) < 2:
        raise LoraFileError("There is nothing to average", why=f"the run has {counted(len(paths), 'save')} to take",
                            remedy="save more often")
    total: dict[str, torch.Tensor] = {}
    for path in paths:
        read = file.load(path)
        shapes = {key: tensor.shape for key, tensor in read.tensors.items()}
        if total and shapes != {key: tensor.shape for key, tensor in total.items()}:
            raise LoraFileError(f"{path.name} cannot be averaged", why="its layers differ from those of the other saves")
        total = {key: tensor.float() + total.get(key, 0) for key, tensor in read.tensors.items()}
    dtype = next(iter(read.tensors.values())).dtype
    metadata = {**read.metadata, "ss_output_name": target.stem, "modelspec.title": target.stem,
                "modelspec.merged_from": some_of([path.stem for path in paths], len(paths))}
    file.save(target, {key: tensor / len(paths) for key, tensor in total.items()}, metadata, dtype=dtype)
    return target


@contextlib.contextmanager
def beside_others(host: LoraHost, path: Path) -> Iterator[Path]:
    """The LoRA at `path` where the host finds it, under its own name, until the block is left. Raises LoraFileError where
    another one of that name is there, and OutputError."""
    if others := [found for found in host.lora_folder.rglob(glob.escape(path.name)) if found.parent.name != SUBFOLDER]:
        if file.load(others[0]).model_hash != file.load(path).model_hash:
            raise LoraFileError(f"{path.stem} cannot be sampled", why=f"{others[0]} is another LoRA of that name",
                                remedy="rename it")
        yield others[0]
        return
    target = host.lora_folder / SUBFOLDER / path.name
    with translated(f"copying {path.name} to where the host finds it"):
        copy_atomic(path, target)
    try:
        host.refresh_loras()
        yield target
    finally:
        with contextlib.suppress(OSError):
            remove(target)
            target.parent.rmdir()  # another grid's may be there
        host.refresh_loras()
