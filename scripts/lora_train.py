"""The WebUI's door: it registers the tab and the API. Everything else lives in `lib_lora_train`."""

from __future__ import annotations

import secrets
from typing import Any

from modules.script_callbacks import on_app_started, on_script_unloaded, on_ui_settings, on_ui_tabs

from lib_lora_train import api
from lib_lora_train.host.webui.allowed_paths import add_option
from lib_lora_train.host.webui.host import HOST, about, api_access
from lib_lora_train.run.runner import RUNNER
from lib_lora_train.ui.layout import build_tab

# Made anew whenever the page is built, and shown to that page only.
TOKEN = secrets.token_urlsafe(32)


def tabs() -> list[tuple[Any, str, str]]:
    """The tab as the WebUI wants it: blocks, title, id."""
    return [(build_tab(runner=RUNNER, host=HOST, token=TOKEN), "Train LoRA", "lora_train")]


def routes(_: Any, app: Any) -> None:
    """The API, guarded as the WebUI's own is."""
    enabled, users = api_access()
    api.install(app, runner=RUNNER, host=HOST, token=TOKEN, credentials=api.parse_credentials(users), api_enabled=enabled,
                program=about())


on_ui_settings(add_option)
on_ui_tabs(tabs)
on_app_started(routes)
# "Reload UI" waits, at most 60 seconds, until a running job has saved and ended; a step and a save take less.
on_script_unloaded(lambda: RUNNER.stop(save=True) and RUNNER.wait(60.0))
