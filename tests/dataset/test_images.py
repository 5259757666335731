"""Images come out upright, in RGB and on white; what cannot be read is named. References: PIL, numpy, the PNG
specification."""

from __future__ import annotations

import gc
import struct
import threading
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile, ImageOps, PngImagePlugin

from lib_lora_train.dataset import images as images_module
from lib_lora_train.dataset.images import check_image, is_image_name, read_image, read_size
from lib_lora_train.errors import DatasetError
from tests.damaged_pictures import damaged_pngs

CORNERS = Image.fromarray(np.arange(5 * 7 * 3, dtype=np.uint8).reshape(5, 7, 3))  # 7 wide, 5 high, no symmetry


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", [".png", ".tif", ".webp", ".jpg"])
def test_exif_orientation_is_undone_as_pillow_does_it(tmp_path: Path, orientation: int, suffix: str) -> None:
    path = tmp_path / f"picture{suffix}"
    exif = Image.Exif()
    exif[0x0112] = orientation
    CORNERS.save(path, exif=exif, **({"lossless": True} if suffix == ".webp" else {}))
    reference = path
    if suffix == ".tif":  # Pillow 9.5 turns a TIFF twice here: its twin as a PNG tells what is right
        reference = tmp_path / "twin.png"
        CORNERS.save(reference, exif=exif)
    with Image.open(reference) as image:
        expected = ImageOps.exif_transpose(image).convert("RGB")
    assert np.array_equal(read_image(path), expected)
    assert read_size(path) == check_image(path)[:2] == expected.size


def test_orientation_written_after_the_pixels_of_a_png_counts(tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    CORNERS.save(path)
    exif = Image.Exif()
    exif[0x0112] = 6
    body = exif.tobytes().removeprefix(b"Exif\0\0")
    chunk = struct.pack(">I", len(body)) + b"eXIf" + body + struct.pack(">I", zlib.crc32(b"eXIf" + body))
    data = path.read_bytes()
    path.write_bytes(data[:-12] + chunk + data[-12:])  # IEND is the last 12 bytes
    with Image.open(path) as image:
        expected = ImageOps.exif_transpose(image)
    assert expected.size == (5, 7)
    assert read_size(path) == (5, 7)
    assert np.array_equal(read_image(path), expected)


def test_a_broken_exif_block_does_not_lose_the_image(tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    CORNERS.save(path, exif=b"Exif\0\0not a tiff header")
    assert np.array_equal(read_image(path), CORNERS)


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK"])
def test_other_colour_modes_become_what_pillow_shows(tmp_path: Path, mode: str) -> None:
    path = tmp_path / ("picture.tif" if mode == "CMYK" else "picture.png")
    source = CORNERS.convert(mode)
    source.save(path)
    image = read_image(path)
    assert image.mode == "RGB"
    assert np.array_equal(image, source.convert("RGB"))


def test_a_cmyk_jpeg_keeps_its_colours(tmp_path: Path) -> None:
    path = tmp_path / "picture.jpg"
    Image.new("RGB", (16, 16), (200, 40, 90)).convert("CMYK").save(path, quality=100)
    assert np.allclose(np.array(read_image(path)).mean((0, 1)), (200, 40, 90), atol=3)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_is_laid_on_white(tmp_path: Path, mode: str) -> None:
    path = tmp_path / "picture.png"
    alpha = Image.fromarray(np.linspace(0, 255, 35).astype(np.uint8).reshape(5, 7))
    source = CORNERS.convert(mode[:-1])
    source.putalpha(alpha)
    source.save(path)
    part = np.array(alpha, dtype=np.float64)[..., None] / 255
    expected = part * np.array(CORNERS.convert(mode[:-1]).convert("RGB")) + (1 - part) * 255
    assert np.abs(np.array(read_image(path)) - expected).max() <= 1


def test_what_is_made_in_strips_shows_no_seam(tmp_path: Path) -> None:
    samples = np.random.default_rng(1).integers(0, 256, (150, 9, 4), dtype=np.uint8)
    Image.fromarray(samples).save(tmp_path / "clear.png")
    white = Image.new("RGBA", (9, 150), "white")
    expected = Image.alpha_composite(white, Image.fromarray(samples)).convert("RGB")
    assert np.array_equal(read_image(tmp_path / "clear.png"), expected)
    # Its white is its own maximum, which stands in the last rows.
    deep = np.linspace(0, 2_550_000, 150 * 9).astype(np.int32).reshape(150, 9)
    Image.fromarray(deep).save(tmp_path / "deep.tif")
    assert np.abs(np.array(read_image(tmp_path / "deep.tif"))[..., 0] - deep / 10_000).max() <= 1


def test_a_transparent_palette_colour_becomes_white(tmp_path: Path) -> None:
    path = tmp_path / "picture.gif"
    source = Image.new("P", (2, 1))
    source.putpalette([10, 20, 30, 200, 100, 50])
    source.putpixel((1, 0), 1)
    source.save(path, transparency=0)
    assert np.array(read_image(path)).tolist() == [[[255, 255, 255], [200, 100, 50]]]


def _png16(path: Path, samples: np.ndarray, *, colour_type: int) -> None:
    """A 16-bit PNG written from the specification; Pillow writes no 16-bit RGB."""
    height, width = samples.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in samples)

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows))
                     + chunk(b"IEND", b""))


