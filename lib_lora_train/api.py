"""The routes under /lora-train/v1/: what `control` offers, as JSON.

    GET  status?after=N     where the run is (`control.status`); points of the curve after step N
    GET  runs               {"runs": [...]}, newest first
    GET  settings           {"settings": [...]}: every setting with its type, default, range, label and help
    POST plan               {"settings": {...}} -> what such a run would do
    POST start              {"settings": {...}} -> {"run": id}; with {"resume": id}, that run goes on with what it was
                            set to, but for "settings", which may then be left out
    POST stop               {"save": true|false} -> {"stopping": whether something was running}
    GET  report?run=ID      a zip for whoever helps (`diagnostics`), about that run or the newest; nothing private

A refusal is {"error": one sentence} with 400 (something given is wrong), 409 (the host or the runner is busy), 401,
403, 413 or 415.

Who may ask: the page, which shows the token it was given inside its own configuration, so whoever may load the page may
use it; and outside programs, where the host's API is switched on, with the host's API user and password where it has
them. Where the page asks for a login (--gradio-auth), both need it: the page's requests carry the session's cookie, and a
program without the API's password is refused without one. No other web page may ask at all: it is known by
Sec-Fetch-Site and Origin, which a program outside of browsers does not send, and it cannot send JSON.
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
import json
import logging
import secrets
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import urlsplit

from fastapi import FastAPI, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse, Response

from lib_lora_train import control, diagnostics
from lib_lora_train.errors import HostError, LoraTrainError, UserError
from lib_lora_train.host.port import Host
from lib_lora_train.runner import Runner

log = logging.getLogger(__name__)
PREFIX = "/lora-train/v1"
TOKEN_HEADER = "X-Lora-Train"
OUTDATED = "This page is older than the server behind it; reload the page."
_LARGEST_BODY = 1 << 20
LoggedIn = Callable[[Mapping[str, str]], bool]
"""Whether a request's cookies are of somebody who may see the page."""


def install(app: FastAPI, *, runner: Runner, host: Host, token: str, credentials: Mapping[str, str],
            api_enabled: bool, logged_in: LoggedIn | None = None, program: str = "") -> None:
    """Add the routes to `app`, once for each app.

    `credentials` are user names and passwords, {} for none; `logged_in` tells the page's users, as
    `login_of(app)` does if it is not given. `program` is what this runs in, for reports of problems.
    """
    diagnostics.remember_log()
    gate = _Gate(token=token, credentials=dict(credentials), api_enabled=api_enabled, logged_in=logged_in or login_of(app))

    def add(method: str, name: str, answer: Callable[[Mapping[str, str], dict[str, Any]], object], about: str) -> None:
        async def route(request: Request) -> Response:
            try:
                gate.check(request)
                body = await _body(request) if method == "POST" else {}
                answered = await run_in_threadpool(answer, request.query_params, body)
                return answered if isinstance(answered, Response) else JSONResponse(answered)
            except _Refused as refused:
                return JSONResponse({"error": str(refused)}, refused.code, refused.headers)
            except UserError as error:
                return JSONResponse({"error": str(error)}, 400)
            except HostError as error:
                return JSONResponse({"error": str(error)}, 409)
            except LoraTrainError as error:
                return JSONResponse({"error": str(error)}, 500)
            except Exception:  # the last line of defence: a program that waits for JSON must not get a traceback
                log.exception("%s %s failed", method, name)
                return JSONResponse({"error": "Something went wrong inside; the log has the details."}, 500)

        app.add_api_route(f"{PREFIX}/{name}", route, methods=[method], name=f"lora_train_{name}", summary=about,
                          tags=["lora-train"])

    add("GET", "status", lambda query, _: control.status(runner=runner, host=host, after=_step(query)),
        "Where the current or last run is")
    add("GET", "runs", lambda _, __: {"runs": control.runs(runner=runner, host=host)}, "Past runs, newest first")
    add("GET", "settings", lambda _, __: {"settings": control.settings_list()}, "Every setting")
    add("POST", "plan", lambda _, body: control.plan(_settings(body), host=host), "What a run would do")
    add("POST", "start", lambda _, body: {"run": _start(body, runner=runner, host=host)}, "Start a run, or go on with one")
    add("POST", "stop", lambda _, body: {"stopping": runner.stop(save=_save(body))}, "Stop the run")
    add("GET", "report", lambda query, _: _report(query, host=host, program=program), "What a helper needs to know, as a zip")


