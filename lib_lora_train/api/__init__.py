"""The routes under /lora-train/v1/: what `service.py` offers, as JSON.

    GET  status?after=N     where the run is (`service.status`); points of the curve after step N
    GET  runs               {"runs": [...]}, newest first
    GET  settings           {"settings": [...]}: every setting with its type, default, range, label and help
    POST plan               {"settings": {...}} -> what such a run would do
    POST start              {"settings": {...}} -> {"run": id}; with {"resume": id}, that run goes on with what it was
                            set to, but for "settings", which may then be left out
    POST find-rate          {"settings": {...}} -> {"run": id} of a short run that finds a learning rate for such a run:
                            what `status` then has under "diagnosed"
    POST suggest            {"settings", "purpose": "character"|"style"|"object"} -> {"purpose", "formula", "warnings",
                            "suggestions": [{setting, label, value, now, reason}]}
    POST stop               {"save": true|false} -> {"stopping": whether something was running}
    POST pause              {"paused": true|false} -> {"pausing": whether something was running}
    POST save               {} -> {"saving": whether something was running}: the LoRA is saved between two steps
    GET  report?run=ID      a zip for support (`run/diagnostics.py`), about that run or the newest; nothing private

Those for files of settings and for presets are in `settings.py`, those under /lora-train/v1/studio/, results/, queue/, history/
and languages/ in the files of these names; `compare` is in `history.py`.

A refusal is {"error": one sentence} with 400 (something given is wrong), 409 (the host or the runner is busy), 401,
403, 413 or 415.

Who may ask: the page, which shows the token it was given inside its own configuration, so whoever can load the page can
use it; and outside programs, where the host's API is switched on, with the host's API user and password where it has
them. Where the page asks for a login (--gradio-auth), both need it: the page's requests carry the session's cookie, and a
program without the API's password is refused without one. No other web page may ask at all: it is known by
Sec-Fetch-Site and Origin, which a program outside of browsers does not send, and it cannot send JSON.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from fastapi import FastAPI
from fastapi.responses import Response
from pydantic import BaseModel, StrictBool, StrictStr, conint, constr

from lib_lora_train.api import history, languages, queue, results, service, settings, studio
from lib_lora_train.api.gate import OUTDATED, PREFIX, TOKEN_HEADER, Gate, LoggedIn, same_origin
from lib_lora_train.errors import SettingError
from lib_lora_train.host.port import Host
from lib_lora_train.run import diagnostics
from lib_lora_train.run.runner import Runner
from lib_lora_train.run.suggestions import suggestions_for
from lib_lora_train.studio.requests import validated
from lib_lora_train.studio.session import studio_for

__all__ = ["OUTDATED", "PREFIX", "TOKEN_HEADER", "LoggedIn", "install", "login_of", "parse_credentials", "same_origin"]


def install(app: FastAPI, *, runner: Runner, host: Host, token: str, credentials: Mapping[str, str],
            api_enabled: bool, logged_in: LoggedIn | None = None, program: str = "") -> None:
    """Add the routes to `app`, once for each app.

    `credentials` are user names and passwords, {} for none; `logged_in` tells the page's users, as
    `login_of(app)` does if it is not given. `program` is what this runs in, for reports of problems.
    """
    diagnostics.remember_log()
    gate = Gate(app, token=token, credentials=dict(credentials), api_enabled=api_enabled, logged_in=logged_in or login_of(app))

    def add(method: str, name: str, answer: Callable[[RunRequest], object], about: str) -> None:
        gate.add(method, name, lambda query, body: answer(validated(RunRequest, body or query)), about)

    add("GET", "status", lambda r: service.status(runner=runner, host=host, after=r.after), "Where the current or last run is")
    add("GET", "runs", lambda _: {"runs": service.runs(host)}, "Past runs, newest first")
    add("GET", "settings", lambda _: {"settings": service.settings_list()}, "Every setting")
    add("POST", "plan", lambda r: service.plan(r.named_settings(), host=host, runner=runner), "What a run would do")
    add("POST", "start", lambda r: {"run": _start(r, runner=runner, host=host)}, "Start a run, or go on with one")
    add("POST", "find-rate", lambda r: {"run": service.find_learning_rate(r.named_settings(), runner=runner, host=host)},
        "Find a learning rate")
    add("POST", "suggest", lambda r: suggestions_for(r.named_settings(), r.purpose, host=host),
        "Settings that suit the pictures")
    add("POST", "stop", lambda r: {"stopping": runner.stop(save=r.save)}, "Stop the run")
    add("POST", "pause", lambda r: {"pausing": runner.pause(r.paused)}, "Stand still between two steps, or go on")
    add("POST", "save", lambda _: {"saving": runner.save_now()}, "Save what the run has learnt so far, and go on")
    gate.add("GET", "report", lambda query, _: _report(query, host=host, program=program),
             "What a helper needs to know, as a zip")
    settings.add_routes(gate, host)
    queue.add_routes(gate, queue.queue_for(host, runner), host)
    studio.add_routes(gate, studio_for(host, runner))
    results.add_routes(gate, results.results_for(host, runner))
    history.add_routes(gate, results.results_for(host, runner))
    languages.add_route(app)


def _report(query: Mapping[str, str], *, host: Host, program: str) -> Response:
    made = service.report(query.get("run", ""), host=host, program=program)
    return Response(made, media_type="application/zip", headers={
        "Content-Disposition": 'attachment; filename="lora-train-report.zip"', "Cache-Control": "no-store"})


def parse_credentials(text: str) -> dict[str, str]:
    """The host's "user:password,user:password" by user name; {} for an empty text."""
    pairs = (entry.strip().partition(":") for entry in text.split(","))
    return {user: password for user, colon, password in pairs if colon}


def login_of(app: Any) -> LoggedIn:
    """Whether a request's cookies belong to somebody who logged in at gradio's `app`; always, where it asks for no login."""
    def logged_in(cookies: Mapping[str, str]) -> bool:
        # Asked anew each time: gradio sets both when the page is launched, which may come later.
        if getattr(app, "auth", None) is None:
            return True
        tokens = getattr(app, "tokens", {})
        return any(name.startswith("access-token") and value in tokens for name, value in cookies.items())
    return logged_in


class RunRequest(BaseModel):
    """What `plan`, `start`, `stop` and `status` are sent."""

    settings: dict[StrictStr, Any] | None = None
    resume: constr(strict=True, min_length=1) = ""
    purpose: StrictStr = ""
    save: StrictBool = False
    paused: StrictBool = True
    after: conint(ge=0, lt=10**18) = 0

    def named_settings(self) -> dict[str, Any]:
        """The settings; raises SettingError where the request holds none."""
        if self.settings is None:
            raise SettingError('The request must hold an object "settings": names of settings and their values')
        return self.settings


def _start(request: RunRequest, *, runner: Runner, host: Host) -> str:
    if request.resume:
        return service.resume(request.resume, request.settings or {}, runner=runner, host=host)
    return service.start(request.named_settings(), runner=runner, host=host)
