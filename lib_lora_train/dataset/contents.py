"""Files by their content: which kinds are read, what another one is, and the chunks of a PNG."""

from __future__ import annotations

import contextlib
import re
import struct
import zlib
from pathlib import Path

from PIL import Image

# Those of `images.IMAGE_SUFFIXES`. Pillow goes by the content: for a PostScript file called x.png it would run Ghostscript.
_FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "BMP", "DIB", "GIF", "TIFF", "AVIF", "HEIF", "JXL")

_MOST_CHUNKS = 100_000  # of a PNG
_PNG = b"\x89PNG\r\n\x1a\n"
_NEEDED = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")

_TO_CONVERT = "save it as JPEG or PNG, as any viewer that shows it can"
# (how such files begin, what they are called, what to do), the first that fits.
_KINDS = tuple((re.compile(start, re.DOTALL | re.IGNORECASE), name, remedy) for start, name, remedy in (
    (rb"....ftyp(avi[fs]|mif1.{0,40}avif)", "an AVIF picture", _TO_CONVERT),
    (rb"....ftyp(he[iv]|mif1|msf1)", "a HEIC picture, as phones of Apple take them", _TO_CONVERT),
    (rb"\xff\x0a|\0\0\0\x0cJXL ", "a JPEG XL picture", f"{_TO_CONVERT} (djxl does it without loss)"),
    (rb"8BPS|%PDF|%!PS", "a Photoshop, PDF or PostScript file", _TO_CONVERT),
    (rb"....ftyp|\x1a\x45\xdf\xa3", "a film", "save single frames of it as PNG"),
    (rb"\s*(<!doctype html|<html)", "a web page that was saved under a picture's name", "download the picture again"),
    (rb"\s*(<\?xml|<svg)", "an SVG drawing or another XML file", "export it as PNG"),
    (rb"\x89PNG|\xff\xd8|GIF8|BM|RIFF....WEBP|II\*\0|MM\0\*", "", "save it again from the original")))


def known_formats() -> list[str]:
    """Those of ours that this Pillow and its plug-ins read. The WebUI ships AVIF as one that only an import switches on."""
    Image.init()
    if "AVIF" not in Image.OPEN:
        with contextlib.suppress(ImportError):
            import pillow_avif  # noqa: F401
    return [name for name in _FORMATS if name in Image.OPEN]


def kind_of_unread(path: Path) -> tuple[str, str]:
    """(why Pillow does not read this file, what to do)."""
    start = b""
    with contextlib.suppress(OSError), path.open("rb") as file:
        start = file.read(64)
    for pattern, name, remedy in _KINDS:
        if pattern.match(start):
            return (f"it is {name}, which is not read here" if name else "it is damaged: its beginning cannot be read"), remedy
    return "it is no picture, or of a kind that is not read here", ""


def png_without_metadata(path: Path) -> bytes | None:
    """The PNG with nothing but its pixels, their palette and transparency, and what may turn them upright.

    None if the file is no PNG, or holds nothing else. Raises OSError where it cannot be read.
    """
    kept, dropped = [_PNG], False
    with path.open("rb") as file:
        if file.read(len(_PNG)) != _PNG:
            return None
        for _ in range(_MOST_CHUNKS):
            if len(header := file.read(8)) < 8:
                break
            length, kind = struct.unpack(">I4s", header)
            body = file.read(length + 4)
            if kind in _NEEDED or kind == b"eXIf" and zlib.crc32(kind + body[:-4]) == int.from_bytes(body[-4:], "big"):
                kept += [header, body]
            else:
                dropped = True
            if kind == b"IEND":
                break
    return b"".join(kept) if dropped else None


def png_trailing_exif(path: Path) -> bytes | None:
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
