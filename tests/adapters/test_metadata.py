from __future__ import annotations

import dataclasses
import json

import pytest

from lib_lora_train.adapters.metadata import TrainingMetadata, describe
from lib_lora_train.model.family import FAMILIES

FACTS = TrainingMetadata(
    family=FAMILIES["sd1"], v_prediction=False, zero_terminal_snr=False, resolution=(512, 768), dim=16, alpha=8.0,
    steps=500, epoch=5, total_epochs=10, total_steps=1000, batches_per_epoch=100, batch_size=2,
    started_at=1700000000.25, finished_at=1700003600.5, clip_skip=2,
    checkpoint_name="model.safetensors", checkpoint_legacy_hash="abcd1234", checkpoint_sha256="f" * 64,
    dataset_dirs={"10_cat": {"n_repeats": 10, "img_count": 20}},
    reg_dataset_dirs={"1_animal": {"n_repeats": 1, "img_count": 50}},
    tag_frequency={"10_cat": {"cat": 20, "a hat": 3}},
    buckets={(512, 768): 150, (768, 512): 50}, aspect_error=0.03125,
    settings={"unet_lr": 1e-4, "text_encoder_lr": 5e-5, "min_snr_gamma": 5.0, "seed": 42, "noise_offset": None,
              "train_data_dir": "/home/somebody/pictures", "output_dir": "/home/somebody"})


def test_what_the_webui_reads_is_there_and_every_value_is_a_string() -> None:
    written = describe(FACTS, "cat-000005")
    assert set(written) >= {
        "ss_output_name", "ss_base_model_version", "ss_v2", "ss_tag_frequency", "ss_bucket_info", "ss_dataset_dirs",
        "ss_sd_model_name", "ss_clip_skip", "ss_network_module", "ss_training_started_at"}
    assert all(isinstance(key, str) and isinstance(value, str) for key, value in written.items())


def test_facts_stand_under_kohyas_names() -> None:
    expected = {
        "ss_output_name": "cat-000005", "ss_network_module": "networks.lora", "ss_network_dim": "16",
        "ss_network_alpha": "8.0", "ss_v2": "False", "ss_base_model_version": "sd_v1", "ss_clip_skip": "2",
        "ss_steps": "500", "ss_epoch": "5", "ss_num_epochs": "10", "ss_max_train_steps": "1000",
        "ss_num_train_images": "200", "ss_num_reg_images": "50", "ss_resolution": "(512, 768)",
        "ss_unet_lr": "0.0001", "ss_text_encoder_lr": "5e-05", "ss_min_snr_gamma": "5.0", "ss_seed": "42",
        "ss_noise_offset": "None", "ss_training_started_at": "1700000000.25",
        "ss_sd_model_name": "model.safetensors", "ss_sd_model_hash": "abcd1234", "ss_new_sd_model_hash": "f" * 64}
    assert expected.items() <= describe(FACTS, "cat-000005").items()


def test_dataset_facts_are_json() -> None:
    written = describe(FACTS, "cat")
    assert json.loads(written["ss_tag_frequency"]) == {"10_cat": {"cat": 20, "a hat": 3}}
    assert json.loads(written["ss_dataset_dirs"]) == {"10_cat": {"n_repeats": 10, "img_count": 20}}
    assert json.loads(written["ss_reg_dataset_dirs"]) == {"1_animal": {"n_repeats": 1, "img_count": 50}}
    assert json.loads(written["ss_bucket_info"]) == {
        "buckets": {"0": {"resolution": [512, 768], "count": 150}, "1": {"resolution": [768, 512], "count": 50}},
        "mean_img_ar_error": 0.03125}
    assert json.loads(describe(dataclasses.replace(FACTS, buckets=None), "cat")["ss_bucket_info"]) is None


@pytest.mark.parametrize(("family", "v", "version", "v2", "architecture", "implementation"), [
    ("sd1", False, "sd_v1", "False", "stable-diffusion-v1/lora", "diffusers"),
    ("sd1", True, "sd_v1_v", "False", "stable-diffusion-v1/lora", "diffusers"),
    ("sd2", False, "sd_v2", "True", "stable-diffusion-v2-512/lora", "diffusers"),
    ("sd2", True, "sd_v2_v", "True", "stable-diffusion-v2-768-v/lora", "diffusers"),
    ("sdxl", False, "sdxl_base_v1-0", "False", "stable-diffusion-xl-v1-base/lora",
     "https://github.com/Stability-AI/generative-models"),
])
def test_the_family_is_written_for_kohya_and_for_modelspec(
        family: str, v: bool, version: str, v2: str, architecture: str, implementation: str) -> None:
    written = describe(dataclasses.replace(FACTS, family=FAMILIES[family], v_prediction=v), "cat")
    assert written["ss_base_model_version"] == version
    assert written["ss_v2"] == v2
    assert written["modelspec.architecture"] == architecture
    assert written["modelspec.implementation"] == implementation
    assert written["modelspec.prediction_type"] == ("v" if v else "epsilon")
    assert written["modelspec.sai_model_spec"] == "1.0.1"
    assert written["modelspec.title"] == "cat"
    assert written["modelspec.resolution"] == "512x768"
    assert written["modelspec.date"] == "2023-11-14T23:13:20+00:00"


def test_no_path_of_the_users_disk_is_written() -> None:
    assert not any("somebody" in value for value in describe(FACTS, "cat").values())


def test_what_is_not_known_is_left_out() -> None:
    written = describe(dataclasses.replace(FACTS, checkpoint_legacy_hash=None, clip_skip=None), "cat")
    assert "ss_sd_model_hash" not in written and "ss_vae_name" not in written
    assert "modelspec.encoder_layer" not in written


def test_the_trigger_word_stands_under_modelspecs_keys_and_none_leaves_them_out() -> None:
    settings = {"trigger_word": "zzk girl", "training_comment": "the third try"}
    written = describe(dataclasses.replace(FACTS, settings=settings), "cat")
    assert (written["modelspec.trigger_phrase"], written["modelspec.usage_hint"]) == ("zzk girl", "Trigger word: zzk girl")
    assert written["modelspec.description"] == "the third try"
    assert not {"modelspec.trigger_phrase", "modelspec.usage_hint", "modelspec.description"} & set(describe(FACTS, "cat"))
