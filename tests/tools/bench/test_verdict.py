"""`bench verdict`: each run goes wrong in the manner it is named after, and what was said of it is told as it was."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from lib_lora_train.events import Finding
from lib_lora_train.settings import DECLARATIONS
from tools.bench.command import main
from tools.bench.verdict import Row, verdict_text
from tools.bench.verdict_cases import CASES, DATA, damaged_checkpoint, mislabelled, one_image, three_images, without_captions

KNOWN = {*Finding.__args__, "refused"}


def read(folder: Path) -> dict[str, str]:
    return {path.with_suffix(".png").name: path.read_text(encoding="utf-8") for path in folder.glob("*.txt")}


def test_there_are_twelve_runs_whose_findings_and_settings_exist():
    assert len({case.name for case in CASES}) == 12
    for case in CASES:
        assert set(case.expected) <= KNOWN and {case.setting, *case.changes} - {""} <= set(DECLARATIONS)


@pytest.mark.parametrize("data", DATA, ids=lambda data: data.name)
def test_no_image_keeps_its_own_caption_and_none_is_lost(tmp_path, data):
    own = {image.name: caption for image, caption in data.entries()}
    mislabelled(data.entries(), tmp_path)
    found = read(tmp_path)
    assert found.keys() == own.keys() and sorted(found.values()) == sorted(own.values())
    assert all(found[name] != own[name] for name in own)


def test_one_image_is_twenty_files_that_look_alike(tmp_path):
    one_image(DATA[0].entries(), tmp_path)
    files = sorted(tmp_path.glob("*.png"))
    pixels = [np.asarray(Image.open(file)).astype(int) for file in files]
    assert len(files) == 20 == len({file.read_bytes() for file in files})
    assert all(abs(one - pixels[0]).max() <= 1 for one in pixels)


def test_three_images_and_empty_captions_are_that(tmp_path):
    three_images(DATA[0].entries(), tmp_path)
    assert len(list(tmp_path.glob("*.png"))) == 3
    without_captions(DATA[0].entries(), tmp_path)
    assert set(read(tmp_path).values()) == {""}


def test_one_number_of_the_damaged_checkpoint_is_none(tmp_path):
    assert sum(int(torch.isnan(tensor).sum()) for tensor in load_file(damaged_checkpoint(tmp_path)).values()) == 1


def test_the_table_tells_what_was_right_and_what_was_not():
    rows = [Row("good run", "style", 42, ("learning",), "", "learning", "It has learnt.", "", "", True, 9.0),
            Row("alpha 0.01", "style", 42, ("no effect",), "network_alpha", "plateau", "Plateau.", "", "", False, 9.0)]
    text = verdict_text(rows, seconds=60)
    assert "1 of 2 right" in text and "It has learnt." in text and "network_alpha" in text


def test_a_run_that_is_not_there_is_refused_in_a_sentence(tmp_path, capsys):
    assert main(["verdict", "--case", "good luck", "--out", str(tmp_path)]) == 2
    assert "good luck" in capsys.readouterr().err and not list(tmp_path.iterdir())
