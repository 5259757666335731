"""The page without a WebUI: the same tab, the same script, the same API, on a small server of its own.

It listens on the loopback address unless told otherwise, and asks nothing of the internet: no fonts, no scripts, no
statistics. A page of another site cannot use it from the user's browser: its Host and Origin are checked. Where other
machines can reach it, it asks for a user and a password, always.
"""

from __future__ import annotations

import contextlib
import re
import secrets
import socket
import sys
from pathlib import Path
from typing import Any

import gradio as gr
import uvicorn
from fastapi import FastAPI
from fastapi.responses import Response
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lib_lora_train import api, terminal
from lib_lora_train.errors import HostError, SettingError
from lib_lora_train.host.exposure import is_loopback
from lib_lora_train.host.port import Host
from lib_lora_train.run.runner import RUNNER, Runner
from lib_lora_train.ui.layout import build_tab

_ROOT = Path(__file__).resolve().parents[2]
# The WebUI loads the folder in the order of names; what the others are built of comes first here.
SCRIPTS = tuple(_ROOT / "javascript" / f"lora_train{part}.js" for part in (
    "_language", *(f"_studio_{part}" for part in (
        "parts", "api", "top", "add", "gallery", "editor", "tags", "panels", "shape", "mask", "caption")),
    "_fields", "_chart", "_curve", "_progress", "_resume", "_send", "_files", "_notice", "_sweep", "_queue", "_suggestions",
    "_result", "_zoom", "_strip", "_verdict", "_learning", "", "_studio",
    *(f"_results{part}" for part in ("_top", "_saves", "_share", "_grid", "_pictures", "_compare", "_runs", ""))))
STYLES = (_ROOT / "style.css", Path(__file__).with_name("standalone.css"))
_IMPORTED_STYLE = _ROOT / "style_results.css"
_OUR_HEAD = (f'<link rel="stylesheet" href=".{api.PREFIX}/page.css">'
             f'<script src=".{api.PREFIX}/page.js" defer></script>').encode()
# gradio's page asks other servers for fonts and for a script that is only of use inside a frame.
_OUTSIDE = re.compile(rb'<script\b[^>]*\bsrc="https?://[^>]*>\s*</script>|<link\b[^>]*\bhref="https?://[^>]*>')
_POLICY = "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; frame-ancestors 'none'"
# Paths of gradio that serve or receive files; this page needs neither.
_CLOSED = ("/file", "/upload", "/stream", "/proxy")


def serve(host: Host, *, port: int, address: str = "127.0.0.1", auth: str = "") -> None:
    """Serve the page until the process is interrupted, and have a training keep what it learnt; port 0 chooses a free one.

    `auth` is user:password; without one a password is made up and printed where other machines reach `address`.
    Raises HostError if the port is taken, SettingError for an `auth` that is none.
    """
    login = parse_login(auth) if auth else None if is_loopback(address) else ("train", secrets.token_urlsafe(12))
    listener = listen(address, port)
    shown = "localhost" if is_loopback(address) else address
    url = f"http://{f'[{shown}]' if ':' in shown else shown}:{listener.getsockname()[1]}/"
    # The one line a user waits for; not a log entry, which they may have switched off.
    sys.stdout.write(f"Train LoRA: {url}\n")
    if login and not auth:
        sys.stdout.write(f"User: {login[0]}   password: {login[1]}   (--auth USER:PASSWORD sets your own)\n")
    if host.allowed:
        sys.stdout.write(f"Datasets may lie in {' or '.join(map(str, host.allowed.reading))}; {host.allowed.advice}\n")
    sys.stdout.flush()
    server = uvicorn.Server(uvicorn.Config(make_app(host, address=address, login=login), log_level="warning"))
    terminal.raise_on_interrupt()
    with contextlib.suppress(KeyboardInterrupt):  # the server raises again what ended it
        server.run(sockets=[listener])
    api.queue.queue_for(host, RUNNER).close()  # first, so that nothing begins when the run has ended
    RUNNER.finish()


def listen(address: str, port: int) -> socket.socket:
    """A bound socket; raises HostError."""
    listener = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET)
    if sys.platform != "win32":
        # There it would let a second server take the port of the first.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((address, port))
    except (OSError, OverflowError) as error:  # the latter: no port has such a number
        listener.close()
        raise HostError(f"The page cannot be served at {address}, port {port}",
                        why=getattr(error, "strerror", "") or str(error), remedy="choose another port (--port)") from error
    return listener


def parse_login(text: str) -> tuple[str, str]:
    """(user, password) from "user:password"; raises SettingError unless both are there."""
    user, _, password = text.partition(":")
    if not user.strip() or not password or user != user.strip():
        raise SettingError("--auth holds no user and password", remedy="write --auth USER:PASSWORD")
    return user, password


