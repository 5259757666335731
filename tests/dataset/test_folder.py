"""What a folder of images becomes, and what is said about the images that are left out."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest
from PIL import Image

from lib_lora_train.dataset import folder as folder_module
from lib_lora_train.dataset import images as images_module
from lib_lora_train.dataset import listing
from lib_lora_train.dataset.buckets import Buckets
from lib_lora_train.dataset.examples import Dataset, assign_buckets, visits_by_bucket
from lib_lora_train.dataset.report import examine
from lib_lora_train.errors import DatasetError, Interrupted
from lib_lora_train.settings import parse
from lib_lora_train.studio.captions.store import CaptionStore
from tests.scanned_folder import scan


def texts(dataset: Dataset) -> str:
    return "\n".join(problem.text for problem in dataset.problems)


def captions(dataset: Dataset) -> dict[str, str]:
    return {example.path.name: example.caption for example in dataset.examples}


def test_kohya_folders_give_repeats_and_captions(tmp_path: Path, make_image) -> None:
    make_image("10_sks dog/a.png", (64, 48), caption="a dog, grass")
    make_image("10_sks dog/B.JPG")
    make_image("3_cat_with_hat/c.webp")
    dataset = scan(tmp_path, max_train_epochs=10)
    assert dataset.layout == "kohya" and texts(dataset) == "3 pictures, 1 with a caption."
    assert captions(dataset) == {"a.png": "a dog, grass", "B.JPG": "sks dog", "c.webp": "cat_with_hat"}
    assert [example.repeats for example in dataset.examples] == [10, 10, 3]
    assert [(e.width, e.height) for e in dataset.examples] == [(64, 48)] * 3
    assert (dataset.images, sum(example.repeats for example in dataset.examples)) == (3, 23)
    assert dataset.dataset_dirs() == {"10_sks dog": {"n_repeats": 10, "img_count": 2},
                                      "3_cat_with_hat": {"n_repeats": 3, "img_count": 1}}
    assert dataset.tag_frequency() == {"10_sks dog": {"a dog": 1, "grass": 1, "sks dog": 1},
                                       "3_cat_with_hat": {"cat_with_hat": 1}}


def test_what_lies_beside_kohya_folders_is_ignored_and_said(tmp_path: Path, make_image) -> None:
    make_image("10_dog/a.png")
    for extra in ("loose.png", "notes/b.png", "0_off/c.png", "10_dog/deeper/d.png"):
        make_image(extra)
    (tmp_path / "5_empty").mkdir()
    (tmp_path / ".lora_train_cache").mkdir()
    dataset = scan(tmp_path, max_train_epochs=1, num_repeats=4)
    assert captions(dataset) == {"a.png": "dog"}
    for word in ("loose.png", "notes", "0_off", "deeper", "5_empty", "num_repeats"):
        assert word in texts(dataset)
    assert ".lora_train_cache" not in texts(dataset)
    assert dataset.examples[0].repeats == 10


@pytest.mark.parametrize(("chosen", "counts"), [
    ("plain", ["3 pictures in the folder outfit (outfit 1, outfit/night 2)", "1 mask (masks/a.png)",
               "1 picture in the folder reg (reg/1_dog 1)"]),
    ("kohya", ["1 picture in the folder deep (deep/deeper 1)", "2 pictures in the folder backup (backup/old 2)"])])
def test_images_that_are_not_used_are_counted_at_every_depth(tmp_path: Path, make_image, chosen: str,
                                                             counts: list[str]) -> None:
    for name in ("plain/a.png", "plain/outfit/b.png", "plain/outfit/night/c.png", "plain/outfit/night/d.png",
                 "plain/masks/a.png", "plain/reg/1_dog/e.png", "plain/@eaDir/f.png", "plain/.hidden/g.png",
                 "kohya/2_dog/a.png", "kohya/2_dog/deep/deeper/b.png", "kohya/backup/old/c.png", "kohya/backup/old/d.png"):
        make_image(name)
    dataset = scan(tmp_path / chosen, max_train_epochs=1, trigger_word="sks")
    assert len(dataset.examples) == 1 and len([p for p in dataset.problems if "caption" not in p.text]) == len(counts)
    assert all(any(count in problem.text for problem in dataset.problems) for count in counts)


def test_a_folder_whose_images_lie_deeper_names_the_folders_to_choose(tmp_path: Path, make_image) -> None:
    for name in ("img/10_dog/a.png", "more/night/b.png", "reg/1_dog/c.png"):
        make_image(name)
    with pytest.raises(DatasetError) as error:
        scan(tmp_path, max_train_epochs=1)
    assert "(img, more/night, reg)" in error.value.remedy
@pytest.mark.parametrize("below", ["", "10_dog/"])
def test_masks_and_conditioning_pictures_are_not_learnt_and_said_to_be_unused(tmp_path: Path, make_image, below: str) -> None:
    for name in ("a.png", "b.jpg", "who-mask.png"):
        make_image(f"{below}{name}", caption="x")
    for name in ("a-masklabel.png", "b_mask.png", "masks/a.png", "a-condlabel.png", "Mask/b.png"):
        make_image(f"{below}{name}")
    dataset = scan(tmp_path, max_train_epochs=1)
    names = ["a.png", "b.jpg", "who-mask.png"]  # the last is of no other picture
    assert [example.path.name for example in dataset.examples] == names
    masks, conditioning = (problem.text for problem in dataset.problems)
    assert masks.startswith("4 masks") and "masked_loss" in masks
    assert "a-condlabel.png" in conditioning and "1 conditioning picture" in conditioning
    report = examine(tmp_path, settings=parse({}))
    assert [image.path.name for image in report.images] == names and {masks, conditioning} <= set(report.advice)
    assert [image.name for image in CaptionStore.open(tmp_path).images] == names


def test_a_plain_folder_computes_its_repeats_from_the_images_that_can_be_used(tmp_path: Path, make_image) -> None:
    for i in range(10):
        make_image(f"{i}.png", caption="x")
    (tmp_path / "broken.png").write_bytes(b"")
    dataset = scan(tmp_path, max_train_epochs=10)
    assert dataset.layout == "plain"
    assert {example.repeats for example in dataset.examples} == {15}  # 1500 visits / 10 images / 10 epochs
    assert {e.repeats for e in scan(tmp_path, max_train_epochs=10, num_repeats=2).examples} == {2}


def test_a_numbered_folder_chosen_itself_is_a_plain_folder_and_says_so(tmp_path: Path, make_image) -> None:
    make_image("10_dog/a.png", caption="a")
    dataset = scan(tmp_path / "10_dog", max_train_epochs=1, num_repeats=1)
    assert (dataset.layout, dataset.examples[0].repeats) == ("plain", 1)
    assert "10_dog" in texts(dataset) and "folder above" in texts(dataset)


def test_a_missing_caption_is_the_trigger_word_or_empty_with_a_warning(tmp_path: Path, make_image) -> None:
    make_image("a.png", caption="smile")
    make_image("b.png")
    make_image("c.png", caption="  ")
    with_trigger = scan(tmp_path, max_train_epochs=1, trigger_word="sks")
    assert captions(with_trigger) == {"a.png": "sks, smile", "b.png": "sks", "c.png": "sks"}
    assert texts(with_trigger) == "3 pictures, 1 with a caption."
    without = scan(tmp_path, max_train_epochs=1)
    assert captions(without) == {"a.png": "smile", "b.png": "", "c.png": ""}
    assert "2 pictures have no caption" in texts(without) and "b.png, c.png" in texts(without)


def test_captions_of_several_lines_or_files_are_warned_about(tmp_path: Path, make_image) -> None:
    make_image("a.png", caption="first\nsecond")
    make_image("b.png", caption="from txt")
    (tmp_path / "b.caption").write_text("from caption")
    make_image("c.png")
    (tmp_path / "c.caption").write_text("only caption")
    dataset = scan(tmp_path, max_train_epochs=1)
    assert captions(dataset) == {"a.png": "first", "b.png": "from txt", "c.png": "only caption"}
    assert "(a.txt)" in texts(dataset) and "(b.txt)" in texts(dataset)


def test_captions_in_no_encoding_are_refused_all_at_once(tmp_path: Path, make_image) -> None:
    for name in ("a", "b", "c"):
        make_image(f"{name}.png", caption="fine")
    (tmp_path / "a.txt").write_bytes(b"caf\x81 \xff")
    with pytest.raises(DatasetError, match=r"a\.txt is not UTF-8"):
        scan(tmp_path, max_train_epochs=1)
    (tmp_path / "c.txt").write_bytes(b"caf\x81 \xff")
    with pytest.raises(DatasetError, match=r"2 caption files.*a\.txt.*c\.txt.*UTF-8"):
        scan(tmp_path, max_train_epochs=1)


def test_a_name_of_macos_and_one_of_windows_are_one(tmp_path: Path, make_image) -> None:
    make_image("cafe\u0301.png")
    (tmp_path / "caf\u00e9.txt").write_text("a red cafe\u0301", encoding="utf-8")
    make_image("B.png")
    (tmp_path / "b.TXT").write_text("blue", encoding="utf-8")
    assert list(captions(scan(tmp_path, max_train_epochs=1)).values()) == ["blue", "a red caf\u00e9"]


def test_captions_that_lie_elsewhere_are_said_although_there_is_a_trigger_word(tmp_path: Path, make_image) -> None:
    make_image("images/1.png")
    for name in ("captions/1.txt", "My Tags/1.txt", "images/img_1.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("a hat", encoding="utf-8")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "images/1.png", "text": "a hat"}', encoding="utf-8")
    said = texts(scan(tmp_path / "images", max_train_epochs=1, trigger_word="zzk"))
    assert f"1 picture of images has a caption in {tmp_path}, which is not read there" in said
    assert str(tmp_path / "captions") in said and str(tmp_path / "My Tags") in said
    assert "1 picture, 0 with captions; 1 text file fits no picture (img_1.txt)." in said


def test_files_of_other_kinds_are_said_even_where_all_have_captions(tmp_path: Path, make_image) -> None:
    make_image("a.png", caption="fine")
    for name in ("b.psd", "metadata.csv", "a.npz", "Thumbs.db", ".hidden.psd"):
        (tmp_path / name).write_bytes(b"")
    assert texts(scan(tmp_path, max_train_epochs=1)).endswith(
        "1 picture, 1 with a caption; 2 files are of a kind that is not read (b.psd, metadata.csv).")


def test_metadata_above_the_numbered_folders_is_read(tmp_path: Path, make_image) -> None:
    for name in ("10_cat/a.png", "5_dog/a.png", "5_dog/b.png"):
        make_image(name)
    (tmp_path / "metadata.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in (
        {"file_name": "10_cat/a.png", "text": "a cat"}, {"file_name": "5_dog/a.png", "text": "a dog"},
        {"file_name": "b.png", "text": "no folder"})), encoding="utf-8")
    assert [e.caption for e in scan(tmp_path, max_train_epochs=1).examples] == ["a cat", "a dog", "no folder"]


def test_a_trigger_word_of_full_width_commas_or_escaped_brackets_is_not_put_twice(tmp_path: Path, make_image) -> None:
    make_image("a.png", caption="zzk，1girl、solo")
    make_image("b.png", caption=r"1girl, zzk, saber \(fate\)")
    dataset = scan(tmp_path, max_train_epochs=1, trigger_word="zzk，saber (fate)")
    assert captions(dataset) == {"a.png": "saber (fate), zzk,1girl,solo", "b.png": r"1girl, zzk, saber \(fate\)"}
    assert dataset.tag_frequency()[tmp_path.name] == {"saber (fate)": 1, "zzk": 2, "1girl": 2, "solo": 1, r"saber \(fate\)": 1}


def test_bad_images_are_skipped_by_name_and_the_rest_is_used(tmp_path: Path, make_image, monkeypatch) -> None:
    make_image("good.png", caption="x")
    (tmp_path / "zero.jpg").write_bytes(b"")
    (tmp_path / "text.png").write_text("hello")
    make_image("large.png", (200, 200))
    damaged = make_image("damaged.png", (64, 64))
    data = bytearray(damaged.read_bytes())
    data[len(data) // 2] ^= 0xFF
    damaged.write_bytes(data)
    monkeypatch.setattr(images_module, "MAX_PIXELS", 10_000)
    dataset = scan(tmp_path, max_train_epochs=1)
    assert list(captions(dataset)) == ["good.png"]
    skipped = {problem.path.name: problem.text for problem in dataset.problems if problem.skipped}
    assert set(skipped) == {"zero.jpg", "text.png", "large.png", "damaged.png"}
    assert all(name in text for name, text in skipped.items())
    assert "zero bytes" in skipped["zero.jpg"] and "200×200" in skipped["large.png"]


def test_a_folder_without_one_usable_image_is_refused_with_the_reasons(tmp_path: Path) -> None:
    (tmp_path / "zero.jpg").write_bytes(b"")
    with pytest.raises(DatasetError, match=r"No picture.*zero\.jpg.*zero bytes"):
        scan(tmp_path, max_train_epochs=1)


def test_a_missing_an_empty_and_a_wrong_folder_are_refused(tmp_path: Path, make_image) -> None:
    with pytest.raises(DatasetError, match="nowhere does not exist"):
        scan(tmp_path / "nowhere", max_train_epochs=1)
    with pytest.raises(DatasetError, match="holds no pictures"):
        scan(tmp_path, max_train_epochs=1)
    image = make_image("dogs/a.png")
    with pytest.raises(DatasetError, match="a.png is a file"):
        scan(image, max_train_epochs=1)
    with pytest.raises(DatasetError, match="holds no pictures.*dogs.*10_name"):
        scan(tmp_path, max_train_epochs=1)
    (tmp_path / "10_none").mkdir()
    with pytest.raises(DatasetError, match="10_none is ignored: it holds no pictures"):
        scan(tmp_path, max_train_epochs=1)


def test_an_unreadable_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(folder: Path) -> None:
        raise PermissionError(13, "Permission denied", str(folder))

    monkeypatch.setattr(listing.os, "scandir", refuse)
    with pytest.raises(DatasetError, match="cannot be read: Permission denied"):
        scan(tmp_path, max_train_epochs=1)


def test_regularisation_images_are_seen_as_often_as_the_others_without_the_trigger(
    tmp_path: Path, make_image,
) -> None:
    for name in ("a", "b"):
        make_image(f"train/4_sks dog/{name}.png")
    for name in ("x", "y", "z"):
        make_image(f"reg/1_dog/{name}.png")
    dataset = scan(tmp_path / "train", max_train_epochs=1, trigger_word="sks", reg_data_dir=tmp_path / "reg")
    reg = [example for example in dataset.examples if example.is_regularisation]
    assert [(e.path.name, e.repeats, e.caption) for e in reg] == [("x.png", 3, "dog"), ("y.png", 3, "dog"),
                                                                   ("z.png", 2, "dog")]
    assert (dataset.images, sum(example.repeats for example in dataset.examples)) == (2, 16)
    assert dataset.dataset_dirs(regularisation=True)["1_dog"]["img_count"] == 3
    assert set(dataset.tag_frequency()) == {"4_sks dog"}


def test_regularisation_images_beyond_the_visits_are_left_out_and_named(tmp_path: Path, make_image) -> None:
    make_image("train/1_dog/a.png")
    for name in ("x", "y"):
        make_image(f"reg/1_dog/{name}.png")
    dataset = scan(tmp_path / "train", max_train_epochs=1, reg_data_dir=tmp_path / "reg")
    assert [e.path.name for e in dataset.examples] == ["a.png", "x.png"]
    assert "y.png" in texts(dataset)


def test_a_regularisation_folder_is_checked_like_the_other(tmp_path: Path, make_image) -> None:
    make_image("train/1_dog/a.png")
    (tmp_path / "reg").mkdir()
    for folder, words in (("nowhere", "does not exist"), ("reg", "regularisation.*holds no pictures"),
                          ("train", "is the dataset folder itself")):
        with pytest.raises(DatasetError, match=words):
            scan(tmp_path / "train", max_train_epochs=1, reg_data_dir=tmp_path / folder)
    (tmp_path / "reg" / "zero.png").write_bytes(b"")
    with pytest.raises(DatasetError, match="No picture in .*reg"):
        scan(tmp_path / "train", max_train_epochs=1, reg_data_dir=tmp_path / "reg")


def test_a_regularisation_folder_that_no_system_can_name_is_refused(tmp_path: Path, make_image) -> None:
    make_image("train/1_dog/a.png")
    for name in ("\ud800", "\0"):
        with pytest.raises(DatasetError):
            scan(tmp_path / "train", max_train_epochs=1, reg_data_dir=name)


def test_progress_is_told_and_a_stop_is_heard_between_images(tmp_path: Path, make_image) -> None:
    for name in ("a", "b", "c"):
        make_image(f"{name}.png")
    seen: list[tuple[int, int]] = []
    scan(tmp_path, max_train_epochs=1, on_progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 3), (2, 3), (3, 3)]
    seen.clear()
    with pytest.raises(Interrupted):
        scan(tmp_path, max_train_epochs=1, on_progress=lambda done, total: seen.append((done, total)),
             should_stop=lambda: len(seen) == 2)
    assert len(seen) == 2


def test_turned_images_are_placed_upright_and_too_narrow_ones_are_skipped(tmp_path: Path, make_image) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (192, 108)).save(tmp_path / "turned.jpg", exif=exif)
    make_image("thin.png", (300, 40))
    buckets = Buckets((512, 512), enable_bucket=True, min_bucket_reso=256, max_bucket_reso=1024, bucket_reso_steps=64,
                      bucket_no_upscale=True)
    dataset, placements = assign_buckets(scan(tmp_path, max_train_epochs=10), lambda _: buckets)
    assert [(e.path.name, e.width, e.height) for e in dataset.examples] == [("turned.jpg", 108, 192)]
    assert [placement.bucket for placement in placements] == [(64, 192)]
    assert any(problem.skipped and "thin.png" in problem.text for problem in dataset.problems)
    assert visits_by_bucket(dataset.examples, placements) == {(64, 192): dataset.examples[0].repeats}


def test_a_dataset_of_which_no_image_can_be_placed_is_refused(tmp_path: Path, make_image) -> None:
    make_image("thin.png", (300, 40))
    buckets = Buckets((512, 512), enable_bucket=True, min_bucket_reso=256, max_bucket_reso=1024, bucket_reso_steps=64,
                      bucket_no_upscale=True)
    with pytest.raises(DatasetError, match=r"No picture.*thin\.png"):
        assign_buckets(scan(tmp_path, max_train_epochs=10), lambda _: buckets)


def test_a_folder_named_by_its_date_is_not_read_as_millions_of_repeats(tmp_path: Path, make_image) -> None:
    make_image("20240101_holiday/a.png")
    make_image("2_dog/b.png")
    dataset = scan(tmp_path, max_train_epochs=1)
    assert [example.path.name for example in dataset.examples] == ["b.png"]
    assert any("20240101" in problem.text and "repeats" in problem.text for problem in dataset.problems)


@pytest.mark.parametrize("many", [1, 10**6])
def test_a_large_folder_read_in_threads_is_what_it_is_read_in_turn(tmp_path: Path, monkeypatch, many: int) -> None:
    monkeypatch.setattr(folder_module, "_MANY", many)
    inside = tmp_path / "2_things"
    inside.mkdir()
    for number in range(40):
        path = inside / f"{number:02}.png"
        Image.new("RGB", (16 + number, 16), (number, 0, 0)).save(path)
        path.with_suffix(".txt").write_text(f"caption {number}", encoding="utf-8")
        if number % 9 == 4:
            path.write_bytes(path.read_bytes()[:40])
    seen: list[tuple[int, int]] = []
    found = scan(tmp_path, max_train_epochs=1, on_progress=lambda done, total: seen.append((done, total)))
    kept = [number for number in range(40) if number % 9 != 4]
    assert [(e.path.name, e.caption, e.width) for e in found.examples] == [
        (f"{number:02}.png", f"caption {number}", 16 + number) for number in kept]
    assert [p.path.name for p in found.problems if p.skipped] == ["04.png", "13.png", "22.png", "31.png"]
    assert seen == [(done, 40) for done in range(1, 41)]
    with pytest.raises(Interrupted):
        scan(tmp_path, max_train_epochs=1, should_stop=lambda: True)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("lora-train-prefetch")]
