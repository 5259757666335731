"""A run's folder: its settings and its events, written as it goes and read back by whoever looks later.

    <runs>/<name>-20261121-154501/
        settings.toml    what it was started with
        events.jsonl     one event a line; every tenth of the steps of a long run, all of the others
"""

from __future__ import annotations

import dataclasses
import json
import logging
import time
from collections.abc import Iterator
from pathlib import Path

from lib_lora_train import events
from lib_lora_train.errors import SettingError
from lib_lora_train.settings import Settings, flat
from lib_lora_train.settings.toml import read_toml, write_toml

log = logging.getLogger(__name__)
_MOST_STEP_LINES = 2000


class RunRecord:
    """Writes one run's folder. Failing to write is not worth a training: the log is told once."""

    def __init__(self, folder: Path, settings: Settings) -> None:
        self.folder = folder
        self._failed = False
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "settings.toml").write_text(
                write_toml(flat(settings)), encoding="utf-8", errors="replace")
        except OSError as error:
            self._complain(error)

    def write(self, event: events.Event) -> None:
        """Append an event. Of more than 2000 steps only every n-th is kept, so that the file stays small."""
        if isinstance(event, events.Step):
            every = -(-event.total // _MOST_STEP_LINES)
            if event.step % every and event.step != event.total:
                return
        if isinstance(event, events.Stage) and event.done not in (0, event.total):
            return
        try:
            # Opened anew for each event: no handle is left open on Windows, and a killed process loses nothing.
            with open(self.folder / "events.jsonl", "a", encoding="utf-8", errors="replace") as file:
                file.write(json.dumps({"time": round(time.time(), 3), **events.to_dict(event)}, ensure_ascii=False) + "\n")
        except OSError as error:
            self._complain(error)

    def _complain(self, error: OSError) -> None:
        if not self._failed:
            log.warning("The record of this run in %s is incomplete: %s", self.folder, error)
        self._failed = True


@dataclasses.dataclass(frozen=True)
class PastRun:
    """A run as its folder tells it. `outcome` is "" for one that was cut off (or is running)."""

    id: str
    name: str
    outcome: str
    message: str
    path: str
    steps: int


def new_folder(runs: Path, name: str) -> Path:
    """A folder for a run that starts now; its name sorts by time among runs of the same name."""
    stem = f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    folder, number = runs / stem, 2
    while folder.exists():
        folder, number = runs / f"{stem}-{number}", number + 1
    return folder


def read_events(folder: Path) -> Iterator[events.Event]:
    """The events of a run's folder; a torn last line and lines of a newer version are passed over."""
    try:
        text = (folder / "events.jsonl").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return
    for line in text.splitlines():
        try:
            yield events.from_dict(json.loads(line))
        except (ValueError, KeyError, TypeError):
            continue


def past_runs(runs: Path, *, most: int = 100) -> list[PastRun]:
    """The newest runs in `runs`, newest first."""
    try:
        folders = sorted((f for f in runs.iterdir() if (f / "settings.toml").is_file()),
                         key=lambda f: f.stat().st_mtime, reverse=True)[:most]
    except OSError:
        return []
    return [_summary(folder) for folder in folders]


def _summary(folder: Path) -> PastRun:
    try:
        name = str(read_toml(folder / "settings.toml").get("output_name", ""))
    except SettingError:
        name = ""
    outcome, message, path, steps = "", "", "", 0
    for event in read_events(folder):
        if isinstance(event, events.Step):
            steps = event.step
        elif isinstance(event, events.Saved):
            path = event.path
        elif isinstance(event, events.Finished):
            outcome, message, path, steps = event.outcome, event.message, event.path or path, event.steps
    return PastRun(folder.name, name, outcome, message, path, steps)
