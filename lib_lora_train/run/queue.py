"""Runs that wait in order, each for its turn and its time, and start by themselves.

The queue is a file beside the runs, `queue.json`, written before each change takes effect: what is queued survives the end of
the program, however it comes, and no run is started twice. One process at a time works on it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import secrets
import threading
import time
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lib_lora_train.errors import HostError, LoraTrainError, OutputError, SettingError, translated
from lib_lora_train.host.port import Host, same_title
from lib_lora_train.run.background import Failure
from lib_lora_train.run.queue_file import FILE_NAME, Entry, State, read_or_keep
from lib_lora_train.run.record import new_folder, past_run, step_to_resume
from lib_lora_train.run.runner import Runner
from lib_lora_train.run.sweep import Sweep, blamed
from lib_lora_train.settings import Settings, flat, parse
from lib_lora_train.storage.atomic import write_atomic
from lib_lora_train.storage.lock import is_locked, lock_run

log = logging.getLogger(__name__)
_POLL_SECONDS = 2.0
"""Between two looks at whether the next run may begin."""
_AGAIN_SECONDS = 60
"""After which one is begun again that found the host or the runner busy; others go first meanwhile."""


Start = Callable[[Entry, Path], object]
"""Starts an entry's run in this folder, or goes on with the one that is there. Raises LoraTrainError."""


