"""Images that were made to do harm: each is a sentence that names it, soon and in bounded memory."""

from __future__ import annotations

import io
import struct
import subprocess
import sys
import tracemalloc
import zlib
from pathlib import Path

import pytest
from PIL import Image, PngImagePlugin

from lib_lora_train.dataset import images as images_module
from lib_lora_train.dataset.images import check_image, read_image, read_size
from lib_lora_train.errors import DatasetError
from tests.scanned_folder import scan

READERS = (check_image, read_size, read_image)
MIB = 1 << 20


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width: int, height: int, *extra: bytes, pixels: bytes = b"") -> bytes:
    """A PNG of 8-bit grey, with chunks before its pixels."""
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + b"".join([chunk(b"IHDR", header), *extra, chunk(b"IDAT", pixels), chunk(b"IEND", b"")])


def refused(path: Path, *, within: int = 24 * MIB) -> list[str]:
    """What each reader says; fails if one takes the file, does not name it, or takes more memory than `within`."""
    said = []
    for reader in READERS:
        tracemalloc.start()
        try:
            with pytest.raises(DatasetError) as error:
                reader(path)
            assert tracemalloc.get_traced_memory()[1] < within
        finally:
            tracemalloc.stop()
        assert path.name in str(error.value) and "\n" not in str(error.value)
        said.append(str(error.value))
    return said


@pytest.mark.parametrize("size", [(20_000, 20_000), (2**31 - 1, 2**31 - 1), (1, 2**28), (178_956_971, 1)])
def test_a_file_of_few_bytes_that_announces_enormous_pixels_is_refused_before_they_are_made(tmp_path: Path,
                                                                                            size: tuple[int, int]):
    path = tmp_path / "bomb.png"
    path.write_bytes(png(*size, pixels=zlib.compress(bytes(1 << 20))))
    assert all("enormous" in text for text in refused(path))


@pytest.mark.parametrize("switched_off", [None, 10**12])
def test_the_limit_holds_where_another_program_switched_pillows_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                                    switched_off: int | None):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", switched_off)
    path = tmp_path / "bomb.png"
    path.write_bytes(png(30_000, 30_000))
    assert all("enormous" in text for text in refused(path))


def test_pixels_that_a_gif_or_a_webp_announces_are_limited_too(tmp_path: Path):
    gif, webp = tmp_path / "bomb.gif", tmp_path / "bomb.webp"
    gif.write_bytes(b"GIF89a" + struct.pack("<HHBBB", 65535, 65535, 0x80, 0, 0) + bytes(6)
                    + b"," + struct.pack("<HHHHB", 0, 0, 65535, 65535, 0) + b"\x02\x02\x44\x01\x00;")
    canvas = struct.pack("<I", 16383 - 1)[:3]
    body = b"WEBP" + b"VP8X" + struct.pack("<I", 10) + bytes(4) + canvas + canvas
    webp.write_bytes(b"RIFF" + struct.pack("<I", len(body)) + body)
    assert all("enormous" in text for text in refused(gif))
    refused(webp)


def taken(path: Path, *, within: int = 24 * MIB) -> bool:
    """Whether each reader takes the file, and none more memory than `within`."""
    for reader in READERS:
        tracemalloc.start()
        try:
            reader(path)
            assert tracemalloc.get_traced_memory()[1] < within
        finally:
            tracemalloc.stop()
    return True


@pytest.mark.parametrize("kind", [b"zTXt", b"iTXt"])
def test_an_image_is_read_without_a_text_that_unpacks_to_very_much(tmp_path: Path, kind: bytes):
    packed = zlib.compress(bytes(64 * MIB), 9)
    body = b"prompt\0\0" + packed if kind == b"zTXt" else b"prompt\0\1\0\0\0" + packed
    path = tmp_path / "bomb.png"
    path.write_bytes(png(8, 8, chunk(kind, body), pixels=zlib.compress(bytes(8 * 9))))
    assert len(path.read_bytes()) < 100_000
    assert taken(path)


