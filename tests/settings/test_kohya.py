"""Settings as kohya's scripts and the page kohya_ss write them: understood, or told all at once."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest

from lib_lora_train.errors import SettingError
from lib_lora_train.settings import DECLARATIONS, kohya, parse
from lib_lora_train.settings.toml import read_toml


def adopted(values: Mapping[str, object]) -> tuple[dict[str, object], list[str]]:
    """(our values, what is told of the others)."""
    found = kohya.adopt(values)
    return dict(found.values), [*found.became, *(f"{name} ({why})" for name, why in found.unused.items())]


# What `kohya_ss` writes beside a training (v25), the settings that were not filled in as it leaves them.
GUI = {
    "LoRA_type": "Standard", "cache_latents": True, "cache_latents_to_disk": False, "caption_extension": ".txt",
    "clip_skip": "1", "conv_alpha": 1, "conv_dim": 1, "dynamo_backend": "no", "epoch": 4, "huber_c": 0.1,
    "huber_schedule": "snr",
    "keep_tokens": "0", "learning_rate": 0.0001, "lr_scheduler": "constant_with_warmup", "lr_warmup": 10, "lr_warmup_steps": 0,
    "max_data_loader_n_workers": "0", "max_resolution": "512,768", "max_timestep": 1000, "max_token_length": 75,
    "max_train_epochs": 0, "max_train_steps": 1600, "mem_eff_attn": False, "min_snr_gamma": 0, "multires_noise_discount": 0.3,
    "network_alpha": 0, "network_dim": 8, "network_dropout": 0, "noise_offset_type": "Original", "optimizer": "AdamW8bit",
    "optimizer_args": "", "pretrained_model_name_or_path": "C:/model.safetensors", "sdxl": False, "seed": "",
    "text_encoder_lr": 0, "train_data_dir": "C:\\pictures", "unet_lr": "1e-4", "v2": False, "v_parameterization": False,
    "xformers": "xformers"}


def test_a_file_of_kohya_ss_becomes_our_settings_and_all_that_it_says_is_told(monkeypatch):
    monkeypatch.setattr(kohya.importlib.util, "find_spec", lambda name: None)  # without bitsandbytes
    values, notes = adopted(GUI)
    settings = parse(values)
    assert (settings.dataset.resolution, settings.optimizer.max_train_steps) == ("512,768", 1600)
    assert (settings.optimizer.optimizer_type, settings.optimizer.lr_scheduler) == ("AdamW", "constant_with_warmup")
    assert settings.optimizer.lr_warmup_steps == 0.1 and settings.optimizer.seed == DECLARATIONS["seed"].default
    assert (settings.network.network_dim, settings.network.network_alpha) == (8, 8.0)  # kohya: alpha 0 is the rank
    assert settings.loss.v_parameterization == "auto" and not settings.dataset.cache_latents_to_disk
    told = " ".join(notes)
    named = {"max_resolution", "epoch", "optimizer", "lr_warmup", "bitsandbytes", "cache_latents", "xformers",
             "pretrained_model_name_or_path"}
    assert not [name for name in named if name not in told]
    assert "cache_latents_to_disk" not in told


@pytest.mark.parametrize(("values", "epochs", "steps"), [
    ({"epoch": 4, "max_train_steps": 0}, 4, 0), ({"epoch": 4, "max_train_steps": "1600"}, 10, 1600),
    ({"sdpa": True, "max_train_epochs": 3, "max_train_steps": 1600}, 3, 0), ({"epoch": 4, "max_train_epochs": 3}, 3, 0)])
def test_how_long_a_file_of_kohyas_trains_is_as_there(values, epochs, steps):
    # sd-scripts: epochs override steps. kohya_ss hands on its `epoch` only to compute steps where none are given.
    optimizer = parse(adopted(values)[0]).optimizer
    assert (optimizer.max_train_epochs, optimizer.max_train_steps) == (epochs, steps)


@pytest.mark.parametrize("kind, expected", [("Original", (0.1, 0)), ("Multires", (0.0, 8)), (None, (0.1, 8))])
def test_the_type_of_noise_offset_decides_which_of_both_a_file_means(kind, expected):
    # kohya_ss stores both and hands on those of the type that is chosen; sd-scripts' own files have no type.
    values, _ = adopted({"noise_offset_type": kind, "noise_offset": 0.1, "multires_noise_iterations": 8})
    noise = parse(values).noise
    assert (noise.noise_offset, noise.multires_noise_iterations) == expected


def test_what_a_file_of_kohyas_does_to_captions_is_taken():
    given = {"caption_extension": ".txt", "caption_separator": ", ", "caption_dropout_every_n_epochs": 3,
             "keep_tokens_separator": "|||",
             "secondary_separator": ";;;", "enable_wildcard": True, "caption_prefix": "best,", "caption_suffix": "end",
             "token_warmup_min": 2, "token_warmup_step": 0.25, "sdpa": True}
    chosen = parse(adopted(given)[0]).captions
    assert {name: getattr(chosen, name) for name in given if name != "sdpa"} == {
        **{name: value for name, value in given.items() if name != "sdpa"}, "caption_separator": ","}
    assert parse(adopted({"caption_extention": ".cap", "dataset_repeats": 4})[0]).dataset.num_repeats == 4
    assert parse(adopted({"dataset_config": "a.toml"})[0]).dataset.dataset_config == "a.toml"


def test_a_percentage_that_is_no_number_is_refused_by_name():
    with pytest.raises(SettingError, match="lr_warmup_steps"):
        parse(adopted({"lr_warmup": "ten"})[0])


def test_every_name_of_sd_scripts_and_of_kohya_ss_is_explained_or_ours():
    # A sample of each group of their argument parsers.
    names = ("network_module network_args network_dropout scale_weight_norms base_weights v2 vae tokenizer_cache_dir "
             "use_8bit_adam optimizer_args lr_scheduler_args lr_decay_steps save_model_as save_n_epoch_ratio max_token_length "
             "sdpa lowram "
             "full_bf16 fp8_base ddp_timeout log_with noise_offset_random_strength multires_noise_iterations ip_noise_gamma "
             "huber_scale sample_prompts masked_loss caption_prefix enable_wildcard face_crop_aug_range in_json dataset_config "
             "debiased_estimation_loss weighted_captions validation_split metadata_title huggingface_token deepspeed "
             "LoRA_type LyCORIS_preset stop_text_encoder_training train_inpainting flux1_checkbox sd3_clip_l t5xxl").split()
    assert not [name for name in names if name not in kohya.explanations() and name not in DECLARATIONS]
    assert not set(kohya.explanations()) & set(DECLARATIONS)


def test_unknown_settings_are_told_all_at_once_each_with_what_it_is_here():
    with pytest.raises(SettingError) as refusal:
        parse({"network_dim": 4, "lerning_rate": 1, "cache_latents": True, "max_resolution": "512", "face_crop_aug_range": 1,
               "zzz": 1})
    text = str(refusal.value)
    assert all(repr(name) in text for name in ("lerning_rate", "cache_latents", "max_resolution", "face_crop_aug_range", "zzz"))
    assert "'learning_rate'" in text and "cache_latents_to_disk" not in text and "here resolution" in text
    assert "'network_dim'" not in text and "\n" not in text


@pytest.mark.parametrize(("values", "expected"), [
    ({"network_args": ["conv_dim=4", "conv_alpha=2"]}, (4, 2.0)), ({"network_args": "conv_dim=4"}, (4, 1.0)),
    ({"LoRA_type": "Kohya LoCon", "conv_dim": 4, "conv_alpha": 2}, (4, 2.0)),
    ({"LoRA_type": "Standard", "conv_dim": 4, "conv_alpha": 2}, (0, 0.0)), ({"conv_dim": 4}, (4, 0.0))])
def test_convolutions_are_taken_from_network_args_and_from_the_type(values, expected):
    # sd-scripts: conv_alpha is 1 where it is not given. kohya_ss writes both for every type.
    network = parse(adopted(values)[0]).network
    assert (network.conv_dim, network.conv_alpha) == expected


LYCORIS = {"network_module": "lycoris.kohya", "network_dim": 8, "network_alpha": 4}


@pytest.mark.parametrize(("values", "expected"), [
    ({**LYCORIS, "network_args": ["algo=lokr", "factor=4", "full_matrix=True", "preset=attn-mlp", "dropout=0"]},
     {"network_module": "LoKr", "factor": 4, "full_matrix": True, "network_targets": "attention and feed-forward"}),
    ({**LYCORIS, "network_args": ["algo=loha", "conv_dim=4", "conv_alpha=1"]},
     {"network_module": "LoHa", "network_targets": "attention and convolutions", "conv_dim": 4, "conv_alpha": 1.0}),
    ({**LYCORIS, "network_args": ["algo=locon", "conv_dim=4", "dora_wd=True", "wd_on_output=False", "use_tucker=False"]},
     {"network_module": "LoRA", "dora_wd": True, "conv_dim": 4, "conv_alpha": 4.0}),
    ({**LYCORIS, "network_train_unet_only": False, "network_args": "algo=lora preset=unet-transformer-only"},
     {"network_targets": "attention and feed-forward", "network_train_unet_only": True, "conv_dim": 0}),
    ({"network_module": "networks.loha"}, {"network_module": "LoHa", "network_targets": "attention and feed-forward"}),
    ({"network_module": "networks.oft"}, {"network_module": "OFT", "network_targets": "attention"}),
    ({"network_module": "networks.oft", "network_args": ["enable_all_linear=True"]},
     {"network_module": "OFT", "network_targets": "attention and feed-forward"}),
    ({"network_args": ["block_dims=1,2", "down_lr_weight=cosine+.25", "loraplus_lr_ratio=4", "rank_dropout=0.1"]},
     {"block_dims": "1,2", "down_lr_weight": "cosine+.25", "loraplus_lr_ratio": 4.0, "rank_dropout": 0.1}),
    ({**LYCORIS, "network_args": ["algo=locon", "dropout=0.2", "module_dropout=0.1", "rs_lora=True"]},
     {"network_dropout": 0.2, "module_dropout": 0.1, "rs_lora": True}),
    ({"network_module": "networks.lora", "base_weights": ["a.safetensors", "b.safetensors"], "base_weights_multiplier": [0.5]},
     {"train_on_top_of": "a.safetensors:0.5, b.safetensors:1"}),
    ({"base_weights": "fp8"}, {"train_on_top_of": ""}),
    ({"LoRA_type": "LyCORIS/LoKr", "factor": -1, "LyCORIS_preset": "attn-only", "conv_dim": 2, "network_dim": 8},
     {"network_module": "LoKr", "factor": -1, "network_targets": "attention", "conv_dim": 2})])
def test_networks_in_kohyas_and_lycoris_words_are_understood(values, expected):
    # LyCORIS: without a preset "full", without conv_alpha the other layers' alpha.
    network = vars(parse(adopted(values)[0]).network)
    assert {name: network[name] for name in expected} == expected


def test_what_lycoris_can_and_this_cannot_is_refused_by_name():
    for arguments in (["algo=glora"], ["algo=lora", "use_tucker=True"], ["algo=lokr", "preset=full-lin"]):
        with pytest.raises(SettingError, match="network_args"):
            parse(adopted({**LYCORIS, "network_args": arguments})[0])
    assert "each input" in " ".join(adopted({**LYCORIS, "network_args": ["algo=lora", "wd_on_output=True"]})[1])


def test_what_is_not_supported_is_refused_where_it_would_change_the_training_and_not_where_it_is_off():
    off = {"use_8bit_adam": False, "lr_scheduler_args": [], "perlin_noise": None,
           "network_module": "networks.lora", "weighted_captions": False}
    assert adopted(off)[0] == {"network_module": "LoRA"}
    assert adopted({"use_8bit_adam": True, "optimizer_type": "SGD"})[0]["optimizer_type"] in ("AdamW", "AdamW8bit")
    for name, value in {"fused_backward_pass": True, "lr_scheduler_type": "OneCycleLR",
                        "perlin_noise": 6, "network_module": "networks.dylora", "datasets": [{"resolution": 512}]}.items():
        with pytest.raises(SettingError, match=name):
            parse(adopted({name: value})[0])


def test_optimizers_arguments_and_schedules_come_along_with_kohyas_own_weight_decay():
    values, _ = adopted({"optimizer_type": "AdamW", "optimizer_args": ["weight_decay=0.1", "betas=0.9,0.99"]})
    assert parse(values).optimizer.optimizer_args == "weight_decay=0.1 betas=0.9,0.99"
    # Its weight decay is the class's own: 0 for all but AdamW.
    values, notes = adopted({"optimizer": "Prodigy", "optimizer_args": "decouple=True d_coef=2", "sdpa": True,
                                   "lr_scheduler": "polynomial", "lr_scheduler_power": 2})
    chosen = parse(values).optimizer
    assert (chosen.optimizer_type, chosen.weight_decay, chosen.lr_scheduler_power) == ("Prodigy", 0.0, 2.0)
    assert "weight_decay" in " ".join(notes)
    for values in ({"optimizer": "Lion", "optimizer_args": "weight_decay=0.2"}, {"optimizer": "AdamW"}):
        assert parse(adopted(values)[0]).optimizer.weight_decay == 0.01


@pytest.mark.parametrize("installed", [True, False])
def test_eight_bits_are_32_where_their_package_is_missing_which_is_told(monkeypatch, installed):
    monkeypatch.setattr(kohya.importlib.util, "find_spec", lambda name: installed or None)
    assert adopted({"use_8bit_adam": True})[0]["optimizer_type"] == ("AdamW8bit" if installed else "AdamW")
    assert adopted({"use_lion_optimizer": True})[0]["optimizer_type"] == "Lion"
    values, notes = adopted({"optimizer_type": "Lion8bit", "weight_decay": 0.1})
    assert values["optimizer_type"] == ("Lion8bit" if installed else "Lion")
    assert installed or "bitsandbytes" in " ".join(notes)


def test_files_of_older_kohya_ss_and_of_lora_scripts_are_understood_too():
    # https://github.com/Akegarasu/lora-scripts, and kohya_ss up to v22.
    values, notes = adopted({"model_train_type": "sdxl-lora", "use_wandb": True, "no_token_padding": True,
                                   "positive_prompts": "1girl", "network_dim": 32})
    assert parse(values).network.network_dim == 32 and "no_token_padding" in " ".join(notes)
    with pytest.raises(SettingError, match="model_train_type"):
        parse(adopted({"model_train_type": "sd-dreambooth"})[0])


def test_a_warm_up_in_per_cent_is_that_share_of_the_run_and_never_a_number_of_steps():
    for value in ("10%", 10, "10"):
        assert parse(adopted({"lr_warmup": value})[0]).optimizer.lr_warmup_steps == 0.1
    assert parse({"lr_warmup_steps": "5 %", "caption_dropout_rate": "5%"}).captions.caption_dropout_rate == 0.05
    for values in ({"lr_warmup": 100}, {"lr_warmup_steps": "100%"}, {"max_train_steps": "50%"}):
        with pytest.raises(SettingError, match="_steps"):
            parse(adopted(values)[0])


@pytest.mark.parametrize(("text", "why"), [
    ('{"network_dim": 8,}', "JSON"), ("[1, 2]", "JSON"), ("null", "JSON"), ('{"seed": 8, "seed": 16}', "seed is set twice")])
def test_a_json_file_that_cannot_be_read_is_told_as_such(tmp_path: Path, text: str, why: str):
    (tmp_path / "kohya.json").write_text(text, encoding="utf-8")
    with pytest.raises(SettingError, match=why) as refusal:
        read_toml(tmp_path / "kohya.json")
    assert "TOML" not in str(refusal.value)


@pytest.mark.parametrize(("text", "encoding"), [
    ("[network_args.args]\nnetwork_dim = 8", "utf-8"), ("network_dim = 8", "utf-16"), ("network_dim = 8", "utf-8-sig"),
    ('{"network_dim": 8}', "utf-8"), ("network.network_dim = 8", "utf-8")])
def test_tables_in_tables_json_and_the_encodings_of_windows_are_read(tmp_path: Path, text: str, encoding: str):
    (tmp_path / "run.toml").write_bytes(text.encode(encoding))
    assert read_toml(tmp_path / "run.toml") == {"network_dim": 8}


def test_a_file_in_another_encoding_or_with_a_windows_path_says_how_to_write_it(tmp_path: Path):
    for data, word in (("output_name = \"привет\"".encode("cp1251"), "UTF-8"),
                       (b'train_data_dir = "C:\\Users"', "'single quotes'"),
                       (b'{"a": ', "not a JSON file")):
        (tmp_path / "run.toml").write_bytes(data)
        with pytest.raises(SettingError) as refusal:
            read_toml(tmp_path / "run.toml")
        assert word in str(refusal.value)


def test_json_as_kohya_ss_writes_it_goes_all_the_way(tmp_path: Path):
    (tmp_path / "kohya.json").write_text(json.dumps(GUI, indent=2), encoding="utf-8")
    assert parse(adopted(read_toml(tmp_path / "kohya.json"))[0]) == parse(adopted(GUI)[0])
