"""`tag`: captions for a folder from the command line, on a small tagger in the published formats."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from lib_lora_train.errors import UserError
from lib_lora_train.studio.commands.arguments import add_tag
from lib_lora_train.studio.commands.tag import SOME_FAILED
from tests.interrupted_save import FINISHED, interrupt_save


def tag(*arguments: object) -> int:
    parser = argparse.ArgumentParser()
    add_tag(parser.add_subparsers())
    chosen = parser.parse_args(["tag", *map(str, arguments)])
    return chosen.command(chosen)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """kohya's layout: three images with prompts inside, one of them captioned."""
    place = tmp_path / "data" / "10_zzk girl"
    place.mkdir(parents=True)
    noise = np.random.default_rng(0)
    for name in ("red_cat", "blue_dog", "猫"):
        info = PngInfo()
        info.add_text("parameters", f"a ({name}:1.2)\nSteps: 20, Seed: 1")
        Image.fromarray(noise.integers(0, 256, (40, 64, 3), dtype=np.uint8)).save(place / f"{name}.png", pnginfo=info)
    (place / "red_cat.txt").write_text("an old caption", encoding="utf-8")
    return tmp_path / "data"


def captions(folder: Path) -> dict[str, str]:
    return {path.stem: path.read_text(encoding="utf-8") for path in folder.rglob("*.txt")}


def test_a_wd_tagger_captions_a_folder(folder: Path, tmp_path: Path):
    from tests.tagging.wd_files import TAGS, write_tagger

    write_tagger(tmp_path / "tiny")
    assert tag(folder, "--with", "wd", "--model", tmp_path / "tiny", "--threshold", 0, "--trigger", "zzk",
               "--set", "remove_underscore=false", "--set", "character_threshold=0", "--device", "cpu") == 0
    written = captions(folder)
    expected = {name for name, category in TAGS if category != 9}
    assert set(written) == {"red_cat", "blue_dog", "猫"}
    for text in written.values():
        first, *others = text.strip().split(", ")
        assert first == "zzk" and set(others) == expected


def test_prompts_inside_the_images_become_captions_and_what_was_there_is_kept_in_a_backup(
        folder: Path, capsys: pytest.CaptureFixture[str]):
    assert tag(folder, "--with", "infotext", "--mode", "prepend") == 0
    assert captions(folder) == {"red_cat": "a red_cat, an old caption", "blue_dog": "a blue_dog", "猫": "a 猫"}
    said = capsys.readouterr().out
    assert "3 captions written" in said
    (backup,) = (folder / ".studio" / "backup").iterdir()
    assert str(backup) in said


def test_only_empty_and_a_template(folder: Path):
    assert tag(folder, "--with", "template", "--mode", "only_empty", "--template", "{folder}: {name}", "--trigger", "zzk") == 0
    assert captions(folder) == {"red_cat": "an old caption", "blue_dog": "zzk, zzk girl: blue dog", "猫": "zzk, zzk girl: 猫"}


def test_a_dry_run_shows_everything_and_writes_nothing(folder: Path, capsys: pytest.CaptureFixture[str]):
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert tag(folder, "--with", "filename", "--dry-run") == 0
    said = capsys.readouterr().out
    assert "red_cat.png: red cat" in said and "猫.png: 猫" in said and "Nothing was written" in said
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_json_has_a_line_for_every_image(folder: Path, capsys: pytest.CaptureFixture[str]):
    (folder / "10_zzk girl" / "broken.png").write_bytes(b"no picture")
    assert tag(folder, "--with", "infotext", "--json") == SOME_FAILED
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {Path(row["picture"]).stem: row["caption"] for row in rows} == {
        "red_cat": "a red_cat", "blue_dog": "a blue_dog", "猫": "a 猫", "broken": None}
    assert [row["problem"] != "" for row in rows] == [Path(row["picture"]).stem == "broken" for row in rows]
    assert captions(folder) == {"red_cat": "a red_cat", "blue_dog": "a blue_dog", "猫": "a 猫"}


def test_a_caption_that_is_no_text_is_named_and_left_alone(folder: Path, capsys: pytest.CaptureFixture[str]):
    odd = folder / "10_zzk girl" / "red_cat.txt"
    odd.write_bytes(b"caf\x81 \xff")
    assert tag(folder, "--with", "filename", "--mode", "append") == SOME_FAILED
    assert odd.read_bytes() == b"caf\x81 \xff"
    assert "not UTF-8" in capsys.readouterr().err
    assert tag(folder, "--with", "filename") == 0
    assert odd.read_text(encoding="utf-8") == "red cat"


@pytest.mark.parametrize("shown", [[], ["--json"]])
def test_what_became_of_an_interrupted_save_is_told(
        folder: Path, shown: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    interrupt_save(folder, "red_cat.png", "nearly saved", monkeypatch)
    assert tag(folder, "--with", "filename", "--mode", "append", *shown) == 0
    said = capsys.readouterr()
    assert FINISHED in said.err.splitlines() and FINISHED not in said.out
    assert captions(folder)["red_cat"] == "nearly saved, red cat"
    tag(folder, "--with", "filename", "--mode", "append")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("arguments", "said"), [
    (["--with", "filename", "--threshold", "2"], "between 0 and 1"),
    (["--with", "filename", "--set", "treshold=1"], "treshold"),
    (["--with", "filename", "--set", "trigger_word"], "name=value"),
    (["--with", "filename", "--model", "x"], "--model"),
    (["--with", "filename", "--device", "abacus"], "abacus"),
    (["--with", "template", "--template", "{no}"], "no"),
    (["--with", "wd", "--model", "nowhere"], "selected_tags.csv|pip install timm"),
])
def test_bad_input_is_one_sentence_and_nothing_is_written(folder: Path, arguments: list[str], said: str):
    with pytest.raises(UserError, match=said):
        tag(folder, *arguments)
    assert captions(folder) == {"red_cat": "an old caption"}


def test_a_folder_without_images_is_told(tmp_path: Path):
    with pytest.raises(UserError, match="no picture"):
        tag(tmp_path, "--with", "filename")
    with pytest.raises(UserError, match="does not exist"):
        tag(tmp_path / "nowhere", "--with", "filename")


def test_an_interrupted_run_writes_what_it_found(folder: Path, monkeypatch: pytest.MonkeyPatch):
    from lib_lora_train.tagging import plain
    words, seen = plain.words_of_name, []

    def interrupting(stem: str) -> str:
        if len(seen) == 2:
            raise KeyboardInterrupt
        seen.append(stem)
        return words(stem)
    monkeypatch.setattr(plain, "words_of_name", interrupting)
    assert tag(folder, "--with", "filename", "--set", "batch_size=1") == 130
    assert seen == ["blue_dog", "red_cat"]
    assert captions(folder) == {"blue_dog": "blue dog", "red_cat": "red cat"}
