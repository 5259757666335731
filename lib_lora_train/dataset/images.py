"""Opening one image the way a person would see it: upright, in RGB, on white; and one back into a file.

Handles EXIF orientation, greyscale, palette, CMYK, 16-bit and float samples, transparency (laid on
white) and the first frame of an animation. Not covered: colour profiles (as in kohya's trainer, the
numbers in the file are taken as sRGB).

An image can be used if all of its pixels can be decoded and some of them can be seen. What else a file holds does not
count: a PNG that Pillow refuses for its texts, profiles or checksums of those is read without them. Pillow's decoders raise
a dozen kinds of exceptions on damaged files; each becomes a DatasetError that names the file here, and nowhere else.
"""

from __future__ import annotations

import contextlib
import io
import struct
import threading
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
from PIL import Image, ImageFile, PngImagePlugin

from lib_lora_train.dataset.contents import kind_of_unread, known_formats, png_trailing_exif, png_without_metadata
from lib_lora_train.errors import DatasetError

T = TypeVar("T")

# Whether Pillow reads the last few depends on its build and plug-ins: they are listed so that a
# image which cannot be read is named to the user and not overlooked.
IMAGE_SUFFIXES = frozenset(
    ".png .jpg .jpeg .jfif .webp .bmp .gif .tif .tiff .avif .heic .heif .jxl".split())

# Twice Pillow's own warning threshold: about 0.5 GB decoded as RGB.
MAX_PIXELS = 178_956_970
# Pillow reads the chunks of a file completely, pixels or not; no image of so many pixels needs more.
MAX_BYTES = 256 << 20
_STRIP = 64  # rows converted to RGB together where the conversion needs several copies
_MOST_EXIF = 65_000  # what fits into a JPEG
JPEG_QUALITY = 95  # with colours at full resolution: what is lost is below what the VAE sees
WRITTEN_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")

_ORIENTATION_TAG = 0x0112
_EXIF_TAG, _USER_COMMENT_TAG = 0x8769, 0x9286
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


def is_image_name(path: Path) -> bool:
    """Whether the name ends like an image's, in upper or lower case; hidden files are not images."""
    return path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")


def read_image(path: Path) -> Image.Image:
    """Decode the image: upright, mode RGB, transparency laid on white.

    Raises DatasetError, naming the file, if it is missing, unreadable, empty, truncated, no image, transparent everywhere,
    or has more than `MAX_PIXELS` pixels.
    """
    def read(image: Image.Image) -> Image.Image:
        # Pillow turns a TIFF while decoding it, and only a TIFF.
        turn = None if image.format == "TIFF" else _UPRIGHT.get(_orientation(image, path))
        with _INTOLERANT:
            image.load()
        return _to_rgb(image, turn)
    return _from_file(path, read)


@dataclass(frozen=True)
class DecodedImage:
    """One image with what `read_image` leaves out."""

    image: Image.Image  # as `read_image` gives it
    alpha: Image.Image | None  # mode L, same size, 0 where nothing is; None for an opaque image
    as_stored: bool  # a program that knows no orientation, transparency or frames sees the same in the file itself
    format: str  # by its content, as Pillow calls it: "PNG"
    parameters: str  # the text that generators put into PNG files; "" for none
    exif: bytes  # without the orientation, for a file with these pixels; b"" for none
    several: bool  # it is the first of several frames or pages


def decode_image(path: Path) -> DecodedImage:
    """Decode the image, keeping its transparency and its notes apart. Errors as in `read_image`."""
    def decode(image: Image.Image) -> DecodedImage:
        kind = image.format or ""
        turn = None if kind == "TIFF" else _UPRIGHT.get(_orientation(image, path))
        exif = b"" if kind == "TIFF" else _exif_of_upright(image)  # a TIFF's describes the layout of its pixels
        several = _has_several(image)
        with _INTOLERANT:
            image.load()
        rgb, alpha = _to_rgb(image, turn), _alpha(image)
        still = kind not in ("PNG", "WEBP") or not several
        as_stored = turn is None and alpha is None and still and image.mode in ("RGB", "L", "P", "1", "RGBA", "LA")
        if turn is not None and alpha is not None:
            alpha = alpha.transpose(turn)
        text = image.info.get("parameters", "")
        return DecodedImage(rgb, alpha, as_stored, kind, text if isinstance(text, str) else "", exif, several)
    return _from_file(path, decode)


