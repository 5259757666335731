"""Images for a browser: thumbnails that are made once and kept, and images in full size.

No byte of a file reaches the browser as it is: every image is decoded and encoded anew.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
from pathlib import Path

from PIL import Image

from lib_lora_train.dataset.images import read_image
from lib_lora_train.errors import DatasetError
from lib_lora_train.storage.atomic import write_atomic

SIDE = 256
MEDIA_TYPE = "image/jpeg"
_NAME_DIGITS = 16


def stamp(path: Path) -> str:
    """What changes whenever the file does, from its time and size; raises DatasetError where it is gone."""
    try:
        status = path.stat()
    except OSError as error:
        raise DatasetError(f"The picture {path.name} cannot be read", why=error.strerror or str(error)) from error
    return f"{status.st_mtime_ns:x}-{status.st_size:x}"


def thumbnail(path: Path, folder: Path) -> bytes:
    """A JPEG of at most 256×256 pixels, from `folder` where it was made before. Raises DatasetError as `read_image`."""
    kept = _cached(path, folder)
    with contextlib.suppress(OSError):
        return kept.read_bytes()
    data = small(path)
    with contextlib.suppress(OSError):  # a full disk costs speed, not the image
        for older in kept.parent.glob(f"{kept.stem[:_NAME_DIGITS]}-*.jpg"):
            older.unlink(missing_ok=True)
        write_atomic(kept, data)
    return data


def small(path: Path) -> bytes:
    """A JPEG of at most 256×256 pixels, not kept. Raises DatasetError as `read_image`."""
    image = read_image(path)
    image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    return jpeg(image, quality=85)


def full_size(path: Path) -> bytes:
    """The image upright and in full size, as a JPEG. Raises DatasetError as `read_image`."""
    return jpeg(read_image(path), quality=92)


def jpeg(image: Image.Image, *, quality: int = 90) -> bytes:
    """The image's bytes as a JPEG."""
    held = io.BytesIO()
    image.convert("RGB").save(held, "JPEG", quality=quality)
    return held.getvalue()


def _cached(path: Path, folder: Path) -> Path:
    # Spread over folders, so that looking for older ones of an image stays quick with thousands of them.
    digits = hashlib.sha256(path.name.encode("utf-8", "surrogatepass")).hexdigest()[:_NAME_DIGITS]
    return folder / digits[:2] / f"{digits}-{stamp(path)}.jpg"
