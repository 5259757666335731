"""`prepare`: a heap of images into a dataset that training takes, from the command line."""

from __future__ import annotations

import argparse
import json
import zipfile
from pathlib import Path

import pytest
from PIL import Image

from lib_lora_train.errors import UserError
from lib_lora_train.studio.commands.arguments import add_prepare
from lib_lora_train.studio.commands.prepare import SOME_LEFT_OUT
from lib_lora_train.studio.importing.owned import OwnedDataset
from tests.mixed_pictures import ADDED, mixed_pictures
from tests.scanned_folder import scan


def prepare(*arguments: object) -> int:
    parser = argparse.ArgumentParser()
    add_prepare(parser.add_subparsers())
    chosen = parser.parse_args(["prepare", *map(str, arguments)])
    return chosen.command(chosen)


@pytest.fixture(scope="module")
def heap(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return mixed_pictures(tmp_path_factory.mktemp("source") / "heap", scale=0.4)


def names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_thirty_mixed_pictures_become_a_dataset_that_training_takes(heap: Path, tmp_path: Path,
                                                                    capsys: pytest.CaptureFixture[str]):
    assert prepare(heap, "--to", tmp_path / "set", "--side", 192, "--name", "zzk", "--json") == SOME_LEFT_OUT
    said = json.loads(capsys.readouterr().out)
    assert {row["name"] for row in said["skipped"]} == {"broken.png", "copy-of-the-first.png"}
    assert len(said["pictures"]) == ADDED and said["repeats"] == 10 and said["concept"] == "zzk"
    found = scan(tmp_path / "set", max_train_epochs=10)
    assert found.layout == "kohya" and len(found.examples) == ADDED
    assert {(e.path.name, e.width, e.height) for e in found.examples} == {
        (row["name"], row["width"], row["height"]) for row in said["pictures"]}
    # Areas of about 192 squared, and each image about in its own proportions.
    for row in said["pictures"]:
        assert row["width"] % 64 == 0 and row["height"] % 64 == 0 and row["width"] * row["height"] <= 192 ** 2
        assert row["cut"] < 0.35
    assert sum(row["masked"] for row in said["pictures"]) == 3


def test_a_dry_run_says_what_would_come_of_it_and_writes_nothing(heap: Path, tmp_path: Path,
                                                                 capsys: pytest.CaptureFixture[str]):
    to = tmp_path / "set"
    arguments = (heap, "--to", to, "--side", 128, "--square", "--json")
    assert prepare(*arguments, "--dry-run") == SOME_LEFT_OUT
    dry = json.loads(capsys.readouterr().out)
    assert not to.exists() and dry["written"] is False
    prepare(*arguments)
    real = json.loads(capsys.readouterr().out)
    keys = ("name", "width", "height", "from", "cut")
    assert [[row[key] for key in keys] for row in dry["pictures"]] == [[row[key] for key in keys] for row in real["pictures"]]
    assert dry["skipped"] == real["skipped"] and dry["folder"] == real["folder"]
    before = names(to)
    with pytest.raises(SystemExit):
        prepare("--to", to)  # no source
    assert prepare(*arguments, "--dry-run") == SOME_LEFT_OUT
    assert names(to) == before  # of one that is there


def test_images_are_added_to_a_dataset_that_is_there(heap: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with zipfile.ZipFile(tmp_path / "z.zip", "w") as packed:
        packed.write(next(heap.glob("big-*.png")), "../x/new.png")
        packed.writestr("../x/new.txt", "a new tag")
    assert prepare(tmp_path / "z.zip", "--to", tmp_path / "set", "--side", 0) == 0
    assert "--data" in capsys.readouterr().out
    dataset = OwnedDataset.open(tmp_path / "set")
    assert dataset.repeats == 150  # one image: 1500 visits over 10 epochs
    assert (dataset.images_folder / "new.txt").read_text("utf-8") == "a new tag"
    more = ("--to", tmp_path / "set", "--side", 0, "--repeats", 7, "--name", "b")
    assert prepare(tmp_path / "z.zip", heap, *more) == SOME_LEFT_OUT
    assert OwnedDataset.open(tmp_path / "set").images_folder.name == "7_b"
    assert len(OwnedDataset.open(tmp_path / "set").images) == ADDED


def test_a_folder_of_somebody_elses_is_not_written_into(heap: Path, tmp_path: Path):
    (tmp_path / "mine").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "mine" / "a.png")
    for option in ([], ["--dry-run"]):
        with pytest.raises(UserError, match="no dataset of this program"):
            prepare(heap, "--to", tmp_path / "mine", *option)
    assert names(tmp_path / "mine") == ["a.png"]


@pytest.mark.parametrize("option", [["--side", "100"], ["--side", "9999"], ["--repeats", "0"]])
def test_bad_numbers_are_refused_before_anything_is_made(heap: Path, tmp_path: Path, option: list[str]):
    with pytest.raises(UserError):
        prepare(heap, "--to", tmp_path / "set", *option)
    assert not (tmp_path / "set").exists()


def test_sources_without_an_image_leave_no_dataset_behind(tmp_path: Path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "x.zip").write_bytes(b"no zip")
    with pytest.raises(UserError, match="no picture to import.*empty.*gone.*x.zip"):
        prepare(tmp_path / "empty", tmp_path / "gone", tmp_path / "x.zip", "--to", tmp_path / "set")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "x.zip"]


def test_the_repeats_of_kohya_folders_are_kept_where_they_are_one_number_and_else_said_to_be_lost(
        tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for number, place in enumerate(("20_sks dog/a.png", "20_sks dog/b.png", "5_sks hat/c.png")):
        (tmp_path / "kohya" / place).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (80, 80), (number, 0, 0)).save(tmp_path / "kohya" / place)
    to = ("--side", 0, "--json", "--to")
    for dry in ((), ("--dry-run",)):
        assert prepare(tmp_path / "kohya" / "20_sks dog", *to, tmp_path / f"one{len(dry)}", *dry) == 0
        said = json.loads(capsys.readouterr().out)
        assert said["repeats"] == 20 and not any("repeats" in note for note in said["notes"])
        assert prepare(tmp_path / "kohya", *to, tmp_path / f"two{len(dry)}", *dry) == 0
        said = json.loads(capsys.readouterr().out)
        (note,) = [note for note in said["notes"] if "repeats" in note]
        assert "20_sks dog" in note and "5_sks hat" in note and str(said["repeats"]) in note
    assert {e.repeats for e in scan(tmp_path / "one0", max_train_epochs=1).examples} == {20}