def encode_image(image: Image.Image, *, suffix: str, source: DecodedImage | None = None) -> bytes:
    """`image` (mode RGB or L) as the file that `suffix` says, upright, with what generators and cameras wrote into `source`.

    JPEG and WebP are written at high quality, not without loss. Raises DatasetError for other kinds.
    """
    exif = source.exif if source is not None else b""
    buffer = io.BytesIO()
    if suffix == ".png":
        text = PngImagePlugin.PngInfo()
        if source is not None and source.parameters:
            text.add_itxt("parameters", source.parameters)
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


def read_size(path: Path) -> tuple[int, int]:
    """(width, height) of the upright image, from its header only. Errors as in `read_image`."""
    return _from_file(path, lambda image: _upright_size(image, path))


class Checked(NamedTuple):
    """What `check_image` sees without decoding."""

    width: int  # upright
    height: int
    several: bool  # several frames or pages, of which the first is used


def check_image(path: Path) -> Checked:
    """The size like `read_size`, and the format's own check of the file where Pillow has one. Errors as in `read_image`.

    That check finds damaged PNGs without decoding them, and what it finds is decoded, because a wrong checksum need not be
    a wrong pixel. A truncated JPEG or WebP passes, and shows only in `read_image`, i.e. when its latents are computed.
    """
    def verified(image: Image.Image) -> Checked:
        found = Checked(*_upright_size(image, path), _has_several(image))
        image.verify()
        return found
    try:
        return _from_file(path, verified)
    except DatasetError:
        decoded = decode_image(path)
        return Checked(*decoded.image.size, decoded.several)


def may_be_transparent(path: Path) -> bool:
    """Whether the file can hold transparency, from its header only. Errors as in `read_image`."""
    return _from_file(path, _may_be_transparent)


def read_texts(path: Path) -> dict[str, str]:
    """The texts that a program kept inside the image, by their keyword; pixels are not decoded. Errors as in `read_image`.

    PNG's text chunks as they are called; a comment in EXIF (JPEG, WebP) as "UserComment", a GIF's as "comment".
    """
    def read(image: Image.Image) -> dict[str, str]:
        texts = {key: value for key, value in image.info.items() if isinstance(key, str) and isinstance(value, str)}
        comment = image.info.get("comment")
        if isinstance(comment, bytes):
            texts["comment"] = comment.decode("utf-8", "replace")
        try:
            user_comment = Image.Image.getexif(image).get_ifd(_EXIF_TAG).get(_USER_COMMENT_TAG)
        except _DECODER_ERRORS:
            user_comment = None  # a broken EXIF block says nothing
        if isinstance(user_comment, bytes) and user_comment:
            texts["UserComment"] = _user_comment(user_comment)
        return texts
    return _from_file(path, read)


def _user_comment(data: bytes) -> str:
    """EXIF 2.32, 4.6.5: eight bytes that name the character set, then the text.

    Which byte comes first in its "UNICODE" is not said there, and programs differ: text of mostly Latin letters has its
    zero bytes on one side.
    """
    kind, body = data[:8], data[8:]
    if kind.rstrip(b"\0 ").upper() == b"UNICODE":
        little = body.startswith(b"\xff\xfe") or body[1::2].count(0) > body[0::2].count(0)
        return body.decode("utf-16-le" if little else "utf-16-be", "replace").strip("\ufeff\0 ")
    if kind.rstrip(b"\0 ").upper() == b"JIS":
        return body.decode("iso2022_jp", "replace").strip("\0 ")
    named = kind.rstrip(b"\0 ").upper() in (b"ASCII", b"")
    return (body if named else data).decode("utf-8", "replace").strip("\0 ")


