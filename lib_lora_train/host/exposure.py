"""Whether people other than this machine's user reach a WebUI, told by how it was started."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping

# A switch that is set -> others reach it, or are expected to: the WebUI's own `webui_is_non_local` counts the first four.
# A login is for somebody; a path below a proxy's is a proxy; hidden folders are hidden from somebody.
_FLAGS = ("share", "listen", "ngrok", "server_name", "gradio_auth", "gradio_auth_path", "api_auth", "subpath",
          "hide_ui_dir_config", "webui_is_non_local")


def reached_by_others(flags: Mapping[str, object], environment: Mapping[str, str]) -> bool:
    """`flags` are the WebUI's command line options by name; `environment` is the process's."""
    return any(flags.get(name) for name in _FLAGS) or (
        # gradio listens there when the WebUI names no address.
        "GRADIO_SERVER_NAME" in environment and not is_loopback(environment["GRADIO_SERVER_NAME"]))


def is_loopback(address: str) -> bool:
    """Whether only this machine can reach the address."""
    if address.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(address.strip("[]")).is_loopback
    except ValueError:
        return False
