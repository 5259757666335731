"""The routes of the queue, under /lora-train/v1/queue. Guarded as every route is (`gate.py`).

    GET  queue              {"held", "entries": [{id, name, state, message, run, checkpoint, not_before, idle_minutes,
                            resumable, sweep}]} in order; state is "waiting", "running", "done", "stopped", "failed" or
                            "interrupted"; sweep is {id, name, values} or null
    GET  queue/settings?id= {"settings": {...}} of one, to be changed
    POST queue/add          {"settings", "start_after": "23:00", "idle_minutes"} -> {"id"}: at the end, on the checkpoint that
                            is loaded now; after that time of day, once nobody else used the model for so long
    POST queue/sweep        {"settings", "axes": {setting: [values]}, "overrides"?: [{setting: value}], "start_after",
                            "idle_minutes"} -> {"id" of the sweep, "ids" of its entries}: a run for each combination of the
                            axes, for each of the overrides where there are some; all of them are queued or none
    POST queue/sweep/plan   {"settings", "axes", "overrides"?} -> {"runs", "steps", "estimate", "names"}: what such a sweep
                            would do, without a look at whether its names are free
    POST queue/edit         {"id", "settings"} -> {"id"}: other settings for one that waits
    POST queue/move         {"id", "position"}: to this position among those that wait, from 0
    POST queue/remove       {"id"}
    POST queue/retry        {"id", "resume": true|false} -> {"id"}: one that ended waits again, from its beginning or its state
    POST queue/hold         {"held": true|false}: nothing more begins, or it goes on
    GET  queue/webhook      {"webhook": the server that is told when a run has ended, "" for none, "problem": why the last
                            notice did not arrive, "" if it did}
    POST queue/webhook      {"url"} -> as GET: keep that address, or none for "", and send it a first notice; not where others
                            reach the page
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import logging
import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pydantic import BaseModel, StrictBool, StrictFloat, StrictInt, StrictStr, conint

from lib_lora_train.api import service
from lib_lora_train.api.gate import Gate
from lib_lora_train.errors import LoraTrainError, SettingError
from lib_lora_train.host.port import Host
from lib_lora_train.results.start import next_time as next_time
from lib_lora_train.results.start import queue_on
from lib_lora_train.run.planning import plan_job
from lib_lora_train.run.queue import RunQueue
from lib_lora_train.run.queue_file import Entry
from lib_lora_train.run.runner import Runner
from lib_lora_train.run.sweep import expand, plan_all
from lib_lora_train.run.webhook import webhook_of
from lib_lora_train.settings import parse
from lib_lora_train.studio.requests import validated

log = logging.getLogger(__name__)


class QueueRequest(BaseModel):
    """What these routes are sent."""

    id: StrictStr = ""
    settings: dict[StrictStr, Any] = {}
    start_after: StrictStr = ""
    idle_minutes: StrictInt | StrictFloat = 0
    position: conint(strict=True, ge=0, lt=10**6) = 0
    resume: StrictBool = False
    held: StrictBool = True
    url: StrictStr = ""
    axes: dict[StrictStr, list[Any]] = {}
    overrides: list[dict[StrictStr, Any]] = []


@functools.lru_cache(maxsize=1)
def queue_for(host: Host, runner: Runner) -> RunQueue:
    """The process's one, however often the page is rebuilt."""
    return queue_on(host, runner)


def stop_all(host: Host, runner: Runner) -> bool:
    """Have the run under way keep what it learnt and end, and the queue begin nothing more until `add_routes` is called again;
    whether there was a run."""
    queue_for(host, runner).close()
    return runner.stop(save=True)


