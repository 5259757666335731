"""The command `queue`: runs that wait in a file beside the runs, shown, added, ordered, and trained one after the other.

Nothing here imports torch or numpy before a command runs, so that every other command and `--help` start at once.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lib_lora_train import terminal
from lib_lora_train.errors import SettingError, translated
from lib_lora_train.run import RUNS_FOLDER
from lib_lora_train.settings import DECLARATIONS, flat, parse, user_path
from lib_lora_train.studio.commands.sweep import add_given, given_values

if TYPE_CHECKING:
    from lib_lora_train.events import Report
    from lib_lora_train.host.standalone import StandaloneHost
    from lib_lora_train.run.queue import RunQueue
    from lib_lora_train.run.queue_file import Entry
    from lib_lora_train.run.runner import Runner

_POLL_SECONDS = 1.0
Commands = Any  # what ArgumentParser.add_subparsers returns


def add_queue(commands: Commands) -> None:
    """Add the command. Exit codes: 0 done, 1 a run failed or another program has the queue, 2 bad input, 130 interrupted."""
    queue = commands.add_parser("queue", help="runs that wait: list, add, order them, and train one after the other",
                                description="One program at a time works on a queue: the WebUI, the page, or this command.")
    actions = queue.add_subparsers(required=True, metavar="ACTION", title="actions")

    def add(name: str, told: str, command: Any) -> argparse.ArgumentParser:
        parser = actions.add_parser(name, help=told, description=f"{told[0].upper()}{told[1:]}.")
        parser.add_argument("--runs", type=user_path, metavar="DIR", help="the folder of runs with queue.json in it (runs in "
                            "--output-dir); the WebUI's is lora_train_runs")
        parser.set_defaults(command=translated("working on the queue")(command))
        if name != "add":
            parser.add_argument("--output-dir", default=".", help="where the LoRAs go")
        return parser

    add("list", "show what waits, and how the others ended", _list).add_argument("--json", action="store_true", help="as JSON")
    new = add("add", "put a run at the end", _add)
    add_given(new)
    new.add_argument("--checkpoint", default="", metavar="NAME", help="the file's name of the checkpoint it trains on; that of "
                     "`queue run` if none is named")
    new.add_argument("--after", default="", metavar="23:00", help="it begins at this time of day or later")
    new.add_argument("--idle-minutes", type=float, default=0.0, metavar="N", help="and once nobody used the model so long")
    for name, told, change in (
            ("move", "put a waiting run at another position", lambda q, entry, c: q.move(entry, c.position - 1)),
            ("remove", "take a run out; its files stay", lambda q, entry, c: q.remove(entry)),
            ("retry", "have one that ended wait again", lambda q, entry, c: q.retry(entry, resume=c.resume))):
        parser = add(name, told, _change)
        parser.set_defaults(change=change)
        parser.add_argument("entry", metavar="ID|NAME", help="as `queue list` shows it")
        if name == "move":
            parser.add_argument("position", type=int, help="among those that wait, from 1")
        if name == "retry":
            parser.add_argument("--resume", action="store_true", help="from where it was saved last, not from its beginning")
    add("hold", "let nothing more begin", _hold).set_defaults(held=True)
    add("release", "let runs begin again", _hold).set_defaults(held=False)
    run = add("run", "train what waits, one after the other", _run)
    run.add_argument("--checkpoint", type=user_path, required=True, help="the model, a .safetensors file; others that entries "
                     "name lie beside it")
    run.add_argument("--json", action="store_true", help="one JSON event a line instead of a progress bar")
    webhook = add("webhook", "have an address told when a run has ended, or show it", _webhook)
    webhook.add_argument("url", nargs="?", help="Discord's, Slack's or your own; \"\" for none")


def _runs(chosen: argparse.Namespace) -> Path:
    return chosen.runs or user_path(chosen.output_dir or ".") / RUNS_FOLDER


def _queue(chosen: argparse.Namespace, *, checkpoint: Path | None = None, show: Report | None = None
           ) -> tuple[RunQueue, StandaloneHost, Runner]:
    """The queue, to be worked on here, with its host and runner; a run's events are shown by `show`."""
    from lib_lora_train.host.standalone import StandaloneHost
    from lib_lora_train.results.start import queue_on
    from lib_lora_train.run.runner import Runner

    host = StandaloneHost(checkpoint, lora_folder=user_path(chosen.output_dir or "."), runs_folder=_runs(chosen))
    runner = Runner()
    if show is not None:
        host.report = show  # type: ignore[method-assign]
    return queue_on(host, runner, watch=False), host, runner


