"""A small client of the API, with nothing but Python's own library: copy this file beside your program.

    from client import LoraTrain

    webui = LoraTrain("http://127.0.0.1:7860")              # started with --api; with --api-auth: user="…", password="…"
    run = webui.train({"output_name": "zzk", "train_data_dir": "D:/pictures/zzk", "trigger_word": "zzk"})
    print(run["outcome"], run["message"])

docs/api.md lists the routes.
"""

from __future__ import annotations

import base64
import json
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping
from typing import Any


class Refusal(Exception):
    """What the API refuses: the sentence, and the HTTP status in `status`."""

    def __init__(self, status: int, sentence: str) -> None:
        super().__init__(sentence)
        self.status = status


class LoraTrain:
    """The API at `url`, that of a WebUI or of the page without one."""

    def __init__(self, url: str = "http://127.0.0.1:7860", *, user: str = "", password: str = "",
                 timeout: float = 60.0) -> None:
        self._root, self._timeout = f"{url.rstrip('/')}/lora-train/v1/", timeout
        self._headers = {"Content-Type": "application/json"}
        if user:
            self._headers["Authorization"] = f"Basic {base64.b64encode(f'{user}:{password}'.encode()).decode()}"

    def get(self, route: str, query: Mapping[str, object] | None = None) -> Any:
        """GET a route: what its JSON holds, or the bytes of a file. Raises Refusal, and OSError where nobody answers."""
        return self._send(f"{route}?{urllib.parse.urlencode(query)}" if query else route, None)

    def post(self, route: str, body: Mapping[str, object] | None = None) -> Any:
        """POST JSON to a route. Raises as `get`."""
        return self._send(route, json.dumps(dict(body or {})).encode())

    def train(self, settings: Mapping[str, object], *, every: float = 2.0,
              on_status: Callable[[dict[str, Any]], None] = lambda status: None) -> dict[str, Any]:
        """Start a run with settings by name and wait for its end; how it ended, as `runs` has it. `on_status` sees each
        status."""
        return self.wait(self.post("start", {"settings": dict(settings)})["run"], every=every, on_status=on_status)

    def wait(self, run: str, *, every: float = 2.0,
             on_status: Callable[[dict[str, Any]], None] = lambda status: None) -> dict[str, Any]:
        """Wait for the end of the run of this id, looking so often, in seconds."""
        while (status := self.get("status"))["running"] and status["run"] == run:
            on_status(status)
            time.sleep(every)
        return next(one for one in self.get("runs")["runs"] if one["id"] == run)

    def _send(self, route: str, body: bytes | None) -> Any:
        request = urllib.request.Request(self._root + route, data=body, headers=self._headers)
        try:
            with urllib.request.urlopen(request, timeout=self._timeout) as answer:
                data = answer.read()
                return json.loads(data) if answer.headers.get_content_type() == "application/json" else data
        except urllib.error.HTTPError as error:
            with error:
                try:
                    sentence = json.loads(error.read())["error"]
                except (ValueError, KeyError, TypeError):
                    sentence = str(error)
            raise Refusal(error.code, sentence) from None