def _report(query: Mapping[str, str], *, host: Host, program: str) -> Response:
    made = control.report(query.get("run", ""), host=host, program=program)
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


def same_origin(origin: str, host: str) -> bool:
    """Whether the header Origin names the server that the header Host names; the scheme may change at a proxy."""
    try:
        return urlsplit(origin).netloc.lower() == host.lower()
    except ValueError:
        return False


class _Refused(Exception):
    """A request that is answered with an HTTP status of its own."""

    def __init__(self, code: int, sentence: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(sentence)
        self.code, self.headers = code, headers


@dataclasses.dataclass(frozen=True)
class _Gate:
    """Decides who may ask."""

    token: str = dataclasses.field(repr=False)
    credentials: Mapping[str, str] = dataclasses.field(repr=False)
    api_enabled: bool
    logged_in: LoggedIn = dataclasses.field(repr=False)

    def check(self, request: Request) -> None:
        """Raise _Refused unless the request may pass."""
        # Browsers say so themselves; another port of this machine is another site too.
        if request.headers.get("sec-fetch-site", "none") not in ("same-origin", "none"):
            raise _Refused(403, "A request from another web page is not accepted.")
        if request.method == "POST":
            # What a form, or a script that asks no leave, cannot send.
            if request.headers.get("content-type", "").split(";")[0].strip().lower() != "application/json":
                raise _Refused(415, "The request must be JSON; set the header Content-Type: application/json.")
        shown = request.headers.get(TOKEN_HEADER)
        if shown is not None:
            # No 401 here: a browser would answer it with a password box over the page.
            if not secrets.compare_digest(shown.encode(), self.token.encode()):
                raise _Refused(403, OUTDATED)
            if not self.logged_in(request.cookies):
                raise _Refused(401, "Your login has ended; reload the page and log in.")
            return
        if not self.api_enabled:
            raise _Refused(403, "The API is switched off; start the WebUI with --api to use it.")
        if self.credentials:
            if not self._known(request.headers.get("authorization", "")):
                raise _Refused(401, "The API's user name and password are missing or wrong.", {"WWW-Authenticate": "Basic"})
        elif not self.logged_in(request.cookies):
            raise _Refused(401, "This page asks for a login; log in, or give the API a password of its own (--api-auth).")
        origin = request.headers.get("origin")
        if request.method == "POST" and origin is not None and not same_origin(origin, request.headers.get("host", "")):
            raise _Refused(403, "A request from another web page is not accepted.")

    def _known(self, authorization: str) -> bool:
        scheme, _, encoded = authorization.partition(" ")
        if scheme.lower() != "basic":
            return False
        try:
            user, _, password = base64.b64decode(encoded.strip(), validate=True).decode("utf-8").partition(":")
        except (binascii.Error, UnicodeDecodeError):
            return False
        expected = self.credentials.get(user)
        matches = secrets.compare_digest(password.encode(), (expected or "").encode())
        return matches and expected is not None


async def _body(request: Request) -> dict[str, Any]:
    """The request's JSON object; {} for an empty body."""
    received = b""
    async for part in request.stream():
        received += part
        if len(received) > _LARGEST_BODY:
            raise _Refused(413, "The request is larger than 1 MiB.")
    try:
        data = json.loads(received or b"{}")
    except (ValueError, RecursionError):
        raise _Refused(400, "The request is not JSON.") from None
    if not isinstance(data, dict):
        raise _Refused(400, "The request must be a JSON object.")
    return data


def _start(body: Mapping[str, Any], *, runner: Runner, host: Host) -> str:
    if "resume" not in body:
        return control.start(_settings(body), runner=runner, host=host)
    run = body["resume"]
    if not isinstance(run, str) or not run:
        raise _Refused(400, '"resume" must be the id of a run.')
    return control.resume(run, _settings(body) if "settings" in body else {}, runner=runner, host=host)


def _settings(body: Mapping[str, Any]) -> dict[str, Any]:
    settings = body.get("settings")
    if not isinstance(settings, dict):
        raise _Refused(400, 'The request must hold an object "settings": names of settings and their values.')
    return settings


def _save(body: Mapping[str, Any]) -> bool:
    save = body.get("save", False)
    if not isinstance(save, bool):
        raise _Refused(400, '"save" must be true or false.')
    return save


def _step(query: Mapping[str, str]) -> int:
    text = query.get("after", "0")
    if not (text.isascii() and text.isdigit() and len(text) < 19):
        raise _Refused(400, "after must be the number of a step.")
    return int(text)
