"""The queue as it stands in its file, `queue.json` beside the runs."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from lib_lora_train.errors import OutputError, translated
from lib_lora_train.records import from_plain
from lib_lora_train.run.sweep import Sweep

log = logging.getLogger(__name__)
FILE_NAME = "queue.json"
State = Literal["waiting", "running", "done", "stopped", "failed", "interrupted"]


@dataclasses.dataclass(frozen=True)
class Entry:
    """One run of the queue.

    checkpoint    the title of the host's model that it trains on, "" for the one that the user has loaded then
    not_before    seconds since 1970; 0 for at once
    idle_minutes  it begins once nobody else used the model for so long
    run           the id of its run, "" before it began
    resumes       whether `run` is one to go on with
    recorded      bytes of the run's record when it was marked as running: it began if there are more now
    message       how it ended, a sentence
    sweep         the sweep that it belongs to, None for none
    """

    id: str
    name: str
    checkpoint: str = ""
    not_before: float = 0.0
    idle_minutes: float = 0.0
    state: State = "waiting"
    run: str = ""
    resumes: bool = False
    recorded: int = 0
    message: str = ""
    sweep: Sweep | None = None
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def open(self) -> bool:
        """Whether it is still to be trained, or is being trained."""
        return self.state in ("waiting", "running")


def queued_runs(runs_folder: Path) -> frozenset[str]:
    """The ids of the runs that the queue of this folder trains or is to go on with, as its file says."""
    try:
        entries = json.loads((runs_folder / FILE_NAME).read_text(encoding="utf-8"))["entries"]
        return frozenset(str(entry["run"]) for entry in entries if entry["state"] in ("waiting", "running") and entry["run"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return frozenset()


_DAMAGED = (ValueError, KeyError, TypeError, RecursionError)


def read_queue(runs: Path) -> tuple[list[Entry], bool]:
    """The entries of the queue in a folder of runs, and whether it is held, whoever works on it. Raises OutputError."""
    try:
        with translated("reading the queue"):
            return _parsed(runs / FILE_NAME) if (runs / FILE_NAME).exists() else ([], False)
    except _DAMAGED as error:
        raise OutputError(f"The queue {runs / FILE_NAME} is damaged", why=str(error)) from error


def _parsed(file: Path) -> tuple[list[Entry], bool]:
    data = json.loads(file.read_text(encoding="utf-8"))
    return [_entry(found) for found in data["entries"]], data["held"] is True


def read_or_keep(runs: Path) -> tuple[list[Entry], bool]:
    """As `read_queue`, of who works on it: a file that is damaged is kept under another name, and the queue begins anew."""
    file = runs / FILE_NAME
    try:
        return _parsed(file)
    except FileNotFoundError:
        return [], False
    except _DAMAGED as error:
        damaged = file.with_name(f"queue-damaged-{time.strftime('%Y%m%d-%H%M%S')}.json")
        os.replace(file, damaged)
        log.warning("The queue is damaged (%s) and begins anew; what was there is in %s", error, damaged)
        return [], False


def _entry(found: Mapping[str, Any]) -> Entry:
    settings = dict(found["settings"])
    return dataclasses.replace(from_plain(Entry, {name: value for name, value in found.items() if name != "settings"}),
                               settings=settings)
