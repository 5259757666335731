"""Opening one picture the way a person would see it: upright, in RGB, on white.

Handles EXIF orientation, greyscale, palette, CMYK, 16-bit and float samples, transparency (laid on
white) and the first frame of an animation. Not covered: colour profiles (as in kohya's trainer, the
numbers in the file are taken as sRGB).

Pillow's decoders raise a dozen kinds of exceptions on damaged files; each becomes a DatasetError
that names the file here, and nowhere else.
"""

from __future__ import annotations

import contextlib
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageFile

from lib_lora_train.errors import DatasetError

# Whether Pillow reads the last few depends on its build and plug-ins: they are listed so that a
# picture which cannot be read is named to the user and not overlooked.
PICTURE_SUFFIXES = frozenset(
    ".png .jpg .jpeg .jfif .webp .bmp .gif .tif .tiff .avif .heic .heif .jxl".split())

# What may stand behind those names. Pillow goes by the content: for a PostScript file called x.png it would run Ghostscript.
_FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "BMP", "DIB", "GIF", "TIFF", "AVIF", "HEIF", "JXL")

# Twice Pillow's own warning threshold: about 0.5 GB decoded as RGB.
MAX_PIXELS = 178_956_970
# Pillow reads the pieces of a file whole, pixels or not; no picture of so many pixels needs more.
MAX_BYTES = 256 << 20
_MOST_CHUNKS = 100_000

_ORIENTATION_TAG = 0x0112
# EXIF 2.32, 4.6.4: what undoes each value of the orientation tag (as PIL.ImageOps does it).
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# What Pillow's decoders were seen to raise on damaged input.
_DECODER_ERRORS = (
    OSError, SyntaxError, ValueError, TypeError, LookupError, EOFError, ArithmeticError,
    struct.error, zlib.error, Image.DecompressionBombError)


def is_picture_name(path: Path) -> bool:
    """Whether the name ends like a picture's, in upper or lower case; hidden files are not pictures."""
    return path.suffix.lower() in PICTURE_SUFFIXES and not path.name.startswith(".")


