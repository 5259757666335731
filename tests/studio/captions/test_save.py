"""Saving captions: whole, backed up, never over what somebody else wrote; journals that are not ours do nothing."""

from __future__ import annotations

import base64
import itertools
import json
import os
import zipfile
from pathlib import Path
from time import gmtime, strftime

import pytest

from lib_lora_train.errors import OutputError
from lib_lora_train.studio.captions import save
from lib_lora_train.studio.captions.edits import AddTags, SetCaption
from lib_lora_train.studio.captions.save import BACKUPS_KEPT, Rewrite, recover
from lib_lora_train.studio.captions.store import CaptionStore

JOURNAL = ".studio/captions.journal"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A dataset of three images; the third has no caption."""
    place = tmp_path / "data"
    (place / "10_x").mkdir(parents=True)
    for name, text in (("a", "cat"), ("b", "dog"), ("c", None)):
        (place / "10_x" / f"{name}.png").write_bytes(b"")
        if text:
            (place / "10_x" / f"{name}.txt").write_text(text)
    return place


def texts(folder: Path) -> dict[str, str]:
    return {path.stem: path.read_text(encoding="utf-8") for path in sorted((folder / "10_x").glob("*.txt"))}


def edited(folder: Path) -> CaptionStore:
    store = CaptionStore.open(folder)
    store.apply(AddTags(("猫",)), range(3))
    return store


AFTER = {"a": "cat, 猫", "b": "dog, 猫", "c": "猫"}


def test_only_what_changed_is_written_and_the_backup_holds_what_stood_there(folder: Path) -> None:
    store = CaptionStore.open(folder)
    store.apply(AddTags(("猫",)), [0, 2])
    before = (folder / "10_x" / "b.txt").stat().st_mtime_ns
    saved = store.save()
    assert saved.written == 2 and saved.conflicts == () and store.unsaved == 0
    assert texts(folder) == {"a": "cat, 猫", "b": "dog", "c": "猫"}
    assert (folder / "10_x" / "b.txt").stat().st_mtime_ns == before
    with zipfile.ZipFile(saved.backup) as archive:
        assert {name: archive.read(name) for name in archive.namelist()} == {"10_x/a.txt": b"cat", "10_x/c.txt": b""}
    hidden = [path.name for path in folder.rglob(".*") if path.name != ".studio"]
    assert hidden == [] and not (folder / JOURNAL).exists()


def test_nothing_changed_nothing_written(folder: Path) -> None:
    saved = CaptionStore.open(folder).save()
    assert (saved.written, saved.backup) == (0, None) and not (folder / ".studio").exists()


@pytest.mark.parametrize("seconds", [0, 1])
def test_the_last_ten_backups_are_kept_and_other_files_beside_them(
        folder: Path, monkeypatch: pytest.MonkeyPatch, seconds: int) -> None:
    """Saved all within one second, and one a second."""
    clock = itertools.count(1_800_000_000, seconds)
    monkeypatch.setattr(save.time, "strftime", lambda form: strftime(form, gmtime(next(clock))))
    store, place = CaptionStore.open(folder), folder / ".studio" / "backup"
    place.mkdir(parents=True)
    (place / "mine.zip").write_bytes(b"somebody's")
    made = []
    for number in range(BACKUPS_KEPT + 3):
        store.apply(SetCaption(f"text {number}"), [0])
        made.append(store.save().backup)
    assert sorted(place.iterdir()) == sorted([*made[-BACKUPS_KEPT:], place / "mine.zip"])


def test_a_backup_unpacked_over_the_dataset_brings_the_captions_back(folder: Path) -> None:
    backup = edited(folder).save().backup
    assert texts(folder) == AFTER
    with zipfile.ZipFile(backup) as archive:
        archive.extractall(folder)
    assert texts(folder) == {"a": "cat", "b": "dog", "c": ""}


@pytest.mark.parametrize("theirs", [b"cat by hand", None, b"\xff\xfe"])
def test_what_another_program_changed_is_named_and_not_overwritten_unless_asked(folder: Path, theirs: bytes | None) -> None:
    store, path = edited(folder), folder / "10_x" / "a.txt"
    path.unlink()
    if theirs is not None:
        path.write_bytes(theirs)
    saved = store.save()
    assert saved.conflicts == (path,) and saved.written == 2 and store.unsaved == 1 and store.is_changed(0)
    assert (path.read_bytes() if path.exists() else None) == theirs
    saved = store.save(overwrite=True)
    assert saved.written == 1 and texts(folder) == AFTER and store.unsaved == 0
    with zipfile.ZipFile(saved.backup) as archive:
        assert archive.read("10_x/a.txt") == (theirs or b"")


def test_a_caption_that_appeared_meanwhile_is_a_conflict_too(folder: Path) -> None:
    store = edited(folder)
    (folder / "10_x" / "c.txt").write_text("from a tagger")
    assert store.save().conflicts == (folder / "10_x" / "c.txt",)


def test_who_wrote_the_same_is_in_nobodys_way(folder: Path) -> None:
    store = edited(folder)
    (folder / "10_x" / "a.txt").write_text("cat, 猫\n", encoding="utf-8")
    saved = store.save()
    assert saved.written == 2 and saved.conflicts == () and store.unsaved == 0


def test_a_folder_that_was_renamed_meanwhile_is_a_conflict(folder: Path) -> None:
    store = edited(folder)
    (folder / "10_x").rename(folder / "12_x")
    assert len(store.save(overwrite=True).conflicts) == 3 and store.unsaved == 3
    (folder / "12_x").rename(folder / "10_x")
    assert store.save().written == 3


def failing_after(replaced: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk is full from the so-manieth caption on."""
    replace, left = os.replace, iter(range(replaced + 1))

    def full(source: Path, target: Path) -> None:
        if Path(target).suffix == ".txt" and next(left, replaced) >= replaced:
            raise OSError(28, "No space left on device")
        replace(source, target)
    monkeypatch.setattr(save.os, "replace", full)


