"""How page, API, queue and command line start a run on a runner, and what follows it."""

from __future__ import annotations

import dataclasses
import datetime
import functools
from collections.abc import Mapping
from pathlib import Path

from lib_lora_train.errors import HostError, LoraFileError, SettingError
from lib_lora_train.host.port import Host
from lib_lora_train.results.promote import dress
from lib_lora_train.results.report import write_report
from lib_lora_train.run.diagnostics import Private
from lib_lora_train.run.planning import plan_job
from lib_lora_train.run.queue import RunQueue
from lib_lora_train.run.queue_file import Entry
from lib_lora_train.run.rate_finder import find_rate, plan_finder
from lib_lora_train.run.resume import compare_settings, find, run_folder, settings_of
from lib_lora_train.run.runner import Runner
from lib_lora_train.run.sweep import record_sweep
from lib_lora_train.run.webhook import Notice, webhook_of
from lib_lora_train.settings import flat, parse


def start(values: Mapping[str, object], *, runner: Runner, host: Host, folder: Path | None = None,
          checkpoint: str = "") -> str:
    """Start a run with settings by name and return its id. `folder` is where it is kept; None makes one. `checkpoint` is the
    title of the only model it may train on; "" for whatever is loaded.

    The settings, the name, the output folder and the dataset are checked first, so that most refusals come at once and
    leave no run behind. Raises UserError, and HostError while another run is under way.
    """
    settings = parse(values)
    if runner.running():
        raise HostError("A training is running already", remedy="wait for it or stop it first")
    plan = plan_job(settings, host)
    if plan.resume_point:
        compare_settings(plan.settings, plan.resume_point, steps=plan.schedule.steps)
    plan = dataclasses.replace(plan, checkpoint=checkpoint)
    return runner.start(plan, host, requested=settings, folder=folder, recorded=functools.partial(conclude, host=host))


def find_learning_rate(values: Mapping[str, object], *, runner: Runner, host: Host) -> str:
    """Start a short run that finds a learning rate for such a run (`run/rate_finder.py`), and return its id. The rate is told
    as a `Diagnosed`. Raises as `start` does, and SettingError where the optimizer needs none."""
    settings = parse(values)
    if runner.running():
        raise HostError("A training is running already", remedy="wait for it or stop it first")
    return runner.start(plan_finder(settings, host), host, requested=settings,
                        job=functools.partial(find_rate, requested=settings))


def conclude(folder: Path, *, host: Host) -> None:
    """What follows a run: cards for its saves, its report, and the notice that it has ended."""
    dress(folder, host.allowed)
    write_report(folder, host)
    webhook_of(host.runs_folder).send(folder)


def resume(run: str, changes: Mapping[str, object], *, runner: Runner, host: Host) -> str:
    """Go on with an interrupted or stopped run of the host (`run` as `runs` names it) and return its id.

    Its settings are those it had, but for `changes`; a raised max_train_steps for example. Raises as `start` does, and
    LoraFileError where the run has no state.
    """
    folder_of(run, host)
    point = find(run, host.runs_folder)
    return start({**flat(settings_of(point, changes)), "resume": run}, runner=runner, host=host)


def folder_of(run: str, host: Host) -> Path:
    """The folder of that run of the host. Raises LoraFileError."""
    folder = run_folder(run, host.runs_folder)
    if folder is None:
        raise LoraFileError(f"There is no run called {run!r}", remedy="see the list of runs")
    return folder


def queue_on(host: Host, runner: Runner, *, watch: bool = True) -> RunQueue:
    """The queue of a host, whose runs this runner trains; `watch` as for `RunQueue`."""
    def begin(entry: Entry, folder: Path) -> None:
        if entry.resumes:
            resume(entry.run, {}, runner=runner, host=host)
        else:
            start(entry.settings, runner=runner, host=host, folder=folder, checkpoint=entry.checkpoint)
            record_sweep(folder, entry.sweep)

    def failed(entry: Entry) -> None:
        message = Private.of(entry.settings, host=host, run=None).replaced(entry.message)
        webhook_of(host.runs_folder).send(Notice("", entry.name, "failed", message))

    queue = RunQueue(host, runner, host.runs_folder, start=begin, failed=failed, watch=watch)
    runner.guard(queue.refuse_others)
    return queue


def next_time(text: str, *, now: datetime.datetime) -> float:
    """When it is `text` ("23:00") next, in seconds since 1970. Raises SettingError."""
    try:
        time = datetime.datetime.strptime(text.strip(), "%H:%M").time()
    except ValueError:
        raise SettingError(f"{text!r} is no time of day", remedy="write it as 23:00") from None
    then = datetime.datetime.combine(now.date(), time)
    return (then if then > now else then + datetime.timedelta(days=1)).timestamp()
