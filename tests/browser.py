"""A real browser for the tests of the page, and the page without a WebUI, served to it.

Importing this skips the module that does so where Playwright is not installed; `needs_browser` skips where no browser is.
"""

from __future__ import annotations

import contextlib
import shutil
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import pytest
import uvicorn

from lib_lora_train.host.port import Host
from lib_lora_train.run.runner import Runner
from lib_lora_train.ui.standalone import listen, make_app
from tests.fake_host import FakeHost

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
expect = sync_api.expect
_NAMES = ("chromium", "chromium-browser", "google-chrome")
_CHROMIUM = next(filter(None, map(shutil.which, _NAMES)), None)
_FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
          "--disable-component-update", "--disable-sync"]
needs_browser = pytest.mark.skipif(_CHROMIUM is None, reason=f"none of {', '.join(_NAMES)} is on the PATH")


@contextlib.contextmanager
def launched() -> Iterator[Any]:
    """A browser without a window, closed at the end."""
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=_CHROMIUM, args=_FLAGS if sys.platform.startswith("linux") else [])
        yield browser
        browser.close()


@contextlib.contextmanager
def opened_page(browser: Any, *, patience_ms: int, locale: str = "en-GB") -> Iterator[Any]:
    """An empty page with nothing remembered, closed at the end; then no script in it may have failed."""
    page = browser.new_page(viewport={"width": 1280, "height": 900}, locale=locale)
    page.set_default_timeout(patience_ms)
    expect.set_options(timeout=patience_ms)
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    try:
        yield page
    finally:
        page.close()
    assert errors == []


class ServedPage:
    """The page without a WebUI, served with a host of its own, and a browser's view of it.

    To be used in a `with` block, at whose end the page must have asked nobody else for anything.
    """

    def __init__(self, folder: Path, page: Any, *, host: Host | None = None) -> None:
        """`host` is one without a model if it is not given."""
        self.host, self.runner, self.page, self.folder = host or FakeHost(folder), Runner(), page, folder
        listener = listen("127.0.0.1", 0)
        # From here on connections wait instead of being refused, so the browser may come before the server is ready.
        listener.listen(100)
        self.url = f"http://localhost:{listener.getsockname()[1]}/"
        self._asked: list[str] = []
        page.on("request", lambda request: self._asked.append(request.url))
        self._server = uvicorn.Server(uvicorn.Config(make_app(self.host, runner=self.runner), log_level="error"))
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [listener]}, daemon=True)
        self._thread.start()

    def __enter__(self) -> ServedPage:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.page.close()
        self.runner.stop(save=False)
        assert self.runner.wait(60)
        self._server.should_exit = True
        self._thread.join(60)
        assert [url for url in self._asked if not url.startswith((self.url, "data:", "blob:"))] == []

    def part(self, name: str) -> Any:
        """What has the id lora_train_`name`."""
        return self.page.locator(f"#lora_train_{name}")
