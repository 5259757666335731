"""The subject dataset: it is what its script draws, and a folder that can be trained on as it is."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image, ImageChops, ImageStat

from tests.scanned_folder import scan

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "lib_lora_train" / "demo" / "subject"
TRIGGER = "zorbi"
PICTURES = sorted(FOLDER.glob("*.png"))


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("subject") / "new"
    subprocess.run([sys.executable, ROOT / "tools" / "draw_subject.py", "--out", folder], check=True, capture_output=True)
    return folder


def rgb(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB")


def test_there_are_twelve_small_pictures() -> None:
    assert len(PICTURES) == 12
    assert {rgb(path).size for path in PICTURES} == {(256, 256)}
    assert max(path.stat().st_size for path in PICTURES) < 15_000


def test_the_script_draws_the_pictures_that_are_here(drawn: Path) -> None:
    assert sorted(path.name for path in drawn.iterdir()) == sorted(
        path.name for path in [*FOLDER.glob("*.png"), *FOLDER.glob("*.txt")] if path.name != "LICENSE.txt")
    for path in PICTURES:
        # Pillow's versions round edges and palettes differently: a little everywhere, or much at single pixels.
        difference = ImageChops.difference(rgb(path), rgb(drawn / path.name)).convert("L")
        assert ImageStat.Stat(difference).mean[0] < 0.1, path.name
        assert sum(difference.histogram()[32:]) < 40, path.name


def test_the_script_writes_the_captions_that_are_here(drawn: Path) -> None:
    for path in PICTURES:
        assert (drawn / f"{path.stem}.txt").read_text(encoding="utf-8") == path.with_suffix(".txt").read_text(encoding="utf-8")


def test_a_pictures_edge_is_never_crossed_by_accident(drawn: Path) -> None:
    """Only the close-up is cut off: the others keep the character's own teal away from the frame."""
    for path in sorted(drawn.glob("*.png")):
        image = rgb(path)
        frame = [image.getpixel((i, side)) for i in range(256) for side in (0, 255)]
        frame += [image.getpixel((side, i)) for i in range(256) for side in (0, 255)]
        assert (path.stem == "08-apple") == ((0x22, 0xB8, 0xAA) in frame), path.name


def test_the_trigger_word_is_the_only_thing_missing_from_the_captions() -> None:
    captions = [path.with_suffix(".txt").read_text(encoding="utf-8").strip() for path in PICTURES]
    assert all(captions) and len(set(captions)) == 12
    assert not [caption for caption in captions if TRIGGER in caption.casefold()]


def test_the_folder_is_read_without_a_problem() -> None:
    dataset = scan(FOLDER, max_train_epochs=10, trigger_word=TRIGGER)
    assert dataset.layout == "plain" and not dataset.problems
    assert [example.path for example in dataset.examples] == PICTURES
    assert [example.caption for example in dataset.examples] == [
        f"{TRIGGER}, {path.with_suffix('.txt').read_text(encoding='utf-8').strip()}" for path in PICTURES]