def read_picture(path: Path, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode the whole picture: upright, mode RGB, transparency laid on white.

    Raises DatasetError, naming the file, if it is missing, unreadable, empty, truncated, no picture,
    or has more than `max_pixels` pixels.
    """
    with _opened(path, max_pixels) as image:
        # Pillow turns a TIFF while decoding it, and only a TIFF.
        turn = None if image.format == "TIFF" else _UPRIGHT.get(_orientation(image, path))
        _load_whole(image)
        picture = _to_rgb(image)
        return picture if turn is None else picture.transpose(turn)


def read_size(path: Path, *, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """(width, height) of the upright picture, from its header only. Errors as in `read_picture`."""
    with _opened(path, max_pixels) as image:
        return _upright_size(image, path)


def check_picture(path: Path, *, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """(width, height) like `read_size`, and the format's own check of the file where Pillow has one.

    That check finds damaged PNGs without decoding them; a truncated JPEG or WebP passes, and shows
    only in `read_picture`, i.e. when its latents are computed.
    """
    with _opened(path, max_pixels) as image:
        size = _upright_size(image, path)
        image.verify()
        return size


@contextlib.contextmanager
def _opened(path: Path, max_pixels: int) -> Iterator[Image.Image]:
    """The picture, opened lazily; every foreign error inside becomes a DatasetError naming the file."""
    _register_avif()
    try:
        size = path.stat().st_size
        if size == 0:
            raise DatasetError(f"The picture {path} cannot be used", why="the file is empty (zero bytes)")
        if size > MAX_BYTES:
            raise DatasetError(f"The picture {path} cannot be used", why=f"its file is enormous ({size >> 20} MiB, the "
                               f"limit is {MAX_BYTES >> 20})", remedy="save it again as JPEG, PNG or WebP")
        with Image.open(path, formats=_known_formats()) as image:
            pixels = image.width * image.height
            if pixels > max_pixels:
                raise DatasetError(
                    f"The picture {path} cannot be used",
                    why=f"it is enormous ({image.width}×{image.height}, the limit is {max_pixels / 1e6:.0f} million "
                        "pixels)", remedy="make it smaller")
            yield image
    except DatasetError:
        raise
    except FileNotFoundError as error:
        raise DatasetError(f"The picture {path} cannot be used", why="the file is gone") from error
    except PermissionError as error:
        raise DatasetError(f"The picture {path} cannot be used", why="access was denied") from error
    except Image.DecompressionBombError as error:
        # Pillow refuses at twice the size at which it warns, and calls the file an attack.
        limit = 2 * (Image.MAX_IMAGE_PIXELS or 0) / 1e6
        raise DatasetError(
            f"The picture {path} cannot be used", why=f"it is enormous (more than {limit:.0f} million pixels)",
            remedy="make it smaller") from error
    except Image.UnidentifiedImageError as error:
        why = "it is damaged, no picture, or of a kind that this version of Pillow does not read"
        raise DatasetError(f"The picture {path} cannot be used", why=why) from error
    except MemoryError as error:
        raise DatasetError(
            f"The picture {path} cannot be used", why="there is not enough memory to decode it",
            remedy="make it smaller") from error
    except _DECODER_ERRORS as error:
        if "MAX_TEXT" in str(error) or "decompressed data too large" in str(error).lower():
            # A little that unpacks to very much: an attack, or a program that keeps its whole workflow in the picture.
            raise DatasetError(f"The picture {path} cannot be used", why="the text inside it is enormous",
                               remedy="save it again without its metadata") from error
        raise DatasetError(f"The picture {path} cannot be used", why=f"it is damaged ({error})") from error


def _known_formats() -> list[str]:
    """Those of ours that this Pillow and its plug-ins read."""
    if any(name not in Image.OPEN for name in _FORMATS[:8]):
        Image.init()
    return [name for name in _FORMATS if name in Image.OPEN]


def _register_avif() -> None:
    """The WebUI ships AVIF as a plug-in of Pillow that only an import switches on."""
    if ".avif" not in Image.registered_extensions():
        with contextlib.suppress(ImportError):
            import pillow_avif  # noqa: F401


def _load_whole(image: Image.Image) -> None:
    """Decode; a truncated file is an error even where somebody switched Pillow's tolerance on.

    BLIP, which the WebUI loads for captions, sets that switch for the whole process; pictures would
    then come with a grey lower half.
    """
    tolerant = ImageFile.LOAD_TRUNCATED_IMAGES
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    try:
        image.load()
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = tolerant


def _upright_size(image: Image.Image, path: Path) -> tuple[int, int]:
    width, height = image.size
    if image.format == "TIFF":  # newer Pillows have turned the size already, older ones not yet
        width, height = image.tag_v2[256], image.tag_v2[257]
    return (height, width) if _orientation(image, path) in (5, 6, 7, 8) else (width, height)


def _orientation(image: Image.Image, path: Path) -> int:
    """EXIF orientation 1…8 without decoding pixels; anything unreadable counts as upright (1)."""
    if image.format == "PNG" and "exif" not in image.info:
        # PngImageFile.getexif would decode everything to see whether a chunk follows the pixels.
        raw = _png_trailing_exif(path)
        if raw is not None:
            image.info["exif"] = b"Exif\0\0" + raw
    try:
        value = Image.Image.getexif(image).get(_ORIENTATION_TAG, 1)
    except _DECODER_ERRORS:
        return 1  # a broken EXIF block says nothing about the pixels
    return value if value in _UPRIGHT else 1


def _png_trailing_exif(path: Path) -> bytes | None:
    """The body of the first eXIf chunk (PNG 1.2 extension 1.5.0), found by hopping over the others."""
    with path.open("rb") as file:
        file.seek(8)
        for _ in range(_MOST_CHUNKS):
            if len(header := file.read(8)) < 8:
                return None
            length, kind = struct.unpack(">I4s", header)
            if kind == b"eXIf":
                return file.read(length)
            if kind == b"IEND":
                return None
            file.seek(length + 4, 1)
    return None


def _to_rgb(image: Image.Image) -> Image.Image:
    """Mode RGB with transparency on white. Samples deeper than 8 bits keep their high byte."""
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        return _deep_grey_to_rgb(image)
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, (255, 255, 255, 255)), rgba).convert("RGB")
    return image.convert("RGB") if image.mode != "RGB" else image.copy()


def _deep_grey_to_rgb(image: Image.Image) -> Image.Image:
    """16-bit, 32-bit and float greyscale. Pillow's own conversion clips them to white.

    A 32-bit or float file does not say what its white is: 1.0 (float), 255 and 65535 are taken where
    they fit, otherwise its own maximum.
    """
    grey = np.nan_to_num(np.asarray(image).astype(np.float64), posinf=0.0, neginf=0.0)
    top = float(grey.max(initial=0.0))
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        grey = grey // 256
    elif image.mode == "F" and top <= 1.0:
        grey = grey * 255 + 0.5
    elif top > 255:
        grey = grey // 256 if top <= 65535 else grey * (255 / top)
    return Image.fromarray(grey.clip(0, 255).astype(np.uint8)).convert("RGB")
