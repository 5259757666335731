"""The WebUI's door: registers the tab and the API. Everything else lives in `lib_lora_train`."""

from __future__ import annotations

from modules import script_callbacks

from lib_lora_train.host.webui import HOST, end_before_reload
from lib_lora_train.runner import RUNNER

script_callbacks.on_script_unloaded(lambda: end_before_reload(RUNNER))
