"""Captions and folders as the settings have them read: several lines and files, prefixes, and folders of `dataset_config`."""

from __future__ import annotations

from pathlib import Path

import pytest

from lib_lora_train.dataset.buckets import TrainingSizes, buckets_for
from lib_lora_train.dataset.examples import Dataset, Example, assign_buckets, at_each_resolution, with_repeats
from lib_lora_train.dataset.folder import read_folder
from lib_lora_train.dataset.held_out import split
from lib_lora_train.errors import DatasetError
from lib_lora_train.settings import parse
from lib_lora_train.settings.dataset_config import subsets_of, with_text


def read(folder: Path, **changes: object) -> Dataset:
    settings = with_text(parse({"train_data_dir": str(folder), **changes}))
    return read_folder(folder, subsets=subsets_of(settings))


def by_name(dataset: Dataset) -> dict[str, Example]:
    return {example.path.name: example for example in dataset.examples}


@pytest.fixture
def lines(tmp_path: Path, make_image) -> Path:
    make_image("a.png", caption="one, {x|y}\n\n two ")
    make_image("b.png", caption="tags")
    (tmp_path / "b.caption").write_text("A sentence.")
    (tmp_path / "b.tags").write_text("other")
    return tmp_path


def test_a_line_is_drawn_only_with_wildcards_and_what_is_said_by_itself_is_plain(lines: Path) -> None:
    plain = by_name(read(lines))["a.png"]
    assert (plain.caption, plain.lines) == ("one, {x|y}", ("one, {x|y}",))
    drawn = by_name(read(lines, enable_wildcard=True, trigger_word="zzk", caption_suffix="end"))["a.png"]
    assert drawn.lines == ("zzk, one, {x|y} end", "zzk, two end") and drawn.caption == "zzk, one, x end"


def test_which_files_hold_captions_is_chosen_by_their_ending(lines: Path) -> None:
    def found(ending: str) -> tuple[str, ...]:
        return by_name(read(lines, caption_extension=ending))["b.png"].lines

    assert found("") == ("tags",) and found(".tags") == ("other",)
    assert found(".caption") == found("caption") == ("A sentence.",)
    assert found(".txt, .caption") == ("tags", "A sentence.")
    assert found(".caption,.tags,.txt") == ("A sentence.", "other", "tags")
    assert found(".none") == ("",)


def test_what_is_not_used_is_said_unless_the_settings_use_it(lines: Path) -> None:
    told = " ".join(problem.text for problem in read(lines).problems)
    assert all(name in told for name in ("enable_wildcard", "caption_extension", "several lines", "several caption files"))
    used = read(lines, enable_wildcard=True, caption_extension=".txt,.caption").problems
    assert [problem.text for problem in used] == []


CONFIG = """
[general]
enable_wildcard = true
[[datasets]]
resolution = 64
[[datasets.subsets]]
image_dir = "cats"
num_repeats = 3
class_tokens = "a cat"
custom_attributes = { trigger_word = "tom", loss_weight = 0.5 }
[[datasets.subsets]]
image_dir = "5_dogs"
flip_aug = true
[[datasets]]
resolution = 128
[[datasets.subsets]]
image_dir = "cats"
[[datasets.subsets]]
image_dir = "people"
is_reg = true
"""
SETTINGS = {"dataset_config": CONFIG, "min_bucket_reso": 64}


@pytest.fixture
def folders(tmp_path: Path, make_image) -> Path:
    for name, caption in {"cats/a.png": None, "cats/b.png": "one\ntwo", "5_dogs/c.png": "dog", "people/d.png": "man",
                          "loose/e.png": "not named"}.items():
        make_image(name, (128, 128), caption=caption)
    return tmp_path


def test_each_folder_has_its_own_repeats_captions_trigger_weight_and_augmentation(folders: Path) -> None:
    dataset = read(folders, **SETTINGS)
    assert [(e.folder, e.path.name, e.repeats, e.lines, e.is_regularisation) for e in dataset.examples] == [
        ("cats", "a.png", 3, ("tom, a cat",), False), ("cats", "b.png", 3, ("tom, one", "tom, two"), False),
        ("5_dogs", "c.png", 1, ("dog",), False),
        ("cats", "a.png", 1, ("",), False), ("cats", "b.png", 1, ("one", "two"), False), ("people", "d.png", 1, ("man",), True)]
    assert [e.subset.loss_weight for e in dataset.examples] == [0.5, 0.5, 1, 1, 1, 1]
    assert [e.subset.dataset.flip_aug for e in dataset.examples] == [False, False, True, False, False, False]
    assert (dataset.images, dataset.layout) == (3, "config")
    assert dataset.dataset_dirs() == {"cats": {"n_repeats": 3, "img_count": 2}, "5_dogs": {"n_repeats": 1, "img_count": 1},
                                      "cats (2)": {"n_repeats": 1, "img_count": 2}}


def test_folders_are_trained_at_their_own_sizes(folders: Path) -> None:
    found = at_each_resolution(with_repeats(read(folders, **SETTINGS), max_train_epochs=1))
    dataset, placements = assign_buckets(found, lambda chosen: buckets_for(chosen, sizes=TrainingSizes()))
    assert [placement.bucket for placement in placements] == [(64, 64)] * 3 + [(128, 128)] * 3
    # 3 + 3 + 1 + 1 + 1 visits, and as many to the one regularisation picture.
    assert [example.repeats for example in dataset.examples] == [3, 3, 1, 1, 1, 9]


def test_of_a_folder_at_several_sizes_each_picture_is_seen_as_often_as_at_one(tmp_path: Path, make_image) -> None:
    for name in "ab":
        make_image(f"{name}.png")

    def repeats(resolution: str, **changes: object) -> list[int]:
        found = at_each_resolution(read(tmp_path, resolution=resolution))
        assert found.images == 2
        return [example.repeats for example in with_repeats(found, max_train_epochs=10, **changes).examples]

    assert repeats("64") == [75, 75] and repeats("64;128") == [38] * 4  # 1500 visits in ten epochs
    assert repeats("64;128", num_repeats=3) == [3] * 4


def test_held_out_pictures_are_held_out_at_every_size(tmp_path: Path, make_image) -> None:
    for number in range(20):
        make_image(f"{number}.png")
    found = split(at_each_resolution(read(tmp_path, resolution="64;128")), share=0.2, seed=1)
    held_out = [image.example.path for image in found.held_out]
    assert len(held_out) == len(set(held_out)) == 4
    assert not {example.path for example in found.training.examples} & set(held_out) and len(found.training.examples) == 32


def test_a_folder_that_is_missing_empty_or_not_allowed_is_refused_by_name(folders: Path) -> None:
    (folders / "empty").mkdir()
    for name in ("gone", "empty"):
        with pytest.raises(DatasetError, match=name):
            read(folders, dataset_config=CONFIG.replace('"5_dogs"', f'"{name}"'))
    settings = with_text(parse({"train_data_dir": str(folders), **SETTINGS}))
    with pytest.raises(DatasetError, match="5_dogs"):
        read_folder(folders, subsets=subsets_of(settings), may_read=lambda path: path.name != "5_dogs")
