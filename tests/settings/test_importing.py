"""Settings of other programs and of LoRA files: every name is accounted for, and the numbers land where they belong.

The files are built from the fields that each program writes, with values its users choose; each comes in ten variations.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import random
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lib_lora_train.adapters.metadata import SETTINGS
from lib_lora_train.adapters.network import DEFAULT_KIND
from lib_lora_train.dataset.plan import plan_run
from lib_lora_train.errors import SettingError
from lib_lora_train.host.port import Checkpoint
from lib_lora_train.model.family import FAMILIES
from lib_lora_train.run.provenance import Provenance
from lib_lora_train.settings import DECLARATIONS, Settings, flat, parse
from lib_lora_train.settings.dataset_config import subsets_of
from lib_lora_train.settings.importing import import_bytes, import_file, import_tables
from lib_lora_train.settings.importing.entries import KINDS
from lib_lora_train.settings.toml import write_toml
from tests.jobs import plan_of

# What the page kohya_ss saves (45088f04), as it leaves what is not filled in.
KOHYA_SS = {
    "LoRA_type": "Standard", "LyCORIS_preset": "full", "adaptive_noise_scale": 0, "additional_parameters": "",
    "block_alphas": "",
    "block_dims": "", "block_lr_zero_threshold": "", "bucket_no_upscale": True, "bucket_reso_steps": 64, "bypass_mode": False,
    "cache_latents": True, "cache_latents_to_disk": True, "caption_dropout_every_n_epochs": 0, "caption_dropout_rate": 0.05,
    "caption_extension": ".txt", "clip_skip": "1", "color_aug": False, "constrain": 0.0, "conv_alpha": 1, "conv_dim": 1,
    "dataset_config": "", "debiased_estimation_loss": False, "decompose_both": False, "dim_from_weights": False,
    "dora_wd": False, "down_lr_weight": "", "dynamo_backend": "no", "enable_bucket": True, "epoch": 8, "factor": -1,
    "flip_aug": False, "fp8_base": False, "full_bf16": False, "full_fp16": False, "gpu_ids": "",
    "gradient_accumulation_steps": "1", "gradient_checkpointing": True, "huber_c": 0.1, "huber_schedule": "snr",
    "huggingface_repo_id": "", "ip_noise_gamma": 0, "ip_noise_gamma_random_strength": False, "keep_tokens": "0",
    "learning_rate": 0.0001, "log_with": "", "logging_dir": "", "lora_network_weights": "", "loss_type": "l2",
    "lr_scheduler": "cosine", "lr_scheduler_args": "", "lr_scheduler_num_cycles": "", "lr_scheduler_power": "",
    "lr_scheduler_type": "", "lr_warmup": 10, "lr_warmup_steps": 0, "masked_loss": False, "max_bucket_reso": 2048,
    "max_data_loader_n_workers": "0", "max_grad_norm": 1, "max_resolution": "512,768", "max_timestep": 1000,
    "max_token_length": "75", "max_train_epochs": "", "max_train_steps": "", "mem_eff_attn": False, "metadata_title": "",
    "mid_lr_weight": "", "min_bucket_reso": 256, "min_snr_gamma": 5, "min_timestep": 0, "mixed_precision": "bf16",
    "model_list": "custom", "module_dropout": 0, "multi_gpu": False, "multires_noise_discount": 0.3,
    "multires_noise_iterations": 0, "network_alpha": 16, "network_dim": "32", "network_dropout": 0, "no_token_padding": False,
    "noise_offset": "0.05", "noise_offset_random_strength": False, "noise_offset_type": "Original", "num_processes": 1,
    "optimizer": "AdamW8bit", "optimizer_args": "", "output_dir": "", "output_name": "zzk",
    "persistent_data_loader_workers": False,
    "pretrained_model_name_or_path": "C:/sd/model.safetensors", "prior_loss_weight": 1.0, "random_crop": False,
    "rank_dropout": 0, "reg_data_dir": "", "resume": "", "sample_every_n_epochs": 1, "sample_every_n_steps": 0,
    "sample_prompts": "a cat --w 512", "sample_sampler": "euler_a", "save_every_n_epochs": 1, "save_every_n_steps": 0,
    "save_last_n_steps": 0, "save_model_as": "safetensors", "save_precision": "fp16", "save_state": False,
    "scale_v_pred_loss_like_noise_pred": False, "scale_weight_norms": 0, "sdxl": True, "sdxl_no_half_vae": True,
    "seed": "1234",
    "shuffle_caption": False, "stop_text_encoder_training": 0, "text_encoder_lr": "5e-05", "train_batch_size": 4,
    "train_data_dir": "C:\\img", "train_norm": False, "train_on_input": False, "training_comment": "3 repeats",
    "unet_lr": 0.0001,
    "unit": 1, "up_lr_weight": "", "use_cp": False, "use_wandb": False, "v2": False, "v_parameterization": False, "vae": "",
    "vae_batch_size": 0, "wandb_api_key": "", "weighted_captions": False, "xformers": "xformers"}
KOHYA_SS_VARIED = [
    {}, {"LoRA_type": "Kohya LoCon", "conv_dim": 8, "conv_alpha": 4}, {"LoRA_type": "LyCORIS/LoHa", "conv_dim": 4},
    {"LoRA_type": "LyCORIS/LoKr", "factor": 6, "network_dim": 100000}, {"LoRA_type": "LyCORIS/iA3", "train_on_input": True},
    {"optimizer": "Prodigy", "learning_rate": 1, "unet_lr": 1, "text_encoder_lr": 1, "scale_weight_norms": 1,
     "optimizer_args": "decouple=True weight_decay=0.5 betas=0.9,0.99 use_bias_correction=True"},
    {"optimizer": "Adafactor", "optimizer_args": "scale_parameter=False relative_step=False warmup_init=False",
     "additional_parameters": "--max_grad_norm=0 --network_train_unet_only --log_prefix=xl"},
    {"noise_offset_type": "Multires", "multires_noise_iterations": 8, "adaptive_noise_scale": 0.005, "bucket_reso_steps": 1},
    {"additional_parameters": '--lr_scheduler_type "CosineAnnealingLR" --lr_scheduler_args "T_max=100" "eta_min=0"',
     "max_train_steps": "1600", "epoch": 1, "masked_loss": True, "fp8_base": True, "down_lr_weight": "1,1,0,0"},
    {"dataset_config": "./dataset.toml", "resume": "C:/state", "ip_noise_gamma": 0.1, "module_dropout": 0.1,
     "flux1_checkbox": False, "a_name_of_next_year": 3}]

SD_SCRIPTS = {
    "model_arguments": {"v2": False, "pretrained_model_name_or_path": "m.safetensors", "vae": ""},
    "additional_network_arguments": {"network_module": "networks.lora", "network_dim": 32, "network_alpha": 16.0,
                                     "network_args": ["conv_dim=8", "conv_alpha=1"], "network_train_unet_only": False},
    "optimizer_arguments": {"optimizer_type": "AdamW8bit", "learning_rate": 5e-4, "unet_lr": 5e-4, "text_encoder_lr": 1e-4,
                            "lr_scheduler": "cosine_with_restarts", "lr_scheduler_num_cycles": 3, "lr_warmup_steps": 95},
    "dataset_arguments": {"train_data_dir": "img", "resolution": "768,768", "enable_bucket": True, "cache_latents": True},
    "training_arguments": {"output_name": "zzk", "output_dir": "out", "save_precision": "fp16", "save_every_n_epochs": 1,
                           "train_batch_size": 6, "max_token_length": 225, "xformers": True, "max_train_epochs": 10,
                           "seed": 42,
                           "max_data_loader_n_workers": 8, "persistent_data_loader_workers": True, "lowram": True,
                           "mixed_precision": "fp16", "clip_skip": 2, "logging_dir": "logs", "prior_loss_weight": 1.0}}
SD_SCRIPTS_VARIED = [
    {}, {"noise_offset": 0.1, "shuffle_caption": True, "keep_tokens": 2}, {"text_encoder_lr": [1e-4, 5e-5]},
    {"network_module": "lycoris.kohya", "network_args": ["algo=locon", "preset=attn-mlp", "dropout=0.1"]},
    {"min_snr_gamma": 5, "scale_weight_norms": 1.0, "sdpa": True}, {"resolution": [832, 1216], "flip_aug": True},
    {"optimizer_type": "prodigyopt.Prodigy", "optimizer_args": ["d_coef=2", "decouple=True"]},
    {"network_module": "networks.oft", "caption_prefix": "zzk, ", "secondary_separator": ";;;",
     "debiased_estimation_loss": True},
    {"general": {"shuffle_caption": True, "of_next_year": 1}, "datasets": [{"resolution": 512, "batch_size": 4, "subsets": [
        {"image_dir": "C:\\img", "num_repeats": 10, "custom_attributes": {"x": 1}}, {"image_dir": "reg", "is_reg": True},
        {"image_dir": "b", "face_crop_aug_range": [2.0, 4.0], "keep_tokens": 2}]}]},
    {"highvram": True, "ddp_timeout": 0, "fused_backward_pass": False, "validation_split": 0.1, "not_there": "x"}]

LORA_SCRIPTS = {
    "model_train_type": "sdxl-lora", "pretrained_model_name_or_path": "./sd-models/m.safetensors", "v2": False,
    "train_data_dir": "./train/aki", "prior_loss_weight": 1, "resolution": "1024,1024", "enable_bucket": True,
    "min_bucket_reso": 256, "max_bucket_reso": 2048, "bucket_reso_steps": 32, "bucket_no_upscale": True, "output_name": "aki",
    "output_dir": "./output", "save_model_as": "safetensors", "save_precision": "bf16", "save_every_n_epochs": 2,
    "max_train_epochs": 10, "train_batch_size": 2, "gradient_checkpointing": True, "network_train_unet_only": True,
    "network_train_text_encoder_only": False, "learning_rate": "1e-4", "unet_lr": "5e-4", "text_encoder_lr": "1e-5",
    "lr_scheduler": "cosine_with_restarts", "lr_warmup_steps": 0, "lr_scheduler_num_cycles": 2, "optimizer_type": "AdamW8bit",
    "network_module": "networks.lora", "network_dim": 32, "network_alpha": 16, "sample_sampler": "euler_a",
    "log_with": "tensorboard", "logging_dir": "./logs", "caption_extension": ".txt", "shuffle_caption": True,
    "keep_tokens": 1,
    "max_token_length": 255, "seed": 1337, "clip_skip": 2, "mixed_precision": "bf16", "no_half_vae": True, "xformers": True,
    "lowram": False, "cache_latents": True, "cache_latents_to_disk": True, "persistent_data_loader_workers": True}
LORA_SCRIPTS_VARIED = [
    {}, {"network_module": "lycoris.kohya", "lycoris_algo": "locon", "conv_dim": 4, "conv_alpha": 1, "dropout": 0,
     "train_norm": False},
    {"network_module": "lycoris.kohya", "lycoris_algo": "lokr", "lokr_factor": -1, "conv_dim": 4},
    {"network_module": "networks.dylora", "dylora_unit": 4},
    {"optimizer_type": "Prodigy", "prodigy_d0": "", "prodigy_d_coef": "2.0", "optimizer_args_custom": ["decouple=True"]},
    {"enable_preview": True, "positive_prompts": "1girl", "negative_prompts": "lowres", "sample_width": 512,
     "sample_height": 768,
     "sample_cfg": 7, "sample_seed": 2333, "sample_steps": 24, "sample_every_n_epochs": 2},
    {"enable_block_weights": True, "down_lr_weight": "1,1,1,1,1,1,1,1,1,1,1,1", "mid_lr_weight": "1",
     "block_lr_zero_threshold": 0},
    {"ui_custom_params": "network_dim = 8\nmin_snr_gamma = 5.0", "loss_type": "l2", "network_args_custom": []},
    {"enable_base_weight": True, "base_weights": "a.safetensors", "base_weights_multiplier": "0.5"},
    {"optimizer_type": "pytorch_optimizer.CAME", "multires_noise_iterations": 6, "multires_noise_discount": 0.3,
     "lr_restart_cycles": 2}]

LORA_EASY = {
    "subsets": [{"image_dir": "C:/img/5_zzk", "num_repeats": 5, "caption_extension": ".txt", "name": "5_zzk",
    "shuffle_caption": True,
                 "keep_tokens": 1}],
    "train_mode": {"train_mode": "lora"},
    "general_args": {"args": {"pretrained_model_name_or_path": "m.safetensors", "mixed_precision": "bf16", "seed": 23,
                              "max_data_loader_n_workers": 1, "persistent_data_loader_workers": True, "max_token_length": 225,
                              "prior_loss_weight": 1.0, "sdxl": True, "xformers": True, "max_train_epochs": 8,
                              "cache_latents": True,
                              "gradient_checkpointing": True}, "dataset_args": {"resolution": [1024, 1024], "batch_size": 2}},
    "network_args": {"args": {"network_dim": 16, "network_alpha": 8.0, "min_timestep": 0, "max_timestep": 1000,
                              "network_train_unet_only": True}},
    "optimizer_args": {"args": {"optimizer_type": "AdamW8bit", "lr_scheduler": "cosine", "learning_rate": 0.0001,
    "max_grad_norm": 1.0,
                                "loss_type": "l2", "warmup_ratio": 0.05, "min_snr_gamma": 8,
                                "optimizer_args": {"weight_decay": 0.1}}},
    "saving_args": {"args": {"output_dir": "out", "output_name": "zzk", "save_precision": "fp16",
    "save_model_as": "safetensors",
                             "save_every_n_epochs": 1, "tag_occurrence": True, "save_toml": True}},
    "bucket_args": {"dataset_args": {"enable_bucket": True, "min_bucket_reso": 512, "max_bucket_reso": 2048,
    "bucket_reso_steps": 64}},
    "noise_args": {}, "sample_args": {}, "logging_args": {}}
LORA_EASY_VARIED = [
    {}, {"network_args": {"args": {"network_dim": 16, "network_alpha": 8, "network_args": {"conv_dim": 8,
     "conv_alpha": 4.0}}}},
    {"network_args": {"args": {"network_dim": 8, "network_alpha": 4, "network_args": {"algo": "loha", "preset": "full",
     "use_tucker": True}}}},
    {"noise_args": {"args": {"noise_offset": "0.0357"}}}, {"noise_args": {"args": {"multires_noise_iterations": 6}}},
    {"sample_args": {"args": {"sample_sampler": "euler_a", "sample_prompts": "p.txt", "sample_every_n_epochs": 1}}},
    {"optimizer_args": {"args": {"optimizer_type": "LoraEasyCustomOptimizer.came.CAME", "learning_rate": 1e-4,
     "loss_type": "huber",
                                 "lr_scheduler_type": "LoraEasyCustomOptimizer.RexAnnealing.RexAnnealingWarmRestarts",
                                 "lr_scheduler": "cosine", "lr_scheduler_args": {"min_lr": 1e-6, "gamma": 0.9},
                                 "unet_lr": 2e-4}}},
    {"subsets": [{"image_dir": f"C:/img/{n}", "num_repeats": n, "flip_aug": True, "is_reg": n == 2} for n in (1, 2)]},
    {"train_mode": {"train_mode": "textual_inversion"}, "logging_args": {"args": {"log_with": "tensorboard",
     "logging_dir": "l"}}},
    {"extra_args": {"args": {"network_dropout": 0.1}}, "flux_args": {}}]

ONETRAINER = {
    "__version": 11, "training_method": "LORA", "model_type": "STABLE_DIFFUSION_XL_10_BASE",
    "base_model_name": "m.safetensors",
    "output_model_destination": "models/zzk.safetensors", "output_model_format": "KOHYA_LORA", "output_dtype": "BFLOAT_16",
    "resolution": "1024", "batch_size": 4, "epochs": 20, "learning_rate": 3e-4, "learning_rate_scheduler": "COSINE",
    "learning_rate_warmup_steps": 0.05, "learning_rate_cycles": 1.0, "learning_rate_min_factor": 0.0,
    "gradient_accumulation_steps": 1,
    "lora_rank": 32, "lora_alpha": 16.0, "peft_type": "LORA", "lora_decompose": False, "layer_filter_preset": "attn-mlp",
    "layer_filter": "attentions", "unet": {"train": True, "learning_rate": None, "weight_dtype": "FLOAT_16",
    "offload_fraction": 0.0,
                                           "stop_training_after": 0, "stop_training_after_unit": "NEVER"},
    "text_encoder": {"train": False, "learning_rate": None, "weight_dtype": "FLOAT_16", "stop_training_after": 30,
                     "stop_training_after_unit": "EPOCH"},
    "text_encoder_2": {"train": False, "weight_dtype": "FLOAT_16"}, "vae": {"weight_dtype": "FLOAT_32"},
    "prior": {"train": True},
    "loss_weight_fn": "CONSTANT", "loss_weight_strength": 5.0, "mse_strength": 1.0, "mae_strength": 0.0,
    "huber_strength": 0.0,
    "log_cosh_strength": 0.0, "ema": "OFF", "ema_decay": 0.999, "train_dtype": "BFLOAT_16", "masked_training": False,
    "unmasked_probability": 0.1, "unmasked_weight": 0.1, "aspect_ratio_bucketing": True, "latent_caching": True,
    "timestep_distribution": "UNIFORM", "min_noising_strength": 0.0, "max_noising_strength": 1.0, "offset_noise_weight": 0.0,
    "optimizer": {"optimizer": "ADAMW", "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.01, "fused": True,
                  "stochastic_rounding": False, "d_coef": None}, "optimizer_defaults": {}, "clip_grad_norm": 1.0,
    "save_every": 1, "save_every_unit": "EPOCH", "backup_after": 30, "backup_after_unit": "MINUTE", "sample_after": 10,
    "sample_after_unit": "MINUTE", "concept_file_name": "c.json", "concepts": None, "samples": None, "workspace_dir": "w",
    "tensorboard": True, "validation": False, "learning_rate_scaler": "NONE", "loss_scaler": "NONE", "secrets": {}}
ONETRAINER_VARIED = [
    {}, {"loss_weight_fn": "MIN_SNR_GAMMA", "loss_weight_strength": 7.0}, {"loss_weight_fn": "P2", "mae_strength": 1.0},
    {"masked_training": True, "unmasked_weight": 0.2, "normalize_masked_area_loss": True},
    {"text_encoder": {"train": True, "learning_rate": 1e-5, "stop_training_after": 30, "stop_training_after_unit": "EPOCH"},
     "text_encoder_2": {"train": True, "learning_rate": 2e-5}},
    {"optimizer": {"optimizer": "PRODIGY", "d_coef": 1.0, "decouple": True, "beta3": None}, "learning_rate": 1.0},
    {"learning_rate_scheduler": "COSINE_WITH_RESTARTS", "learning_rate_cycles": 2.0, "learning_rate_warmup_steps": 100,
     "gradient_accumulation_steps": 4, "learning_rate_min_factor": 0.1, "learning_rate_scaler": "BOTH"},
    {"ema": "GPU", "timestep_distribution": "LOGIT_NORMAL", "noising_bias": 0.5, "perturbation_noise_weight": 0.1},
    {"peft_type": "LOKR", "lokr_dim": 8, "lokr_decompose_factor": 4, "lokr_full_matrix": False,
     "layer_filter_preset": "custom"},
    {"training_method": "FINE_TUNE", "model_type": "FLUX_DEV_1", "a_name_of_next_year": True,
     "loss_weight_fn": "DEBIASED_ESTIMATION",
     "optimizer": {"optimizer": "MUON_ADV", "ns_steps": 5}, "save_every_unit": "MINUTE",
     "quantization": {"layer_filter": "x"}}]

FILES = [(program, {**data, **varied}) for program, data, several in (
    ("kohya_ss", KOHYA_SS, KOHYA_SS_VARIED), ("kohya's scripts", SD_SCRIPTS, SD_SCRIPTS_VARIED),
    ("lora-scripts (SD-Trainer)", LORA_SCRIPTS, LORA_SCRIPTS_VARIED), ("LoRA Easy Training Scripts", LORA_EASY,
    LORA_EASY_VARIED),
    ("OneTrainer", ONETRAINER, ONETRAINER_VARIED)) for varied in several]


def imported(data: Mapping[str, Any], **changed: object):
    return import_tables({**data, **changed}, name="settings")


def entry(found: Any, name: str) -> Any:
    one, = [entry for entry in found.entries if entry.name == name]
    return one


def names(data: Mapping[str, Any]) -> Iterator[str]:
    """Of all that stands in a file, at any depth."""
    for name, value in data.items():
        if isinstance(value, dict):
            yield from names(value)
        elif isinstance(value, list) and value and all(isinstance(inner, dict) for inner in value):
            for inner in value:
                yield from names(inner)
        else:
            yield name


@pytest.mark.parametrize(("program", "data"), FILES)
def test_every_name_of_a_file_is_taken_changed_or_told_with_a_reason(program: str, data: dict):
    found = imported(data)
    assert found.program == program and found.foreign
    told = {part for entry in found.entries for part in (entry.name, *entry.name.replace("--", "").split(".")[-1].split())}
    assert {name for name in names(data)} - {"additional_parameters", "value"} <= told
    for one in found.entries:
        assert one.kind in KINDS and (one.text or one.kind == "taken"), one
    parse({"output_name": "x", **found.values})  # nothing in it is impossible
    json.dumps(found.to_json())
    assert all("\n" not in line for line in found.sentences())


@pytest.mark.parametrize(("program", "data"), FILES[::7])
def test_a_file_is_known_in_the_formats_it_is_kept_in(program: str, data: dict, tmp_path: Path):
    (tmp_path / "a.json").write_text(json.dumps(data), encoding="utf-8")
    assert import_file(tmp_path / "a.json") == imported(data)
    assert import_bytes(json.dumps(data).encode("utf-16"), name="a.json") == imported(data)


def test_numbers_of_kohya_ss_land_where_they_belong():
    settings = parse(imported(KOHYA_SS).values)
    assert settings.optimizer.lr_warmup_steps == 0.1  # per cent
    assert (settings.dataset.resolution, settings.optimizer.max_train_epochs) == ("512,768", 8)
    assert (settings.network.network_dim, settings.network.network_alpha) == (32, 16.0)
    assert (settings.optimizer.unet_lr, settings.optimizer.text_encoder_lr) == (1e-4, 5e-5)
    assert settings.optimizer.seed == 1234 and settings.optimizer.train_batch_size == 4
    assert settings.dataset.train_data_dir == "C:\\img" and settings.evaluation.sample_prompts == "a cat --w 512"
    assert not settings.network.network_train_unet_only


@pytest.mark.parametrize(("unet", "text", "learning_rate", "expected"), [
    (1e-4, 5e-5, 1e-3, (1e-4, 5e-5)), ("1e-4", "0", 1e-3, (1e-4, 0.0)), (0.0, 0, 3e-4, (3e-4, 3e-4)), ("", "", "3e-4",
    (3e-4, 3e-4))])
def test_which_parts_a_file_of_kohya_ss_trains_follows_its_rates(unet, text, learning_rate, expected):
    # lora_gui.py: one rate of 0 leaves its part alone, two of them are both the learning rate.
    found = imported(KOHYA_SS, unet_lr=unet, text_encoder_lr=text, learning_rate=learning_rate)
    assert parse(found.values).rates == expected


def test_a_command_line_in_a_file_of_kohya_ss_goes_before_its_fields():
    found = imported(KOHYA_SS, additional_parameters='--max_grad_norm=0.5 --flip_aug --output_name "a b" --nonsense 1 2')
    assert (found.values["max_grad_norm"], found.values["flip_aug"], found.values["output_name"]) == (0.5, True, "a b")
    assert entry(found, "additional_parameters: --nonsense").kind == "refused"
    found = imported(KOHYA_SS, additional_parameters='--sample_prompts="a dog --w 768" --max_grad_norm 0.5')
    assert (found.values["sample_prompts"], found.values["max_grad_norm"]) == ("a dog --w 768", 0.5)
    assert entry(imported(KOHYA_SS, additional_parameters="'"), "additional_parameters").kind == "refused"


def test_what_a_file_leaves_out_is_as_the_program_has_it_and_told():
    # sd-scripts' argument parser, and OneTrainer's TrainConfig: presets of it hold only what differs.
    found = imported({"pretrained_model_name_or_path": "m", "learning_rate": 1e-3})
    settings = parse(found.values)
    assert settings.rates == (1e-3, 1e-3) and settings.optimizer.lr_scheduler == "constant"
    assert (settings.network.network_dim, settings.network.network_alpha, settings.loss.min_snr_gamma) == (4, 1.0, 0.0)
    assert settings.optimizer.max_train_steps == 1600 and found.implied["min_snr_gamma"] == 0.0
    assert "min_snr_gamma = 0" in " ".join(found.sentences())
    found = parse(imported({"training_method": "LORA", "model_type": "STABLE_DIFFUSION_15"}).values)
    assert (found.optimizer.learning_rate, found.optimizer.max_train_epochs, found.optimizer.lr_warmup_steps) == (3e-6,
        100, 200)
    assert (found.network.network_dim, found.network.network_alpha, found.rates) == (16, 1.0, (3e-6, 3e-6))


def test_numbers_of_sd_scripts_and_lora_scripts_land_where_they_belong():
    settings = parse(imported(SD_SCRIPTS).values)
    assert (settings.network.conv_dim, settings.network.conv_alpha, settings.optimizer.lr_scheduler_num_cycles) == (8, 1.0, 3)
    two = imported(SD_SCRIPTS, text_encoder_lr=[1e-4, 5e-5])
    assert two.values["text_encoder_lr"] == 1e-4
    settings = parse(imported(LORA_SCRIPTS, **LORA_SCRIPTS_VARIED[7]).values)  # its custom TOML goes before the fields
    assert (settings.network.network_dim, settings.loss.min_snr_gamma, settings.optimizer.unet_lr) == (8, 5.0, 5e-4)
    prompts = imported(LORA_SCRIPTS, **LORA_SCRIPTS_VARIED[5]).values["sample_prompts"]
    assert prompts == "1girl --n lowres --w 512 --h 768 --l 7 --s 24 --d 2333"


@pytest.mark.parametrize(("data", "varied", "expected"), [
    (SD_SCRIPTS, SD_SCRIPTS_VARIED[8],
     [("C:\\img", 10, False, 0, "512"), ("reg", 1, True, 0, "512"), ("b", 1, False, 2, "512")]),
    (LORA_EASY, LORA_EASY_VARIED[7], [("C:/img/1", 1, False, 0, "1024,1024"), ("C:/img/2", 2, True, 0, "1024,1024")])])
def test_folders_with_settings_of_their_own_come_along(data: dict, varied: dict, expected: list):
    found = subsets_of(parse(imported(data, **varied).values))
    assert [(of.image_dir, of.dataset.num_repeats, of.is_reg, of.captions.keep_tokens, of.dataset.resolution)
            for of in found] == expected


def test_of_arguments_each_one_that_is_possible_is_taken_and_the_others_are_named():
    easy = imported(LORA_EASY, **LORA_EASY_VARIED[2])
    kinds = {entry.name.rpartition(".")[2]: entry.kind for entry in easy.entries if "network_args.network_args" in entry.name}
    assert kinds == {"algo": "changed", "preset": "changed", "use_tucker": "refused"}
    assert easy.values["network_module"] == "LoHa"
    flat = {**SD_SCRIPTS_VARIED[2], "network_module": "lycoris.kohya", "network_args": ["algo=loha", "use_tucker=True"]}
    told = entry(imported(flat), "network_args")
    assert told.kind == "refused" and "use_tucker=True" in told.text and "algo" not in told.text


@pytest.mark.parametrize(("kind", "refused"), [
    ("LyCORIS/LoKr", {"decompose_both", "train_norm"}), ("LyCORIS/LoHa", {"train_norm"}), ("Standard", set())])
def test_variants_of_lycoris_are_not_called_unneeded_where_the_page_trains_them(kind: str, refused: set[str]):
    found = imported(KOHYA_SS, LoRA_type=kind, decompose_both=True, train_norm=True)
    assert {entry.name for entry in found.entries if entry.kind == "refused"} == refused


def test_a_dropout_that_the_kind_of_network_cannot_have_is_not_taken_and_the_rest_can_start():
    found = imported(KOHYA_SS, LoRA_type="LyCORIS/LoHa", rank_dropout=0.1, module_dropout=0.2)
    assert {entry.name: entry.kind for entry in found.entries}["rank_dropout"] == "refused"
    network = parse(found.values).network
    assert (network.network_module, network.rank_dropout, network.module_dropout) == ("LoHa", 0.0, 0.2)


def test_numbers_of_lora_easy_land_where_they_belong():
    settings = parse(imported(LORA_EASY).values)
    assert (settings.dataset.resolution, settings.optimizer.train_batch_size) == ("1024,1024", 2)
    assert (settings.optimizer.lr_warmup_steps, settings.loss.min_snr_gamma) == (0.05, 8.0)
    assert settings.dataset.min_bucket_reso == 512 and settings.network.network_train_unet_only
    assert parse(imported(LORA_EASY, **LORA_EASY_VARIED[1]).values).network.conv_dim == 8


def test_numbers_of_onetrainer_land_where_they_belong():
    settings = parse(imported(ONETRAINER).values)
    assert (settings.network.network_dim, settings.network.network_alpha, settings.optimizer.learning_rate) == (32, 16.0,
        3e-4)
    assert settings.optimizer.lr_warmup_steps == 0.05 and settings.network.network_targets == "attention and feed-forward"
    assert settings.network.network_train_unet_only and settings.save.output_name == "zzk" and settings.loss.min_snr_gamma == 0
    assert (settings.memory.mixed_precision, settings.save.save_every_n_epochs) == ("bf16", 1)
    assert parse(imported(ONETRAINER, **ONETRAINER_VARIED[1]).values).loss.min_snr_gamma == 7.0
    both = imported(ONETRAINER, **ONETRAINER_VARIED[4])
    assert parse(both.values).rates == (3e-4, 1e-5) and entry(both, "text_encoder_2.learning_rate").kind == "refused"
    sizes = {"512": "512", "512,768": "512;768", "512x768": "512,768"}  # several with commas there, one with an x
    assert {size: imported(ONETRAINER, resolution=size).values["resolution"] for size in sizes} == sizes
    assert imported(ONETRAINER, clip_grad_norm=None).values["max_grad_norm"] == 0.0
    normal = {"timestep_distribution": "LOGIT_NORMAL", "noising_bias": 0.0, "noising_weight": 0.0}
    assert imported(ONETRAINER, **normal).values["timestep_distribution"] == "sigmoid"
    masked = imported(ONETRAINER, **ONETRAINER_VARIED[3])
    assert masked.values["masked_loss"] and masked.values["unmasked_weight"] == 0.2
    assert {entry(masked, name).kind for name in ("unmasked_probability", "normalize_masked_area_loss")} == {"refused"}
    assert entry(imported(ONETRAINER), "unmasked_probability").kind == "unused"
    # It counts passes, not steps, and whole waves where others count halves of them.
    waves = imported(ONETRAINER, **ONETRAINER_VARIED[6]).values
    assert (waves["lr_warmup_steps"], waves["lr_scheduler_num_cycles"]) == (25, 4)
    assert (waves["lr_scheduler"], waves["lr_scheduler_min_lr_ratio"]) == ("cosine_with_min_lr", 0.1)


def header(metadata: Mapping[str, str], *layers: str) -> bytes:
    """The beginning of a LoRA file, which the page sends of it."""
    tensors = {f"{layer}.alpha": {"dtype": "F32", "shape": [], "data_offsets": [0, 4]} for layer in layers}
    text = json.dumps({"__metadata__": dict(metadata), **tensors}).encode()
    return len(text).to_bytes(8, "little") + text


# What the metadata of a file of ours holds of its run; kohya's names of it are those of sd-scripts, train_network.py.
@pytest.mark.parametrize("changed", [
    {}, {"network_train_unet_only": False, "text_encoder_lr": 2e-5, "trigger_word": "zzk", "clip_skip": 2},
    {"max_train_steps": 7, "lr_warmup_steps": 0.1, "lr_scheduler": "constant", "weight_decay": 0.1, "seed": 3},
    {"min_snr_gamma": 0.0, "noise_offset": 0.05, "flip_aug": True, "shuffle_caption": True, "keep_tokens": 2,
     "train_batch_size": 2},
    {"enable_bucket": False, "loss_type": "huber", "huber_c": 0.2, "debiased_estimation_loss": True,
     "caption_dropout_rate": 0.1},
    {"optimizer_type": "Lion", "optimizer_args": "betas=0.9,0.98", "gradient_accumulation_steps": 2, "max_grad_norm": 0.0,
     "network_dim": 4, "network_alpha": 2.0, "unet_lr": 2e-4, "training_comment": "a, b"}])
def test_a_lora_file_gives_back_the_settings_of_its_run(changed: dict):
    settings = parse({"output_name": "zzk", "unet_lr": 1e-4, "clip_skip": 1, "resolution": "64,64", **changed})
    found = import_bytes(header(metadata_of(settings), "lora_unet_x", *(
        [] if settings.network.network_train_unet_only else ["lora_te_x"])), name="zzk.safetensors")
    of_file = {*SETTINGS, "network_dim", "network_alpha", "resolution", "train_batch_size", "clip_skip", "optimizer_type",
               "weight_decay", "optimizer_args", "network_train_unet_only", "trigger_word", "debiased_estimation_loss"}
    theirs, ours = flat(parse(found.values)), flat(settings)
    if ours["network_train_unet_only"]:
        of_file.remove("text_encoder_lr")  # not trained
    different = {name for name in of_file & DECLARATIONS.keys() if theirs[name] != ours[name]}
    assert different <= ({"max_train_epochs"} if ours["max_train_steps"] else set()), {
        name: (ours[name], theirs[name]) for name in different}
    assert not [entry for entry in found.entries if entry.kind == "refused"]
    assert not parse(found.values).save.output_name  # a name of one's own


def metadata_of(settings: Settings) -> dict[str, str]:
    """What a run with these settings writes into its file."""
    model = SimpleNamespace(
        architecture=SimpleNamespace(family=FAMILIES["sd1"], zero_terminal_snr=False),
        schedule=SimpleNamespace(prediction_type="epsilon"), text=SimpleNamespace(uses_clip_skip=True))
    size = settings.network.network_dim, settings.network.network_alpha
    network = SimpleNamespace(usual_size=size, kind=DEFAULT_KIND, arguments=lambda: {})
    leased = SimpleNamespace(checkpoint=Checkpoint("m", "m.safetensors", "sd1"), clip_skip=1)
    schedule = plan_run({(64, 64): 5}, train_batch_size=settings.optimizer.train_batch_size,
                        gradient_accumulation_steps=settings.optimizer.gradient_accumulation_steps,
                        max_train_epochs=settings.optimizer.max_train_epochs,
                            max_train_steps=settings.optimizer.max_train_steps)
    plan = dataclasses.replace(plan_of(settings), schedule=schedule, placements=(SimpleNamespace(aspect_error=0.0),))
    return Provenance(plan, model, leased, network, started_at=1.0).metadata("zzk", step=1, epoch=1)


def test_a_file_names_no_argument_of_the_network_that_had_no_effect():
    told = {"block_dims": ",".join(["4"] * 25), "rank_dropout": 0.1}
    assert json.loads(metadata_of(parse(told))["ss_network_args"]) == {name: str(value) for name, value in told.items()}
    continued = metadata_of(parse({**told, "network_weights": "a.safetensors"}))
    assert json.loads(continued["ss_network_args"]) == {"rank_dropout": "0.1"}


# Names that sd-scripts writes (train_network.py, 48d368fa), with what they hold where little was asked for.
KOHYAS_METADATA = {f"ss_{name}": value for value, names in {
    "None": "unet_lr network_dropout clip_skip max_token_length noise_offset multires_noise_iterations adaptive_noise_scale "
            "face_crop_aug_range min_snr_gamma scale_weight_norms ip_noise_gamma resize_interpolation validation_seed "
            "max_validation_steps validate_every_n_epochs validate_every_n_steps vae_name training_comment "
            "caption_dropout_rate",
    "False": "gradient_checkpointing full_fp16 v2 lowram zero_terminal_snr debiased_estimation noise_offset_random_strength "
             "ip_noise_gamma_random_strength fp8_base fp8_base_unet color_aug flip_aug random_crop bucket_no_upscale",
    "True": "cache_latents shuffle_caption enable_bucket", "0": "lr_warmup_steps caption_dropout_every_n_epochs num_reg_images",
    "0.0": "caption_tag_dropout_rate validation_split", "1": "gradient_accumulation_steps num_epochs epoch keep_tokens "
    "batch_size_per_device total_batch_size", "8": "network_dim", "4.0": "network_alpha", "0.0001": "learning_rate",
    "[5e-05, 1e-05]": "text_encoder_lr", "cosine": "lr_scheduler", "networks.lora": "network_module", "fp16": "mixed_precision",
    "1.0": "max_grad_norm prior_loss_weight huber_scale", "l2": "loss_type", "snr": "huber_schedule", "0.1": "huber_c",
    "0.3": "multires_noise_discount", "(768, 768)": "resolution", "256": "min_bucket_reso", "1024": "max_bucket_reso",
    "10": "num_train_images num_batches_per_epoch max_train_steps steps", "42": "seed session_id", "torch.optim.adamw.AdamW":
    "optimizer", "{}": "tag_frequency dataset_dirs reg_dataset_dirs bucket_info", "sdxl_base_v1-0": "base_model_version",
    "1700000000.0": "training_started_at training_finished_at",
    "m": "output_name sd_model_name sd_model_hash new_sd_model_hash sd_scripts_commit_hash"}.items() for name in names.split()}


def test_all_that_kohyas_scripts_write_into_a_lora_is_understood():
    found = import_bytes(header(KOHYAS_METADATA, "lora_unet_x", "lora_te1_x"), name="k.safetensors")
    assert {entry.name for entry in found.entries} >= KOHYAS_METADATA.keys()
    assert not [entry for entry in found.entries if entry.kind == "refused"]
    settings = parse(found.values)
    assert settings.rates == (1e-4, 5e-5) and settings.optimizer.max_train_epochs == 1 and not settings.loss.min_snr_gamma
    assert settings.evaluation.validation_split == 0 and settings.dataset.resolution == "768,768"


def test_a_lora_of_kohyas_or_of_onetrainer_gives_the_settings_of_its_run():
    dataset = [{"resolution": [512, 768], "batch_size_per_device": 3, "enable_bucket": True, "min_bucket_reso": 320,
                "subsets": [{"shuffle_caption": True, "keep_tokens": 3, "img_count": 9}]}]
    found = import_bytes(header({
        "ss_learning_rate": "0.0002", "ss_network_dim": "8", "ss_network_module": "networks.lora", "ss_min_snr_gamma": "None",
        "ss_optimizer": "bitsandbytes.optim.adamw.AdamW8bit(weight_decay=0.1,betas=(0.9, 0.99))",
        "ss_datasets": json.dumps(dataset),
        "ss_network_args": '{"conv_dim": "4"}', "ss_lowram": "False", "ss_num_epochs": "3", "ss_seed": "5", "ss_v2": "False"},
        "lora_unet_x", "lora_te1_x"), name="k.safetensors")
    settings = parse(found.values)
    assert (settings.dataset.resolution, settings.optimizer.train_batch_size, settings.captions.keep_tokens) == ("512,768",
        3, 3)
    assert (settings.network.network_dim, settings.network.conv_dim, settings.loss.min_snr_gamma) == (8, 4, 0.0)
    assert settings.optimizer.optimizer_args == "betas=0.9,0.99" and settings.optimizer.weight_decay == 0.1
    assert settings.optimizer.max_train_epochs == 3 and not settings.network.network_train_unet_only
    config = json.dumps({**ONETRAINER, "lora_rank": 5})
    assert import_bytes(header({"ot_config": config, "ot_branch": "x"}), name="o.safetensors").values["network_dim"] == 5
    with pytest.raises(SettingError):
        import_bytes(header({"format": "pt"}, "lora_unet_x"), name="x.safetensors")


# Keys as sd-scripts' and LyCORIS' networks have them.
@pytest.mark.parametrize(("layers", "arguments", "expected"), [
    (["attentions_0_transformer_blocks_0_attn2_to_k", "attentions_0_transformer_blocks_0_attn1_to_k"], "", "attention"),
    (["attentions_0_transformer_blocks_0_attn2_to_k"], "", "cross-attention"),
    (["attentions_0_transformer_blocks_0_ff_net_2", "attentions_0_transformer_blocks_0_attn1_to_k"], "",
     "attention and feed-forward"),
    (["resnets_0_conv1", "attentions_0_transformer_blocks_0_ff_net_2"], "", "attention and convolutions"),
    (["resnets_0_conv1", "attentions_0_transformer_blocks_0_ff_net_2"], '{"conv_dim": "4"}', "attention and feed-forward"),
    (["output_blocks_0_1_transformer_blocks_0_attn1_to_q"], "", "B-LoRA content"),
    (["output_blocks_1_1_transformer_blocks_0_attn1_to_q"], "", "B-LoRA style"), ([], "", "text encoder")])
def test_the_layers_of_a_lora_file_are_those_that_are_trained(layers: list[str], arguments: str, expected: str):
    of_file = [f"lora_unet_{layer}" if layer.startswith("output") else f"lora_unet_down_blocks_0_{layer}" for layer in layers]
    metadata = {"ss_network_dim": "8", "ss_network_args": arguments} if arguments else {"ss_network_dim": "8"}
    found = import_bytes(header(metadata, *of_file, "lora_te_text_model_encoder_layers_0_mlp_fc1"), name="x.safetensors")
    assert found.values["network_targets"] == expected


def test_a_file_of_our_own_is_read_exactly_and_held_to_its_names(tmp_path: Path):
    rng = random.Random(1)
    values = {name: flat(Settings())[name] for name in DECLARATIONS}
    values |= {"network_dim": 7, "training_comment": 'a "b"\nc', "train_data_dir": "C:\\x",
        "learning_rate": 10 ** -rng.uniform(3, 5)}
    found = import_bytes(write_toml(values).encode(), name="run.toml")
    assert found.values == values and not found.foreign and found.sentences() == [] and not found.implied
    with pytest.raises(SettingError) as refusal:
        import_bytes(b"network_dim = 4\nlerning_rate = 1", name="run.toml")
    assert "lerning_rate" in str(refusal.value)


ODD = (None, "", "x", -1, 0, 1e400, True, [], [[]], {}, {"a": 1}, [1, "2"], "\0", "9" * 400)


@pytest.mark.parametrize(("program", "data"), FILES[::10])
def test_whatever_a_value_of_a_program_is_its_file_is_read_or_refused_with_a_sentence(program: str, data: dict):
    rng = random.Random(program)

    def odd(table: Mapping[str, Any], share: float) -> dict[str, Any]:
        return {name: rng.choice(ODD) if rng.random() < share else odd(value, share) if isinstance(value, dict) else value
                for name, value in table.items()}
    for share in [0.02, 0.1, 0.5] * 10:
        with contextlib.suppress(SettingError):
            found = imported(odd(data, share))
            assert {entry.kind for entry in found.entries} <= KINDS.keys() and json.dumps(found.to_json())


@pytest.mark.parametrize("data", [
    b"\x00\x01", b"[1, 2]", b"network_dim = ", b'{"LoRA_type": {}, "epoch": [], "max_resolution": {"a": 1}}',
    b'{"training_method": 3, "optimizer": 4, "learning_rate_warmup_steps": "x"}', b'{"unet": [], "lora_rank": {}}'])
def test_whatever_a_file_holds_is_read_or_refused_with_a_sentence(data: bytes):
    for name in ("a.json", "a.toml", "a.safetensors"):
        try:
            import_bytes(data, name=name)
        except SettingError as refusal:
            assert name.split(".")[0] in str(refusal) or "setting" in str(refusal)
