"""Which requests are accepted, and how one becomes an answer or a refusal, whatever the route."""

from __future__ import annotations

import base64
import binascii
import dataclasses
import json
import logging
import secrets
from collections.abc import Awaitable, Callable, Mapping
from typing import Any
from urllib.parse import urlsplit

from fastapi import FastAPI, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse, Response

from lib_lora_train.errors import HostError, LoraTrainError, UserError

log = logging.getLogger(__name__)
PREFIX = "/lora-train/v1"
TOKEN_HEADER = "X-Lora-Train"
OUTDATED = "This page is older than the server behind it; reload the page."
_LARGEST_BODY = 1 << 20
LoggedIn = Callable[[Mapping[str, str]], bool]
"""Whether a request's cookies belong to a logged-in user of the page."""
Answer = Callable[[Mapping[str, str], dict[str, Any]], object]
"""From the query and the body to plain data, or to a Response."""
Receive = Callable[[Request], Awaitable[object]]
"""Reads the body itself and answers with plain data."""


class Refused(Exception):
    """A request that is answered with an HTTP status of its own."""

    def __init__(self, code: int, sentence: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(sentence)
        self.code, self.headers = code, headers


@dataclasses.dataclass(frozen=True)
class Gate:
    """Adds routes to an application, and accepts or refuses the requests for them."""

    app: FastAPI
    token: str = dataclasses.field(repr=False)
    credentials: Mapping[str, str] = dataclasses.field(repr=False)
    api_enabled: bool
    logged_in: LoggedIn = dataclasses.field(repr=False)

    def _check(self, request: Request, *, upload: bool = False) -> None:
        """Raise Refused unless the request may pass; a POST must be JSON, and an upload a file that the page sends."""
        # Browsers say so themselves; another port of this machine is another site too.
        if request.headers.get("sec-fetch-site", "none") not in ("same-origin", "none"):
            raise Refused(403, "A request from another web page is not accepted.")
        content_type = request.headers.get("content-type", "").split(";")[0].strip().lower()
        if upload and content_type != "application/octet-stream":
            raise Refused(415, "A file must be sent as it is; set the header Content-Type: application/octet-stream.")
        if request.method == "POST" and not upload and content_type != "application/json":
            # What a form, or a script that asks no leave, cannot send.
            raise Refused(415, "The request must be JSON; set the header Content-Type: application/json.")
        shown = request.headers.get(TOKEN_HEADER)
        if upload and shown is None:
            raise Refused(403, "Only the page sends files; a program names the folder they are in.")
        if shown is not None:
            # No 401 here: a browser would answer it with a password box over the page.
            if not secrets.compare_digest(shown.encode(), self.token.encode()):
                raise Refused(403, OUTDATED)
            if not self.logged_in(request.cookies):
                raise Refused(401, "Your login has ended; reload the page and log in.")
            return
        if not self.api_enabled:
            raise Refused(403, "The API is switched off; start the WebUI with --api to use it.")
        if self.credentials:
            if not self._known(request.headers.get("authorization", "")):
                raise Refused(401, "The API's user name and password are missing or wrong.", {"WWW-Authenticate": "Basic"})
        elif not self.logged_in(request.cookies):
            raise Refused(401, "This page asks for a login; log in, or give the API a password of its own (--api-auth).")
        origin = request.headers.get("origin")
        if request.method == "POST" and origin is not None and not same_origin(origin, request.headers.get("host", "")):
            raise Refused(403, "A request from another web page is not accepted.")

    def _known(self, authorization: str) -> bool:
        scheme, _, encoded = authorization.partition(" ")
        try:
            user, _, password = base64.b64decode(encoded.strip(), validate=True).decode("utf-8").partition(":")
        except (binascii.Error, UnicodeDecodeError):
            return False
        matches = secrets.compare_digest(password.encode(), self.credentials.get(user, "").encode())
        return matches and scheme.lower() == "basic" and user in self.credentials

    def add(self, method: str, name: str, answer: Answer, about: str, *, largest: int = _LARGEST_BODY) -> None:
        """A route that takes JSON of at most `largest` bytes (or nothing) and gives JSON or a Response. `answer` runs on a
        thread of its own."""
        async def handler(request: Request) -> object:
            self._check(request)
            body = await _body(request, largest) if method == "POST" else {}
            return await run_in_threadpool(answer, request.query_params, body)
        self._add(method, name, handler, about)

    def add_upload(self, name: str, receive: Receive, about: str) -> None:
        """A route that takes one file as the body."""
        async def handler(request: Request) -> object:
            self._check(request, upload=True)
            return await receive(request)
        self._add("POST", name, handler, about)

    def _add(self, method: str, name: str, handler: Receive, about: str) -> None:
        async def route(request: Request) -> Response:
            try:
                answered = await handler(request)
                return answered if isinstance(answered, Response) else JSONResponse(answered)
            except Refused as refused:
                return JSONResponse({"error": str(refused)}, refused.code, refused.headers)
            except LoraTrainError as error:
                status = 400 if isinstance(error, UserError) else 409 if isinstance(error, HostError) else 500
                return JSONResponse({"error": str(error)}, status)
            except Exception:  # the last line of defence: a program that waits for JSON must not get a traceback
                log.exception("%s %s failed", method, name)
                return JSONResponse({"error": "Something went wrong inside; the log has the details."}, 500)

        self.app.add_api_route(f"{PREFIX}/{name}", route, methods=[method], summary=about, tags=["lora-train"],
                               name=f"lora_train_{name.replace('/', '_').replace('-', '_')}")


def same_origin(origin: str, host: str) -> bool:
    """Whether the header Origin names the server that the header Host names; the scheme may change at a proxy."""
    try:
        return urlsplit(origin).netloc.lower() == host.lower()
    except ValueError:
        return False


async def _body(request: Request, largest: int) -> dict[str, Any]:
    """The request's JSON object; {} for an empty body."""
    received = bytearray()
    async for part in request.stream():
        received += part
        if len(received) > largest:
            raise Refused(413, f"The request is larger than {largest >> 20} MiB.")
    try:
        data = json.loads(received or b"{}")
    except (ValueError, RecursionError):
        raise Refused(400, "The request is not JSON.") from None
    if not isinstance(data, dict):
        raise Refused(400, "The request must be a JSON object.")
    return data
