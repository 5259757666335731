"""The reference in docs/api.md: every route of the API as the program registers it, and what each takes and gives, from the
docstrings of `lib_lora_train/api/`. `settings_docs.py` writes it."""

from __future__ import annotations

import ast
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

API = Path(__file__).resolve().parent.parent / "lib_lora_train" / "api"
_ROUTE = re.compile(r"^    (GET|POST)\b", re.MULTILINE)


def routes() -> list[tuple[str, str, str]]:
    """(method, route, what it is about) of all that is registered, in that order."""
    from fastapi import FastAPI

    from lib_lora_train import api
    from lib_lora_train.host.standalone import StandaloneHost
    from lib_lora_train.run.runner import Runner

    app = FastAPI()
    with tempfile.TemporaryDirectory() as made:
        host = StandaloneHost(None, lora_folder=Path(made), runs_folder=Path(made) / "runs")
        api.install(app, runner=Runner(), host=host, token="-", credentials={}, api_enabled=True, logged_in=lambda _: True)
    return [(method, route.path.removeprefix(f"{api.PREFIX}/"), route.summary or "")
            for route in app.routes if "lora-train" in getattr(route, "tags", ()) for method in sorted(route.methods)]


def details() -> dict[str, str]:
    """{module: its docstring} of those that describe routes."""
    found = {path.name: ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")), clean=False) or ""
             for path in sorted(API.glob("*.py"))}
    return {name: text for name, text in found.items() if _ROUTE.search(text)}


def reference() -> Iterator[str]:
    """The lines of the reference."""
    yield "| route | |"
    yield "|---|---|"
    for method, route, about in routes():
        yield f"| `{method} {route}` | {about} |"
    for name, text in details().items():
        yield f"\n### {'the routes above all' if name == '__init__.py' else name.removesuffix('.py')}\n"
        yield f"```text\n{text.strip()}\n```"
