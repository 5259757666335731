"""An image back into a file of a given kind, with what generators and cameras wrote into the one it came from."""

from __future__ import annotations

import io

from PIL import Image, PngImagePlugin

from lib_lora_train.dataset.images import Layers
from lib_lora_train.errors import DatasetError

JPEG_QUALITY = 95  # with colours at full resolution: what is lost is below what the VAE sees
WRITTEN_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


def encode(image: Image.Image, *, suffix: str, layers: Layers | None = None) -> bytes:
    """`image` (mode RGB or L) as the file that `suffix` says, upright; `layers` gives the notes to keep.

    JPEG and WebP are written at high quality, not without loss. Raises DatasetError for other kinds.
    """
    exif = layers.exif if layers is not None else b""
    buffer = io.BytesIO()
    if suffix == ".png":
        text = PngImagePlugin.PngInfo()
        if layers is not None and layers.parameters:
            text.add_itxt("parameters", layers.parameters)
        image.save(buffer, "PNG", pnginfo=text, exif=exif)
    elif suffix in (".jpg", ".jpeg"):
        image.save(buffer, "JPEG", quality=JPEG_QUALITY, subsampling=0, exif=exif)
    elif suffix == ".webp":
        image.save(buffer, "WEBP", quality=JPEG_QUALITY, method=4, exif=exif)
    elif suffix == ".bmp":
        image.save(buffer, "BMP")
    else:
        raise DatasetError(f"A picture cannot be written as {suffix}", why="training tools do not all read that kind",
                           remedy="import it into a dataset, which makes it a PNG")
    return buffer.getvalue()
