"""The tab where the extension cannot be used: one sentence. It needs nothing of the package, and runs in older Pythons too."""

from __future__ import annotations

import html
import sys
from typing import Any

import gradio as gr

OLDEST_PYTHON = (3, 10)


def sentence(why: str, version: tuple[int, ...] = sys.version_info[:2]) -> str:
    """What the tab says; `why` is the error's text, `version` that of Python."""
    if version < OLDEST_PYTHON:
        return (f"Train LoRA needs Python 3.10 or newer, and this WebUI runs in Python {version[0]}.{version[1]}; "
                "update the WebUI's environment.")
    return (f"Train LoRA does not know this WebUI ({why}); it runs in AUTOMATIC1111, Forge, Forge Neo and reForge, "
            "and alone with tools/start.py.")


def tabs(why: str) -> list[tuple[Any, str, str]]:
    """The tab as the WebUI wants it: blocks, title, id."""
    with gr.Blocks(analytics_enabled=False) as tab:
        gr.HTML(f"<p>{html.escape(sentence(why))}</p>", elem_id="lora_train_unsupported")
    return [(tab, "Train LoRA", "lora_train")]
