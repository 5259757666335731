"""Zip files that were made to do harm: nothing leaves its place, and what is refused is named."""

from __future__ import annotations

import io
import os
import random
import stat
import struct
import sys
import tracemalloc
import zipfile
from pathlib import Path

import pytest
from PIL import Image

from lib_lora_train.errors import DatasetError
from lib_lora_train.studio.importing import archive as archive_module
from lib_lora_train.studio.importing.archive import open_archive
from lib_lora_train.studio.importing.collect import Collected, collect
from lib_lora_train.studio.importing.owned import OwnedDataset

MIB = 1 << 20


def png(colour: int = 0) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16), (colour % 256, colour // 256, 9)).save(buffer, "PNG")
    return buffer.getvalue()


def packed(path: Path, entries: list[tuple[str | zipfile.ZipInfo, bytes]], method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", method) as file:
        for name, data in entries:
            file.writestr(name, data)
    return path


def patched(path: Path, old: bytes, new: bytes) -> Path:
    """Change bytes of the same length everywhere: what no honest program writes."""
    assert len(old) == len(new) and old in path.read_bytes()
    path.write_bytes(path.read_bytes().replace(old, new))
    return path


def flagged(path: Path, bit: int, *, method: int | None = None) -> Path:
    """Set a bit in the flags of every entry, and perhaps its method of packing, where both headers say it."""
    data = bytearray(path.read_bytes())
    for signature, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        at = data.find(signature)
        while at >= 0:
            flags, packing = struct.unpack_from("<HH", data, at + offset)
            struct.pack_into("<HH", data, at + offset, flags | bit, packing if method is None else method)
            at = data.find(signature, at + 4)
    path.write_bytes(data)
    return path


def imported(tmp_path: Path, path: Path) -> Collected:
    """What comes of importing it; fails if anything lies outside of the dataset afterwards."""
    outside = sorted(tmp_path.iterdir())
    dataset = OwnedDataset.create(tmp_path / "inside", "d")
    collected = collect(dataset, [path])
    assert sorted(tmp_path.iterdir()) == sorted([*outside, tmp_path / "inside"])
    assert all(added.parent == dataset.images_folder and added.is_file() for added in collected.added)
    assert sorted(collected.added) == sorted(dataset.images)
    assert set(dataset.folder.iterdir()) <= {dataset.images_folder, dataset.folder / "dataset.json"}
    return collected


def names(collected: Collected) -> list[str]:
    return [path.name for path in collected.added]


@pytest.mark.parametrize("name", [
    "../../evil.png", "..\\..\\evil.png", "/tmp/evil.png", "C:\\Windows\\evil.png", "C:evil.png", "\\\\server\\share\\evil.png",
    "a/../../../evil.png", "//evil.png", "./evil.png", "x/./evil.png", "\\\\?\\C:\\evil.png"])
def test_no_name_leads_out_of_the_dataset(tmp_path: Path, name: str):
    collected = imported(tmp_path, packed(tmp_path / "z.zip", [(name, png())]))
    assert len(collected.added) == 1 and collected.added[0].stem.endswith("evil")


@pytest.mark.parametrize("name", ["CON.png", "nul.png", "a/COM1.png", "LPT9.x.png", "aux .png"])
def test_names_that_windows_keeps_get_others(tmp_path: Path, name: str):
    assert names(imported(tmp_path, packed(tmp_path / "z.zip", [(name, png())])))[0].startswith("_")


@pytest.mark.parametrize("name", ["a<b>.png", "a|b?.png", "a:stream.png", "a*.png", 'a".png', "a\tb.png", "a\u202egnp.png",
                                  "x. .png"])
def test_names_that_are_none_on_some_system_get_others(tmp_path: Path, name: str):
    (name,) = names(imported(tmp_path, packed(tmp_path / "z.zip", [(name, png())])))
    assert not set(name) & set('<>:"|?*\t\u202e') and not name.endswith((" .png", "..png"))


def test_names_that_differ_in_case_only_do_not_cover_each_other_up(tmp_path: Path):
    path = packed(tmp_path / "z.zip", [("a.png", png(1)), ("A.PNG", png(2)), ("x/a.png", png(3)), ("A.jpg", png(4)),
                                       ("x/a.txt", b"third"), ("a.txt", b"first")])
    collected = imported(tmp_path, path)
    assert len({name.casefold() for name in names(collected)}) == 4
    assert len({Path(name).stem.casefold() for name in names(collected)}) == 4  # captions go by the stem
    texts = {p.name: p.with_suffix(".txt").read_text("utf-8") for p in collected.added if p.with_suffix(".txt").exists()}
    assert texts == {"a.png": "first", "a_3.png": "third"}


def test_one_name_twice_gives_two_images(tmp_path: Path):
    with pytest.warns(UserWarning, match="Duplicate name"):
        path = packed(tmp_path / "z.zip", [("a.png", png(1)), ("a.png", png(2))])
    collected = imported(tmp_path, path)
    assert names(collected) == ["a.png", "a_2.png"]
    assert [Image.open(path).getpixel((0, 0))[0] for path in collected.added] == [1, 2]


def test_links_are_not_followed(tmp_path: Path):
    (tmp_path / "secret.png").write_bytes(png(7))
    link = zipfile.ZipInfo("link.png")
    link.create_system, link.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
    path = packed(tmp_path / "z.zip", [(link, str(tmp_path / "secret.png").encode()), ("a.png", png())])
    collected = imported(tmp_path, path)
    assert names(collected) == ["a.png"] and ("z.zip/link.png", "It is a link to another file.") in collected.skipped


def test_an_image_that_unpacks_to_very_much_is_refused_before_it_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with zipfile.ZipFile(tmp_path / "z.zip", "w", zipfile.ZIP_DEFLATED) as file, file.open("bomb.png", "w") as entry:
        for _ in range(20):
            entry.write(bytes(MIB))
    assert (tmp_path / "z.zip").stat().st_size < 64 << 10
    path = packed_again(tmp_path / "z.zip", ("a.png", png()))
    assert archive_module.MOST_ENTRY_BYTES <= 256 * MIB
    monkeypatch.setattr(archive_module, "MOST_ENTRY_BYTES", 16 * MIB)  # the same at a sixteenth
    collected = imported(tmp_path, path)
    assert names(collected) == ["a.png"]
    assert collected.skipped == (("z.zip/bomb.png", "It is enormous (20 MiB unpacked, the limit is 16)."),)


def packed_again(path: Path, entry: tuple[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "a") as file:
        file.writestr(*entry)
    return path


def test_an_entry_that_lies_about_its_size_gives_no_more_than_it_said(tmp_path: Path):
    path = packed(tmp_path / "z.zip", [("a.png", png()), ("lie.png", bytes(8 * MIB))])
    patched(path, struct.pack("<I", 8 * MIB), struct.pack("<I", 100))
    collected = imported(tmp_path, path)
    assert names(collected) == ["a.png"] and [name for name, _ in collected.skipped] == ["z.zip/lie.png"]


def test_all_of_an_archive_together_may_only_unpack_to_so_much(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    noise = random.Random(1)
    entries = [(f"{i}.png", png(i) + bytes(noise.randrange(2)) + bytes(MIB)) for i in range(40)]
    path = packed(tmp_path / "z.zip", entries)
    monkeypatch.setattr(archive_module, "ALWAYS_BYTES", 5 * MIB)
    monkeypatch.setattr(archive_module, "MOST_EXPANSION", 1)
    collected = imported(tmp_path, path)
    assert 1 <= len(collected.added) <= 5
    assert collected.skipped[-1] == ("z.zip", "It unpacks to far more than its own size, so the rest of it was left out.")
    assert len(collected.skipped) == 2  # not a line for each of the rest


def test_thousands_of_images_are_taken_and_too_many_files_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    many = packed(tmp_path / "many.zip", [(f"{i}.txt", b"x") for i in range(2500)] + [("a.png", png())])
    assert names(imported(tmp_path, many)) == ["a.png"]
    dataset = OwnedDataset.create(tmp_path, "second")
    monkeypatch.setattr(archive_module, "MOST_ENTRIES", 2000)
    collected = collect(dataset, [many])
    assert collected.added == () and "2501 files, more than 2000" in collected.skipped[0][1]


def test_an_enormous_list_of_contents_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(archive_module, "_MOST_DIRECTORY", 256 << 10)
    path = packed(tmp_path / "z.zip", [(f"{'x' * 200}{i}.png", b"") for i in range(2000)], zipfile.ZIP_STORED)
    tracemalloc.start()
    try:
        collected = imported(tmp_path, path)
        assert tracemalloc.get_traced_memory()[1] < 4 * MIB
    finally:
        tracemalloc.stop()
    assert "list of contents is enormous" in collected.skipped[0][1]


def test_a_password_is_told_once(tmp_path: Path):
    path = flagged(packed(tmp_path / "z.zip", [(f"{i}.png", png(i)) for i in range(5)]), 0x1)
    collected = imported(tmp_path, path)
    assert collected.skipped == (("z.zip", "Of every picture in it: it is locked with a password; unpack the archive and "
                                  "choose the folder."),)


def test_packings_that_cost_memory_or_are_not_known_are_told(tmp_path: Path):
    lzma = packed(tmp_path / "lzma.zip", [("a.png", png())], zipfile.ZIP_LZMA)
    unknown = flagged(packed(tmp_path / "unknown.zip", [("a.png", png())]), 0, method=97)
    dataset = OwnedDataset.create(tmp_path, "d")
    skipped = collect(dataset, [lzma, unknown]).skipped
    assert [name for name, _ in skipped] == ["lzma.zip", "unknown.zip"]
    assert all("packed in a way" in why for _, why in skipped)
    bzip2 = packed(tmp_path / "bzip2.zip", [("a.png", png())], zipfile.ZIP_BZIP2)
    assert len(collect(dataset, [bzip2]).added) == 1


@pytest.mark.parametrize(("name", "encoding"), [
    ("猫の写真", "cp932"), ("猫の写真", "utf-8"), ("café", "cp437"), ("été", "cp437"), ("кот", "utf-8")])
def test_names_without_the_mark_of_utf8_are_read_as_they_were_meant(tmp_path: Path, name: str, encoding: str):
    raw = f"{name}.png".encode(encoding)
    placeholder = "~" * len(raw)
    path = packed(tmp_path / "z.zip", [(placeholder, png())])
    patched(path, placeholder.encode(), raw)
    assert names(imported(tmp_path, path)) == [f"{name}.png"]


def test_a_name_that_is_no_text_is_a_sentence(tmp_path: Path):
    path = packed(tmp_path / "z.zip", [("é" * 4 + ".png", png())])
    patched(path, ("é" * 4).encode(), b"\xff\xfe" * 4)
    collected = imported(tmp_path, path)
    assert collected.added == () and "not the text that it says" in collected.skipped[0][1]


def test_what_systems_hide_beside_images_is_passed_over(tmp_path: Path):
    path = packed(tmp_path / "z.zip", [("__MACOSX/._a.png", b"x"), (".hidden.png", b"x"), (".git/a.png", b"x"),
                                       ("a.png", png()), ("Thumbs.db", b"x"), ("folder.png/", b"")])
    collected = imported(tmp_path, path)
    assert names(collected) == ["a.png"] and collected.skipped == ()


def test_an_archive_inside_an_archive_is_named_and_not_opened(tmp_path: Path):
    inner = packed(tmp_path / "inner.zip", [("b.png", png(2))]).read_bytes()
    collected = imported(tmp_path, packed(tmp_path / "z.zip", [("a.png", png()), ("inner.zip", inner)]))
    assert names(collected) == ["a.png"]
    assert collected.skipped == (("z.zip/inner.zip", "An archive inside an archive is not opened."),)


def test_a_damaged_archive_gives_what_is_whole_in_it(tmp_path: Path):
    path = packed(tmp_path / "z.zip", [("a.png", png(1)), ("b.png", png(2)), ("c.png", png(3))], zipfile.ZIP_STORED)
    data = bytearray(path.read_bytes())
    data[data.find(png(2)) + 50] ^= 0xFF
    path.write_bytes(data)
    collected = imported(tmp_path, path)
    assert names(collected) == ["a.png", "c.png"] and collected.skipped[0][0] == "z.zip/b.png"


@pytest.mark.parametrize("content", [b"", b"x" * 1000, b"PK\x05\x06" + bytes(18), b"PK\x03\x04" + bytes(60)])
def test_what_is_no_archive_is_a_sentence(tmp_path: Path, content: bytes):
    (tmp_path / "z.zip").write_bytes(content)
    collected = imported(tmp_path, tmp_path / "z.zip")
    assert collected.added == () and collected.skipped[0][0] == "z.zip"


@pytest.mark.skipif(not hasattr(os, "mkfifo") or sys.platform == "win32", reason="no such files there")
def test_what_is_no_plain_file_is_not_waited_for(tmp_path: Path):
    os.mkfifo(tmp_path / "endless.zip")
    dataset = OwnedDataset.create(tmp_path, "d")
    assert collect(dataset, [tmp_path / "endless.zip"]).skipped == (("endless.zip", "It is not a file."),)


def test_damaged_archives_end_in_a_value_or_a_sentence(tmp_path: Path):
    rng = random.Random(7)
    seeds = [packed(tmp_path / "s.zip", [("x/猫.png", png()), ("a.txt", b"tag"), ("b.png", png(2))], method).read_bytes()
             for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2)]
    ended = {"value": 0, "sentence": 0}
    for _ in range(400):
        data = bytearray(rng.choice(seeds))
        for _ in range(rng.choice((1, 2, 6))):
            place = rng.randrange(len(data)) if rng.random() < 0.3 else rng.randrange(max(0, len(data) - 300), len(data))
            data[place] = rng.choice((0, 1, 0xFF, 0x80, rng.randrange(256)))
        (tmp_path / "f.zip").write_bytes(data[:rng.choice((None, None, rng.randrange(len(data))))])
        try:
            with open_archive(tmp_path / "f.zip") as archive:
                for entry in archive.entries():
                    archive.copy(entry, io.BytesIO())
            ended["value"] += 1
        except DatasetError as error:
            assert "\n" not in str(error)
            ended["sentence"] += 1
    assert min(ended.values()) > 10
