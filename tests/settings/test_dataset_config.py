"""Settings of single folders as sd-scripts writes them: which table counts, what is refused, and what is said."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lib_lora_train.errors import SettingError
from lib_lora_train.settings import ignored, parse
from lib_lora_train.settings.dataset_config import each_resolution, notes, subsets_of, with_text

# As in the examples of sd-scripts' docs/config_README-en.md.
CONFIG = """
[general]
shuffle_caption = true
caption_extension = '.txt'
keep_tokens = 1

[[datasets]]
resolution = 512
batch_size = 4
keep_tokens = 2

  [[datasets.subsets]]
  image_dir = 'hoge'
  class_tokens = 'hoge girl'

  [[datasets.subsets]]
  image_dir = 'fuga'
  keep_tokens = 3
  flip_aug = true
  num_repeats = 10
  custom_attributes = { loss_weight = 0.5, trigger_word = 'fuga' }

[[datasets]]
resolution = [768, 640]
batch_size = 4

  [[datasets.subsets]]
  is_reg = true
  image_dir = 'reg'
  caption_dropout_rate = 0.2
"""


def of(text: str, **changes: object):
    return with_text(parse({"dataset_config": text, "train_data_dir": "/data", **changes}))


def test_the_inner_table_counts_before_the_outer_and_both_before_the_runs_settings():
    first, second, third = subsets_of(of(CONFIG, caption_prefix="best,", shuffle_caption=False, num_repeats=7, flip_aug=False))
    assert [subset.captions.keep_tokens for subset in (first, second, third)] == [2, 3, 1]
    assert all(s.captions.shuffle_caption and s.captions.caption_prefix == "best," for s in (first, second, third))
    assert [s.dataset.flip_aug for s in (first, second, third)] == [False, True, False]
    assert [s.dataset.num_repeats for s in (first, second, third)] == [7, 10, 7]
    assert [s.dataset.resolution for s in (first, second, third)] == ["512", "512", "768,640"]
    assert [s.captions.caption_dropout_rate for s in (first, second, third)] == [0, 0, 0.2]
    assert [(s.image_dir, s.class_tokens, s.is_reg) for s in (first, second, third)] == [
        ("hoge", "hoge girl", False), ("fuga", "", False), ("reg", "", True)]
    assert [(s.loss_weight, s.dataset.trigger_word) for s in (first, second, third)] == [(1, ""), (0.5, "fuga"), (1, "")]


def test_without_a_number_a_folder_is_shown_once_as_in_sd_scripts():
    assert [s.dataset.num_repeats for s in subsets_of(of(CONFIG))] == [1, 10, 1]


def test_a_batch_size_in_it_counts_and_of_several_the_smallest_which_is_said():
    assert of(CONFIG, train_batch_size=1).optimizer.train_batch_size == 4 and not notes(of(CONFIG))
    several = of(CONFIG.replace("[768, 640]\nbatch_size = 4", "[768, 640]\nbatch_size = 2"))
    assert several.optimizer.train_batch_size == 2 and "2 and 4" in " ".join(notes(several))


def test_a_file_becomes_its_text_and_its_folder_the_dataset_folder(tmp_path: Path):
    for name, text in {"a.toml": CONFIG, "b.json": json.dumps({"datasets": [{"subsets": [{"image_dir": "x"}]}]})}.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
        found = with_text(parse({"dataset_config": str(tmp_path / name)}))
        assert (found.dataset.dataset_config, found.dataset.train_data_dir) == (text.strip(), str(tmp_path))
        assert subsets_of(found)[0].image_dir in ("hoge", "x") and with_text(found) == found
    with pytest.raises(SettingError, match="gone.toml"):
        with_text(parse({"dataset_config": str(tmp_path / "gone.toml")}))
    absolute = with_text(parse({"dataset_config": CONFIG.replace("'hoge'", "'/a/b/x'").replace("'fuga'", "'/a/b/y'").replace(
        "'reg'", "'/a/c'")}))
    assert Path(absolute.dataset.train_data_dir) == Path("/a")


def test_a_folder_without_repeats_is_left_out_and_said_and_not_all_may_be():
    found = of(CONFIG.replace("num_repeats = 10", "num_repeats = 0"))
    assert [s.image_dir for s in subsets_of(found)] == ["hoge", "reg"] and "1 folder" in " ".join(notes(found))
    with pytest.raises(SettingError, match="no folder to train on"):
        subsets_of(of(CONFIG.replace("keep_tokens = 1", "num_repeats = 0").replace("num_repeats = 10", "")))


@pytest.mark.parametrize(("written", "named"), [
    ("keep_tokns = 2", "keep_tokens"), ("clip_skip = 2", "clip_skip"), ("image_dir = 'x'", "image_dir"),
    ("keep_tokens = -1", "keep_tokens"), ("flip_aug = 'maybe'", "flip_aug"), ("resolution = 'big'", "resolution"),
    ("batch_size = 0", "train_batch_size"), ("loss_weight = -1", "loss_weight"), ("loss_weight = 'x'", "loss_weight"),
    ("is_reg = 'no'", "is_reg")])
def test_what_is_not_known_or_not_possible_is_refused_by_name(written: str, named: str):
    with pytest.raises(SettingError, match=named):
        subsets_of(of(CONFIG.replace("keep_tokens = 1", written).replace("keep_tokens = 2", "").replace("resolution = 512", "")
                      .replace("batch_size = 4", "").replace("keep_tokens = 3", "").replace("loss_weight = 0.5, ", "")))


@pytest.mark.parametrize("text", ["x = 1", "[[datasets]]\nresolution = 512", "datasets = 3", "[[datasets]]\nsubsets = [{}]",
                                  "[general]", "[[datasets]]\n[[datasets.subsets]]\nmetadata_file = 'a.json'", "{",
                                  "[[datasets]]\nsubsets = [5]",
                                  "[[datasets]]\n[[datasets.subsets]]\nimage_dir = 'a'\ncustom_attributes = 5"])
def test_what_is_no_such_file_is_refused(text: str):
    with pytest.raises(SettingError, match="dataset_config"):
        subsets_of(of(text))


def test_of_names_that_change_nothing_here_those_are_told_that_change_something_there():
    harmless = "network_multiplier = 1.0\ncache_info = true\nvalidation_split = 0.0\n"
    assert not notes(of(CONFIG.replace("class_tokens", f"{harmless}class_tokens")))
    told = notes(of(CONFIG.replace("class_tokens", "resize_interpolation = 'area'\nclass_tokens"), reg_data_dir="reg"))
    assert len(told) == 2 and "resize_interpolation" in told[0] and "reg_data_dir" in told[1]


def test_what_belongs_to_another_table_or_has_no_effect_is_told_and_attributes_of_ones_own_are_not_refused():
    folder = "[[datasets]]\n[[datasets.subsets]]\nimage_dir = 'a'\n"
    with pytest.raises(SettingError, match=r"'resolution' in \[\[datasets.subsets\]\], which belongs in \[\[datasets\]\]"):
        subsets_of(of(folder + "resolution = 512"))
    told, = notes(of(folder + "custom_attributes = {memo = 'x', trigger_word = 'zzk'}"))
    assert "memo" in told and "trigger_word" not in told
    told, = notes(of(folder + "conditioning_data_dir = 'masks'"))
    assert "(conditioning_data_dir) has no effect" in told


def test_settings_of_folders_count_where_a_run_asks_what_it_needs():
    assert of(CONFIG.replace("flip_aug", "color_aug")).encodes_in_steps and not of(CONFIG).encodes_in_steps
    told = " ".join(ignored(of(CONFIG.replace("flip_aug = true", "rotate_aug_degrees = 5"), rotate_aug_variants=8,
                               token_warmup_min=3)))
    assert "token_warmup_min" in told and "rotate_aug_variants" not in told


def test_a_folder_is_trained_at_each_size_that_is_listed():
    (whole,) = subsets_of(parse({"resolution": "512; 768,640"}))
    assert [subset.dataset.resolution for subset in each_resolution(whole)] == ["512", "768,640"]
    for text in ("512;", ";", "512;9999999", "512;x"):
        with pytest.raises(SettingError, match="resolution"):
            parse({"resolution": text})


def test_the_example_of_the_documentation_is_one():
    page = (Path(__file__).parents[2] / "docs" / "captions.md").read_text(encoding="utf-8")
    small, large = subsets_of(of(page.partition("```toml\n")[2].partition("```")[0]))
    assert (small.image_dir, small.dataset.num_repeats, small.dataset.trigger_word) == ("portraits", 10, "zzk")
    assert (large.image_dir, large.dataset.num_repeats, large.dataset.resolution) == ("portraits", 5, "768")
