"""All runs of a folder, newest first, each with what it was worth and the disk it takes; runs are deleted with their files.

What is read of a run is kept until its files change, so that a list of hundreds is read once.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lib_lora_train.errors import HostError, LoraFileError, SettingError, translated
from lib_lora_train.evaluation.scores import NAMES
from lib_lora_train.host.port import Host
from lib_lora_train.results import user_metadata
from lib_lora_train.results.comparison import GAIN, compared_run
from lib_lora_train.results.grid import CELLS
from lib_lora_train.results.history import read_history
from lib_lora_train.results.overview import plain, shown
from lib_lora_train.results.saves import result_path, saves_of, wrote
from lib_lora_train.results.scoring import SCORES
from lib_lora_train.run.output import step_path
from lib_lora_train.run.queue_file import queued_runs
from lib_lora_train.run.record import past_run, read_settings
from lib_lora_train.run.sweep import read_sweep
from lib_lora_train.settings.allowed_paths import AllowedPaths, inside, is_run_name
from lib_lora_train.storage.atomic import remove
from lib_lora_train.storage.lock import LOCK_NAME, is_locked, lock_run

_SETTINGS = "settings.toml"
_KEPT = 2000  # runs whose entries are kept in memory


@dataclasses.dataclass(frozen=True)
class Deletion:
    """What deleting runs takes away: their folders and, where it was asked for, the LoRAs that they wrote; `freed` in bytes."""

    folders: tuple[Path, ...]
    loras: tuple[Path, ...]
    freed: int


def run_folders(runs: Path) -> list[Path]:
    """The folders of all runs, the newest first; links are none. Raises OutputError."""
    with translated("past runs were read"):
        try:
            found = [(status.st_mtime, folder) for folder in runs.iterdir() if (status := _stat(folder / _SETTINGS))
                     and not _is_link(folder)]
        except (FileNotFoundError, NotADirectoryError):
            return []
    return [folder for _, folder in sorted(found, reverse=True)]


def listed(runs: Path, *, offset: int = 0, count: int = 30) -> dict[str, Any]:
    """Some of the runs as plain data: {"total": of all runs, "runs": [...]}, each with

        id, name, started, outcome, message, steps, total, verdict, finding, resume_step
        usable     whether another run may have its settings: not those of a rate finder
        file       of the image that shows its recommended save, "" for none
        save, weight, scores   what is recommended, and {name: number} of `MEASURES`
        checkpoint, sweep {id, name, values} or None
        size       bytes of its folder; lora_size those of the LoRAs that it wrote
    """
    folders = run_folders(runs)
    return plain({"total": len(folders), "runs": [
        {**_entry(folder), "size": folder_size(folder), "lora_size": sum(map(_size, _known_loras(folder, _state(folder))))}
        for folder in folders[offset:offset + count]]})


def disk_use(runs: Path) -> dict[str, int]:
    """{"runs", "size", "lora_size"} of all runs; a LoRA that two runs wrote counts once."""
    folders = run_folders(runs)
    loras = {lora for folder in folders for lora in _known_loras(folder, _state(folder))}
    return {"runs": len(folders), "size": sum(map(folder_size, folders)), "lora_size": sum(map(_size, loras))}


def folder_size(folder: Path) -> int:
    """The bytes of all files below a folder; links are not followed."""
    size = 0
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    size += 0 if _is_link(Path(entry.path)) else folder_size(Path(entry.path))
                else:
                    size += entry.stat(follow_symlinks=False).st_size
    except OSError:  # it goes while it is looked at
        pass
    return size


def loras_of(folder: Path) -> tuple[Path, ...]:
    """The LoRAs that are there and say themselves that the run in `folder` wrote them: its saves and its result."""
    return tuple(path for path in _targets(folder) if wrote(folder, path))


def deletion(runs: Path, ids: Sequence[str], *, with_loras: bool, allowed: AllowedPaths | None = None) -> Deletion:
    """What deleting these runs would take away.

    Raises SettingError for an empty list and for a LoRA that may not be written to here; LoraFileError for an id that is no
    run's, whatever path it spells; HostError for a run that is under way or queued, and for a LoRA that a run under way writes.
    """
    if not ids:
        raise SettingError("No run was named", remedy="mark some")
    folders, queued = [_folder(runs, one) for one in dict.fromkeys(ids)], queued_runs(runs)
    for folder in folders:
        if is_locked(folder):
            raise HostError(f"The run {folder.name} is not deleted", why="it is under way", remedy="stop it first")
        if folder.name in queued:
            raise HostError(f"The run {folder.name} is not deleted", why="the queue is to go on with it",
                            remedy="take it out of the queue first")
    loras = list(dict.fromkeys(lora for folder in folders for lora in loras_of(folder))) if with_loras else []
    if loras:
        written = [folder.name for folder in run_folders(runs) if is_locked(folder) and set(_targets(folder)) & set(loras)]
        if written:
            raise HostError("The LoRAs are not deleted", why=f"{written[0]} is under way and writes to the same files",
                            remedy="wait for it")
    for lora in loras:
        if allowed is not None and not inside(str(lora), allowed.writing):
            raise SettingError(f"{lora} is left as it is", why="others can reach this page, so it keeps to the folders it is "
                               "allowed", remedy=allowed.advice)
    return Deletion(tuple(folders), tuple(loras), sum(map(folder_size, folders)) + sum(map(_size, loras)))


def delete_runs(found: Deletion, host: Host) -> None:
    """Delete what `deletion` found. A run is in the list until all else of its folder is gone. Raises OutputError, and
    HostError for a run that has begun meanwhile."""
    for lora in found.loras:
        with translated(f"deleting {lora.name}"):
            remove(lora)
        user_metadata.remove_ours(lora)
    for folder in found.folders:
        lock = lock_run(folder)
        try:
            with translated(f"deleting the run {folder.name}"):
                for path in folder.iterdir():
                    if path.is_dir() and not _is_link(path):
                        shutil.rmtree(path)
                    elif path.name not in (LOCK_NAME, _SETTINGS):
                        remove(path)
        finally:
            if lock is not None:
                lock.release()
        with translated(f"deleting the run {folder.name}"):
            remove(folder / LOCK_NAME)
            remove(folder / _SETTINGS)
            folder.rmdir()
    if found.loras:
        host.refresh_loras()


def _folder(runs: Path, run: str) -> Path:
    """The folder of the run of this id, itself in `runs` and no link. Raises LoraFileError."""
    folder = runs / run
    if "\0" in run or not is_run_name(run) or run != folder.name or _is_link(folder) or not (folder / _SETTINGS).is_file() or (
            folder.resolve().parent != runs.resolve()):
        raise LoraFileError(f"There is no run called {run!r}", remedy="see the list of runs")
    return folder


def _is_link(path: Path) -> bool:
    """Whether it leads elsewhere, a junction of Windows too."""
    return path.is_symlink() or os.path.realpath(path) != os.path.join(os.path.realpath(path.parent), path.name)


def _stat(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except OSError:
        return None


def _size(path: Path) -> int:
    status = _stat(path)
    return status.st_size if status else 0


def _state(folder: Path) -> tuple[tuple[int, int], ...]:
    """What changes whenever one of the files changes that an entry is made of."""
    files = [folder / name for name in ("events.jsonl", _SETTINGS, CELLS, SCORES, "state.safetensors")]
    state = tuple(map(_stamp, files))
    return *state, *map(_stamp, _save_files(folder, state))


def _stamp(path: Path) -> tuple[int, int]:
    status = _stat(path)
    return (status.st_mtime_ns, status.st_size) if status else (0, 0)


@functools.lru_cache(maxsize=_KEPT)
def _save_files(folder: Path, state: object) -> tuple[Path, ...]:
    """Wherever the run's saves may be, whether or not they are there."""
    result, saved = result_path(folder), [event for _, event in read_history(folder).saved]
    written = [Path(event.path) for event in saved]
    homes = [step_path(result, event.step) for event in saved if Path(event.path) == result] if result else []
    return tuple(dict.fromkeys([*written, *homes, *([result] if result else [])]))


