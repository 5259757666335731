"""One image that shows what training would cut off: each image of a report, with the part it loses dimmed."""

from __future__ import annotations

import math

from PIL import Image, ImageDraw, ImageFont

from lib_lora_train.dataset.findings import DatasetReport, Examined
from lib_lora_train.dataset.images import read_image
from lib_lora_train.errors import DatasetError, plain_line

_CELL, _MARGIN, _LINE = 200, 14, 17
_MOST_ACROSS = 8
_PAPER, _INK, _FRAME = (255, 255, 255), (32, 32, 32), (214, 40, 40)
_DIMMED = 0.4  # of the image is left to be seen where it is lost; the rest is grey
_FONTS = ("DejaVuSans.ttf", "arial.ttf", "Arial.ttf")
# Names in every script; Windows, macOS, Linux.
_WIDE_FONTS = ("meiryo.ttc", "msyh.ttc", "malgun.ttf", "Hiragino Sans GB.ttc", "PingFang.ttc", "Arial Unicode.ttf",
               "NotoSansCJK-Regular.ttc", "wqy-microhei.ttc")

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def crop_sheet(report: DatasetReport, *, most: int = 48) -> Image.Image:
    """Up to `most` images, those that lose most first; below each its name, its sizes and its loss.

    Images that cannot be read, or that no training size takes, are left out. Raises DatasetError if none is left.
    """
    chosen = sorted((image for image in report.images if image.bucket != (0, 0)), key=lambda p: -p.crop_loss)
    cells = []
    for image in chosen:
        if len(cells) == most:
            break
        try:
            cells.append(_cell(image))
        except DatasetError:
            continue  # gone or damaged since the report
    if not cells:
        raise DatasetError(f"There is nothing to show of {report.folder}", why="no picture in it can be used")
    across = min(_MOST_ACROSS, len(cells), math.ceil(math.sqrt(len(cells) * 1.3)))
    width, height = _CELL + _MARGIN, _CELL + 2 * _LINE + _MARGIN
    sheet = Image.new("RGB", (_MARGIN + across * width, _MARGIN + math.ceil(len(cells) / across) * height), _PAPER)
    for number, cell in enumerate(cells):
        sheet.paste(cell, (_MARGIN + number % across * width, _MARGIN + number // across * height))
    return sheet


def dimmed(image: Image.Image, kept: tuple[float, float, float, float]) -> Image.Image:
    """The RGB image with everything outside `kept` (left, top, right, bottom in pixels) greyed, and a frame around it."""
    left, top = (min(round(start), side - 1) for start, side in zip(kept, image.size, strict=False))
    box = left, top, max(left + 1, round(kept[2])), max(top + 1, round(kept[3]))  # at least a pixel, of a thin one too
    grey = Image.blend(Image.new("RGB", image.size, (128, 128, 128)), image.convert("L").convert("RGB"), _DIMMED)
    grey.paste(image.crop(box), box[:2])
    if box != (0, 0, *image.size):
        ImageDraw.Draw(grey).rectangle((box[0], box[1], box[2] - 1, box[3] - 1), outline=_FRAME,
                                       width=max(1, max(image.size) // 100))
    return grey


def _cell(examined: Examined) -> Image.Image:
    image = read_image(examined.path)
    if image.size != (examined.width, examined.height):
        raise DatasetError(f"The picture {examined.path} has changed since it was examined")
    scale = min(_CELL / image.width, _CELL / image.height)
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    small = image.resize(size, Image.Resampling.LANCZOS)
    across, down = size[0] / image.width, size[1] / image.height
    left, top, right, bottom = examined.kept
    shown = dimmed(small, (left * across, top * down, right * across, bottom * down))
    cell = Image.new("RGB", (_CELL, _CELL + 2 * _LINE), _PAPER)
    cell.paste(shown, ((_CELL - size[0]) // 2, (_CELL - size[1]) // 2))
    pen = ImageDraw.Draw(cell)
    _write(pen, (0, _CELL + 1), examined.path.name)
    lost = f", -{100 * examined.crop_loss:.0f} %" if examined.crop_loss >= 0.005 else ""
    _write(pen, (0, _CELL + _LINE),
           f"{examined.width}×{examined.height} → {examined.bucket[0]}×{examined.bucket[1]}{lost}")
    return cell


def _write(pen: ImageDraw.ImageDraw, corner: tuple[int, int], text: str) -> None:
    """`text` in one line as wide as a cell, its middle left out where it is longer."""
    text = plain_line(text)
    font = font_for(text, 12)
    if isinstance(font, ImageFont.ImageFont):
        text = text.replace("→", ">").encode("latin-1", "replace").decode("latin-1")  # Pillow's own font has no more
    full, half = text, len(text) // 2
    while half > 3 and pen.textlength(text, font=font) > _CELL:
        half -= 1
        text = f"{full[:half]}..{full[-half:]}"
    pen.text(corner, text, fill=_INK, font=font)


def font_for(text: str, size: int) -> Font:
    """A font of this machine that has the letters of `text`, if one is found; else Pillow's own, which knows Latin-1 only."""
    wide = any(ord(letter) >= 0x2E80 for letter in text)
    for name in (*_WIDE_FONTS, *_FONTS) if wide else _FONTS:
        try:
            return ImageFont.truetype(name, size)
        except OSError:
            continue
    return ImageFont.load_default()
