"""The caption check as one image: originals on the left, beside them samples of the model from their captions."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from lib_lora_train.dataset.crop_sheet import Font, font_for
from lib_lora_train.dataset.images import read_image
from lib_lora_train.errors import DatasetError, plain_line
from lib_lora_train.evaluation.caption_check import Checked

_SIDE, _MARGIN, _TEXT, _LINE = 160, 12, 320, 17
_LONGEST = 1000


def draw_checks(checked: Sequence[Checked], *, most: int = 48) -> Image.Image:
    """The first `most` rows under each other on white: the original, the samples, score and caption.

    Images are shrunk to fit 160 pixels. Letters that no font of this machine has are drawn as boxes or question marks.
    """
    rows = checked[:most]
    generated = max((len(row.images) for row in rows), default=0)
    across = _SIDE + _MARGIN
    sheet = Image.new("RGB", (_MARGIN + across * (1 + generated) + _TEXT, _MARGIN + max(1, len(rows)) * across), "white")
    draw, font = ImageDraw.Draw(sheet), font_for("".join(text for row in rows for text in _texts(row)), 13)
    for line, row in enumerate(rows):
        top = _MARGIN + line * across
        for column, image in enumerate((_original(row), *row.images)):
            small = image.copy()
            small.thumbnail((_SIDE, _SIDE))
            sheet.paste(small, (_MARGIN + column * across + (_SIDE - small.width) // 2, top + (_SIDE - small.height) // 2))
        lines = [part for text in _texts(row) for part in _wrapped(text, draw, font)]
        for number, text in enumerate(lines[:_SIDE // _LINE]):
            draw.text((_MARGIN + across * (1 + generated), top + number * _LINE), text, fill="black", font=font)
    return sheet


def _texts(row: Checked) -> list[str]:
    if row.problem or row.score is None or row.gain is None:
        facts = [row.problem]
    else:
        facts = [f"score {row.score:.0f}   loss {-row.gain:+.1%}"]
        if row.similarity is not None:
            facts.append(f"similarity {row.similarity:.2f}")
    return [row.path.name, *facts, row.caption]


def _wrapped(text: str, draw: ImageDraw.ImageDraw, font: Font) -> list[str]:
    """`text` in lines that fit the column: cut at spaces where there are some, as Chinese and Japanese have none."""
    if not isinstance(font, ImageFont.FreeTypeFont):  # Pillow's own small font knows Latin-1 only
        text = text.encode("latin-1", "replace").decode("latin-1")
    # Letter by letter and each letter once: measuring whole lines again and again takes seconds for a page of captions.
    widths: dict[str, float] = {}
    lines, line = [], ""
    for letter in plain_line(text)[:_LONGEST]:
        if letter not in widths:
            widths[letter] = draw.textlength(letter, font=font)
        if sum(map(widths.__getitem__, line)) + widths[letter] > _TEXT - _MARGIN:
            head, space, tail = line.rpartition(" ")
            lines.append(head if space else line)
            line = tail if space else ""
        line += letter
    return [*lines, line]


def _original(row: Checked) -> Image.Image:
    try:
        return read_image(row.path)
    except DatasetError:
        return Image.new("RGB", (_SIDE, _SIDE), "lightgrey")