@pytest.mark.parametrize(("colour_type", "channels"), [(0, ()), (2, (3,))], ids=["grey", "rgb"])
def test_16_bit_pngs_keep_their_high_byte_and_do_not_turn_white(
    tmp_path: Path, colour_type: int, channels: tuple[int, ...],
) -> None:
    path = tmp_path / "picture.png"
    samples = np.random.default_rng(0).integers(0, 65536, (5, 7, *channels))
    _png16(path, samples, colour_type=colour_type)
    expected = samples // 256 if channels else np.repeat((samples // 256)[..., None], 3, axis=-1)
    assert np.array_equal(read_image(path), expected)


@pytest.mark.parametrize("dtype", [np.uint16, np.float32])
def test_deep_greyscale_tiffs_are_scaled_and_not_clipped(tmp_path: Path, dtype: type) -> None:
    path = tmp_path / "picture.tif"
    eight_bits = np.linspace(0, 255, 35).astype(np.uint8).reshape(5, 7)
    deep = eight_bits.astype(np.uint16) * 257 if dtype is np.uint16 else eight_bits.astype(np.float32) / 255
    Image.fromarray(deep).save(path)
    assert np.array_equal(np.array(read_image(path))[..., 0], eight_bits)


def test_avif_is_read_where_pillow_can(tmp_path: Path) -> None:
    path = tmp_path / "picture.avif"
    if ".avif" not in Image.registered_extensions():
        pytest.importorskip("pillow_avif", reason="this Pillow does not read AVIF")
    Image.new("RGB", (64, 48), (200, 40, 90)).save(path, quality=100)
    assert read_size(path) == (64, 48)
    assert np.allclose(np.array(read_image(path)).mean((0, 1)), (200, 40, 90), atol=4)


def test_suffixes_count_in_any_case_and_hidden_files_do_not() -> None:
    assert [is_image_name(Path(n)) for n in ("A.PNG", "b.JpEg", "c.webp", "d.txt", "._e.png", "png")] == [
        True, True, True, False, False, False]


def test_an_upper_case_suffix_is_opened(tmp_path: Path) -> None:
    CORNERS.save(tmp_path / "A.PNG")
    assert np.array_equal(read_image(tmp_path / "A.PNG"), CORNERS)


