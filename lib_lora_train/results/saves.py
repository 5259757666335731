"""The saves of a run, from its events and the disk.

The run's result is the file called as the LoRA. Taking another save puts that save's weights there (`take.py`), so a save is
found by what its file says of its own making, and its id stays what it was when it was written.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from pathlib import Path

from lib_lora_train import events
from lib_lora_train.adapters.file import read_metadata
from lib_lora_train.errors import LoraFileError
from lib_lora_train.results.history import read_history
from lib_lora_train.run.output import step_path
from lib_lora_train.run.record import read_settings

# Seconds by which the clock may be set back during a run, and between a file's metadata and the event that tells of it.
_CLOCK_SLACK = 60.0


@dataclasses.dataclass(frozen=True)
class Save:
    """One save of a run.

    id         the stem of the file's name when it was written; it stays so where the file is renamed
    path       where its weights are now: their name in a prompt is this file's stem
    exists     whether they are there; a file that another run has put in their place does not count
    is_result  whether they are what the LoRA's own file holds
    own        whether the file says itself that this run wrote it
    size       bytes, 0 where it does not exist
    """

    id: str
    path: Path
    step: int
    epoch: int
    final: bool
    exists: bool
    size: int
    is_result: bool
    own: bool


def saves_of(folder: Path) -> tuple[Save, ...]:
    """The saves of the run in `folder`, by step; () where there are none. Of one that was written twice the last counts."""
    history, result = read_history(folder), result_path(folder)
    last = {Path(event.path).stem: _Written(event, history.started, time) for time, event in history.saved}
    saves = [_located(written, result) for written in last.values()]
    results = [save for save in saves if result is not None and last[save.id].is_at(result)] or [
        save for save in saves if save.exists and save.path == result]
    # Of two saves after the same step, which hold the same weights, the one that lies there is the result.
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


def kept_path(save_path: Path, step: int, result: Path) -> Path:
    """Where a save's weights are kept when another one is the result: the file that was written, or, for what was the result
    itself, one of its step's name."""
    return step_path(result, step) if save_path == result else save_path


@dataclasses.dataclass(frozen=True)
class _Written:
    """A file that a run wrote, between the run's start and the end of writing it, in seconds since 1970."""

    event: events.Saved
    started: float
    time: float

    def is_at(self, path: Path) -> bool:
        """Whether the file at `path` says that it holds these weights."""
        found = _origin(path)
        return found is not None and found[0] == self.event.step and (
            self.started - _CLOCK_SLACK <= found[1] <= self.time + _CLOCK_SLACK)


def _located(written: _Written, result: Path | None) -> Save:
    event, path = written.event, Path(written.event.path)
    places = [path, *([kept_path(path, event.step, result), result] if result else [])]
    found = next((place for place in places if written.is_at(place)), None)
    # A file that says nothing of its making is taken for what it was.
    exists = found is not None or (_origin(path) is None and path.is_file())
    place, size = found or path, 0
    with contextlib.suppress(OSError):
        size = place.stat().st_size if exists else 0
    return Save(path.stem, place, event.step, event.epoch, event.final, exists, size, is_result=False, own=found is not None)


def _origin(path: Path) -> tuple[int, float] | None:
    """(steps, seconds since 1970) of a LoRA's training when it was written; None where it does not say or is not there."""
    try:
        status = path.stat()
    except (OSError, ValueError):
        return None
    return _read_origin(path, status.st_mtime_ns, status.st_size)


@functools.lru_cache(maxsize=4096)
def _read_origin(path: Path, modified: int, size: int) -> tuple[int, float] | None:
    """Read once for each state of the file: the page asks every few seconds."""
    try:
        metadata = read_metadata(path)
        return int(metadata["ss_steps"]), float(metadata["ss_training_finished_at"])
    except (LoraFileError, KeyError, ValueError):
        return None


def lora_text(path: str | Path, weight: float = 1) -> str:
    """What to write in a prompt to use the file."""
    # A path of Windows read on another system would not be taken apart by Path; a run's folder may travel.
    name = str(path).replace("\\", "/").rsplit("/", 1)[-1]
    return f"<lora:{name.removesuffix('.safetensors')}:{weight:g}>"
