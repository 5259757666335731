"""The routes for files of settings and for the user's presets, as JSON or TOML. Guarded as every route is (`gate.py`).

    POST settings/read?name=  the bytes of a file of settings, of a LoRA its header -> what `Imported.to_json` says of it
    POST settings/file        {"settings": {...}} -> these settings as a TOML file, of a run with GET settings/file?run=ID
    GET  presets              {"presets": [{"name", "description", "version", "own"}]}
    POST presets/save         {"name", "settings"} -> {"name", "version"}: keep them under a name of one's own
    POST presets/rename       {"name", "to"} -> {"name", "version"}
    POST presets/delete       {"name"} -> {"name", "version"} of what was there
    GET  presets/file?name=   a preset as a TOML file, to be given away
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

from fastapi import Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import Response
from pydantic import BaseModel, StrictStr, constr

from lib_lora_train.api.gate import Gate, Refused
from lib_lora_train.api.service import folder_of
from lib_lora_train.host.port import Paths
from lib_lora_train.run import presets
from lib_lora_train.run.record import read_settings
from lib_lora_train.settings import flat, parse
from lib_lora_train.settings.importing import import_bytes
from lib_lora_train.settings.presets import Preset
from lib_lora_train.settings.toml import write_toml
from lib_lora_train.studio.requests import validated

_LARGEST_FILE = 32 << 20
"""Of a LoRA only the header is sent; with a preview and the counts of tags it is some megabytes."""


class SettingsRequest(BaseModel):
    """What these routes are sent."""

    name: constr(strict=True, max_length=1000) = ""
    to: constr(strict=True, max_length=1000) = ""
    run: StrictStr = ""
    settings: dict[StrictStr, Any] = {}


def add_routes(gate: Gate, host: Paths) -> None:
    """Add them, on the host's folders."""
    folder = host.presets_folder

    def request_of(data: Mapping[str, Any]) -> SettingsRequest:
        return validated(SettingsRequest, data)

    async def receive(request: Request) -> object:
        received = bytearray()
        async for part in request.stream():
            received += part
            if len(received) > _LARGEST_FILE:
                raise Refused(413, f"A file of settings is not larger than {_LARGEST_FILE >> 20} MiB.")
        name = request_of(request.query_params).name or "settings.toml"
        return (await run_in_threadpool(import_bytes, bytes(received), name=name)).to_json()

    gate.add_upload("settings/read", receive, "What a file of settings, or a LoRA, says")
    gate.add("POST", "settings/file", lambda _, body: _toml(write_toml(flat(parse(request_of(body).settings))), "settings"),
             "Settings as a TOML file")
    gate.add("GET", "settings/file", lambda query, _: _of_run(request_of(query).run, host), "A run's settings as a TOML file")
    gate.add("GET", "presets", lambda *_: {"presets": [
        {"name": p.name, "description": p.description, "version": p.version, "own": p.own} for p in presets.offered(folder)]},
        "Every preset")
    for name, change in {
            "save": lambda request: presets.save_preset(request.name, request.settings, folder),
            "rename": lambda request: presets.rename_preset(request.name, request.to, folder),
            "delete": lambda request: presets.delete_preset(request.name, folder)}.items():
        gate.add("POST", f"presets/{name}", lambda _, body, change=change: _told(change(request_of(body))),
                 f"{name.capitalize()} a preset of one's own")
    gate.add("GET", "presets/file", lambda query, _: _toml(presets.preset_text(found := presets.find_preset(
        request_of(query).name, folder)), found.name),
             "A preset as a TOML file")


def _told(preset: Preset) -> dict[str, object]:
    return {"name": preset.name, "version": preset.version}


def _of_run(run: str, host: Paths) -> Response:
    folder = folder_of(run, host)
    return _toml(write_toml(read_settings(folder)), folder.name)


def _toml(text: str, name: str) -> Response:
    return Response(text.encode("utf-8", "replace"), media_type="application/toml", headers={
        "Content-Disposition": f"attachment; filename*=UTF-8''{quote(name)}.toml", "Cache-Control": "no-store"})
