"""What is found in a folder of images, and what is said to fix first."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFilter

from lib_lora_train.dataset.advice import respelt, typing_errors
from lib_lora_train.dataset.crop_sheet import crop_sheet, dimmed
from lib_lora_train.dataset.findings import DatasetReport, Examined
from lib_lora_train.dataset.report import examine
from lib_lora_train.demo import STYLE, SUBJECT
from lib_lora_train.errors import DatasetError, Interrupted, SettingError
from lib_lora_train.model.family import training_sizes
from lib_lora_train.run.planning import plan_dataset
from lib_lora_train.settings import parse

Draw = Callable[..., Path]


@pytest.fixture
def draw(tmp_path: Path) -> Draw:
    """draw("a/b.png", size=(512, 512), caption="…", seed=None) -> path; sharp shapes, different for each name or seed."""

    def make(name: str, size: tuple[int, int] = (512, 512), caption: str | None = "a drawing", seed: int | None = None,
             blur: float = 0) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        random = np.random.default_rng(list(name.encode()) if seed is None else seed)
        image = Image.new("RGB", (600, 600), tuple(random.integers(0, 256, 3)))
        pen = ImageDraw.Draw(image)
        for _ in range(12):
            pen.polygon([tuple(random.integers(0, 600, 2)) for _ in range(3)], fill=tuple(random.integers(0, 256, 3)))
        image.resize(size, Image.Resampling.LANCZOS).filter(ImageFilter.GaussianBlur(blur)).save(path)
        if caption is not None:
            path.with_suffix(".txt").write_text(caption, encoding="utf-8")
        return path

    return make


def look(folder: Path, tokenizer: object = None, family: str = "", **settings: object) -> DatasetReport:
    return examine(folder, settings=parse(settings), tokenizer=tokenizer, sizes=training_sizes(family))


def codes(report: DatasetReport) -> dict[str, set[str]]:
    return {image.path.name: set(image.problems) for image in report.images if image.problems}


def advice(report: DatasetReport, *words: str) -> str:
    """The one sentence that holds all of `words`."""
    found = [sentence for sentence in report.advice if all(word in sentence for word in words)]
    assert len(found) == 1, report.advice
    return found[0]


@pytest.mark.parametrize("folder", [STYLE, SUBJECT], ids=["style", "subject"])
def test_the_demos_images_have_nothing_to_fix(folder: Path) -> None:
    report = look(folder, resolution="128")
    assert (report.advice, report.counts, report.duplicates) == ((), {}, ())
    assert report.trainable and report.usable == len(report.images) > 10
    assert "Nothing to fix" in report.text()


def test_each_problem_is_marked_at_its_image_and_said_in_a_sentence(tmp_path: Path, draw: Draw) -> None:
    for i in range(12):
        draw(f"good{i}.png")
    draw("small.png", (300, 200))
    draw("blurred.png", blur=6)
    draw("strip.png", (1800, 400))
    draw("bare.png", caption=None)
    draw("mute.png", caption="  \n ")
    draw("twin.png", (400, 400), seed=99)
    draw("larger twin.png", (500, 500), seed=99)
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnonsense")
    report = look(tmp_path)
    assert codes(report) == {
        "small.png": {"small"}, "blurred.png": {"blurry"}, "strip.png": {"narrow"}, "bare.png": {"no_caption"},
        "mute.png": {"empty_caption"}, "twin.png": {"duplicate", "small"}, "broken.png": {"broken", "no_caption"}}
    assert [[path.name for path in group] for group in report.duplicates] == [["larger twin.png", "twin.png"]]
    for words in (["2 pictures are smaller", "small.png, 300×200"], ["blurred (blurred.png)"], ["strip.png"],
                  ["2 pictures have no caption file", "trigger word"], ["mute.png"], ["twin.png ≈ larger twin.png"],
                  ["1 picture cannot be used", "broken.png", "it is damaged"]):
        advice(report, *words)
    assert all(sentence.endswith(".") and not sentence[0].islower() for sentence in report.advice)
    assert report.counts["no_caption"] == 2 and report.trainable and report.usable == 19


def test_what_would_keep_a_training_from_starting_comes_first(tmp_path: Path, draw: Draw) -> None:
    for i in range(3):
        draw(f"{i}.png", (100, 100), caption=None)
    (tmp_path / "1.txt").write_bytes(b"caf\x81 \xff")
    report = look(tmp_path)
    assert "UTF-8" in report.advice[0] and "Only 3 different pictures" in report.advice[1]
    assert not report.trainable and codes(report)["1.png"] == {"unreadable_caption", "small"}
    (tmp_path / "0.json").write_text("{", encoding="utf-8")
    damaged = next(text for text in look(tmp_path).advice if "0.png" in text)
    assert "would refuse to start: it is not JSON" in damaged and "UTF-8" not in damaged
    with pytest.raises(DatasetError, match="UTF-8"):
        plan_dataset(parse({"train_data_dir": str(tmp_path)}), family="")


def test_a_problem_of_most_images_comes_before_one_of_a_few(tmp_path: Path, draw: Draw) -> None:
    for i in range(10):
        draw(f"{i}.png", blur=6 if i else 0)
    draw("small.png", (200, 200))
    few_small = look(tmp_path).advice
    for i in range(10):
        draw(f"{i}.png", (300, 300), blur=4 if i == 3 else 0)
    few_blurred = look(tmp_path).advice
    assert "blurred" in few_small[0] and "smaller" in few_blurred[0]


def test_an_image_cut_short_is_found_although_its_header_is_fine(tmp_path: Path, draw: Draw) -> None:
    draw("a.jpg")
    whole = draw("b.jpg").read_bytes()
    (tmp_path / "b.jpg").write_bytes(whole[:len(whole) // 2])
    assert codes(look(tmp_path)) == {"b.jpg": {"broken"}}


def test_a_folder_of_broken_images_is_reported_and_one_without_images_refused(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"")
    report = look(tmp_path)
    assert not report.trainable and "No picture of this folder can be trained on" in report.advice[0]
    assert json.loads(json.dumps(report.to_dict()))["trainable"] is False and report.text()
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(DatasetError, match="holds no pictures"):
        look(empty)
    with pytest.raises(DatasetError, match="does not exist"):
        look(tmp_path / "missing")


def test_sizes_buckets_and_steps_are_those_of_the_training(tmp_path: Path, draw: Draw) -> None:
    for i in range(10):
        draw(f"{i}.png", [(512, 512), (640, 480), (480, 720)][i % 3])
    report = look(tmp_path, train_batch_size=2)
    prepared = plan_dataset(parse({"train_data_dir": str(tmp_path), "train_batch_size": 2}), family="")
    assert [p.bucket for p in report.images] == [p.bucket for p in prepared.placements]
    assert {size for size, _ in report.buckets} == {size for size, _ in prepared.schedule.buckets}
    assert report.sizes[0] == ((512, 512), 4)
    assert (report.proposal.steps, report.proposal.epochs) == (prepared.schedule.steps, prepared.schedule.epochs)
    assert report.proposal.repeats == prepared.dataset.examples[0].repeats
    assert look(tmp_path, family="sdxl").resolution == (1024, 1024)


@pytest.mark.parametrize(("images", "batch", "repeats", "steps"), [
    (5, 1, 30, 1500), (12, 1, 15, 1500), (22, 4, 10, 500)])  # of 12 and 22 two are held out
def test_the_proposal_is_a_hundred_times_an_image_and_fifteen_hundred_in_all(
        tmp_path: Path, draw: Draw, images: int, batch: int, repeats: int, steps: int) -> None:
    for i in range(images):
        draw(f"{i}.png", (64, 64))
    proposal = look(tmp_path, resolution="64", train_batch_size=batch).proposal
    assert (proposal.repeats, proposal.epochs, proposal.steps, proposal.batch) == (repeats, 10, steps, batch)


def test_the_crop_is_what_is_cut_off_in_the_images_own_pixels(tmp_path: Path, draw: Draw) -> None:
    draw("a.png", (768, 512))
    square, = look(tmp_path, enable_bucket=False).images
    assert square.crop_loss == pytest.approx(1 / 3) and square.kept == (128.0, 0.0, 640.0, 512.0)
    assert "deep_crop" in square.problems
    bucketed, = look(tmp_path, resolution="512,768").images  # 768×512 is a bucket of that area
    assert bucketed.crop_loss == 0 and bucketed.kept == (0, 0, 768, 512) and not bucketed.problems


@pytest.mark.parametrize(("side", "wanted", "advised"), [(560, "1024", "512"), (800, "1024", "768"), (448, "512", "")])
def test_a_smaller_size_is_advised_only_where_the_page_offers_it(tmp_path, side, wanted, advised):
    for number in range(3):
        Image.new("RGB", (side, side), (80 * number, 0, 0)).save(tmp_path / f"{number}.png")
    text = " ".join(look(tmp_path, resolution=wanted).advice)
    assert "3 pictures are smaller" in text
    assert (f"or set Resolution (resolution) to {advised}." in text) if advised else ("Resolution (resolution)" not in text)


def test_deep_crops_are_said_with_the_worst_and_the_way_out(tmp_path: Path, draw: Draw) -> None:
    for i in range(10):
        draw(f"{i}.png", (768, 512 + 8 * i))
    assert "switch Aspect buckets (enable_bucket) on" in advice(
        look(tmp_path, enable_bucket=False), "10 pictures would lose", "0.png, 33 %")
    assert not look(tmp_path).advice


def test_without_upscaling_what_no_bucket_takes_is_said_to_be_left_out(tmp_path: Path, draw: Draw) -> None:
    draw("strip.png", (1000, 40))
    draw("tiny.png", (40, 40))
    report = look(tmp_path, bucket_no_upscale=True)
    assert [(p.path.name, p.usable, p.problems[0]) for p in report.images] == [
        ("strip.png", False, "narrow"), ("tiny.png", False, "small")]
    assert "left out" in advice(report, "strip.png")


def test_duplicates_are_marked_but_for_the_best_so_that_removing_the_marked_leaves_one(tmp_path: Path, draw: Draw) -> None:
    draw("a.png", seed=5)
    draw("b.jpg", seed=5)
    draw("c.png", (900, 900), seed=5)
    report = look(tmp_path)
    assert [[path.name for path in group] for group in report.duplicates] == [["c.png", "a.png", "b.jpg"]]
    assert [p.path.name for p in report.images if "duplicate" not in p.problems] == ["c.png"]


class Words:
    """One token a word."""

    def encode(self, text: str) -> list[int]:
        return list(range(len(text.split())))


def test_tokens_are_counted_of_the_caption_as_it_is_trained(tmp_path: Path, draw: Draw) -> None:
    draw("a.png", caption="red hat, blue coat")
    draw("b.png", caption="word " * 226)
    report = look(tmp_path, tokenizer=Words(), trigger_word="sks")
    assert [image.tokens for image in report.images] == [5, 227]
    assert "long_caption" in report.images[1].problems and "227 tokens" in advice(report, "longer than 225 tokens")
    assert look(tmp_path).images[0].tokens is None


def test_tags_are_counted_once_a_caption_and_without_regard_to_case(tmp_path: Path, draw: Draw) -> None:
    for name, caption in {"a": "Smile, hat, smile", "b": "smile", "c": "smile, coat"}.items():
        draw(f"{name}.png", caption=caption)
    report = look(tmp_path)
    assert report.tags == {"smile": 3, "coat": 1, "hat": 1} and list(report.tags)[0] == "smile"
    assert report.once == ("coat", "hat")


def test_captions_that_are_not_saved_yet_count_instead_of_their_files(tmp_path: Path, draw: Draw) -> None:
    bare, written = draw("bare.png", caption=None), draw("written.png", caption="old")
    report = examine(tmp_path, settings=parse({}), unsaved={bare: "new", written: ""})
    assert report.tags == {"new": 1} and codes(report) == {"written.png": {"empty_caption"}}


def test_the_report_says_how_many_captions_there_are_and_which_text_files_are_nobodys(tmp_path: Path, draw: Draw) -> None:
    draw("a.png", caption=None)
    draw("b.png", caption=None)
    (tmp_path / "a.png.txt").write_text("a hat", encoding="utf-8")
    (tmp_path / "img_1.txt").write_text("free", encoding="utf-8")
    report = look(tmp_path, trigger_word="zzk")
    assert report.captions == "2 pictures, 1 with a caption; 1 text file fits no picture (img_1.txt)."
    assert report.captions in " ".join(report.text().split()) and report.tags == {"a hat": 1}
    assert "(b.png)" in advice(report, "1 picture has no caption file")


def test_in_kohyas_layout_the_folders_name_stands_in_for_missing_captions_only(tmp_path: Path, draw: Draw) -> None:
    for i in range(10):
        draw(f"15_zzk girl/{i}.png", caption=None if i < 4 else "a hat")
    assert "'zzk girl' alone" in advice(look(tmp_path), "4 pictures have no caption file")
    assert "would call nothing" in advice(look(tmp_path), "None of the 6 captions", "zzk girl")
    assert "None of the" not in " ".join(look(tmp_path, trigger_word="zzk girl").advice)


def test_too_few_repeats_are_said_with_the_folders_new_name(tmp_path: Path, draw: Draw) -> None:
    for i in range(10):
        draw(f"2_zzk girl/{i}.png", caption="zzk girl, hat")
    assert "set 15 repeats (a folder called 15_zzk girl) and 10 epochs" in advice(look(tmp_path), "only 200 times")
    (tmp_path / "2_zzk girl").rename(tmp_path / "15_zzk girl")
    assert look(tmp_path).advice == ()


def test_the_folders_the_studio_keeps_beside_the_images_are_no_problem(tmp_path: Path, draw: Draw) -> None:
    for i in range(10):
        draw(f"15_zzk girl/{i}.png", caption="zzk girl, hat")
    draw(".studio/thumbs/0.png", caption=None)
    (tmp_path / "dataset.json").write_text("{}", encoding="utf-8")
    assert look(tmp_path).advice == () and len(look(tmp_path).images) == 10
    draw("elsewhere/0.png")
    assert advice(look(tmp_path), "elsewhere", "ignored")


def test_a_caption_of_several_lines_or_files_is_said(tmp_path: Path, draw: Draw) -> None:
    draw("a.png", caption="first\nsecond")
    draw("b.png")
    (tmp_path / "b.caption").write_text("other", encoding="utf-8")
    report = look(tmp_path)
    assert advice(report, "several lines", "a.txt") and advice(report, "several caption files", "b.txt")
    assert "several" not in " ".join(look(tmp_path, caption_extension=".txt,.caption", enable_wildcard=True).advice)


def test_captions_in_another_encoding_are_trained_and_said(tmp_path: Path, draw: Draw) -> None:
    draw("a.png", caption=None)
    draw("b.png", caption=None)
    (tmp_path / "a.txt").write_bytes("zzk, 红发, 蓝眼睛".encode("gbk"))
    (tmp_path / "b.txt").write_bytes("zzk, a café".encode("cp1252"))
    report = look(tmp_path)
    assert report.tags == {"zzk": 2, "a café": 1, "红发": 1, "蓝眼睛": 1} and report.trainable
    assert "(a.txt)" in advice(report, "GBK") and "(b.txt)" in advice(report, "Windows-1252")


def test_what_other_programs_read_in_captions_is_said_to_be_plain_text_here(tmp_path: Path, draw: Draw) -> None:
    draw("a.png", caption="a {red|blue} hat <lora:other:0.8>")
    draw("b.png", caption="zzk ||| a hat")
    report = look(tmp_path)
    assert "(a.txt)" in advice(report, "{a|b}", "plain text", "enable_wildcard")
    assert "(a.txt)" in advice(report, "<lora:name:1>", "plain text")
    assert "(b.txt)" in advice(report, "|||", "plain text")


def test_a_tag_with_and_without_escaped_brackets_is_counted_once_and_said(tmp_path: Path, draw: Draw) -> None:
    draw("a.png", caption="saber (fate), hat")
    draw("b.png", caption=r"saber \(fate\)")
    report = look(tmp_path)
    assert report.tags == {"saber (fate)": 2, "hat": 1}
    assert advice(report, "spelt in two ways", r"\(fate\)")


@pytest.mark.parametrize(("tags", "found"), [
    ({"long hair": 9, "long_hair": 2, "Long-Hair": 1}, [("long_hair", "long hair"), ("Long-Hair", "long hair")]),
    ({"saber_(fate)": 3, "saber \\(fate\\)": 1}, [("saber \\(fate\\)", "saber_(fate)")]),
    ({"hat": 3, "cat": 3}, []),
], ids=["separators", "escapes", "different"])
def test_a_tag_spelt_in_two_ways_is_found(tags: dict[str, int], found: list[tuple[str, str]]) -> None:
    assert respelt(tags) == found


@pytest.mark.parametrize(("slip", "is_one"), [
    ("long hiar", True), ("long har", True), ("long haair", True), ("Long Hiar", True),
    ("long hairs", False), ("long hail", False), ("short hair", False)])
def test_slips_of_the_keyboard_are_told_from_other_words(slip: str, is_one: bool) -> None:
    assert typing_errors({"long hair": 9, slip: 1}) == ([(slip, "long hair")] if is_one else [])


def test_tags_that_differ_in_a_number_or_are_short_are_no_slips() -> None:
    assert typing_errors({"12girls": 9, "1girls": 1, "bear": 9, "beard": 1, "long hair": 4, "long hiar": 1}) == []


def test_slips_among_tags_are_advice(tmp_path: Path, draw: Draw) -> None:
    for i in range(10):
        draw(f"{i}.png", caption=["long hair, hat", "long hiar, hat", "long_hair, hat"][i if i < 3 else 0])
    report = look(tmp_path)
    assert advice(report, "'long hiar' beside 'long hair' 8") and advice(report, "'long_hair' 1 beside 'long hair' 8")


def test_the_report_as_json_names_images_within_the_folder(tmp_path: Path, draw: Draw) -> None:
    draw("5_猫/絵.png", (300, 200), caption="猫")
    data = json.loads(json.dumps(look(tmp_path).to_dict()))
    image, = data["pictures"]
    assert image["path"] == "5_猫/絵.png" and (image["width"], image["height"]) == (300, 200)
    assert data["counts"] == {"small": 1} and data["tags"] == {"猫": 1} and data["advice"]
    assert set(data["proposal"]) == {"pictures", "repeats", "epochs", "steps", "batch"}


def test_progress_counts_every_image_and_stopping_ends_the_work(tmp_path: Path, draw: Draw) -> None:
    for i in range(4):
        draw(f"{i}.png", (64, 64))
    seen: list[tuple[int, int]] = []
    examine(tmp_path, settings=parse({}), on_progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]
    with pytest.raises(Interrupted):
        examine(tmp_path, settings=parse({}), should_stop=lambda: True)


def test_what_may_not_be_read_is_not(tmp_path: Path, draw: Draw) -> None:
    draw("a.png")
    draw("10_secret/b.png")
    report = examine(tmp_path, settings=parse({}), may_read=lambda path: "secret" not in path.name)
    assert [image.path.name for image in report.images] == ["a.png"] and advice(report, "not allowed")


def test_sizes_that_contradict_each_other_are_refused(tmp_path: Path, draw: Draw) -> None:
    draw("a.png")
    with pytest.raises(SettingError):
        look(tmp_path, bucket_reso_steps=512, resolution="256")


def test_what_is_lost_is_grey_on_the_sheet_and_what_is_kept_is_as_it_was() -> None:
    red = Image.new("RGB", (300, 100), "red")
    shown = dimmed(red, (100.0, 0.0, 200.0, 100.0))
    assert shown.getpixel((150, 50)) == (255, 0, 0)
    lost = shown.getpixel((20, 50))
    assert lost[0] == lost[1] == lost[2] and shown.size == red.size
    assert dimmed(red, (0.0, 0.0, 300.0, 100.0)).getcolors() == [(30000, (255, 0, 0))]


def test_the_sheet_shows_the_deepest_crops_first_and_no_more_than_asked(tmp_path: Path) -> None:
    Image.new("RGB", (512, 512), (0, 0, 255)).save(tmp_path / "whole.png")
    Image.new("RGB", (768, 512), (255, 0, 0)).save(tmp_path / "cut.png")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    report = look(tmp_path, enable_bucket=False)
    colours = {colour for _, colour in crop_sheet(report, most=1).getcolors(1 << 16)}
    assert (255, 0, 0) in colours and (0, 0, 255) not in colours
    both = crop_sheet(report)
    assert (0, 0, 255) in {colour for _, colour in both.getcolors(1 << 16)}
    (tmp_path / "cut.png").unlink()
    assert crop_sheet(report).size[0] < both.size[0]
    (tmp_path / "whole.png").unlink()
    with pytest.raises(DatasetError):
        crop_sheet(report)


def test_a_name_in_any_script_and_of_any_length_fits_the_sheet(tmp_path: Path, draw: Draw) -> None:
    draw("猫" * 60 + ".png", (64, 64))
    draw("w" * 200 + ".png", (64, 64))
    assert crop_sheet(look(tmp_path)).size == (14 + 2 * 214, 14 + 248)


@pytest.mark.parametrize("size", [(1920, 4), (4, 1920), (300, 1), (1, 1), (1, 5000)])
@pytest.mark.parametrize("resolution", ["128", "512"])
def test_the_sheet_shows_images_of_every_shape(tmp_path: Path, size: tuple[int, int], resolution: str) -> None:
    Image.new("RGB", size, (255, 0, 0)).save(tmp_path / "separator.png")
    sheet = crop_sheet(look(tmp_path, resolution=resolution))
    assert sheet.size == (14 + 214, 14 + 248)
    assert any(red > green + 50 for _, (red, green, _) in sheet.getcolors(1 << 16))


@pytest.mark.skipif(sys.platform == "win32", reason="no such names there")
def test_the_sheet_shows_names_with_line_breaks_and_control_characters(tmp_path: Path, draw: Draw) -> None:
    for name in ("two\nlines.png", "\x1b[31m\t\x7f.png", "\u2028\u202e.png"):
        draw(name, (64, 64))
    assert crop_sheet(look(tmp_path)).size == (14 + 2 * 214, 14 + 2 * 248)


def test_a_broken_image_has_no_size(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"no picture")
    (image,) = look(tmp_path).images
    assert image.why and replace(image, why="") == Examined(
        tmp_path / "a.png", 0, 0, (0, 0), 0.0, 0.0, None, ("broken", "no_caption"))