def _entry(queue: RunQueue, name: str) -> Entry:
    """The one of this id, else of this name. Raises SettingError where there is none or several."""
    found = [entry for entry in queue.entries() if entry.id == name] or [e for e in queue.entries() if e.name == name]
    if len(found) != 1:
        raise SettingError(f"There {'are several runs' if found else 'is no run'} {name!r} in the queue",
                           remedy="name its id: `queue list`")
    return found[0]


def _list(chosen: argparse.Namespace) -> int:
    from lib_lora_train.run.queue_file import read_queue
    from lib_lora_train.run.record import past_run
    from lib_lora_train.storage.lock import is_locked

    entries, held = read_queue(_runs(chosen))
    told = []
    for entry in entries:
        ended = entry.state == "running" and not is_locked(_runs(chosen) / entry.run)
        past = past_run(_runs(chosen) / entry.run) if ended else None
        told.append(dataclasses.replace(entry, state=past.outcome, message=past.message) if past else entry)
    if chosen.json:
        print(json.dumps({"held": held, "entries": [dataclasses.asdict(entry) for entry in told]}, indent=1))
        return 0
    if not entries:
        print(f"Nothing waits in {_runs(chosen)}.", file=sys.stderr)
    for entry in told:
        when = f"  after {datetime.datetime.fromtimestamp(entry.not_before):%H:%M}" if (
            entry.not_before and entry.state == "waiting") else ""
        print(f"{entry.id}  {entry.name:30} {entry.state:12} {entry.checkpoint}{when}  {entry.message}".rstrip())
    if held:
        print("The queue is held; `queue release` lets runs begin again.", file=sys.stderr)
    return 0


def _add(chosen: argparse.Namespace) -> int:
    from lib_lora_train.results.start import next_time
    from lib_lora_train.run.planning import plan_job

    given, notes = given_values(chosen)
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    values = {name: str(Path(str(value)).absolute()) if value and DECLARATIONS[name].holds_path(str(value)) else value
              for name, value in flat(parse(given)).items()}  # it may be trained by a program in another folder
    queue, host, _ = _queue(chosen)
    host.lora_folder.mkdir(parents=True, exist_ok=True)
    plan_job(parse(values), host)
    after = next_time(chosen.after, now=datetime.datetime.now()) if chosen.after else 0.0
    entry = queue.add(parse(values), checkpoint=chosen.checkpoint, not_before=after, idle_minutes=chosen.idle_minutes)
    queue.close()
    print(entry.id)
    return 0


def _change(chosen: argparse.Namespace) -> int:
    """Do what `chosen.change` says with the entry that is named, on the queue."""
    queue, _, _ = _queue(chosen)
    queue.open()
    chosen.change(queue, _entry(queue, chosen.entry).id, chosen)
    queue.close()
    return 0


def _hold(chosen: argparse.Namespace) -> int:
    queue, _, _ = _queue(chosen)
    queue.hold(chosen.held)
    queue.close()
    return 0


def _webhook(chosen: argparse.Namespace) -> int:
    from lib_lora_train.run.webhook import webhook_of

    webhook = webhook_of(_runs(chosen))
    if chosen.url is not None:
        webhook.keep(chosen.url)
        if chosen.url:
            webhook.test()
    print(webhook.shown() or "Nobody is told.")
    return 0


def _run(chosen: argparse.Namespace) -> int:
    from lib_lora_train.host.standalone import describe_file
    from lib_lora_train.run.webhook import webhook_of
    from lib_lora_train.studio.commands.progress import RunBar, show_json

    describe_file(chosen.checkpoint)  # a wrong one is refused before anything begins
    queue, _, runner = _queue(chosen, checkpoint=chosen.checkpoint, show=show_json if chosen.json else RunBar())
    queue.open()
    tried, outcomes = {entry.id for entry in queue.entries() if entry.open}, dict[str, str]()
    with terminal.StopRequest(launched=False, tells=True) as request:
        while not request.wanted and not queue.held and any(entry.open for entry in queue.entries()):
            queue.check()
            if runner.running():
                runner.wait(_POLL_SECONDS)
            else:
                time.sleep(_POLL_SECONDS)
        runner.stop(save=True)
        while not runner.wait(_POLL_SECONDS):
            pass
    if queue.held:
        print("The queue is held; `queue release` lets runs begin again.", file=sys.stderr)
    for entry in queue.entries():
        if entry.id in tried and not entry.open:
            outcomes[entry.name] = entry.state
            print(f"{entry.name}: {entry.state}. {entry.message}", file=sys.stderr)
    queue.close()
    webhook_of(_runs(chosen)).wait()
    if request.wanted:
        return terminal.INTERRUPTED
    return 0 if set(outcomes.values()) <= {"done"} else 1