class RunQueue:
    """The queue in a folder of runs. `start` is called in its own thread, on a host with the entry's model."""

    def __init__(self, host: Host, runner: Runner, runs_folder: Path, *, start: Start,
                 failed: Callable[[Entry], None] = lambda entry: None, watch: bool = True,
                 clock: Callable[[], float] = time.time) -> None:
        """`failed` is told of one that could not begin. Without `watch` nothing begins but by `check`."""
        self._host, self._runner, self._runs, self._start, self._clock = host, runner, runs_folder, start, clock
        self._failed, self._watches = failed, watch
        self._lock = threading.RLock()
        self._opened, self._process_lock = False, None
        self._entries: list[Entry] = []
        self._held = False
        self._used_at = clock()
        self._chosen, self._before_choice = "", ""  # titles: of the model that the queue chose, and of the user's before it
        self._closed = threading.Event()
        # The id of the entry that the thread `_starter` is about to begin, "-" while it chooses the user's model.
        self._starting = ""
        self._starter = 0
        self._begun = ""  # the id of the entry whose run began last

    def open(self) -> None:
        """Read the queue, and begin to work on it where something waits. Does nothing while it is open, and where there is no
        queue. Raises HostError where another process works on it."""
        with self._lock:
            if not self._opened and (self._runs / FILE_NAME).exists():
                self._load()

    def close(self) -> None:
        """Stop working on it until it is opened or changed again: nothing more begins, the run under way goes on."""
        with self._lock:
            self._closed.set()
            if self._process_lock is not None:
                self._process_lock.release()
            self._opened, self._process_lock = False, None

    def entries(self) -> tuple[Entry, ...]:
        """All of them, in order."""
        with self._lock:
            if self._opened:
                self._note_ended()
            return tuple(self._entries)

    def entry(self, entry_id: str) -> Entry:
        """The one of this id. Raises SettingError where there is none."""
        for entry in self._entries:
            if entry.id == entry_id:
                return entry
        raise SettingError(f"There is no run {entry_id!r} in the queue", remedy="see the queue")

    def resumable(self, entry: Entry) -> bool:
        """Whether one that ended can go on from a state it saved."""
        return bool(not entry.open and entry.run) and step_to_resume(self._runs / entry.run) is not None

    @property
    def runner(self) -> Runner:
        """What trains its runs."""
        return self._runner

    @property
    def held(self) -> bool:
        """Whether nothing more begins."""
        return self._held

    def add(self, settings: Settings, *, checkpoint: str = "", not_before: float = 0.0, idle_minutes: float = 0.0) -> Entry:
        """Put a run at the end. Raises OutputError where another one is to write the same file, HostError as `open`."""
        return self._add([(settings, None)], checkpoint, not_before, idle_minutes)[0]

    def add_sweep(self, runs: Sequence[tuple[Settings, Sweep]], *, checkpoint: str = "", not_before: float = 0.0,
                  idle_minutes: float = 0.0) -> tuple[Entry, ...]:
        """Put all runs of a sweep at the end, or none of them. Raises as `add`."""
        return self._add(runs, checkpoint, not_before, idle_minutes)

    def _add(self, runs: Sequence[tuple[Settings, Sweep | None]], checkpoint: str, not_before: float, idle_minutes: float
             ) -> tuple[Entry, ...]:
        if not 0 <= idle_minutes <= 24 * 60:
            idle_minutes = min(max(idle_minutes, -1e9), 1e9)  # an integer may be too large to be shown as a float
            raise SettingError(f"{idle_minutes:g} minutes without generations cannot be waited for", remedy="say 0 to 1440")
        with self._changed():
            entries = tuple(Entry(secrets.token_hex(4), settings.save.output_name, checkpoint, not_before, idle_minutes,
                                  sweep=sweep, settings=flat(settings)) for settings, sweep in runs)
            for entry in entries:
                with blamed(entry.name) if entry.sweep else contextlib.nullcontext():
                    self._check_name(entry)
                self._entries.append(entry)
            return entries

    def edit(self, entry_id: str, settings: Settings) -> Entry:
        """Give a waiting run other settings. Raises SettingError where it does not wait, OutputError as `add`."""
        with self._changed():
            if self._waiting(entry_id).resumes:
                raise SettingError(f"{self.entry(entry_id).name} goes on with the settings it had",
                                   remedy="start it anew to change them")
            entry = dataclasses.replace(self._waiting(entry_id), name=settings.save.output_name, settings=flat(settings))
            self._check_name(entry)
            self._put(entry)
            return entry

    def move(self, entry_id: str, position: int) -> None:
        """Put a waiting run at this position among those that wait, from 0."""
        with self._changed():
            entry = self._waiting(entry_id)
            others = [other for other in self._entries if other is not entry]
            waiting = [other for other in others if other.state == "waiting"]
            before = others.index(waiting[position]) if 0 <= position < len(waiting) else len(others)
            self._entries = [*others[:before], entry, *others[before:]]

    def remove(self, entry_id: str) -> None:
        """Take a run out that is not being trained; what it has written stays."""
        with self._changed():
            entry = self.entry(entry_id)
            if entry.state == "running":
                raise HostError(f"{entry.name} is being trained", remedy="stop it first")
            self._entries.remove(entry)

    def retry(self, entry_id: str, *, resume: bool) -> Entry:
        """Have a run that ended wait again, from its beginning or from where it was saved last. Raises SettingError where it
        has not ended or cannot be resumed, OutputError as `add`."""
        with self._changed():
            entry = self.entry(entry_id)
            if entry.open:
                raise SettingError(f"{entry.name} has not ended", remedy="wait for it, or remove it")
            if resume and not self.resumable(entry):
                raise SettingError(f"{entry.name} cannot be resumed", why="it saved no state", remedy="start it anew")
            entry = dataclasses.replace(entry, state="waiting", message="", not_before=0.0, resumes=resume,
                                        run=entry.run if resume else "")
            self._check_name(entry)
            self._put(entry)
            return entry

    def hold(self, held: bool) -> None:
        """Let nothing more begin, or go on; the run under way is not touched."""
        with self._changed():
            self._held = held

    def check(self) -> None:
        """One look: note how the last run ended, and begin the next one where its time has come."""
        with self._lock:
            if not self._opened:
                return
            self._note_ended()
            if not self._runner.running() and not self._host.idle():
                self._used_at = self._clock()
            entry = None if self._held or self._runner.running() else next(filter(self._due, self._entries), None)
            self._starter = threading.get_ident()
            if entry is not None:
                folder = self._runs / entry.run if entry.resumes else new_folder(self._runs, entry.name)
                # On the disk before anything begins: killed from here on, it is not begun a second time.
                entry = dataclasses.replace(entry, state="running", run=folder.name, message="",
                                            recorded=_recorded(folder))
                with self._changed():
                    self._put(entry)
                self._starting = entry.id
            elif self._chosen and not self._runner.running():
                self._starting = "-"
        try:
            if entry is not None:
                self._begin(entry, folder)
            elif self._starting:
                with contextlib.suppress(HostError), self._runner.other_model():  # else once a task has ended that needs it
                    self._restore_choice()
        finally:
            self._starting = ""

    def refuse_others(self, _: Settings) -> None:
        """Raises HostError where a run of the queue is about to begin, in another thread: it may be loading its checkpoint; and
        for that run itself where the queue was closed meanwhile."""
        if self._starting and (self._starter != threading.get_ident() or not self._opened):
            raise HostError("A queued run is about to begin", remedy="wait for it, or hold the queue")

    def _begin(self, entry: Entry, folder: Path) -> None:
        try:
            with translated("starting a queued run"):
                # What must end first objects before the model is changed.
                self._runner.refuse(parse(entry.settings))
                with contextlib.nullcontext() if self._holds(entry.checkpoint) else self._runner.other_model():
                    try:
                        with translated("starting a queued run"):
                            self._choose(entry.checkpoint)
                    except Exception as error:  # noqa: BLE001 - it is not here, or damaged: no reason to wait
                        self._ended(entry, "failed", error)
                        return
                self._begun = entry.id
                self._start(entry, folder)
        except HostError as error:  # somebody pressed Train, or other work must end first: the next may be luckier
            later = self._clock() + _AGAIN_SECONDS
            self._ended(dataclasses.replace(entry, run=entry.run if entry.resumes else "", not_before=later), "waiting", error)
        except Exception as error:  # noqa: BLE001 - whatever is wrong with this one, the next has its turn
            self._ended(entry, "failed", error)

    def _holds(self, checkpoint: str) -> bool:
        """Whether the host holds the model that an entry of this checkpoint trains on."""
        loaded, wanted = self._host.checkpoint(), checkpoint or self._before_choice
        return not wanted or loaded is not None and same_title(loaded.title, wanted)

    def _ended(self, entry: Entry, state: State, error: Exception) -> None:
        if not self._opened:  # closed meanwhile: marked as running and never begun, it waits when the queue is read again
            return
        entry = dataclasses.replace(entry, state=state, message=Failure.of(error, name="The start").message)
        with self._changed():
            self._put(entry)
        if state == "failed":
            self._failed(entry)

    def _due(self, entry: Entry) -> bool:
        now = self._clock()
        return (entry.state == "waiting" and now >= entry.not_before
                and (not entry.idle_minutes or now - self._used_at >= 60 * entry.idle_minutes))

    def _note_ended(self) -> None:
        """Note how those ended that are marked as running and do not run any more."""
        for entry in [e for e in self._entries if e.state == "running" and e.id != self._starting]:
            folder = self._runs / entry.run
            # Locked until its last word is written; a drive without locks cannot tell.
            if is_locked(folder) or entry.id == self._begun and self._runner.running():
                continue
            began = (folder / "settings.toml").is_file() and (not entry.resumes or _recorded(folder) > entry.recorded)
            run = past_run(folder)
            with self._changed():
                self._put(dataclasses.replace(entry, state=run.outcome, message=run.message) if began
                          else dataclasses.replace(entry, state="waiting", run=entry.run if entry.resumes else ""))

    def _choose(self, checkpoint: str) -> None:
        """Have the host hold the entry's model, and remember the user's, which one that names none has again."""
        if not checkpoint:
            self._restore_choice()
            return
        before = self._host.select(checkpoint)
        if not same_title(before, checkpoint):
            if not same_title(before, self._chosen):
                self._before_choice = before
            self._chosen = checkpoint

    def _restore_choice(self) -> None:
        """Have the host hold the user's model, unless another one was chosen meanwhile."""
        chosen, before, loaded = self._chosen, self._before_choice, self._host.checkpoint()
        self._chosen = self._before_choice = ""
        if before and loaded is not None and same_title(loaded.title, chosen):
            try:
                self._host.select(before)
            except LoraTrainError as error:
                log.warning("The model of before the queue could not be chosen again: %s", error)

    def _check_name(self, entry: Entry) -> None:
        def target(settings: Mapping[str, Any]) -> str:
            folder = os.path.realpath(settings.get("output_dir") or self._host.lora_folder)
            return os.path.normcase(os.path.join(folder, unicodedata.normalize("NFC", str(settings.get("output_name")))))

        others = [(other.settings, "is in the queue") for other in self._entries if other.open and other.id != entry.id]
        if self._runner.running() and self._runner.saves():
            others.append((self._runner.settings(), "is being trained"))
        for settings, doing in others:
            if target(settings) == target(entry.settings):
                raise OutputError(f"A run that writes {entry.name} {doing} already", remedy="choose another name")

    def _waiting(self, entry_id: str) -> Entry:
        entry = self.entry(entry_id)
        if entry.state != "waiting":
            raise SettingError(f"{entry.name} does not wait any more")
        return entry

    def _put(self, entry: Entry) -> None:
        self._entries = [entry if other.id == entry.id else other for other in self._entries]

    @contextlib.contextmanager
    def _changed(self) -> Iterator[None]:
        """A change of the entries: it is on the disk when the block ends, or it did not happen. Raises HostError where another
        process works on the queue, OutputError where it cannot be written."""
        with self._lock:
            if not self._opened:
                self._load()
            entries, held = list(self._entries), self._held
            try:
                yield
                with translated("writing the queue"):
                    self._write()
            except BaseException:
                self._entries, self._held = entries, held
                raise

    def _load(self) -> None:
        """Read the queue and begin to work on it."""
        with translated("opening the queue"):
            self._runs.mkdir(parents=True, exist_ok=True)
            try:
                lock = lock_run(self._runs)  # None on a drive without locks
            except HostError:
                raise HostError("The queue cannot be changed here", why="another program works on it",
                                remedy="use that one, or close it") from None
            self._entries, self._held = read_or_keep(self._runs)
            self._opened, self._process_lock, self._closed = True, lock, threading.Event()
        if self._watches:
            threading.Thread(target=self._watch, args=[self._closed], name="lora-train-run-queue", daemon=True).start()

    def _watch(self, closed: threading.Event) -> None:
        while not closed.wait(_POLL_SECONDS):
            try:
                self.check()
            except Exception:
                log.exception("The queue could not go on; it tries again")

    def _write(self) -> None:
        data = {"held": self._held, "entries": [dataclasses.asdict(entry) for entry in self._entries]}
        write_atomic(self._runs / FILE_NAME, json.dumps(data, indent=1, ensure_ascii=False).encode("utf-8", "replace"))


def _recorded(folder: Path) -> int:
    """How many bytes of its events a run has recorded."""
    events = folder / "events.jsonl"
    return events.stat().st_size if events.is_file() else 0
