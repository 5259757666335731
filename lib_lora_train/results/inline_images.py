"""A run's images inside an HTML file: small JPEGs as data URLs, so that the file stands alone."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from PIL import Image

SIDE = 256  # pixels of the longer side
_MOST_STEPS, _MOST_PROMPTS = 10, 6  # of the strips
T = TypeVar("T")


def image(folder: Path, name: str, label: str) -> str:
    """The image `name` (with slashes, relative to the run's folder) with a label below it; a click enlarges it."""
    url = _data_url(folder, name)
    shown = f'<img src="{url}" alt="{escape(label)}">' if url else '<span class="gone">gone</span>'
    return f'<label class="image"><input type="checkbox">{shown}{escape(label)}</label>'


def _data_url(folder: Path, name: str) -> str:
    """The image as a JPEG of at most `SIDE` pixels; "" where it is gone, damaged or not in the folder."""
    parts = PurePosixPath(name.replace("\\", "/")).parts
    if not parts or ".." in parts or not set(parts[0]).isdisjoint("/:"):
        return ""
    buffer = io.BytesIO()
    try:
        with Image.open(folder.joinpath(*parts), formats=("PNG", "JPEG", "WEBP")) as read:
            small = read.convert("RGB")
            small.thumbnail((SIDE, SIDE), reducing_gap=2.0)
            small.save(buffer, "JPEG", quality=82)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):  # what Pillow raises of damaged files
        return ""
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def strips(folder: Path, samples: Sequence[Mapping[str, Any]]) -> str:
    """For each prompt its samples over time, the first and the last among them."""
    made = []
    for prompt in samples[:_MOST_PROMPTS]:
        files = spread(prompt["pictures"], _MOST_STEPS)
        row = "".join(image(folder, entry["file"], f"step {entry['step']}" if entry["step"] else "base model")
                      for entry in files)
        seed = f", seed {files[0]['seed']}" if files else ""
        made.append(f'<h3>{escape(prompt["prompt"])}<span class="note">{seed}</span></h3><div class="strip">{row}</div>')
    left = len(samples) - _MOST_PROMPTS
    return "".join(made) + (f'<p class="note">{left} more prompts are in the folder of the run.</p>' if left > 0 else "")


def spread(entries: Sequence[T], most: int) -> list[T]:
    """At most `most` of the entries, evenly, with the first and the last."""
    if len(entries) <= most:
        return list(entries)
    return [entries[round(index * (len(entries) - 1) / (most - 1))] for index in range(most)]
