"""The notice that a run has ended, to an address of the user's: a chat's webhook, or a program of their own.

The address is kept beside the queue, since it belongs to this machine and to no recipe; it mostly holds a secret, and is never
shown whole. The file is `webhook-….json` with a random part: WebUIs serve the folder it is in to whoever knows a file's name,
but list none. What is sent names no folder of the disk.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import http.client
import json
import logging
import secrets
import threading
import urllib.error
import urllib.request
from pathlib import Path
from urllib.parse import urlsplit

from lib_lora_train import __version__
from lib_lora_train.errors import HostError, OutputError, SettingError, translated
from lib_lora_train.run.diagnostics import Private
from lib_lora_train.run.record import past_run, read_settings
from lib_lora_train.storage.atomic import remove, write_atomic

log = logging.getLogger(__name__)
FILE_NAMES, _GUESSED = "webhook*.json", "webhook.json"  # the latter was the name at first
_TIMEOUT, _TRIES, _MOST_TEXT = 10.0, 2, 1800  # seconds; Discord takes 2000 letters


@dataclasses.dataclass(frozen=True)
class Notice:
    """How a run ended. `run` is its id, "" for one that could not begin; `file` the name of its newest file."""

    run: str
    name: str
    outcome: str
    message: str
    step: int = 0
    file: str = ""

    @classmethod
    def of(cls, folder: Path) -> Notice:
        """That of the run in `folder`, without folders and users."""
        past = past_run(folder)
        file = past.path.replace("\\", "/").rpartition("/")[2]
        message = past.message.replace(past.path, file) if past.path else past.message
        private = Private.of(read_settings(folder), host=None, run=folder)
        return cls(past.id, past.name, past.outcome, private.replaced(message), past.steps, file)

    def body(self) -> bytes:
        """As JSON; "content" is what Discord shows of it, "text" what Slack does."""
        text = f"{self.name} ({self.outcome}): {self.message}"[:_MOST_TEXT]
        return json.dumps({**dataclasses.asdict(self), "content": text, "text": text}).encode()


class Webhook:
    """The address that is kept in a folder of runs. `problem` is why the last notice did not arrive, "" if it did."""

    def __init__(self, runs: Path) -> None:
        self._runs, self.problem = runs, ""
        self._last: threading.Thread | None = None

    def address(self) -> str:
        """The address, "" for none."""
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            for file in self._files():
                address = _checked(str(json.loads(file.read_text(encoding="utf-8"))["webhook"]))
                if file.name == _GUESSED:
                    with contextlib.suppress(OutputError):
                        self.keep(address)
                return address
        return ""

    def _files(self) -> list[Path]:
        return sorted(self._runs.glob(FILE_NAMES))

    def shown(self) -> str:
        """The address without what may be secret in it."""
        found = urlsplit(self.address())
        return f"{found.scheme}://{found.hostname}/…" if found.hostname else ""

    def keep(self, address: str) -> None:
        """Keep another address, or with "" none. Raises SettingError for what is none, OutputError."""
        address, self.problem = _checked(address), ""
        with translated("the webhook was kept"):
            before, file = self._files(), self._runs / f"webhook-{secrets.token_urlsafe(24)}.json"
            if address:
                write_atomic(file, json.dumps({"webhook": address}).encode())
                with contextlib.suppress(OSError):
                    file.chmod(0o600)
            for old in before:
                remove(old)

    def send(self, told: Notice | Path) -> None:
        """Send a notice, or that of the end of the run in a folder, in a thread of its own. Nothing where there is no address;
        what goes wrong is logged once."""
        if address := self.address():
            self._last = threading.Thread(target=self._send, args=(address, told), name="lora-train-webhook", daemon=True)
            self._last.start()

    def _send(self, address: str, told: Notice | Path) -> None:
        try:
            self._deliver(address, Notice.of(told) if isinstance(told, Path) else told)
        except Exception:
            log.exception("The notice of the run's end could not be put together")

    def wait(self) -> None:
        """Wait until the last notice was sent, or could not be: for programs that end."""
        if self._last is not None:
            self._last.join(_TRIES * _TIMEOUT + 1)

    def test(self) -> None:
        """Send one now, and wait for it. Raises HostError where it does not arrive."""
        self._deliver(self.address(), Notice("", "Train LoRA", "test", "A message like this one comes when a run has ended."))
        if self.problem:
            raise HostError("The webhook was kept, and does not answer as it should", why=self.problem,
                            remedy="check the address")

    def _deliver(self, address: str, notice: Notice) -> None:
        for _ in range(_TRIES):
            try:
                request = urllib.request.Request(address, data=notice.body(), headers={
                    "Content-Type": "application/json", "User-Agent": f"train-lora/{__version__}"})
                with _OPENER.open(request, timeout=_TIMEOUT):
                    self.problem = ""
                    return
            except urllib.error.HTTPError as error:
                self.problem = f"the server answers {error.code}"
                error.close()
            except OSError as error:
                self.problem = str(getattr(error, "reason", "") or error) or type(error).__name__
            except (http.client.HTTPException, ValueError) as error:  # whose texts may hold the address
                self.problem = type(error).__name__
        log.warning("The notice of %s could not be sent to %s: %s", notice.name, self.shown(), self.problem)


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect is an error: it would be followed with a GET, which tells nobody anything."""

    def redirect_request(self, *_: object) -> None:
        """None, so that the answer raises HTTPError."""


_OPENER = urllib.request.build_opener(_NoRedirect)


@functools.lru_cache(maxsize=16)
def webhook_of(runs: Path) -> Webhook:
    """The one of that folder of runs."""
    return Webhook(runs)


def _checked(address: str) -> str:
    address = address.strip()
    try:
        found = urlsplit(address)
        found.port  # noqa: B018 - raises ValueError for what is no number
        plain = address.isascii() and address.isprintable() and " " not in address and "@" not in found.netloc
        usable = not address or bool(found.scheme in ("http", "https") and found.hostname) and plain
    except ValueError:
        usable = False
    if not usable:
        raise SettingError("The webhook is no address", why="it must begin with https or http, without a user, spaces or "
                           "letters that are not ASCII", remedy="copy it from the chat's settings")
    return address
