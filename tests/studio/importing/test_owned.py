"""The dataset folder the studio owns: kohya's layout, whole at every moment, nothing lost."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from PIL import Image

from lib_lora_train.errors import DatasetError, LoraTrainError
from lib_lora_train.storage import atomic
from lib_lora_train.studio.importing.owned import OwnedDataset, list_datasets, plain_line
from tests.scanned_folder import scan


def filled(folder: Path, *names: str, concept: str = "zzk girl") -> OwnedDataset:
    dataset = OwnedDataset.create(folder, "zzk", concept=concept)
    for name in names:
        Image.new("RGB", (64, 64)).save(dataset.images_folder / name)
        (dataset.images_folder / name).with_suffix(".txt").write_text(f"caption of {name}", encoding="utf-8")
    return dataset


def test_kohyas_layout_is_read_as_kohyas_layout(tmp_path: Path):
    dataset = filled(tmp_path, "a.png", "b.jpg")
    (dataset.images_folder / "b.txt").unlink()
    found = scan(dataset.folder, max_train_epochs=1)
    assert found.layout == "kohya"
    assert [(e.path.name, e.caption, e.repeats) for e in found.examples] == [
        ("a.png", "caption of a.png", 10), ("b.jpg", "zzk girl", 10)]


def test_what_was_made_is_found_again(tmp_path: Path):
    filled(tmp_path, "a.png", "b.png")
    OwnedDataset.create(tmp_path, "日本の猫")
    (tmp_path / "no dataset").mkdir()
    (tmp_path / "file.txt").write_text("x")
    assert list_datasets(tmp_path) == [("zzk", 2), ("日本の猫", 0)]
    again = OwnedDataset.open(tmp_path / "zzk")
    assert (again.name, again.concept, again.repeats) == ("zzk", "zzk girl", 10)
    assert [path.name for path in again.images] == ["a.png", "b.png"]
    assert list_datasets(tmp_path / "nowhere") == []


@pytest.mark.parametrize("name", ["ZZK", "zzk ", "zzk."])
def test_two_datasets_never_share_a_folder(tmp_path: Path, name: str):
    filled(tmp_path)
    with pytest.raises(DatasetError, match="already"):
        OwnedDataset.create(tmp_path, name)


@pytest.mark.parametrize("name", ["../outside", "..\\outside", "/outside", "C:\\outside", "a/../../outside"])
def test_a_name_leads_nowhere_else(tmp_path: Path, name: str):
    dataset = OwnedDataset.create(tmp_path / "datasets", name)
    assert dataset.folder.parent == tmp_path / "datasets"
    assert [path.name for path in tmp_path.iterdir()] == ["datasets"]


@pytest.mark.parametrize("name", ["", "  ", "..", "/"])
def test_no_name_is_refused(tmp_path: Path, name: str):
    with pytest.raises(DatasetError, match="no name"):
        OwnedDataset.create(tmp_path, name)


def test_a_concept_that_is_no_folders_name_is_kept_as_it_was_meant(tmp_path: Path):
    dataset = filled(tmp_path, "a.png", concept='girl: "zzk"/left\nsecond')
    assert dataset.images_folder.name == "10_girl_ _zzk__left second"
    again = OwnedDataset.open(dataset.folder)
    assert again.concept == 'girl: "zzk"/left second' and again.images == dataset.images


def test_repeats_are_the_number_before_the_folders_name(tmp_path: Path):
    dataset = filled(tmp_path, "a.png")
    dataset.set_repeats(25)
    assert dataset.images_folder.name == "25_zzk girl" and OwnedDataset.open(dataset.folder).repeats == 25
    assert scan(dataset.folder, max_train_epochs=1).examples[0].repeats == 25
    dataset.set_concept("zzk boy")
    assert OwnedDataset.open(dataset.folder).images[0].parent.name == "25_zzk boy"
    dataset.set_concept("ZZK boy")  # another case: one folder on Windows, two elsewhere
    assert [p.name for p in OwnedDataset.open(dataset.folder).images] == ["a.png"]


@pytest.mark.parametrize("repeats", [0, -1, 10_001])
def test_repeats_that_training_would_not_read_are_refused(tmp_path: Path, repeats: int):
    dataset = filled(tmp_path, "a.png")
    with pytest.raises(DatasetError, match="repeats"):
        dataset.set_repeats(repeats)
    assert dataset.images


def test_renaming_never_mixes_two_folders(tmp_path: Path):
    dataset = filled(tmp_path, "a.png")
    (dataset.folder / "5_zzk girl").mkdir()
    dataset.set_repeats(5)  # an empty one is in nobody's way
    (dataset.folder / "7_zzk girl").mkdir()
    (dataset.folder / "7_zzk girl" / "mine.png").write_bytes(b"x")
    with pytest.raises(DatasetError, match="there already"):
        dataset.set_repeats(7)
    assert dataset.repeats == 5 and dataset.images


def test_a_folder_that_a_program_keeps_open_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    dataset = filled(tmp_path, "a.png")

    def locked(*_: object) -> None:
        raise PermissionError(13, "used by another process")

    monkeypatch.setattr(Path, "rename", locked)
    with pytest.raises(LoraTrainError, match="close programs"):
        dataset.set_repeats(5)
    assert dataset.repeats == 10 and dataset.images


def test_what_is_removed_comes_back_with_all_that_belongs_to_it(tmp_path: Path):
    dataset = filled(tmp_path, "a.png", "b.png")
    for path in (dataset.mask_path("a.png"), dataset.unshaped_path("a.png"), dataset.unshaped_mask_path("a.png")):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(path.as_posix().encode())
    before = {path.relative_to(dataset.folder): path.read_bytes() for path in dataset.folder.rglob("*") if path.is_file()}
    assert dataset.remove(["a.png", "gone.png"]) == ("a.png",)
    assert [path.name for path in dataset.images] == ["b.png"]
    assert [e.path.name for e in scan(dataset.folder, max_train_epochs=1).examples] == ["b.png"]
    assert not dataset.mask_path("a.png").exists() and not dataset.unshaped_path("a.png").exists()
    assert "a" in dataset.taken_stems()
    assert dataset.restore(["a.png"]) == ("a.png",) and dataset.restore(["a.png"]) == ()
    after = {path.relative_to(dataset.folder): path.read_bytes() for path in dataset.folder.rglob("*") if path.is_file()}
    assert after == before


def test_restoring_covers_nothing_up(tmp_path: Path):
    dataset = filled(tmp_path, "a.png")
    dataset.remove(["a.png"])
    (dataset.images_folder / "a.png").write_bytes(b"another")
    with pytest.raises(DatasetError, match="there already"):
        dataset.restore(["a.png"])
    assert (dataset.images_folder / "a.png").read_bytes() == b"another"


@pytest.mark.parametrize("name", ["../dataset.json", "../../outside.png", "/etc/x.png", "a.txt", ""])
def test_only_images_of_the_dataset_are_moved(tmp_path: Path, name: str):
    dataset = filled(tmp_path, "a.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "outside.png")
    for action in (dataset.remove, dataset.restore, lambda names: dataset.image(names[0])):
        with pytest.raises(DatasetError, match="no picture"):
            action([name])
    assert (tmp_path / "outside.png").exists() and (dataset.folder / "dataset.json").exists()


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\xfe", b'{"pictures": 3, "concept": 4}', b"[" * 100_000])
def test_damaged_notes_cost_the_notes_only(tmp_path: Path, content: bytes):
    dataset = filled(tmp_path, "a.png")
    (dataset.folder / "dataset.json").write_bytes(content)
    again = OwnedDataset.open(dataset.folder)
    assert again.concept == "zzk girl" and [p.name for p in again.images] == ["a.png"] and again.notes() == {}
    again.write_notes({"a.png": {"source": "x"}})
    assert json.loads((dataset.folder / "dataset.json").read_text("utf-8")) == {
        "version": 1, "concept": "zzk girl", "pictures": {"a.png": {"source": "x"}}}


def test_a_dataset_of_a_newer_version_is_not_touched(tmp_path: Path):
    dataset = filled(tmp_path, "a.png")
    (dataset.folder / "dataset.json").write_text('{"version": 2, "new": 1}')
    with pytest.raises(DatasetError, match="newer version"):
        OwnedDataset.open(dataset.folder)
    with pytest.raises(DatasetError, match="newer version"):
        dataset.write_notes({})
    assert (dataset.folder / "dataset.json").read_text() == '{"version": 2, "new": 1}'


def test_a_folder_that_is_none_is_refused(tmp_path: Path):
    with pytest.raises(DatasetError, match="not a dataset"):
        OwnedDataset.open(tmp_path)


def test_a_full_disk_leaves_the_notes_as_they_were(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    dataset = filled(tmp_path, "a.png")
    dataset.write_notes({"a.png": {"source": "x"}})

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(atomic.os, "replace", full)
    with pytest.raises(LoraTrainError, match="disk"):
        dataset.write_notes({"a.png": {"source": "y"}})
    monkeypatch.undo()
    assert dataset.notes() == {"a.png": {"source": "x"}}
    assert not [path for path in dataset.folder.iterdir() if path.name.endswith(".part")]


def test_a_kill_between_two_moves_of_a_removal_loses_no_caption(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    dataset, moves, replace = filled(tmp_path, "a.png"), [], os.replace

    def killed(old: Path, new: Path) -> None:
        if moves:
            raise KeyboardInterrupt
        moves.append(old)
        replace(old, new)

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        dataset.remove(["a.png"])
    monkeypatch.undo()
    assert dataset.images == () and "a" in dataset.taken_stems()  # nobody else gets its caption
    dataset.restore(["a.png"])
    assert scan(dataset.folder, max_train_epochs=1).examples[0].caption == "caption of a.png"


def test_a_concept_is_one_line_of_letters_that_are_seen():
    assert plain_line("  a\r\n b\t\u202ec\0 ") == "a b c" and plain_line("日本 👩") == "日本 👩"
