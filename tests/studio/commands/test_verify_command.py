"""`check-captions` and `class-pictures` from the command line, on a small model."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
from PIL import Image

from lib_lora_train.errors import SettingError
from lib_lora_train.studio.commands.arguments import add_verify
from lib_lora_train.studio.commands.verify import SOME_FAILED


def run(*arguments: object) -> int:
    parser = argparse.ArgumentParser()
    add_verify(parser.add_subparsers(required=True))
    chosen = parser.parse_args([str(argument) for argument in arguments])
    return chosen.command(chosen)


def test_every_image_has_a_line_and_those_that_could_not_be_checked_a_sentence(tiny_file, images, tmp_path, capsys):
    (images / "0.txt").write_bytes(b"caf\x81 \xff")  # in no encoding
    sheet = tmp_path / "sheet.png"
    code = run("check-captions", images, "--checkpoint", tiny_file, "--resolution", 64, "--json", "--sheet", sheet,
               "--seeds", 1, "--steps", 1, "--worst", 3)
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert code == SOME_FAILED
    assert sorted(Path(row["picture"]).name for row in rows) == ["0.png", "1.png", "2.png", "3.png"]
    assert [(Path(row["picture"]).name, row["score"]) for row in rows[:2]] == [("0.png", None), ("3.png", None)]
    assert "UTF-8" in rows[0]["problem"] and "no caption" in rows[1]["problem"]
    assert all(row["caption"] and 0 <= row["score"] <= 100 and 0 <= row["similarity"] <= 1 for row in rows[2:])
    with Image.open(sheet) as drawn:
        assert drawn.size[0] > 2 * 160 and drawn.size[1] > 3 * 160


def test_without_a_sheet_nothing_is_painted(tiny_file, images, capsys):
    (images / "3.png").unlink()
    assert run("check-captions", images, "--checkpoint", tiny_file, "--resolution", 64) == 0
    out = capsys.readouterr().out
    assert "red cat" in out and "similarity" not in out


def test_class_images_go_on_where_they_were(tiny_file, tmp_path, capsys):
    command = ("class-pictures", "--checkpoint", tiny_file, "--prompt", "a cat", "--to", tmp_path, "--resolution", "64",
               "--steps", 1, "--count")
    assert run(*command, 1) == 0 and run(*command, 2) == 0
    assert sorted(path.name for path in (tmp_path / "1_class").iterdir()) == [
        "000001.png", "000001.txt", "000002.png", "000002.txt"]
    assert "Painted 1; 1 were there already" in capsys.readouterr().out


@pytest.mark.parametrize("wrong", [("--steps", 0), ("--seeds", -1), ("--worst", -1)], ids=str)
def test_numbers_that_are_not_possible_are_refused(tiny_file, images, wrong):
    with pytest.raises(SettingError, match=wrong[0]):
        run("check-captions", images, "--checkpoint", tiny_file, *wrong)
