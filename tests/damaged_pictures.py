"""PNGs whose pixels are whole, and which something else is wrong with. By the PNG specification."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image, PngImagePlugin


def damaged_pngs(folder: Path) -> dict[str, Path]:
    """PNGs whose pixels are whole, and which something else is wrong with; the last is cut within its pixels."""
    whole, text = folder / "whole.png", PngImagePlugin.PngInfo()
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))
    text.add_text("parameters", "a cat")
    noise.save(whole, pnginfo=text)
    data = whole.read_bytes()

    def wrong_checksum(kind: bytes) -> bytes:
        start = data.index(kind)
        end = start + 4 + int.from_bytes(data[start - 4:start], "big")
        return data[:end] + bytes(byte ^ 255 for byte in data[end:end + 4]) + data[end + 4:]

    start = data.index(b"tEXt") - 4
    note = data[start:start + 12 + int.from_bytes(data[start:start + 4], "big")]
    behind = data.replace(note, b"")[:-12] + note[:-4] + b"\0\0\0\0" + data[-12:]
    profile = zlib.compress(bytes(70 << 20), 9)
    large = struct.pack(">I", len(profile) + 3) + b"iCCP" + b"p\0\0" + profile
    large += struct.pack(">I", zlib.crc32(large[4:]))
    made = {"checksum of the pixels": wrong_checksum(b"IDAT"), "checksum of a text": wrong_checksum(b"tEXt"),
            "checksum of a text behind the pixels": behind, "no end": data[:-12],
            "a large profile": data.replace(note, large), "cut": data[:len(data) // 2]}
    paths = {}
    for number, (what, content) in enumerate(made.items()):
        paths[what] = folder / f"{number}.png"
        paths[what].write_bytes(content)
    return paths