@pytest.mark.parametrize("replaced", [0, 1, 2])
def test_a_disk_that_fills_up_loses_nothing_and_the_next_save_goes_on(
        folder: Path, monkeypatch: pytest.MonkeyPatch, replaced: int) -> None:
    store = edited(folder)
    with monkeypatch.context() as patch:
        failing_after(replaced, patch)
        with pytest.raises(OutputError, match="No space left"):
            store.save()
    assert store.unsaved == 3 and not list(folder.rglob("*.part"))
    store.apply(SetCaption("later"), [1])
    saved = store.save()
    assert saved.conflicts == () and texts(folder) == {**AFTER, "b": "later"} and store.unsaved == 0


def test_after_a_full_disk_opening_goes_on_too_and_says_so(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = edited(folder)
    with monkeypatch.context() as patch:
        failing_after(1, patch)
        with pytest.raises(OutputError):
            store.save()
    again = CaptionStore.open(folder)
    assert texts(folder) == AFTER and again.unsaved == 0 and "3 captions" in again.notes[0]


def test_a_disk_that_refuses_the_backup_leaves_everything_as_it_is(folder: Path) -> None:
    store = edited(folder)
    (folder / ".studio").mkdir()
    (folder / ".studio" / "backup").write_text("a file")
    with pytest.raises(OutputError, match="backed up"):
        store.save()
    assert texts(folder) == {"a": "cat", "b": "dog"} and not (folder / JOURNAL).exists()


def test_what_was_changed_after_the_kill_is_left_alone_and_the_text_kept(
        folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = edited(folder)
    with monkeypatch.context() as patch:
        failing_after(0, patch)
        with pytest.raises(OutputError):
            store.save()
    (folder / "10_x" / "a.txt").write_text("cat by hand")
    again = CaptionStore.open(folder)
    assert texts(folder) == {**AFTER, "a": "cat by hand"} and again.caption(0) == "cat by hand"
    assert any("could not be finished for 1 caption that" in note for note in again.notes)
    kept, = (folder / ".studio" / "backup").glob("interrupted-*.json")
    assert "cat, 猫" in kept.read_text(encoding="utf-8") and not (folder / JOURNAL).exists()


def journal(folder: Path, file: str, *, new: object = "overwritten", version: int = 1) -> None:
    name = base64.b64encode(os.fsencode(file)).decode()
    (folder / ".studio").mkdir(exist_ok=True)
    (folder / JOURNAL).write_text(json.dumps({"version": version, "captions": [{"file": name, "new": new, "old": None}]}))


@pytest.mark.parametrize("file", [
    "../evil.txt", "10_x/../../evil.txt", "/evil.txt", "10_x/deeper/evil.txt", "evil.py", ".studio/evil.txt", ".hidden.txt",
    "10_x\\..\\evil.txt", "C:evil.txt", "evil.txt/", "", "10_x/evil.txt\0"])
def test_a_journal_made_to_write_elsewhere_writes_nothing(folder: Path, file: str) -> None:
    before = {path for path in folder.parent.rglob("*") if path.is_file()}
    journal(folder, file)
    CaptionStore.open(folder)
    aside, = {path for path in folder.parent.rglob("*") if path.is_file()} - before
    assert aside.parent == folder / ".studio" / "backup" and aside.name.startswith("interrupted-")


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff", b"null", b'{"version": 1}', b'{"version": 1, "captions": [3]}',
                                     b'{"version": 2, "captions": []}', b'{"version": 1, "captions": [{"file": 3}]}'])
def test_a_journal_that_is_none_is_moved_to_the_backups(folder: Path, content: bytes) -> None:
    (folder / ".studio").mkdir()
    (folder / JOURNAL).write_bytes(content)
    assert [CaptionStore.open(folder).caption(index) for index in range(3)] == ["cat", "dog", ""]
    assert not (folder / JOURNAL).exists()


def test_a_studio_folder_that_leads_elsewhere_is_refused(folder: Path) -> None:
    store = CaptionStore.open(folder, may_read=lambda path: path.name != ".studio")
    store.apply(SetCaption("x"), [0])
    with pytest.raises(OutputError, match="not allowed"):
        store.save()
    assert texts(folder)["a"] == "cat"


def test_recovering_twice_or_where_nothing_is_does_nothing(folder: Path) -> None:
    assert recover(folder) == recover(folder) == save.Recovered()
    save.write_captions(folder, [Rewrite(folder / "10_x" / "a.txt", "new", b"cat")])
    assert recover(folder) == save.Recovered()


def test_many_captions_are_written_the_same_way(tmp_path: Path) -> None:
    for number in range(50):
        (tmp_path / f"{number:02}.png").write_bytes(b"")
    store = CaptionStore.open(tmp_path)
    store.apply(SetCaption("x"), range(50))
    assert store.save().written == 50
    assert {path.read_text() for path in tmp_path.glob("*.txt")} == {"x"} and len(list(tmp_path.glob("*.txt"))) == 50
