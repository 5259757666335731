"""The routes under /lora-train/v1/: what `control` offers, as JSON.

    GET  status?after=N     where the run is (`control.status`); points of the curve after step N
    GET  runs               {"runs": [...]}, newest first
    GET  settings           {"settings": [...]}: every setting with its type, default, range, label and help
    POST plan               {"settings": {...}} -> what such a run would do
    POST start              {"settings": {...}} -> {"run": id}; with {"resume": id}, that run goes on with what it was
                            set to, but for "settings", which may then be left out
    POST stop               {"save": true|false} -> {"stopping": whether something was running}
    GET  report?run=ID      a zip for whoever helps (`diagnostics`), about that run or the newest; nothing private

Those under /lora-train/v1/studio/ are in `studio.py`.

A refusal is {"error": one sentence} with 400 (something given is wrong), 409 (the host or the runner is busy), 401,
403, 413 or 415.

Who may ask: the page, which shows the token it was given inside its own configuration, so whoever may load the page may
use it; and outside programs, where the host's API is switched on, with the host's API user and password where it has
them. Where the page asks for a login (--gradio-auth), both need it: the page's requests carry the session's cookie, and a
program without the API's password is refused without one. No other web page may ask at all: it is known by
Sec-Fetch-Site and Origin, which a program outside of browsers does not send, and it cannot send JSON.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI
from fastapi.responses import Response

from lib_lora_train.api import service, studio
from lib_lora_train.api.gate import OUTDATED, PREFIX, TOKEN_HEADER, Door, Gate, LoggedIn, Refused, same_origin
from lib_lora_train.host.port import Host
from lib_lora_train.run import diagnostics
from lib_lora_train.run.runner import Runner
from lib_lora_train.studio.session import studio_for

__all__ = ["OUTDATED", "PREFIX", "TOKEN_HEADER", "LoggedIn", "install", "login_of", "parse_credentials", "same_origin"]


def install(app: FastAPI, *, runner: Runner, host: Host, token: str, credentials: Mapping[str, str],
            api_enabled: bool, logged_in: LoggedIn | None = None, program: str = "") -> None:
    """Add the routes to `app`, once for each app.

    `credentials` are user names and passwords, {} for none; `logged_in` tells the page's users, as
    `login_of(app)` does if it is not given. `program` is what this runs in, for reports of problems.
    """
    diagnostics.remember_log()
    gate = Gate(token=token, credentials=dict(credentials), api_enabled=api_enabled, logged_in=logged_in or login_of(app))
    door = Door(app, gate)
    add = door.add
    add("GET", "status", lambda query, _: service.status(runner=runner, host=host, after=_step(query)),
        "Where the current or last run is")
    add("GET", "runs", lambda _, __: {"runs": service.runs(runner=runner, host=host)}, "Past runs, newest first")
    add("GET", "settings", lambda _, __: {"settings": service.settings_list()}, "Every setting")
    add("POST", "plan", lambda _, body: service.plan(_settings(body), host=host), "What a run would do")
    add("POST", "start", lambda _, body: {"run": _start(body, runner=runner, host=host)}, "Start a run, or go on with one")
    add("POST", "stop", lambda _, body: {"stopping": runner.stop(save=_save(body))}, "Stop the run")
    add("GET", "report", lambda query, _: _report(query, host=host, program=program), "What a helper needs to know, as a zip")
    studio.add_routes(door, studio_for(host, runner))


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


def _start(body: Mapping[str, Any], *, runner: Runner, host: Host) -> str:
    if "resume" not in body:
        return service.start(_settings(body), runner=runner, host=host)
    run = body["resume"]
    if not isinstance(run, str) or not run:
        raise Refused(400, '"resume" must be the id of a run.')
    return service.resume(run, _settings(body) if "settings" in body else {}, runner=runner, host=host)


def _settings(body: Mapping[str, Any]) -> dict[str, Any]:
    settings = body.get("settings")
    if not isinstance(settings, dict):
        raise Refused(400, 'The request must hold an object "settings": names of settings and their values.')
    return settings


def _save(body: Mapping[str, Any]) -> bool:
    save = body.get("save", False)
    if not isinstance(save, bool):
        raise Refused(400, '"save" must be true or false.')
    return save


def _step(query: Mapping[str, str]) -> int:
    text = query.get("after", "0")
    if not (text.isascii() and text.isdigit() and len(text) < 19):
        raise Refused(400, "after must be the number of a step.")
    return int(text)
