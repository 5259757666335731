"""The record of a run: the folder of its settings and events, written as it goes and read back later.

    <runs>/<name>-20261121-154501/
        settings.toml       what it was started with
        events.jsonl        one event a line; of the steps of a long run every n-th
        images.json         the images it had, with their captions (`image_record.py`)
        sweep.json          the sweep that it belongs to, where it does (`sweep.py`)
        state.safetensors   what it needs to go on after an interruption (`training/checkpoint.py`)
        error.txt           the traceback of a failure
        .lock               locked while a process works on it
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path

from lib_lora_train import events
from lib_lora_train.errors import LoraTrainError, SettingError, translated
from lib_lora_train.settings import Settings, flat
from lib_lora_train.settings.toml import read_toml, write_toml
from lib_lora_train.storage.atomic import remove_parts, write_atomic
from lib_lora_train.storage.lock import is_abandoned, is_locked, lock_run
from lib_lora_train.training.checkpoint import FILE_NAME, read_metadata

log = logging.getLogger(__name__)
FAILURE = "error.txt"
_MOST_STEP_LINES = 2000
_STEP = f'"event": "{events.Step.kind}"'  # in the line of a step, as json.dumps writes it


class RunRecord:
    """Writes one run's folder, and holds its lock until `close`. A disk that refuses ends no training: it is logged once.
    `folder` may be that of an interrupted run, which then goes on there. Raises HostError if a process works on it."""

    def __init__(self, folder: Path, settings: Settings) -> None:
        self.folder = folder
        self._failed = False
        self._new_line = os.path.exists(folder / "events.jsonl")  # its last line may be torn
        self._lock = None
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._lock = lock_run(folder)
            _remove_parts(folder.parent)
        except OSError as error:
            self._warn(error)
        self.complete(settings)

    def complete(self, settings: Settings) -> None:
        """Write the settings: at first those given, later those of the run's plan, with what was derived from them."""
        self._settings = write_toml(flat(settings)).encode("utf-8", errors="replace")
        try:
            write_atomic(self.folder / "settings.toml", self._settings)
        except OSError as error:
            self._warn(error)

    def write(self, event: events.Event) -> None:
        """Append an event. Of more than 2000 steps only every n-th is kept, so that the file stays small."""
        if isinstance(event, events.Step):
            every = -(-event.total // _MOST_STEP_LINES)
            if event.step % every and event.step != event.total:
                return
        if isinstance(event, events.Stage) and event.done not in (0, event.total):
            return
        line = json.dumps({"time": round(time.time(), 3), **events.to_dict(event)}, ensure_ascii=False) + "\n"
        try:
            if not self.folder.is_dir():
                # It vanished while the run went on: the rest is written to a new one.
                write_atomic(self.folder / "settings.toml", self._settings)
            # Opened anew for each event: no handle is left open on Windows, and a killed process loses nothing.
            # Names that are no text become JSON's escapes of lone surrogates.
            with open(self.folder / "events.jsonl", "a", encoding="utf-8", errors="backslashreplace") as file:
                file.write("\n" + line if self._new_line else line)
            self._new_line = False
        except OSError as error:
            self._new_line = True
            self._warn(error)

    def keep_failure(self, trace: str) -> None:
        """Write the traceback of a failure, for a report of the problem."""
        try:
            stamp = time.strftime("%Y-%m-%d %H:%M:%S")
            write_atomic(self.folder / FAILURE, f"{stamp}\n{trace}".encode("utf-8", errors="replace"))
        except OSError as error:
            self._warn(error)

    def close(self) -> None:
        """Release the lock, after the last event. The end of the process does the same."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def _warn(self, error: OSError) -> None:
        if not self._failed:
            log.warning("The record of this run in %s is incomplete: %s", self.folder, error)
        self._failed = True


@dataclasses.dataclass(frozen=True)
class PastRun:
    """A past or running run, as its folder tells it.

    outcome     "done", "stopped", "failed", "running", or "interrupted" for one whose process ended before it did
    verdict     what its result is worth: "healthy", "ruined", or "" where nobody looked
    steps       how far it got, of `total` (0 where that was not known yet)
    resume_step the step it can be resumed from, None if it cannot
    path        its newest file, "" for none
    """

    id: str
    name: str
    outcome: str
    message: str
    path: str
    steps: int
    total: int
    resume_step: int | None
    verdict: events.Verdict = ""


def new_folder(runs: Path, name: str) -> Path:
    """A folder for a run that starts now; its name sorts by time among runs of the same name."""
    stem = f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    folder, number = runs / stem, 2
    while os.path.lexists(folder):
        folder, number = runs / f"{stem}-{number}", number + 1
    return folder


def _remove_parts(runs: Path) -> None:
    """Remove the temporary files that killed processes left in the folders of other runs. A run that was killed during its
    first save is never resumed, so that nothing else would remove them."""
    for folder in {part.parent for part in runs.glob("*/.*.part")}:
        if (folder / "settings.toml").is_file() and is_abandoned(folder):
            remove_parts(folder)


def read_events(folder: Path) -> Iterator[events.Event]:
    """The events of a run's folder, without a torn last line and lines of a newer version."""
    return (event for _, event in read_timed_events(folder))


def read_timed_events(folder: Path, *, every_step: bool = True) -> Iterator[tuple[float, events.Event]]:
    """As `read_events`, each with the time it was written at, in seconds since 1970. Without `every_step` only the last of
    steps that follow each other, which takes a twentieth of the time."""
    try:
        text = (folder / "events.jsonl").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return
    steps: list[str] = []
    for line in [*text.splitlines(), ""]:
        if not every_step and _STEP in line:
            steps.append(line)
            continue
        last = next((found for step in reversed(steps) if (found := _timed(step))), None)
        steps.clear()
        yield from filter(None, (last, _timed(line)))


def _timed(line: str) -> tuple[float, events.Event] | None:
    """The event of a line and its time; None for a torn line and one of a newer version."""
    try:
        data = json.loads(line)
        return float(data.get("time", 0)), events.from_dict(data)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def read_settings(folder: Path) -> dict[str, object]:
    """The settings of a run's folder by name; {} where they cannot be read."""
    try:
        return read_toml(folder / "settings.toml")
    except SettingError:
        return {}


def newest_run(*folders: str) -> Path | None:
    """The folder of the newest run in these folders, None for none."""
    found = [run for folder in folders for run in Path(folder).glob("*") if (run / "settings.toml").is_file()]
    return max(found, key=lambda run: run.stat().st_mtime, default=None)


def past_runs(runs: Path, *, most: int = 100) -> list[PastRun]:
    """The newest runs in `runs`, newest first; none where there is no such folder. Raises OutputError if it cannot be read."""
    with translated("past runs were read"):
        try:
            folders = sorted((f for f in runs.iterdir() if (f / "settings.toml").is_file()),
                             key=lambda f: f.stat().st_mtime, reverse=True)[:most]
        except (FileNotFoundError, NotADirectoryError):
            return []
    return [past_run(folder) for folder in folders]


def past_run(folder: Path) -> PastRun:
    """The run of this folder."""
    name = str(read_settings(folder).get("output_name", ""))
    outcome, message, path, steps, total = "", "", "", 0, 0
    verdict: events.Verdict = ""
    for _, event in read_timed_events(folder, every_step=False):
        if isinstance(event, events.Planned):
            # The run begins or is resumed; how an earlier part of it ended no longer matters.
            outcome, message, verdict, steps, total = "", "", "", event.resumed_at, event.steps
        elif isinstance(event, events.Step):
            outcome, steps, total = "", event.step, event.total
        elif isinstance(event, events.Saved):
            path, steps = event.path, max(steps, event.step)
            if event.final and event.step == total:
                # Killed between its last save and its last event, a run is complete all the same.
                outcome, message = "done", f"It is saved: {path}"
        elif isinstance(event, events.Finished):
            outcome, message, verdict = event.outcome, event.message, event.verdict
            path, steps = event.path or path, event.steps or steps
    resume_step = step_to_resume(folder)
    if is_locked(folder):
        outcome, message = "running", ""
    elif not outcome:
        outcome, steps = "interrupted", max(steps, resume_step or 0)
        said = [f"Interrupted at step {steps} of {total}" if total else "Interrupted before the first step"]
        if resume_step is not None:
            said.append(f"it can be resumed from step {resume_step}")
        message = "; ".join(said) + "."
    return PastRun(folder.name, name, outcome, message, path, steps, total, resume_step, verdict)


def step_to_resume(folder: Path) -> int | None:
    """The step that the run of this folder can be resumed from, None if it cannot."""
    try:
        return int(read_metadata(folder / FILE_NAME)["step"])
    except LoraTrainError:
        return None