def _from_file(path: Path, make: Callable[[Image.Image], T]) -> T:
    """What `make` gives for the image, opened lazily; every foreign error inside becomes a DatasetError naming the file."""
    try:
        if (size := path.stat().st_size) == 0:
            raise DatasetError("", why="the file is empty (zero bytes)")
        if size > MAX_BYTES:
            raise DatasetError("", why=f"its file is enormous ({size >> 20} MiB, the limit is {MAX_BYTES >> 20})",
                               remedy="save it again as JPEG, PNG or WebP")
        try:
            return _from_source(path, make)
        except (DatasetError, Image.DecompressionBombError):
            raise
        except _DECODER_ERRORS:
            if (bare := png_without_metadata(path)) is None:
                raise
            return _from_source(io.BytesIO(bare), make)
    except (MemoryError, *_DECODER_ERRORS) as error:
        why, remedy = (error.why, error.remedy) if isinstance(error, DatasetError) else _reason(error, path)
        raise DatasetError(f"The picture {path} cannot be used", why=why, remedy=remedy) from error


def _from_source(source: Path | io.BytesIO, make: Callable[[Image.Image], T]) -> T:
    with Image.open(source, formats=known_formats()) as image:
        if image.width * image.height > MAX_PIXELS:
            raise DatasetError("", why=f"it is enormous ({image.width}×{image.height}, the limit is {MAX_PIXELS / 1e6:.0f} "
                               "million pixels)", remedy="make it smaller")
        return make(image)


def _reason(error: BaseException, path: Path) -> tuple[str, str]:
    """(why an image cannot be used, what to do)."""
    if isinstance(error, FileNotFoundError):
        return "the file is gone", ""
    if isinstance(error, PermissionError):
        return "access was denied", ""
    if isinstance(error, Image.DecompressionBombError):
        # Pillow refuses at twice the size at which it warns, and calls the file an attack.
        return f"it is enormous (more than {2 * (Image.MAX_IMAGE_PIXELS or 0) / 1e6:.0f} million pixels)", "make it smaller"
    if isinstance(error, Image.UnidentifiedImageError):
        return kind_of_unread(path)
    if isinstance(error, MemoryError):
        return "there is not enough memory to decode it", "make it smaller"
    if "truncated" in str(error).lower():
        return "it is damaged: its end is missing", "save it again from the original"
    return f"it is damaged ({error})", "save it again from the original"


