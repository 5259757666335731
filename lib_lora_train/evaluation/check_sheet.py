"""The caption check as one picture: originals on the left, beside them what the model paints from their captions."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from lib_lora_train.dataset.pictures import read_picture
from lib_lora_train.errors import DatasetError
from lib_lora_train.evaluation.caption_check import Checked

_SIDE, _MARGIN, _TEXT, _LINE = 160, 12, 320, 17
_FONTS = ("NotoSansCJK-Regular.ttc", "meiryo.ttc", "msyh.ttc", "Hiragino Sans GB.ttc", "DejaVuSans.ttf", "arial.ttf",
          "Arial.ttf")


def draw_checks(checked: Sequence[Checked], *, most: int = 48) -> Image.Image:
    """The first `most` rows under each other on white: the original, the painted pictures, score and caption.

    Pictures are shrunk to fit 160 pixels. Letters that no font of this machine has are drawn as boxes or question marks.
    """
    rows = checked[:most]
    painted = max((len(row.pictures) for row in rows), default=0)
    across = _SIDE + _MARGIN
    sheet = Image.new("RGB", (_MARGIN + across * (1 + painted) + _TEXT, _MARGIN + max(1, len(rows)) * across), "white")
    pen, font = ImageDraw.Draw(sheet), _font(13)
    for line, row in enumerate(rows):
        top = _MARGIN + line * across
        for column, picture in enumerate((_original(row), *row.pictures)):
            small = picture.copy()
            small.thumbnail((_SIDE, _SIDE))
            sheet.paste(small, (_MARGIN + column * across + (_SIDE - small.width) // 2, top + (_SIDE - small.height) // 2))
        for number, text in enumerate(_lines(row)[:_SIDE // _LINE]):
            shown = text if isinstance(font, ImageFont.FreeTypeFont) else text.encode("latin-1", "replace").decode("latin-1")
            pen.text((_MARGIN + across * (1 + painted), top + number * _LINE), shown, fill="black", font=font)
    return sheet


def _lines(row: Checked) -> list[str]:
    if row.problem or row.score is None or row.gain is None:
        facts = textwrap.wrap(row.problem, 42)
    else:
        facts = [f"score {row.score:.0f}   loss {-row.gain:+.1%}"]
        if row.similarity is not None:
            facts.append(f"similarity {row.similarity:.2f}")
    return [row.path.name, *facts, *textwrap.wrap(row.caption, 42)]


def _original(row: Checked) -> Image.Image:
    try:
        return read_picture(row.path)
    except DatasetError:
        return Image.new("RGB", (_SIDE, _SIDE), "lightgrey")


def _font(size: int) -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    for name in _FONTS:
        try:
            return ImageFont.truetype(name, size)
        except OSError:
            continue
    return ImageFont.load_default()
