"""A run's images inside an HTML file: small JPEGs as data URLs, so that the file stands alone."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, TypeVar

from PIL import Image

from lib_lora_train.results.overview import image_of

SIDE = 256  # pixels of the longer side
_MOST_STEPS, _MOST_PROMPTS = 10, 6  # of the strips
T = TypeVar("T")


def image(folder: Path, name: str, label: str) -> str:
    """The image `name` (with slashes, relative to the run's folder) with a label below it; a click enlarges it."""
    small = small_image(folder, name)
    shown = f'<img src="{_data_url(small)}" alt="{escape(label)}">' if small else '<span class="gone">gone</span>'
    return f'<label class="image"><input type="checkbox">{shown}{escape(label)}</label>'


def small_image(folder: Path, name: str, side: int = SIDE) -> Image.Image | None:
    """The image `name` of a run, shrunk to fit `side` pixels; None where it is gone, damaged or none of the run's."""
    path = image_of(folder, name)
    try:
        if path is None:
            return None
        with Image.open(path, formats=("PNG",)) as read:
            small = read.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):  # what Pillow raises of damaged files
        return None
    small.thumbnail((side, side), reducing_gap=2.0)
    return small


def _data_url(small: Image.Image) -> str:
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=82)
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