def _entry(folder: Path) -> dict[str, Any]:
    running = is_locked(folder)
    kept = (_read.__wrapped__ if running else _read)(folder, _state(folder))
    return {**kept, "outcome": "running" if running else kept["outcome"], "message": "" if running else kept["message"]}


@functools.lru_cache(maxsize=_KEPT)
def _read(folder: Path, state: object) -> dict[str, Any]:
    past, found, sweep = past_run(folder), compared_run(folder), read_sweep(folder)
    history = read_history(folder)
    image = shown(folder, found.save, weight=found.weight).file if found.save else ""
    last = next((event.file for event in reversed(history.sampled) if event.index == 0), "")
    return {
        **{name: getattr(past, name) for name in ("id", "name", "message", "steps", "total", "verdict", "resume_step")},
        "outcome": past.outcome, "started": history.started,
        "finding": found.finding, "usable": found.usable, "file": image or last, "save": found.save, "weight": found.weight,
        "scores": {name: found.values.get(name) for name in (*NAMES, GAIN)},
        "checkpoint": history.planned.checkpoint if history.planned else "",
        "sweep": dataclasses.asdict(sweep) if sweep else None}


@functools.lru_cache(maxsize=_KEPT)
def _known_loras(folder: Path, state: object) -> tuple[Path, ...]:
    """As `loras_of`, to be counted only: a file may be another one since."""
    return loras_of(folder)


def _targets(folder: Path) -> Iterator[Path]:
    """Where the run in `folder` writes its LoRAs, each once."""
    result, name = result_path(folder), str(read_settings(folder).get("output_name", ""))
    yield from dict.fromkeys([*(save.path for save in saves_of(folder)), *([result] if result and name else [])])
