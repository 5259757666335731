"""A run whose folders have settings of their own: its plan, what it trains, and what its file says of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors import safe_open

from lib_lora_train import events
from lib_lora_train.errors import SettingError
from lib_lora_train.host.standalone import StandaloneHost
from lib_lora_train.run.planning import plan_dataset, plan_job
from lib_lora_train.settings import parse
from lib_lora_train.settings.dataset_config import subsets_of
from tests.jobs import run_settings

CONFIG = """
[[datasets]]
resolution = 64
[[datasets.subsets]]
image_dir = "."
num_repeats = 2
enable_wildcard = true
caption_prefix = "{drawing|sketch} of"
[[datasets]]
resolution = 128
[[datasets.subsets]]
image_dir = "."
rotate_aug_degrees = 20
rotate_aug_variants = 2
shuffle_caption = true
"""


def settings(images: Path, **changes: object):
    return parse({"train_data_dir": str(images), "output_name": "zzk", "num_repeats": 1, "max_train_epochs": 1,
                  "min_bucket_reso": 64, "network_dim": 2, "save_precision": "float", "trigger_word": "zzk", "keep_tokens": 0,
                  "sample_images": False, "validation": False, "save_state": False, **changes})


def test_a_run_trains_each_folder_in_its_own_manner_and_its_file_says_so(images: Path, host: StandaloneHost, tmp_path: Path):
    config = tmp_path / "config.toml"
    config.write_text(CONFIG, encoding="utf-8")
    chosen = settings(images, dataset_config=str(config), token_warmup_step=0.5)
    seen: list[events.Event] = []
    finished = run_settings(chosen, host, report=seen.append, stop=lambda: "")
    assert finished.outcome == "done" and finished.steps == 4 * 2 + 4
    (planned,) = [event for event in seen if isinstance(event, events.Planned)]
    assert "4 pictures × 1 to 2 repeats" in planned.summary and "at 64×64 and 128×128" in planned.summary
    warned = " ".join(event.message for event in seen if isinstance(event, events.Warned))
    assert "text encoder" in warned
    with safe_open(finished.path, framework="pt") as file:
        metadata = file.metadata()
    assert json.loads(metadata["ss_dataset_dirs"]) == {
        "pictures": {"n_repeats": 2, "img_count": 4}, "pictures (2)": {"n_repeats": 1, "img_count": 4}}
    small, large = json.loads(metadata["ss_datasets"])
    assert (small["resolution"], large["resolution"], small["num_train_images"]) == ([64, 64], [128, 128], 8)
    assert (small["subsets"][0]["enable_wildcard"], small["subsets"][0]["caption_prefix"]) == (True, "{drawing|sketch} of")
    assert (large["subsets"][0]["shuffle_caption"], large["subsets"][0]["img_count"]) == (True, 4)
    assert not [value for value in metadata.values() if str(images) in value or str(config) in value], "a LoRA is published"


def test_the_plan_keeps_the_text_of_the_folders_settings_so_that_a_resume_does_not_read_the_file(images, host, tmp_path: Path):
    config = tmp_path / "config.toml"
    config.write_text(CONFIG, encoding="utf-8")
    plan = plan_job(settings(images, dataset_config=str(config), token_warmup_step=0.5), host)
    assert plan.settings.captions.token_warmup_step == 6  # of 12 steps
    config.unlink()
    again = plan_dataset(plan.settings, family="")
    assert again.placements == plan.placements and again.schedule == plan.schedule
    assert [(e.path, e.lines, e.repeats) for e in again.dataset.examples] == [
        (e.path, e.lines, e.repeats) for e in plan.dataset.examples]
    assert subsets_of(again.settings) == subsets_of(plan.settings)


@pytest.mark.parametrize("changes, warned", [
    ({}, False), ({"enable_wildcard": True, "caption_prefix": "{a|b}", "caption_dropout_rate": 0.1}, False),
    ({"token_warmup_step": 5}, False), ({"shuffle_caption": True}, True), ({"caption_tag_dropout_rate": 0.1}, True),
    ({"enable_wildcard": True, "caption_prefix": "{a|b}" * 14}, True),
    ({"shuffle_caption": True, "network_train_unet_only": False}, False)])
def test_the_plan_says_what_it_costs_where_captions_are_too_many_to_be_encoded_beforehand(images: Path, changes, warned: bool):
    plan = plan_dataset(settings(images, **changes), family="")
    assert any("text encoder" in text and "GB" in text for text in plan.warnings) == warned


def test_at_several_sizes_the_largest_is_the_runs_and_all_are_trained(images: Path):
    plan = plan_dataset(settings(images, resolution="128;64", num_repeats=0), family="")
    assert plan.resolution == (128, 128) and plan.dataset.images == 4 and len(plan.dataset.examples) == 8
    assert {placement.bucket for placement in plan.placements} >= {(64, 64), (128, 128)}


def test_words_of_preservation_need_a_trigger_word_in_some_folder(images: Path):
    chosen = {"dataset_config": CONFIG, "trigger_word": "", "preservation_class": "cat"}
    with pytest.raises(SettingError, match="trigger_word"):
        plan_dataset(settings(images, **chosen, preservation="dop"), family="sd1")
    own = {**chosen, "dataset_config": CONFIG + 'trigger_word = "zzk"'}
    plan_dataset(settings(images, **own, preservation="dop"), family="sd1")
    said = plan_dataset(settings(images, **chosen, preservation="dco"), family="sd1").warnings
    assert any("(preservation_class) has no effect" in text for text in said)


def test_masks_that_only_a_folder_asks_for_and_that_are_not_there_are_told(images: Path):
    said = plan_dataset(settings(images, dataset_config=CONFIG + "alpha_mask = true"), family="sd1").warnings
    assert any("(alpha_mask) has no effect" in text for text in said)


def test_a_regularisation_folder_of_the_folders_settings_has_its_weight(images: Path):
    config = CONFIG + '[[datasets.subsets]]\nimage_dir = "."\nis_reg = true\n'
    for text, told in ((config, False), (CONFIG, True)):
        said = plan_dataset(settings(images, dataset_config=text, prior_loss_weight=0.5), family="sd1").warnings
        assert any("(prior_loss_weight) has no effect" in warning for warning in said) == told
