"""`check`: what it prints, what it writes, and what its exit code says."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from pathlib import Path

import pytest
from PIL import Image

from lib_lora_train.__main__ import main
from lib_lora_train.demo import STYLE
from lib_lora_train.errors import DatasetError, SettingError
from lib_lora_train.model.family import FAMILIES
from lib_lora_train.model.sd.tokens import clip_tokenizer
from lib_lora_train.studio.commands import check as check_command
from lib_lora_train.studio.commands.arguments import add_check


def check(*arguments: object) -> int:
    parser = argparse.ArgumentParser()
    add_check(parser.add_subparsers())
    chosen = parser.parse_args(["check", *map(str, arguments)])
    return chosen.command(chosen)


def test_a_folder_with_nothing_to_fix_ends_with_zero(capsys: pytest.CaptureFixture[str]) -> None:
    assert check(STYLE, "--set", "resolution=128") == 0
    shown = capsys.readouterr()
    assert "Nothing to fix" in shown.out and "24 pictures" in shown.out and "2,200 steps" in shown.out
    assert "1 to 6 a caption" in shown.out  # "grinning face with big eyes": six words, each a token of CLIP's


def test_a_folder_with_something_to_look_at_ends_with_three_and_says_what(capsys: pytest.CaptureFixture[str]) -> None:
    assert check(STYLE, "--family", "sd1") == 3
    assert "1. 24 pictures are smaller than the training size 512×512" in capsys.readouterr().out
    assert check(STYLE, "--family", "sdxl") == 3
    assert "1024×1024" in capsys.readouterr().out


def test_every_family_can_be_named_and_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        check("--help")
    assert f"--family {{{','.join(FAMILIES)}}}" in capsys.readouterr().out


def test_a_folder_that_cannot_be_trained_on_ends_with_two_but_is_reported(
        tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.png").write_bytes(b"no picture")
    assert check(tmp_path, "--sheet", tmp_path / "sheet.png") == 2
    assert "No picture of this folder can be trained on" in capsys.readouterr().out
    assert not (tmp_path / "sheet.png").exists()


def test_a_folder_without_images_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="holds no pictures"):
        check(tmp_path)


def test_json_is_all_that_goes_to_standard_output(capsys: pytest.CaptureFixture[str]) -> None:
    assert check(STYLE, "--json", "--set", "resolution=128") == 0
    data = json.loads(capsys.readouterr().out)
    assert data["advice"] == [] and len(data["pictures"]) == 24 and data["proposal"]["steps"] == 2200


@pytest.mark.parametrize(("name", "kind"), [("a.png", "PNG"), ("A.JPG", "JPEG"), ("deeper/a.webp", "WEBP")])
def test_the_crop_sheet_is_written_in_the_format_of_its_name(tmp_path: Path, name: str, kind: str) -> None:
    assert check(STYLE, "--json", "--sheet", tmp_path / name, "--set", "resolution=128") == 0
    with Image.open(tmp_path / name) as sheet:
        assert sheet.format == kind and sheet.width > 1000


def test_what_was_typed_wrong_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    for arguments, named in ((("--set", "resolutoin=5"), "resolution"), (("--set", "resolution"), "name=value"),
                             (("--sheet", "a.txt"), "a.txt")):
        with pytest.raises(SettingError, match=named):
            check(tmp_path / "missing", *arguments)


def test_without_open_clip_the_report_comes_without_tokens(
        monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    clip_tokenizer.cache_clear()  # another test may have had one
    monkeypatch.setitem(sys.modules, "open_clip.tokenizer", None)
    assert check(STYLE, "--json", "--set", "resolution=128") == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out)["pictures"][0]["tokens"] is None and "open_clip_torch" in shown.err


def test_an_interrupted_check_ends_as_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(check_command, "progress_bar", lambda doing: contextlib.nullcontext(interrupt))
    assert main(["check", str(STYLE), "--json"]) == 130
