"""The WebUI's door: it registers the tab and the API. Everything else lives in `lib_lora_train`."""

from __future__ import annotations

import logging
import secrets

from modules.script_callbacks import on_app_started, on_script_unloaded, on_ui_settings, on_ui_tabs

TOKEN = secrets.token_urlsafe(32)
"""Made anew whenever the page is built, and shown to that page only."""


def register() -> None:
    """The tab, the API and the page of settings. Raises whatever comes of a WebUI or a Python that is not known here."""
    from lib_lora_train import api
    from lib_lora_train.host.webui.allowed_paths import add_option
    from lib_lora_train.host.webui.host import HOST, about, api_access
    from lib_lora_train.run.runner import RUNNER
    from lib_lora_train.ui.layout import build_tab

    enabled, users = api_access()
    on_ui_settings(add_option)
    on_ui_tabs(lambda: [(build_tab(runner=RUNNER, host=HOST, token=TOKEN), "Train LoRA", "lora_train")])
    on_app_started(lambda _, app: api.install(  # guarded as the WebUI's own API is
        app, runner=RUNNER, host=HOST, token=TOKEN, credentials=api.parse_credentials(users), api_enabled=enabled,
        program=about()))
    # "Reload UI" waits, at most 60 seconds, until a running job has saved and ended; a step and a save take less.
    on_script_unloaded(lambda: api.queue.stop_all(HOST, RUNNER) and RUNNER.wait(60.0))


try:
    register()
except Exception as error:  # a tab that says why, and not an extension that is missing without a word
    from lib_lora_train.ui.unsupported import tabs

    logging.getLogger(__name__).exception("Train LoRA cannot be used here")
    reason = str(error)
    on_ui_tabs(lambda: tabs(reason))
