"""The catalogues of translations, as the page's script asks for them: GET /lora-train/v1/languages/zh_CN.json.

They are part of the extension and the same for everybody, so nobody needs to be known to read them.
"""

from __future__ import annotations

from pathlib import Path

from fastapi import FastAPI
from fastapi.responses import FileResponse, JSONResponse, Response

from lib_lora_train.api.gate import PREFIX

CATALOGUES = Path(__file__).resolve().parents[2] / "localizations"


def add_route(app: FastAPI) -> None:
    """Serve each catalogue of the folder by its name."""
    app.add_api_route(f"{PREFIX}/languages/{{name}}", _catalogue, methods=["GET"], include_in_schema=False)


def _catalogue(name: str) -> Response:
    files = {path.name: path for path in CATALOGUES.glob("*.json")}
    if name not in files:
        return JSONResponse({"error": "There is no such language."}, 404)
    return FileResponse(files[name], media_type="application/json", headers={"Cache-Control": "no-cache"})
