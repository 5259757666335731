"""Images beside each other, to look at."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image

from tools.bench.real_images import SIDE, to_image


def save_sheet(path: Path, rows: Sequence[torch.Tensor], *, most: int = 16) -> None:
    """Images [n, 3, 128, 128] under each other, a line for each of `rows`, at most `most` in a line, evenly chosen."""
    count = min(most, len(rows[0]))
    chosen = [index * len(rows[0]) // count for index in range(count)]
    sheet = Image.new("RGB", (count * SIDE, len(rows) * SIDE), "white")
    for line, images in enumerate(rows):
        for column, index in enumerate(chosen):
            sheet.paste(to_image(images[index]), (column * SIDE, line * SIDE))
    sheet.save(path)
