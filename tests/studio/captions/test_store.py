"""The caption book: reading a folder, steps and their undoing, images that come and go."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from lib_lora_train.errors import DatasetError, SettingError
from lib_lora_train.studio.captions.edits import AddTags, RemoveTags, ReplaceText, SetCaption, SortTags
from lib_lora_train.studio.captions.filter import Filter
from lib_lora_train.studio.captions.store import CaptionStore


def make(folder: Path, captions: dict[str, str | bytes | None]) -> Path:
    """A folder with an image (nobody decodes it) and perhaps a caption for each name; a name may hold one folder."""
    for name, caption in captions.items():
        image = folder / name
        image.parent.mkdir(parents=True, exist_ok=True)
        image.write_bytes(b"")
        if caption is not None:
            data = caption.encode() if isinstance(caption, str) else caption
            image.with_suffix(".txt").write_bytes(data)
    return folder


def captions(store: CaptionStore) -> dict[str, str]:
    return {path.name: store.caption(index) for index, path in enumerate(store.images)}


@pytest.mark.parametrize("content", ['{"rating": "s"}', "[1]", "{", '{"caption": "cat"}'])
def test_another_programs_json_file_is_never_written(tmp_path: Path, content: str) -> None:
    make(tmp_path, {"a.png": None})
    (tmp_path / "a.json").write_text(content, encoding="utf-8")
    store = CaptionStore.open(tmp_path)
    assert store.caption(0) == ("cat" if "cat" in content else "")
    store.apply(SetCaption(text="hat"), [0])
    store.save()
    assert (tmp_path / "a.json").read_text(encoding="utf-8") == content and (tmp_path / "a.txt").read_text() == "hat"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names")
def test_a_pipe_of_a_captions_name_is_not_waited_for(tmp_path: Path) -> None:
    make(tmp_path, {"a.png": None})
    os.mkfifo(tmp_path / "a.txt")
    assert "a.txt cannot be read: it is no file" in CaptionStore.open(tmp_path).problem(0)


def test_a_plain_folder_is_read_by_name_with_and_without_captions(tmp_path: Path) -> None:
    make(tmp_path, {"b.png": "dog,  café ", "A.jpg": "\ufeffcat", "c.webp": None})
    (tmp_path / "notes.md").write_text("no picture")
    store = CaptionStore.open(tmp_path)
    assert captions(store) == {"A.jpg": "cat", "b.png": "dog,  café", "c.webp": ""}
    assert list(captions(store)) == ["A.jpg", "b.png", "c.webp"]
    assert store.unsaved == 0 and store.can_undo == "" and not list(tmp_path.glob(".*"))


def test_of_kohyas_layout_the_numbered_folders_are_read_and_no_others(tmp_path: Path) -> None:
    make(tmp_path, {"10_zzk girl/a.png": "one", "2_bg/b.png": "two", "masks/a.png": None, "20240101_trip/c.png": "x",
                    ".studio/removed/d.png": "gone", "loose.png": "x"})
    store = CaptionStore.open(tmp_path)
    assert [path.relative_to(tmp_path).as_posix() for path in store.images] == ["10_zzk girl/a.png", "2_bg/b.png"]


def test_a_folder_without_images_is_an_empty_store_and_one_that_is_missing_is_refused(tmp_path: Path) -> None:
    (tmp_path / "10_new").mkdir()
    assert CaptionStore.open(tmp_path).images == ()
    with pytest.raises(DatasetError, match="does not exist"):
        CaptionStore.open(tmp_path / "nowhere")


def test_a_caption_that_is_no_utf_8_is_kept_until_it_is_set(tmp_path: Path) -> None:
    no_text = b"caf\x81 \xff"
    make(tmp_path, {"a.png": no_text, "b.png": "dog"})
    store = CaptionStore.open(tmp_path)
    assert "a.txt is not UTF-8" in store.problem(0) and store.problem(1) == ""
    assert store.apply(AddTags(("zzk",)), [0, 1]) == 1
    store.save()
    assert (tmp_path / "a.txt").read_bytes() == no_text
    store.apply(SetCaption("1girl, café"), [0])
    assert store.problem(0) == "" and store.unsaved == 1
    store.save()
    assert (tmp_path / "a.txt").read_text(encoding="utf-8") == "1girl, café"


def test_only_the_first_line_is_edited_and_the_others_stay_in_the_file(tmp_path: Path) -> None:
    make(tmp_path, {"a.png": "\none, two\nthree\n"})
    store = CaptionStore.open(tmp_path)
    assert store.caption(0) == "one, two" and "first line" in store.hint(0) and store.problem(0) == ""
    store.apply(AddTags(("four",)), [0])
    store.save()
    assert (tmp_path / "a.txt").read_text(encoding="utf-8") == "one, two, four\nthree"
    assert CaptionStore.open(tmp_path).caption(0) == "one, two, four"


def test_an_enormous_file_is_no_caption(tmp_path: Path) -> None:
    make(tmp_path, {"a.png": b"a" * (2 << 20)})
    assert "too large" in CaptionStore.open(tmp_path).problem(0)


def test_images_of_one_name_share_their_caption(tmp_path: Path) -> None:
    make(tmp_path, {"a.png": "one", "a.jpg": "one"})
    store = CaptionStore.open(tmp_path)
    assert store.apply(AddTags(("two",)), [0]) == 1
    assert [store.caption(0), store.caption(1)] == ["one, two"] * 2 and store.unsaved == 1


def test_txt_is_used_before_caption_and_said(tmp_path: Path) -> None:
    make(tmp_path, {"a.png": "from txt", "b.png": None})
    (tmp_path / "a.caption").write_text("other")
    (tmp_path / "b.caption").write_text("kept where it was")
    store = CaptionStore.open(tmp_path)
    assert captions(store) == {"a.png": "from txt", "b.png": "kept where it was"}
    assert "a.caption does not count" in store.hint(0)
    store.set_captions({1: "new"}, "Tag")
    store.save()
    assert (tmp_path / "b.caption").read_text() == "new" and not (tmp_path / "b.txt").exists()


def test_a_caption_in_another_encoding_is_said_and_saved_as_utf_8(tmp_path: Path) -> None:
    make(tmp_path, {"a.png": "zzk, 红色帽子".encode("gbk"), "b.png": "dog"})
    store = CaptionStore.open(tmp_path)
    assert store.caption(0) == "zzk, 红色帽子" and "GBK" in store.hint(0) and store.hint(1) == ""
    assert store.apply(AddTags(("hat",)), [0]) == 1
    assert store.save().conflicts == ()
    assert (tmp_path / "a.txt").read_text(encoding="utf-8") == "zzk, 红色帽子, hat" and store.hint(0) == ""


def test_a_caption_from_a_json_file_is_shown_and_its_change_saved_beside_it(tmp_path: Path) -> None:
    make(tmp_path, {"a.png": None, "b.png": " ", "c.png": None})
    (tmp_path / "a.json").write_text('{"tags": ["zzk", "hat"]}')
    (tmp_path / "b.caption").write_text("behind an empty one")
    (tmp_path / "c.png.txt").write_text("own")
    store = CaptionStore.open(tmp_path)
    assert captions(store) == {"a.png": "zzk, hat", "b.png": "behind an empty one", "c.png": "own"} and store.unsaved == 0
    store.apply(AddTags(("new",)), range(3))
    assert store.save().written == 3
    assert (tmp_path / "a.txt").read_text() == "zzk, hat, new"
    assert (tmp_path / "b.caption").read_text() == "behind an empty one, new"
    assert (tmp_path / "c.png.txt").read_text() == "own, new" and not (tmp_path / "c.txt").exists()
    assert captions(CaptionStore.open(tmp_path)) == captions(store)


def test_a_caption_that_an_import_wrote_is_known_unless_it_was_edited(tmp_path: Path) -> None:
    store = CaptionStore.open(make(tmp_path, {"a.png": None, "b.png": None}))
    store.set_captions({1: "edited"}, "Tag")
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text("imported")
    store.reread(store.images)
    assert captions(store) == {"a.png": "imported", "b.png": "edited"} and store.unsaved == 1
    assert store.save().conflicts == ()


def test_each_edit_is_one_step_that_can_be_undone_and_redone(tmp_path: Path) -> None:
    store = CaptionStore.open(make(tmp_path, {"a.png": "cat", "b.png": "dog", "c.png": None}))
    states = [captions(store)]
    for edit in (AddTags(("zzk",), "start"), ReplaceText("o", "u"), SetCaption("one text for all")):
        assert store.apply(edit, range(3)) > 0
        states.append(captions(store))
    assert states[1] == {"a.png": "zzk, cat", "b.png": "zzk, dog", "c.png": "zzk"}
    labels = []
    for state in reversed(states[:-1]):
        labels.append(store.undo())
        assert captions(store) == state
    assert labels == ["Edit caption", "Replace the text o by u", "Add zzk"]
    assert store.unsaved == 0 and store.undo() == ""
    for state in states[1:]:
        assert store.can_redo == store.redo() != ""
        assert captions(store) == state
    assert store.redo() == ""


def test_a_new_edit_forgets_what_was_undone_and_one_that_changes_nothing_is_no_step(tmp_path: Path) -> None:
    store = CaptionStore.open(make(tmp_path, {"a.png": "cat"}))
    store.apply(AddTags(("x",)), [0])
    store.undo()
    assert store.apply(RemoveTags(("dog",)), [0]) == 0 and store.can_redo == "Add x"
    store.apply(AddTags(("y",)), [0])
    assert store.can_redo == "" and store.can_undo == "Add y"


def test_what_was_saved_can_still_be_undone(tmp_path: Path) -> None:
    store = CaptionStore.open(make(tmp_path, {"a.png": "cat"}))
    store.apply(AddTags(("x",)), [0])
    store.save()
    store.undo()
    assert store.caption(0) == "cat" and store.unsaved == 1
    store.save()
    assert (tmp_path / "a.txt").read_text() == "cat"


def test_an_edit_that_fails_half_way_changes_nothing(tmp_path: Path) -> None:
    store = CaptionStore.open(make(tmp_path, {"a.png": "cat", "b.png": "a" * 9000}))
    with pytest.raises(SettingError, match="longer than"):
        store.apply(ReplaceText("a", "aa"), [0, 1])
    assert store.caption(0) == "cat" and store.unsaved == 0 and store.can_undo == ""


def test_a_caption_is_one_line_of_text_whatever_was_sent(tmp_path: Path) -> None:
    store = CaptionStore.open(make(tmp_path, {"a.png": "cat"}))
    store.set_captions({0: " one\r\ntwo\u2028three\0four\ud800 "}, "Tag")
    store.save()
    assert CaptionStore.open(tmp_path).caption(0) == store.caption(0) == "one two three four?"


def test_tags_are_counted_once_an_image_and_without_regard_to_case(tmp_path: Path) -> None:
    store = CaptionStore.open(make(tmp_path, {"a.png": "Smile, cat, cat", "b.png": "smile", "c.png": "smile, dog"}))
    assert store.tags() == [("smile", 3), ("cat", 1), ("dog", 1)]
    assert store.tags([0]) == [("Smile", 1), ("cat", 1)] or store.tags([0]) == [("cat", 1), ("Smile", 1)]


def test_the_most_frequent_tags_of_the_whole_dataset_come_first(tmp_path: Path) -> None:
    store = CaptionStore.open(make(tmp_path, {"a.png": "zzk, a, b, c", "b.png": "c, b", "c.png": "c"}))
    store.apply(SortTags("frequency", keep=1), [0])
    assert store.caption(0) == "zzk, c, b, a"


def test_selecting_goes_on_from_a_selection(tmp_path: Path) -> None:
    store = CaptionStore.open(make(tmp_path, {"a.png": "cat", "b.png": "dog", "c.png": None, "d.png": "cat, dog"}))
    assert store.select(Filter()) == [0, 1, 2, 3]
    assert store.select(Filter(all_of=("CAT",))) == [0, 3] and store.select(Filter(empty_only=True)) == [2]
    store.apply(AddTags(("x",)), [1, 2])
    assert store.select(Filter(changed_only=True)) == [1, 2]


def test_removed_images_come_back_with_what_was_not_saved(tmp_path: Path) -> None:
    store = CaptionStore.open(make(tmp_path, {"a.png": "cat", "b.png": "dog", "c.png": "cow"}))
    store.apply(AddTags(("x",)), [1])
    calls = []
    assert store.remove([1], move=lambda back: calls.append("back" if back else "away")) == 1
    assert captions(store) == {"a.png": "cat", "c.png": "cow"} and store.unsaved == 0
    assert store.index(tmp_path / "b.png") is None and store.index(tmp_path / "c.png") == 1
    assert store.save().written == 0
    assert store.undo() == "Remove 1 picture"
    assert captions(store) == {"a.png": "cat", "b.png": "dog, x", "c.png": "cow"} and store.unsaved == 1
    store.redo()
    assert calls == ["back", "away"] and len(store) == 2


def test_a_removal_that_cannot_be_undone_leaves_the_store_as_it_is(tmp_path: Path) -> None:
    store = CaptionStore.open(make(tmp_path, {"a.png": "cat"}))

    def refuse(back: bool) -> None:
        raise DatasetError("The file is gone")
    store.remove([0], move=refuse)
    with pytest.raises(DatasetError):
        store.undo()
    assert store.images == () and store.can_undo == "Remove 1 picture"


def test_new_images_take_their_place_and_older_steps_still_fit(tmp_path: Path) -> None:
    store = CaptionStore.open(make(tmp_path, {"b.png": "cat", "d.png": "dog"}))
    store.apply(AddTags(("x",)), [0, 1])
    make(tmp_path, {"a.png": "new", "c.png": None})
    assert store.add([tmp_path / name for name in ("a.png", "c.png", "gone.png", "b.png")]) == 2
    assert captions(store) == {"a.png": "new", "b.png": "cat, x", "c.png": "", "d.png": "dog, x"}
    store.undo()
    assert captions(store) == captions(CaptionStore.open(tmp_path))


def test_a_renamed_folder_is_followed(tmp_path: Path) -> None:
    store = CaptionStore.open(make(tmp_path, {"10_x/a.png": "cat"}))
    store.apply(AddTags(("x",)), [0])
    (tmp_path / "10_x").rename(tmp_path / "15_x")
    store.moved(tmp_path / "10_x", tmp_path / "15_x")
    assert store.images == (tmp_path / "15_x" / "a.png",) and store.index(store.images[0]) == 0
    store.save()
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
    store = CaptionStore.open(folder, may_read=may_read)
    assert captions(store) == {"a.png": "", "b.png": "own"} and "not allowed" in store.problem(0)
    store.set_captions({0: "mine"}, "Tag")
    for overwrite in (False, True):
        assert store.save(overwrite=overwrite).conflicts == (folder / "a.txt",)
    assert (outside / "s.txt").read_text() == "secret" and not (folder / ".studio").exists()


def test_opening_reads_each_caption_once_and_leaves_no_file_open(tmp_path: Path) -> None:
    counts = {}
    for images in (20, 200):
        folder = make(tmp_path / str(images), {f"{number}.png": "one, two" for number in range(images)})
        seen: list[str] = []
        watching = [True]
        sys.addaudithook(lambda event, arguments, seen=seen, watching=watching, folder=folder:  # stays for good, but silent
                         seen.append(event) if watching[0] and event in ("open", "os.scandir", "os.listdir")
                         and str(arguments[0]).startswith(str(folder)) else None)
        CaptionStore.open(folder)
        watching[0] = False
        counts[images] = (seen.count("open"), seen.count("os.scandir") + seen.count("os.listdir"))
    assert counts == {20: (20, 1), 200: (200, 1)}