def test_an_image_is_read_without_many_texts_that_add_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert PngImagePlugin.MAX_TEXT_MEMORY <= 64 * MIB
    monkeypatch.setattr(PngImagePlugin, "MAX_TEXT_MEMORY", 4 * MIB)  # the same at a sixteenth
    packed = zlib.compress(bytes(MIB - 1), 9)
    path = tmp_path / "bomb.png"
    texts = [chunk(b"zTXt", b"k%d\0\0" % number + packed) for number in range(6)]
    path.write_bytes(png(8, 8, *texts, pixels=zlib.compress(bytes(8 * 9))))
    assert taken(path)


def test_an_enormous_file_is_not_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "big.png"
    with path.open("wb") as file:
        file.seek(images_module.MAX_BYTES)  # a hole: no disk is used
        file.write(b"x")
    monkeypatch.setattr(Image, "open", lambda *_, **__: pytest.fail("it was opened"))
    assert all("256" in text for text in refused(path))


def test_of_an_animation_only_the_first_image_is_decoded(tmp_path: Path):
    frames = [Image.new("RGB", (32, 32), (red, 0, 0)) for red in range(0, 250, 5)]
    for suffix in (".gif", ".webp", ".png"):
        path = tmp_path / f"many{suffix}"
        options = {"lossless": True} if suffix == ".webp" else {}
        frames[0].save(path, save_all=True, append_images=frames[1:], duration=10, **options)
        assert read_image(path).getpixel((3, 3)) == (0, 0, 0)
        assert check_image(path) == (32, 32, True)
    whole = (tmp_path / "many.gif").read_bytes()
    (tmp_path / "cut.gif").write_bytes(whole[: len(whole) // 2])
    assert read_image(tmp_path / "cut.gif").size == (32, 32)


@pytest.mark.parametrize("content", [
    b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(x) run\n%%EOF\n", b"%PDF-1.4\n",
    b"P6 2 2 255\n" + bytes(12), b"\x00\x00\x01\x00\x01\x00\x10\x10\x00\x00\x01\x00\x20\x00" + bytes(40),
    b"8BPS\x00\x01" + bytes(30), b"<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'/>",
    b"\xd7\xcd\xc6\x9a" + bytes(40), b"PK\x03\x04" + bytes(40)])
@pytest.mark.parametrize("name", ["x.png", "x.jpg"])
def test_only_images_stand_behind_an_images_name(tmp_path: Path, content: bytes, name: str,
                                                    monkeypatch: pytest.MonkeyPatch):
    # Pillow goes by the content, and would start Ghostscript for PostScript.
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("a program was started"))
    (tmp_path / name).write_bytes(content)
    refused(tmp_path / name)


def test_a_phones_jpeg_of_several_images_is_one_still(tmp_path: Path):
    path = tmp_path / "phone.jpg"
    first, second = Image.new("RGB", (16, 8), "red"), Image.new("RGB", (16, 8), "blue")
    first.save(path, format="MPO", save_all=True, append_images=[second])
    with Image.open(path) as image:
        assert image.format == "MPO"
    assert read_image(path).size == (16, 8) and read_image(path).getpixel((2, 2))[0] > 200


def test_hostile_images_are_skipped_by_name_and_the_others_trained(tmp_path: Path):
    Image.new("RGB", (64, 64)).save(tmp_path / "good.png")
    (tmp_path / "pixels.png").write_bytes(png(50_000, 50_000))
    (tmp_path / "text.png").write_bytes(png(8, 8, chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(9 * MIB))),
                                        pixels=zlib.compress(bytes(8 * 9))))
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64)).save(buffer, "PNG")
    (tmp_path / "cut.png").write_bytes(buffer.getvalue()[:60])
    found = scan(tmp_path, max_train_epochs=1)
    assert [example.path.name for example in found.examples] == ["good.png", "text.png"]
    assert sorted(problem.path.name for problem in found.problems if problem.skipped) == ["cut.png", "pixels.png"]


@pytest.mark.skipif(not hasattr(__import__("os"), "mkfifo") or sys.platform == "win32", reason="no such files there")
def test_what_is_no_plain_file_is_not_waited_for(tmp_path: Path):
    import os

    os.mkfifo(tmp_path / "endless.png")
    Image.new("RGB", (64, 64)).save(tmp_path / "good.png")
    assert [example.path.name for example in scan(tmp_path, max_train_epochs=1).examples] == ["good.png"]
