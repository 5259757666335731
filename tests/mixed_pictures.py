"""Thirty images as a user has them: made on the spot, each another, and some of them trouble."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from lib_lora_train import demo

_STYLE = Path(demo.__file__).parent / "style"
_SIZES = ((640, 640), (512, 768), (768, 512), (900, 600), (600, 900), (800, 600))
_TURNED_RIGHT = 6
"""EXIF's word for an image that is to be turned by 90 degrees clockwise when it is shown."""
COUNT = 30
ADDED = 28
"""The broken one and the second copy of one file stay out."""


def mixed_pictures(folder: Path, *, scale: float = 1.0) -> Path:
    """Portraits, landscapes, three transparent ones, two turned by EXIF, one broken, one copied, one saved anew as JPEG.

    The names are words ("cherry-blossom.png"); `scale` makes them smaller, for models that are small.
    """
    folder.mkdir(parents=True)
    sources = sorted(_STYLE.glob("*.png"))
    random = np.random.default_rng(7)
    for number, source in enumerate(sources[:20]):
        image = _image(source, _scaled(_SIZES[number % len(_SIZES)], scale), random)
        if number in (4, 9):
            exif = Image.Exif()
            exif[0x0112] = _TURNED_RIGHT
            # As a camera stores it: lying, with a note to turn it.
            image.rotate(90, expand=True).save(folder / f"{source.stem}.jpg", quality=95, exif=exif)
        elif number in (2, 7, 12):
            _cut_out(image).save(folder / f"{source.stem}.png")
        else:
            image.save(folder / f"{source.stem}.png")
    for source in sources[:7]:
        # The same drawings in another place and colour are other images.
        image = _image(source, _scaled((720, 480), scale), random, mirrored=True)
        image.save(folder / f"big-{source.stem}.png")
    first = folder / f"{sources[0].stem}.png"
    (folder / "copy-of-the-first.png").write_bytes(first.read_bytes())
    with Image.open(first) as image:
        image.convert("RGB").save(folder / "first-once-more.jpg", quality=80)
    (folder / "broken.png").write_bytes(first.read_bytes()[:900])
    assert len(list(folder.iterdir())) == COUNT
    return folder


def _scaled(size: tuple[int, int], scale: float) -> tuple[int, int]:
    return round(size[0] * scale), round(size[1] * scale)


def _image(source: Path, size: tuple[int, int], random: np.random.Generator, *, mirrored: bool = False) -> Image.Image:
    """The drawing large on a background of its own colours, with grain as a photograph has it."""
    width, height = size
    corners = random.integers(40, 230, (3, 3, 3), dtype=np.uint8)
    background = Image.fromarray(corners).resize(size, Image.Resampling.BICUBIC)
    with Image.open(source) as file:
        drawing = file.convert("RGBA").resize((int(min(size) * 0.7),) * 2, Image.Resampling.LANCZOS)
    if mirrored:
        drawing = drawing.transpose(Image.Transpose.FLIP_TOP_BOTTOM)
    place = (int((width - drawing.width) * random.random()), int((height - drawing.height) * random.random()))
    background.paste(drawing, place, drawing)
    grain = random.normal(0, 6, (height, width, 1))
    return Image.fromarray(np.clip(np.asarray(background) + grain, 0, 255).astype(np.uint8))


def _cut_out(image: Image.Image) -> Image.Image:
    """The image with nothing around its middle."""
    width, height = image.size
    alpha = Image.new("L", image.size, 0)
    alpha.paste(255, (width // 5, height // 5, width - width // 5, height - height // 5))
    image.putalpha(alpha)
    return image