class _Intolerance:
    """While an image is decoded, a truncated file is an error even where Pillow's tolerance was switched on.

    BLIP, which the WebUI loads for captions, sets that switch for the whole process; images would then come with a grey
    lower half. Several threads decode at once: the first one stores the switch, the last one restores it.
    """

    def __init__(self) -> None:
        self._lock, self._inside, self._tolerant = threading.Lock(), 0, False

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                self._tolerant = ImageFile.LOAD_TRUNCATED_IMAGES
                ImageFile.LOAD_TRUNCATED_IMAGES = False
            self._inside += 1

    def __exit__(self, *exception: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside and ImageFile.LOAD_TRUNCATED_IMAGES is False:  # still as we left it
                ImageFile.LOAD_TRUNCATED_IMAGES = self._tolerant


_INTOLERANT = _Intolerance()


def _upright_size(image: Image.Image, path: Path) -> tuple[int, int]:
    width, height = image.size
    if image.format == "TIFF":  # newer Pillows have turned the size already, older ones not yet
        width, height = image.tag_v2[256], image.tag_v2[257]
    return (height, width) if _orientation(image, path) in (5, 6, 7, 8) else (width, height)


def _orientation(image: Image.Image, path: Path) -> int:
    """EXIF orientation 1…8 without decoding pixels; anything unreadable counts as upright (1)."""
    if image.format == "PNG" and "exif" not in image.info:
        # PngImageFile.getexif would decode everything to see whether a chunk follows the pixels.
        raw = png_trailing_exif(path)
        if raw is not None:
            image.info["exif"] = b"Exif\0\0" + raw
    try:
        value = Image.Image.getexif(image).get(_ORIENTATION_TAG, 1)
    except _DECODER_ERRORS:
        return 1  # a broken EXIF block says nothing about the pixels
    return value if value in _UPRIGHT else 1


def _exif_of_upright(image: Image.Image) -> bytes:
    """The EXIF block for a file whose pixels are upright; b"" where there is none, or none that can be read."""
    try:
        exif = Image.Image.getexif(image)
        if not exif:
            return b""
        exif.pop(_ORIENTATION_TAG, None)
        written = exif.tobytes()
    except _DECODER_ERRORS:
        return b""
    return written if len(written) < _MOST_EXIF else b""


def _to_rgb(image: Image.Image, turn: Image.Transpose | None) -> Image.Image:
    """A new image of mode RGB, with transparency on white, and turned. Samples deeper than 8 bits keep their high byte."""
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        image = _deep_grey_to_rgb(image)
    elif _may_be_transparent(image):
        image = _on_white(image)
    elif image.mode == "RGB":
        return image.copy() if turn is None else image.transpose(turn)
    else:
        image = image.convert("RGB")
    return image if turn is None else image.transpose(turn)


def _in_strips(image: Image.Image, convert: Callable[[Image.Image], Image.Image]) -> Image.Image:
    """The RGB image that `convert` makes, a strip at a time, so that only a strip of its copies is in memory."""
    made = Image.new("RGB", image.size)
    for top in range(0, image.height, _STRIP):
        box = (0, top, image.width, min(top + _STRIP, image.height))
        made.paste(convert(image.crop(box)), box)
    return made


def _on_white(image: Image.Image) -> Image.Image:
    """The image laid on white. Raises DatasetError where nothing of it can be seen."""
    seen = False

    def laid(part: Image.Image) -> Image.Image:
        nonlocal seen
        rgba = part.convert("RGBA")
        seen = seen or rgba.getchannel("A").getextrema()[1] > 0
        return Image.alpha_composite(Image.new("RGBA", rgba.size, (255, 255, 255, 255)), rgba).convert("RGB")
    made = _in_strips(image, laid)
    if not seen:
        raise DatasetError("", why="it is transparent everywhere")
    return made


def _has_several(image: Image.Image) -> bool:
    """Whether more frames or pages follow the first; asked before decoding. What cannot be read of them counts as none."""
    with contextlib.suppress(*_DECODER_ERRORS):
        return image.n_frames > 1 if image.format == "TIFF" else getattr(image, "is_animated", False)
    return False


def _may_be_transparent(image: Image.Image) -> bool:
    return image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info


def _alpha(image: Image.Image) -> Image.Image | None:
    """How much of each pixel is there, mode L; None if all of it is everywhere."""
    if image.mode.startswith("I") or image.mode == "F" or not _may_be_transparent(image):
        return None
    alpha = image.convert("RGBA").getchannel("A")
    return None if alpha.getextrema()[0] == 255 else alpha


def _deep_grey_to_rgb(image: Image.Image) -> Image.Image:
    """16-bit, 32-bit and float greyscale. Pillow's own conversion clips them to white.

    A 32-bit or float file does not say what its white is: 1.0 (float), 255 and 65535 are taken where
    they fit, otherwise its own maximum.
    """
    sixteen = image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG")
    top = 65535.0
    if not sixteen:
        samples = np.asarray(image)
        top = float(samples.max(where=np.isfinite(samples), initial=0))

    def to_rgb(part: Image.Image) -> Image.Image:
        grey = np.nan_to_num(np.asarray(part).astype(np.float64), posinf=0.0, neginf=0.0)
        if image.mode == "F" and top <= 1.0:
            grey = grey * 255 + 0.5
        elif top > 255:
            grey = grey // 256 if top <= 65535 else grey * (255 / top)
        return Image.fromarray(grey.clip(0, 255).astype(np.uint8)).convert("RGB")
    return _in_strips(image, to_rgb)