def make_app(host: Host, *, address: str = "127.0.0.1", login: tuple[str, str] | None = None,
             runner: Runner = RUNNER) -> FastAPI:
    """The whole server as an ASGI application. `login` is a user and a password, None to ask for none.

    Raises HostError where other machines could reach it without one.
    """
    if login is None and not is_loopback(address):
        raise HostError(f"The page is not served at {address} without a password", remedy="give it one (--auth)")
    app = FastAPI(title="Train LoRA", docs_url=None, redoc_url=None)
    token = secrets.token_urlsafe(32)
    gradio_app: list[Any] = []  # made below, after the routes that it would hide
    # Whoever may load the page may train with it; without a login the API has nothing to lock.
    api.install(app, runner=runner, host=host, token=token, credentials=dict([login] if login else []), api_enabled=True,
                logged_in=lambda cookies: api.login_of(gradio_app[0])(cookies), program="page without a WebUI")
    app.add_api_route(f"{api.PREFIX}/page.js", _script, include_in_schema=False)
    app.add_api_route(f"{api.PREFIX}/page.css", _style, include_in_schema=False)
    app.add_api_route(f"{api.PREFIX}/{_IMPORTED_STYLE.name}", _imported_style, include_in_schema=False)
    tab = build_tab(runner=runner, host=host, token=token)
    # Rendered into a page of its own just as the WebUI renders it into its tabs.
    with gr.Blocks(title="Train LoRA", analytics_enabled=False, theme=_theme()) as page, gr.Column(
            elem_classes=["lora-train-standalone"]):
        tab.render()
    page.auth, page.auth_message = [login] if login else None, ""
    gr.mount_gradio_app(app, page, path="/")
    gradio_app.append(app.routes[-1].app)  # type: ignore[attr-defined]
    app.add_middleware(_Guard, loopback_only=is_loopback(address))
    return app


def _script() -> Response:
    return Response(b"\n".join(path.read_bytes() for path in SCRIPTS), media_type="text/javascript")


def _style() -> Response:
    return Response(b"\n".join(path.read_bytes() for path in STYLES), media_type="text/css")


def _imported_style() -> Response:
    return Response(_IMPORTED_STYLE.read_bytes(), media_type="text/css")


def _theme() -> gr.themes.Base:
    # Fonts by name only: gradio's own theme asks Google for them.
    return gr.themes.Default(font=["Source Sans Pro", "ui-sans-serif", "system-ui", "sans-serif"],
                             font_mono=["ui-monospace", "Consolas", "monospace"])


class _Guard:
    """Refuses requests that a foreign web page makes, and keeps our page from contacting other servers.

    A name of the attacker's own that resolves to 127.0.0.1 shows in Host; a page of another origin shows in Origin,
    which gradio by itself lets pass.
    """

    def __init__(self, app: ASGIApp, *, loopback_only: bool) -> None:
        self._app, self._loopback_only = app, loopback_only

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refusal = self._refusal(scope) if scope["type"] in ("http", "websocket") else ""
        if refusal and scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        elif refusal:
            await Response(refusal, 403, media_type="text/plain")(scope, receive, send)
        else:
            await self._app(scope, receive, _rewriting(send) if scope["type"] == "http" else send)

    def _refusal(self, scope: Scope) -> str:
        headers = Headers(scope=scope)
        host, origin = headers.get("host", "").lower(), headers.get("origin")
        # "localhost:7860" -> "localhost", "[::1]:7860" -> "[::1]".
        if self._loopback_only and not is_loopback(re.sub(r":\d+$", "", host)):
            return "This page is served to this machine only; open it as http://localhost."
        if origin is not None and not api.same_origin(origin, host):
            return "A request from another web page is not accepted."
        return "There is nothing here." if scope["path"].startswith(_CLOSED) else ""


def _rewriting(send: Send) -> Send:
    """As `send`, but puts our script and style into HTML pages, and removes and forbids what is loaded from elsewhere."""
    start: Message | None = None
    body = b""

    async def rewriting(message: Message) -> None:
        nonlocal start, body
        if message["type"] == "http.response.start" and Headers(raw=message["headers"]).get("content-type", "").startswith(
                "text/html"):
            start = message
        elif start is None:
            await send(message)
        else:
            body += message.get("body", b"")
            if not message.get("more_body"):
                body = _OUTSIDE.sub(b"", body).replace(b"</head>", _OUR_HEAD + b"</head>", 1)
                headers = MutableHeaders(raw=list(start["headers"]))
                headers.update({"content-length": str(len(body)), "content-security-policy": _POLICY})
                await send({**start, "headers": headers.raw})
                await send({"type": "http.response.body", "body": body})

    return rewriting