@pytest.mark.parametrize("content", [b"", b"not a picture at all", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0\0\x10JFIF"])
@pytest.mark.parametrize("reader", [read_image, read_size, check_image])
def test_what_is_no_image_is_refused_by_name(tmp_path: Path, content: bytes, reader) -> None:
    path = tmp_path / "broken.png"
    path.write_bytes(content)
    with pytest.raises(DatasetError, match=r"broken\.png"):
        reader(path)


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".bmp", ".tif"])
@pytest.mark.parametrize("tolerant", [False, True])
def test_a_truncated_image_is_refused_even_where_pillow_was_told_to_tolerate_it(
    tmp_path: Path, suffix: str, tolerant: bool, monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = tmp_path / f"cut{suffix}"
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", tolerant)
    with pytest.raises(DatasetError, match="cut"):
        read_image(path)
    assert ImageFile.LOAD_TRUNCATED_IMAGES is tolerant


def test_threads_that_decode_at_once_leave_pillows_switch_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second begins after the first and ends after it; in between, a truncated file is an error for both."""
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    CORNERS.save(tmp_path / "picture.png")
    inside, first_is_out, seen = threading.Barrier(2, timeout=60), threading.Event(), {}
    original = PngImagePlugin.PngImageFile.load

    def load(image: Image.Image) -> object:
        name = threading.current_thread().name
        if name not in seen:  # Pillow asks again for what is decoded already
            inside.wait()
            assert name == "first" or first_is_out.wait(60)
            seen[name] = ImageFile.LOAD_TRUNCATED_IMAGES
        return original(image)
    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", load)
    path = tmp_path / "picture.png"
    threads = [threading.Thread(target=read_image, args=(path,), name=name) for name in ("first", "second")]
    for thread in threads:
        thread.start()
    threads[0].join()
    first_is_out.set()
    threads[1].join()
    assert seen == {"first": False, "second": False}
    assert ImageFile.LOAD_TRUNCATED_IMAGES is True


def test_a_tolerance_that_is_switched_on_meanwhile_stays_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", False)
    CORNERS.save(tmp_path / "picture.png")
    original = PngImagePlugin.PngImageFile.load

    def load(image: Image.Image) -> object:
        loaded = original(image)
        ImageFile.LOAD_TRUNCATED_IMAGES = True
        return loaded
    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", load)
    read_image(tmp_path / "picture.png")
    assert ImageFile.LOAD_TRUNCATED_IMAGES is True


def test_a_damaged_png_is_found_without_decoding(tmp_path: Path) -> None:
    path = tmp_path / "damaged.png"
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)
    with pytest.raises(DatasetError, match="damaged"):
        check_image(path)


def test_a_png_is_used_if_and_only_if_all_of_its_pixels_are_there(tmp_path: Path) -> None:
    paths = damaged_pngs(tmp_path)
    cut = paths.pop("cut")
    for what, path in paths.items():
        assert np.array_equal(read_image(path), read_image(tmp_path / "whole.png")), what
        assert check_image(path)[:2] == read_size(path) == (32, 32), what
    for reader in (read_image, check_image):
        with pytest.raises(DatasetError, match="its end is missing"):
            reader(cut)


@pytest.mark.parametrize(("start", "word"), [
    (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIC"), (b"\0\0\0\x18ftypmif1\0\0\0\0mif1heic", "HEIC"),
    (b"\0\0\0\x0cJXL \r\n\x87\n", "JPEG XL"), (b"\xff\x0a\xfa\x1f", "JPEG XL"), (b"8BPS\0\1", "Photoshop"),
    (b"<!DOCTYPE html><html>", "web page"), (b"\0\0\0\x18ftypmp42", "film"), (b"no picture", "no picture")])
def test_a_file_of_a_kind_that_is_not_read_is_called_what_it_is_whatever_its_name_says(tmp_path: Path, start: bytes, word: str):
    (tmp_path / "a.jpg").write_bytes(start + bytes(200))
    for reader in (read_image, read_size, check_image):
        with pytest.raises(DatasetError) as error:
            reader(tmp_path / "a.jpg")
        assert word in error.value.why and (error.value.remedy or word == "no picture")


def test_an_image_of_which_nothing_can_be_seen_is_refused(tmp_path: Path) -> None:
    clear = CORNERS.copy()
    clear.putalpha(0)
    clear.save(tmp_path / "clear.png")
    with pytest.raises(DatasetError, match="transparent everywhere"):
        read_image(tmp_path / "clear.png")
    clear.putpixel((6, 4), (1, 2, 3, 1))
    clear.save(tmp_path / "clear.png")
    assert read_image(tmp_path / "clear.png").size == CORNERS.size


@pytest.mark.parametrize("reader", [read_image, read_size, check_image])
def test_an_enormous_image_is_refused_from_its_header(tmp_path: Path, reader) -> None:
    path = tmp_path / "huge.png"
    header = struct.pack(">IIBBBBB", 40000, 30000, 8, 2, 0, 0, 0)
    body = struct.pack(">I", 13) + b"IHDR" + header + struct.pack(">I", zlib.crc32(b"IHDR" + header))
    empty = struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", zlib.crc32(b"IDAT"))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body + empty)
    with pytest.raises(DatasetError, match="huge.png.*enormous.*million pixels"):
        reader(path)


def test_the_pixel_limit_is_exact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "picture.png"
    CORNERS.save(path)
    monkeypatch.setattr(images_module, "MAX_PIXELS", 35)
    assert read_image(path).size == (7, 5)
    monkeypatch.setattr(images_module, "MAX_PIXELS", 34)
    with pytest.raises(DatasetError, match="enormous"):
        read_image(path)


def test_a_missing_image_and_a_forbidden_one_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DatasetError, match="gone"):
        read_image(tmp_path / "nothing.png")
    CORNERS.save(tmp_path / "locked.png")

    def refuse(*args: object, **kwargs: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Image, "open", refuse)
    with pytest.raises(DatasetError, match="locked.png.*denied"):
        read_image(tmp_path / "locked.png")


def test_no_file_stays_open(tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    CORNERS.save(path)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always", ResourceWarning)
        read_image(path), read_size(path), check_image(path)
        gc.collect()
    assert not warned
    path.unlink()
