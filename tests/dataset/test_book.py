"""The caption book: reading a folder, steps and their undoing, pictures that come and go."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from lib_lora_train.errors import DatasetError, Interrupted, SettingError
from lib_lora_train.studio.captions.edits import AddTags, RemoveTags, ReplaceText, SetCaption, SortTags
from lib_lora_train.studio.captions.filter import Filter
from lib_lora_train.studio.captions.store import CaptionBook


def make(folder: Path, captions: dict[str, str | bytes | None]) -> Path:
    """A folder with a picture (nobody decodes it) and perhaps a caption for each name; a name may hold one folder."""
    for name, caption in captions.items():
        picture = folder / name
        picture.parent.mkdir(parents=True, exist_ok=True)
        picture.write_bytes(b"")
        if caption is not None:
            data = caption.encode() if isinstance(caption, str) else caption
            picture.with_suffix(".txt").write_bytes(data)
    return folder


def captions(book: CaptionBook) -> dict[str, str]:
    return {path.name: book.caption(index) for index, path in enumerate(book.pictures)}


def test_a_plain_folder_is_read_by_name_with_and_without_captions(tmp_path: Path) -> None:
    make(tmp_path, {"b.png": "dog,  café ", "A.jpg": "\ufeffcat", "c.webp": None})
    (tmp_path / "notes.md").write_text("no picture")
    book = CaptionBook.open(tmp_path)
    assert captions(book) == {"A.jpg": "cat", "b.png": "dog,  café", "c.webp": ""}
    assert list(captions(book)) == ["A.jpg", "b.png", "c.webp"]
    assert book.unsaved == 0 and book.can_undo == "" and not list(tmp_path.glob(".*"))


def test_of_kohyas_layout_the_numbered_folders_are_read_and_no_others(tmp_path: Path) -> None:
    make(tmp_path, {"10_zzk girl/a.png": "one", "2_bg/b.png": "two", "masks/a.png": None, "20240101_trip/c.png": "x",
                    ".studio/removed/d.png": "gone", "loose.png": "x"})
    book = CaptionBook.open(tmp_path)
    assert [path.relative_to(tmp_path).as_posix() for path in book.pictures] == ["10_zzk girl/a.png", "2_bg/b.png"]


def test_a_folder_without_pictures_is_an_empty_book_and_one_that_is_missing_is_refused(tmp_path: Path) -> None:
    (tmp_path / "10_new").mkdir()
    assert CaptionBook.open(tmp_path).pictures == ()
    with pytest.raises(DatasetError, match="does not exist"):
        CaptionBook.open(tmp_path / "nowhere")


def test_a_caption_that_is_no_utf_8_is_kept_until_it_is_set(tmp_path: Path) -> None:
    latin = "1girl, café".encode("latin-1")
    make(tmp_path, {"a.png": latin, "b.png": "dog"})
    book = CaptionBook.open(tmp_path)
    assert "a.txt is not UTF-8" in book.problem(0) and book.problem(1) == ""
    assert book.apply(AddTags(("zzk",)), [0, 1]) == 1
    book.save()
    assert (tmp_path / "a.txt").read_bytes() == latin
    book.apply(SetCaption("1girl, café"), [0])
    assert book.problem(0) == "" and book.unsaved == 1
    book.save()
    assert (tmp_path / "a.txt").read_text(encoding="utf-8") == "1girl, café"


def test_only_the_first_line_is_edited_and_the_others_stay_in_the_file(tmp_path: Path) -> None:
    make(tmp_path, {"a.png": "\none, two\nthree\n"})
    book = CaptionBook.open(tmp_path)
    assert book.caption(0) == "one, two" and "first line" in book.hint(0) and book.problem(0) == ""
    book.apply(AddTags(("four",)), [0])
    book.save()
    assert (tmp_path / "a.txt").read_text(encoding="utf-8") == "one, two, four\nthree"
    assert CaptionBook.open(tmp_path).caption(0) == "one, two, four"


def test_an_enormous_file_is_no_caption(tmp_path: Path) -> None:
    make(tmp_path, {"a.png": b"a" * (2 << 20)})
    assert "too large" in CaptionBook.open(tmp_path).problem(0)


def test_pictures_of_one_name_share_their_caption(tmp_path: Path) -> None:
    make(tmp_path, {"a.png": "one", "a.jpg": "one"})
    book = CaptionBook.open(tmp_path)
    assert book.apply(AddTags(("two",)), [0]) == 1
    assert [book.caption(0), book.caption(1)] == ["one, two"] * 2 and book.unsaved == 1


def test_txt_is_used_before_caption_and_said(tmp_path: Path) -> None:
    make(tmp_path, {"a.png": "from txt", "b.png": None})
    (tmp_path / "a.caption").write_text("other")
    (tmp_path / "b.caption").write_text("kept where it was")
    book = CaptionBook.open(tmp_path)
    assert captions(book) == {"a.png": "from txt", "b.png": "kept where it was"}
    assert "a.caption does not count" in book.hint(0)
    book.set_captions({1: "new"}, "Tag")
    book.save()
    assert (tmp_path / "b.caption").read_text() == "new" and not (tmp_path / "b.txt").exists()


def test_each_edit_is_one_step_that_can_be_undone_and_redone(tmp_path: Path) -> None:
    book = CaptionBook.open(make(tmp_path, {"a.png": "cat", "b.png": "dog", "c.png": None}))
    states = [captions(book)]
    for edit in (AddTags(("zzk",), "start"), ReplaceText("o", "u"), SetCaption("one text for all")):
        assert book.apply(edit, range(3)) > 0
        states.append(captions(book))
    assert states[1] == {"a.png": "zzk, cat", "b.png": "zzk, dog", "c.png": "zzk"}
    labels = []
    for state in reversed(states[:-1]):
        labels.append(book.undo())
        assert captions(book) == state
    assert labels == ["Edit caption", "Replace the text o by u", "Add zzk"]
    assert book.unsaved == 0 and book.undo() == ""
    for state in states[1:]:
        assert book.can_redo == book.redo() != ""
        assert captions(book) == state
    assert book.redo() == ""


def test_a_new_edit_forgets_what_was_undone_and_one_that_changes_nothing_is_no_step(tmp_path: Path) -> None:
    book = CaptionBook.open(make(tmp_path, {"a.png": "cat"}))
    book.apply(AddTags(("x",)), [0])
    book.undo()
    assert book.apply(RemoveTags(("dog",)), [0]) == 0 and book.can_redo == "Add x"
    book.apply(AddTags(("y",)), [0])
    assert book.can_redo == "" and book.can_undo == "Add y"


def test_what_was_saved_can_still_be_undone(tmp_path: Path) -> None:
    book = CaptionBook.open(make(tmp_path, {"a.png": "cat"}))
    book.apply(AddTags(("x",)), [0])
    book.save()
    book.undo()
    assert book.caption(0) == "cat" and book.unsaved == 1
    book.save()
    assert (tmp_path / "a.txt").read_text() == "cat"


def test_an_edit_that_fails_half_way_changes_nothing(tmp_path: Path) -> None:
    book = CaptionBook.open(make(tmp_path, {"a.png": "cat", "b.png": "a" * 9000}))
    with pytest.raises(SettingError, match="longer than"):
        book.apply(ReplaceText("a", "aa"), [0, 1])
    asked = iter([False, True])
    with pytest.raises(Interrupted):
        book.apply(AddTags(("x",)), [0, 1], should_stop=lambda: next(asked))
    assert book.caption(0) == "cat" and book.unsaved == 0 and book.can_undo == ""


def test_a_caption_is_one_line_of_text_whatever_was_sent(tmp_path: Path) -> None:
    book = CaptionBook.open(make(tmp_path, {"a.png": "cat"}))
    book.set_captions({0: " one\r\ntwo\u2028three\0four\ud800 "}, "Tag")
    book.save()
    assert CaptionBook.open(tmp_path).caption(0) == book.caption(0) == "one two three four?"


def test_tags_are_counted_once_a_picture_and_without_regard_to_case(tmp_path: Path) -> None:
    book = CaptionBook.open(make(tmp_path, {"a.png": "Smile, cat, cat", "b.png": "smile", "c.png": "smile, dog"}))
    assert book.tags() == [("smile", 3), ("cat", 1), ("dog", 1)]
    assert book.tags([0]) == [("Smile", 1), ("cat", 1)] or book.tags([0]) == [("cat", 1), ("Smile", 1)]


def test_the_most_frequent_tags_of_the_whole_dataset_come_first(tmp_path: Path) -> None:
    book = CaptionBook.open(make(tmp_path, {"a.png": "zzk, a, b, c", "b.png": "c, b", "c.png": "c"}))
    book.apply(SortTags("frequency", keep=1), [0])
    assert book.caption(0) == "zzk, c, b, a"


def test_selecting_goes_on_from_a_selection(tmp_path: Path) -> None:
    book = CaptionBook.open(make(tmp_path, {"a.png": "cat", "b.png": "dog", "c.png": None, "d.png": "cat, dog"}))
    assert book.select(Filter()) == [0, 1, 2, 3]
    assert book.select(Filter(all_of=("CAT",))) == [0, 3] and book.select(Filter(empty_only=True)) == [2]
    assert book.select(Filter(any_of=("dog",)), among=[3, 0, 1]) == [3, 1]
    book.apply(AddTags(("x",)), [1, 2])
    assert book.select(Filter(changed_only=True)) == [1, 2] and book.select(Filter(changed_only=True), among=[2]) == [2]


def test_removed_pictures_come_back_with_what_was_not_saved(tmp_path: Path) -> None:
    book = CaptionBook.open(make(tmp_path, {"a.png": "cat", "b.png": "dog", "c.png": "cow"}))
    book.apply(AddTags(("x",)), [1])
    calls = []
    assert book.remove([1], bring_back=lambda: calls.append("back"), take_away=lambda: calls.append("away")) == 1
    assert captions(book) == {"a.png": "cat", "c.png": "cow"} and book.unsaved == 0
    assert book.index(tmp_path / "b.png") is None and book.index(tmp_path / "c.png") == 1
    assert book.save().written == 0
    assert book.undo() == "Remove 1 picture"
    assert captions(book) == {"a.png": "cat", "b.png": "dog, x", "c.png": "cow"} and book.unsaved == 1
    book.redo()
    assert calls == ["back", "away"] and len(book) == 2


def test_a_removal_that_cannot_be_undone_leaves_the_book_as_it_is(tmp_path: Path) -> None:
    book = CaptionBook.open(make(tmp_path, {"a.png": "cat"}))

    def refuse() -> None:
        raise DatasetError("The file is gone")
    book.remove([0], bring_back=refuse)
    with pytest.raises(DatasetError):
        book.undo()
    assert book.pictures == () and book.can_undo == "Remove 1 picture"


def test_new_pictures_take_their_place_and_older_steps_still_fit(tmp_path: Path) -> None:
    book = CaptionBook.open(make(tmp_path, {"b.png": "cat", "d.png": "dog"}))
    book.apply(AddTags(("x",)), [0, 1])
    make(tmp_path, {"a.png": "new", "c.png": None})
    assert book.add([tmp_path / name for name in ("a.png", "c.png", "gone.png", "b.png")]) == 2
    assert captions(book) == {"a.png": "new", "b.png": "cat, x", "c.png": "", "d.png": "dog, x"}
    book.undo()
    assert captions(book) == captions(CaptionBook.open(tmp_path))


def test_a_renamed_folder_is_followed(tmp_path: Path) -> None:
    book = CaptionBook.open(make(tmp_path, {"10_x/a.png": "cat"}))
    book.apply(AddTags(("x",)), [0])
    (tmp_path / "10_x").rename(tmp_path / "15_x")
    book.moved(tmp_path / "10_x", tmp_path / "15_x")
    assert book.pictures == (tmp_path / "15_x" / "a.png",) and book.index(book.pictures[0]) == 0
    book.save()
    assert (tmp_path / "15_x" / "a.txt").read_text() == "cat, x"


@pytest.mark.skipif(sys.platform == "win32", reason="links need a privilege there")
def test_links_out_of_the_allowed_folders_are_passed_over(tmp_path: Path) -> None:
    outside = make(tmp_path / "outside", {"s.png": "secret"})
    folder = make(tmp_path / "data", {"a.png": None, "b.png": "own"})
    (folder / "a.txt").symlink_to(outside / "s.txt")
    (folder / "c.png").symlink_to(outside / "s.png")
    (folder / "10_more").symlink_to(outside)

    def may_read(path: Path) -> bool:
        return folder.resolve() in path.resolve().parents
    book = CaptionBook.open(folder, may_read=may_read)
    assert captions(book) == {"a.png": "", "b.png": "own"} and "not allowed" in book.problem(0)
    book.set_captions({0: "mine"}, "Tag")
    for overwrite in (False, True):
        assert book.save(overwrite=overwrite).conflicts == (folder / "a.txt",)
    assert (outside / "s.txt").read_text() == "secret" and not (folder / ".studio").exists()


def test_opening_reads_each_caption_once_and_leaves_no_file_open(tmp_path: Path) -> None:
    counts = {}
    for pictures in (20, 200):
        folder = make(tmp_path / str(pictures), {f"{number}.png": "one, two" for number in range(pictures)})
        seen: list[str] = []
        watching = [True]
        sys.addaudithook(lambda event, arguments, seen=seen, watching=watching, folder=folder:  # stays for good, but silent
                         seen.append(event) if watching[0] and event in ("open", "os.scandir", "os.listdir")
                         and str(arguments[0]).startswith(str(folder)) else None)
        CaptionBook.open(folder)
        watching[0] = False
        counts[pictures] = (seen.count("open"), seen.count("os.scandir") + seen.count("os.listdir"))
    assert counts == {20: (20, 1), 200: (200, 1)}


def test_progress_is_told_and_opening_can_be_stopped(tmp_path: Path) -> None:
    make(tmp_path, {f"{number}.png": None for number in range(3)})
    told: list[tuple[int, int]] = []
    CaptionBook.open(tmp_path, on_progress=lambda done, total: told.append((done, total)))
    assert told == [(1, 3), (2, 3), (3, 3)]
    with pytest.raises(Interrupted):
        CaptionBook.open(tmp_path, should_stop=lambda: True)
