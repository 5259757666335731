"""The samples of a run on one sheet: a row a prompt, a column a step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from lib_lora_train.dataset.crop_sheet import font_for
from lib_lora_train.errors import plain_line
from lib_lora_train.results.inline_images import small_image

_SIDE, _MARGIN, _LINE = 192, 10, 18


def draw_samples(folder: Path, samples: Sequence[Mapping[str, Any]]) -> Image.Image:
    """The samples (`overview`'s) of the run in `folder` on white, each shrunk to fit 192 pixels, its step below it and the
    prompt above its row."""
    steps = sorted({entry["step"] for prompt in samples for entry in prompt["pictures"]})
    across, down = _SIDE + _MARGIN, _SIDE + _MARGIN + 2 * _LINE
    sheet = Image.new("RGB", (_MARGIN + across * max(1, len(steps)), _MARGIN + down * max(1, len(samples))), "white")
    draw, font = ImageDraw.Draw(sheet), font_for("".join(prompt["prompt"] for prompt in samples), 13)
    for row, prompt in enumerate(samples):
        top = _MARGIN + row * down
        draw.text((_MARGIN, top), plain_line(prompt["prompt"])[:across * len(steps) // 7], fill="black", font=font)
        for entry in prompt["pictures"]:
            left = _MARGIN + steps.index(entry["step"]) * across
            small = small_image(folder, entry["file"], _SIDE) or Image.new("RGB", (_SIDE, _SIDE), "lightgrey")
            sheet.paste(small, (left, top + _LINE))
            told = f"step {entry['step']}" if entry["step"] else "base model"
            draw.text((left, top + _LINE + small.height + 2), told, fill="grey", font=font)
    return sheet
