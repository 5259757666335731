"""The saves of a run, from its events and the disk.

The run's result is the file called as the LoRA. Another save may be promoted (`promote.py`), whose weights are then there: so a
save is found by what its file says of its own making, and its id stays what it was when it was written.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from pathlib import Path

from lib_lora_train import events
from lib_lora_train.adapters.file import read_metadata
from lib_lora_train.errors import LoraFileError
from lib_lora_train.results.history import read_history
from lib_lora_train.run.output import step_path
from lib_lora_train.run.record import read_settings

_ROUNDED = 0.001  # events tell their time to a thousandth of a second


@dataclasses.dataclass(frozen=True)
class Save:
    """One save of a run.

    id         the stem of the file's name when it was written; it stays so where the file is renamed
    path       where its weights are now: their name in a prompt is this file's stem
    home       where they are kept while another save is the LoRA: as they were written, the run's result under its step's name
    exists     whether they are there; a file that another run has put in their place does not count
    is_result  whether they are what the LoRA's own file holds
    own        whether the file says itself that this run wrote it
    size       bytes, 0 where it does not exist
    """

    id: str
    path: Path
    home: Path
    step: int
    epoch: int
    final: bool
    exists: bool
    size: int
    is_result: bool
    own: bool


def saves_of(folder: Path) -> tuple[Save, ...]:
    """The saves of the run in `folder`, by step; () where there are none. Of one that was written twice the last counts."""
    result = result_path(folder)
    saves = [_located(folder, event, time, result) for time, event in
             {Path(event.path).stem: (time, event) for time, event in read_history(folder).saved}.values()]
    # Of two saves after the same step, which hold the same weights, the one that lies there is the result.
    results = [save for save in saves if result is not None and save.exists and (
        save.path == result or save.own and _is_of(folder, save.step, result))]
    chosen = next((save for save in results if save.path == result), results[0] if results else None)
    return tuple(sorted((dataclasses.replace(save, is_result=save is chosen) for save in saves),
                        key=lambda save: (save.step, save.final)))


def result_path(folder: Path) -> Path | None:
    """The LoRA's own file: the run's result, or what it would have been called; None before there is any save."""
    saved = [event for _, event in read_history(folder).saved]
    final = [event for event in saved if event.final]
    if final:
        return Path(final[-1].path)
    name = str(read_settings(folder).get("output_name", ""))
    return Path(saved[-1].path).with_name(f"{name}.safetensors") if saved and name else None


def wrote(folder: Path, path: Path, *, before: float = math.inf) -> bool:
    """Whether the run in `folder` wrote the LoRA at `path`, or what it is a copy or the mean of, by the time `before`: one of
    its saves was made after as many steps and written by then. Nothing is allowed for a clock that was set, so what another
    run wrote in its place a moment before or after is not taken for this one's."""
    found, history = origin(path), read_history(folder)
    return found is not None and any(event.step == found.steps and
                                     history.started - _ROUNDED <= found.written <= min(before, time) + _ROUNDED
                                     for time, event in history.saved)


def _is_of(folder: Path, step: int, path: Path, *, before: float = math.inf) -> bool:
    """Whether the file at `path` holds this run's weights after that step."""
    found = origin(path)
    return found is not None and not found.merged and found.steps == step and wrote(folder, path, before=before)


def _located(folder: Path, event: events.Saved, time: float, result: Path | None) -> Save:
    path = Path(event.path)
    home = step_path(result, event.step) if result is not None and path == result else path
    found = next((place for place in (path, home, result) if place is not None and
                  _is_of(folder, event.step, place, before=time)), None)
    # A file that says nothing of its making is taken for what it was.
    exists = found is not None or (origin(path) is None and path.is_file())
    place, size = found or path, 0
    with contextlib.suppress(OSError):
        size = place.stat().st_size if exists else 0
    return Save(path.stem, place, home, event.step, event.epoch, event.final, exists, size, is_result=False,
                own=found is not None)


@dataclasses.dataclass(frozen=True)
class Origin:
    """What a LoRA says of its making: the steps trained and the seconds since 1970 when it was written, whether it is a mean of
    others, and the hash of its weights."""

    steps: int
    written: float
    merged: bool
    model_hash: str


def origin(path: Path) -> Origin | None:
    """The origin of the LoRA at `path`; None where it does not say or is not there."""
    try:
        status = path.stat()
    except (OSError, ValueError):
        return None
    return _read_origin(path, status.st_mtime_ns, status.st_size, status.st_ino)


@functools.lru_cache(maxsize=4096)
def _read_origin(path: Path, modified: int, size: int, number: int) -> Origin | None:
    """Read once for each state of the file: the page asks every few seconds."""
    try:
        metadata = read_metadata(path)
        return Origin(int(metadata["ss_steps"]), float(metadata["ss_training_finished_at"]),
                      "modelspec.merged_from" in metadata, metadata.get("sshs_model_hash", ""))
    except (LoraFileError, KeyError, ValueError):
        return None


def lora_text(path: str | Path, weight: float = 1) -> str:
    """What to write in a prompt to use the file."""
    # A path of Windows read on another system would not be taken apart by Path; a run's folder may travel.
    name = str(path).replace("\\", "/").rsplit("/", 1)[-1]
    return f"<lora:{name.removesuffix('.safetensors')}:{weight:g}>"