def add_routes(gate: Gate, queue: RunQueue, host: Host) -> None:
    """Add them, and go on with what was queued when the program ended last."""
    def add(method: str, name: str, answer: Callable[[QueueRequest], object], about: str) -> None:
        gate.add(method, name, lambda query, body: answer(validated(QueueRequest, body or query)), about)

    add("GET", "queue", lambda _: shown(queue, host), "What waits, and how the others ended")
    add("GET", "queue/settings", lambda r: {"settings": dict(queue.entry(r.id).settings)}, "The settings of one")
    add("POST", "queue/add", lambda r: {"id": enqueue(r, queue=queue, host=host).id}, "Put a run into the queue")
    add("POST", "queue/sweep", lambda r: _queued(enqueue_sweep(r, queue=queue, host=host)), "Put a sweep into the queue")
    add("POST", "queue/sweep/plan", lambda r: service.plan_sweep(
        expand(r.settings, axes=r.axes, overrides=r.overrides), host=host, runner=queue.runner), "What a sweep would do")
    add("POST", "queue/edit", lambda r: {"id": enqueue(r, queue=queue, host=host).id}, "Change the settings of one that waits")
    add("POST", "queue/move", lambda r: _done(queue.move(r.id, r.position)), "Change the order")
    add("POST", "queue/remove", lambda r: _done(queue.remove(r.id)), "Take one out")
    add("POST", "queue/retry", lambda r: {"id": queue.retry(r.id, resume=r.resume).id}, "Have one that ended wait again")
    add("POST", "queue/hold", lambda r: _done(queue.hold(r.held)), "Begin nothing more, or go on")
    add("GET", "queue/webhook", lambda _: webhook(host), "Who is told when a run has ended")
    add("POST", "queue/webhook", lambda r: keep_webhook(r.url, host=host), "Have somebody told when a run has ended")
    try:
        queue.open()
    except LoraTrainError as error:
        log.warning("%s", error)


def webhook(host: Host) -> dict[str, str]:
    """The webhook as plain data, without its secret."""
    found = webhook_of(host.runs_folder)
    return {"webhook": found.shown(), "problem": found.problem}


def keep_webhook(address: str, *, host: Host) -> dict[str, str]:
    """Keep a webhook and try it. Raises SettingError, and HostError where it does not answer."""
    if host.allowed is not None:  # this machine would send to wherever they like
        raise SettingError("The webhook is not changed here", why="others can reach this page",
                           remedy="set it on the machine itself: python -m lib_lora_train queue webhook "
                           "ADDRESS --runs FOLDER, the folder with queue.json in it")
    webhook_of(host.runs_folder).keep(address)
    if address.strip():
        webhook_of(host.runs_folder).test()
    return webhook(host)


def enqueue(request: QueueRequest, *, queue: RunQueue, host: Host) -> Entry:
    """Queue a run that could begin now, or give one that waits (`request.id`) these settings; most of what is wrong is refused
    at once. Raises UserError, HostError."""
    settings = parse(request.settings)
    if settings.save.resume:
        raise SettingError("A run that goes on is not queued by its settings", remedy="press Resume beside it in the queue")
    plan_job(settings, host)
    if request.id:
        return queue.edit(request.id, settings)
    return queue.add(settings, checkpoint=_loaded(host), idle_minutes=request.idle_minutes, not_before=_not_before(request))


def enqueue_sweep(request: QueueRequest, *, queue: RunQueue, host: Host) -> tuple[Entry, ...]:
    """Queue all runs of a sweep, or none of them. Raises as `enqueue`, naming the run that is refused."""
    runs = expand(request.settings, axes=request.axes, overrides=request.overrides)
    plan_all(runs, host)
    sweep_id, name = secrets.token_hex(4), str(request.settings["output_name"]).strip()
    return queue.add_sweep([(run.settings, run.sweep(sweep_id, name)) for run in runs], checkpoint=_loaded(host),
                           idle_minutes=request.idle_minutes, not_before=_not_before(request))


def _loaded(host: Host) -> str:
    loaded = host.checkpoint()
    return loaded.title if loaded else ""


def _not_before(request: QueueRequest) -> float:
    return next_time(request.start_after, now=datetime.datetime.now()) if request.start_after else 0.0


def shown(queue: RunQueue, host: Host) -> dict[str, Any]:
    """The queue as plain data; without the settings, which are long."""
    def told(entry: Entry) -> Mapping[str, Any]:
        fields = {field.name: getattr(entry, field.name) for field in dataclasses.fields(entry) if field.name != "settings"}
        return fields | {"resumable": queue.resumable(entry), "sweep": dataclasses.asdict(entry.sweep) if entry.sweep else None}
    return {"held": queue.held, "entries": [told(entry) for entry in queue.entries()]}


def _queued(entries: Sequence[Entry]) -> dict[str, Any]:
    assert entries[0].sweep is not None
    return {"id": entries[0].sweep.id, "ids": [entry.id for entry in entries]}


def _done(_: None) -> dict[str, bool]:
    return {"done": True}
