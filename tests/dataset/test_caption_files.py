"""Which text belongs to which image, and what is said about captions."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lib_lora_train.dataset.caption_files import (
    CaptionNotes,
    FolderCaptions,
    count_of_captions,
    find_captions,
    match_names,
    read_caption_file,
)
from lib_lora_train.settings import parse


def found(folder: Path, images: list[str], texts: dict[str, object]) -> FolderCaptions:
    """The captions of `images` in a folder of `texts`; what is no text is written as JSON."""
    for name, text in texts.items():
        (folder / name).write_text(text if isinstance(text, str) else json.dumps(text), encoding="utf-8")
    return find_captions([folder / image for image in images], sorted(folder.iterdir()))


def lines(captions: FolderCaptions, folder: Path, images: list[str]) -> list[str | None]:
    return [one.line if (one := captions.of(folder / image)) else None for image in images]


@pytest.mark.parametrize(("images", "texts", "expected"), [
    (["a.png"], ["a.caption", "a.TXT", "a.png.txt"], {"a.png": ["a.TXT", "a.png.txt", "a.caption"]}),
    (["b.png", "b.jpg"], ["b.txt"], {"b.png": ["b.txt"], "b.jpg": ["b.txt"]}),
    (["b.png", "b.jpg"], ["b.jpg.txt"], {"b.jpg": ["b.jpg.txt"]}),
    (["aaa.bbb.jpg", "aaa.ccc.jpg"], ["aaa.bbb.txt", "aaa.ccc.txt"],
     {"aaa.bbb.jpg": ["aaa.bbb.txt"], "aaa.ccc.jpg": ["aaa.ccc.txt"]}),
    (["a.jpg", "A.jpg"], ["a.txt", "A.txt"], {"a.jpg": ["a.txt"], "A.jpg": ["A.txt"]}),
    (["a.jpg", "A.jpg"], ["a.txt"], {"a.jpg": ["a.txt"]}),
    (["IMG.JPG"], ["img.txt"], {"IMG.JPG": ["img.txt"]}),
    (["cafe\u0301.png"], ["caf\u00e9.txt"], {"cafe\u0301.png": ["caf\u00e9.txt"]}),
    (["a.png"], ["b.txt", "readme.md"], {}),
    (["readme.png"], ["readme.txt", "LICENSE.txt"], {"readme.png": ["readme.txt"]}),
], ids=["order", "shared", "own", "dots", "twins", "taken", "case", "accents", "none", "for people"])
def test_images_and_texts_are_matched_by_name(images: list[str], texts: list[str], expected: dict[str, list[str]]) -> None:
    own, unmatched = match_names(images, texts)
    assert own == expected
    assert unmatched == ["b.txt"] * ("b.txt" in texts and "a.png" in images)


def test_the_first_file_with_a_caption_counts(tmp_path: Path) -> None:
    images = ["a.png", "b.png", "c.png", "d.png"]
    captions = found(tmp_path, images, {"a.txt": " ,，\n", "a.caption": "from caption", "b.txt": "one", "b.caption": "two",
                                        "c.txt": "same", "c.png.txt": "same", "d.txt": " "})
    assert lines(captions, tmp_path, images) == ["from caption", "one", "same", ""]
    assert [captions.of(tmp_path / image).passed_over for image in images] == [(), (tmp_path / "b.caption",), (), ()]


@pytest.mark.parametrize(("entry", "caption"), [
    ({"caption": "a cat", "tags": "hat, coat"}, "a cat, hat, coat"), ({"tags": ["zzk", "hat"]}, "zzk, hat"),
    ({"text": "a cat"}, "a cat"), ({"prompt": "a cat", "seed": 1}, "a cat"),
    ({"tag_string": "1girl red_hat"}, "1girl, red_hat"),
    ({"caption": "", "tags": ["hat"]}, "hat"), ({"text": "a\ud800 c\0t"}, "a? c t"), ({"width": 5}, ""), ([1, 2], ""),
    (["1girl", "hat"], "1girl, hat"), ('"a cat"', "a cat"), ({"caption": ["a cat", "one cat"]}, "a cat"),
    ({"tags": {"hat": 0.9, "coat": 0.8}}, "hat, coat"), ({"category": "gelbooru", "tags": "1girl solo"}, "1girl, solo"),
    ({"tag_string": "1girl solo"}, "1girl, solo")])
def test_a_json_file_of_the_images_name_holds_its_caption(tmp_path: Path, entry: object, caption: str) -> None:
    assert lines(found(tmp_path, ["a.png"], {"a.json": entry}), tmp_path, ["a.png"]) == [caption]


@pytest.mark.parametrize(("name", "content"), [
    ("meta_cap.json", {"a": {"caption": "cat", "tags": "hat"}, "/data/x/b.png": {"tags": "hat"}, "z": {"caption": "none"}}),
    ("metadata.jsonl", '{"file_name": "a.png", "text": "cat, hat"}\n\n{"file_name": "x/b.png", "text": "hat"}'),
    ("list.json", [{"image": "A.png", "caption": "cat, hat"}, {"file": "b.png", "prompt": "hat"}]),
    ("plain.json", {"a.png": "cat, hat", "b": "hat"})])
def test_metadata_of_several_images_is_read(tmp_path: Path, name: str, content: object) -> None:
    captions = found(tmp_path, ["a.png", "b.png", "c.png"], {name: content})
    assert lines(captions, tmp_path, ["a.png", "b.png", "c.png"]) == ["cat, hat", "hat", None] and captions.unmatched == ()


def test_metadata_that_names_no_image_of_the_folder_is_said_to_fit_none(tmp_path: Path) -> None:
    captions = found(tmp_path, ["a.png"], {"meta.json": {"z": {"caption": "cat"}}, "metadata.jsonl": "no JSON", "z.txt": "cat"})
    assert captions.unmatched == ("meta.json", "metadata.jsonl", "z.txt")


def test_a_text_file_comes_before_metadata_and_damaged_json_is_named_only_where_it_is_an_images(tmp_path: Path) -> None:
    captions = found(tmp_path, ["a.png", "b.png"], {"a.txt": "own", "m.json": {"a": {"caption": "listed"}}, "b.json": "{",
                                                    "x.json": "{"})
    assert captions.of(tmp_path / "a.png").line == "own"
    assert "b.json cannot be read: it is not JSON" in str(captions.of(tmp_path / "b.png").error)


def test_what_is_odd_is_said_once_a_kind(tmp_path: Path) -> None:
    notes = CaptionNotes()
    for name, text in {"a": "one\ntwo", "b": "a {x|y} <lora:z:1>", "c": "fine {x}", "d": "one\ntwo"}.items():
        (tmp_path / f"{name}.txt").write_text(text)
        notes.add(read_caption_file(tmp_path / f"{name}.txt"))
    notes.add(None)
    several, wildcards, networks = notes.sentences()
    assert several.startswith("2 pictures have several lines in the caption file (a.txt, d.txt)")
    assert wildcards.startswith("1 picture has wildcards such as {a|b} in the caption (b.txt)")
    assert "enable_wildcard" in wildcards
    assert networks.startswith("1 picture has networks such as <lora:name:1> in the caption (b.txt)")

    chosen = CaptionNotes()
    for name in "ab":
        chosen.add(read_caption_file(tmp_path / f"{name}.txt"), parse({"enable_wildcard": True}).captions)
    assert chosen.sentences() == [networks]
    assert notes.captioned == 4


def test_a_json_file_without_a_caption_is_said(tmp_path: Path) -> None:
    notes = CaptionNotes()
    notes.add(found(tmp_path, ["a.png"], {"a.json": {"rating": "s"}}).of(tmp_path / "a.png"))
    assert notes.captioned == 0
    assert notes.sentences() == ["1 picture has a JSON file that names no caption or tags (a.json)."]


def test_the_closing_sentence_counts_in_correct_english() -> None:
    assert count_of_captions(1, 1, []) == "1 picture, 1 with a caption."
    assert count_of_captions(3, 0, ["x.txt"]) == "3 pictures, 0 with captions; 1 text file fits no picture (x.txt)."
    assert count_of_captions(2, 2, list("wxyz")) == (
        "2 pictures, 2 with captions; 4 text files fit no picture (w, x, y and 1 more).")
    assert count_of_captions(1, 0, ["a\nb.txt"]).endswith("(a\ufffdb.txt).")
    assert count_of_captions(1, 1, [], unread=["a.psd"]) == (
        "1 picture, 1 with a caption; 1 file is of a kind that is not read (a.psd).")
