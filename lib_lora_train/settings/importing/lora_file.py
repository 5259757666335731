"""A LoRA file as settings: what its metadata says of how it was trained (sd-scripts, train_network.py, 48d368fa)."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lib_lora_train.errors import SettingError
from lib_lora_train.settings import DECLARATIONS
from lib_lora_train.settings.importing import onetrainer
from lib_lora_train.settings.importing.entries import Imported
from lib_lora_train.settings.importing.translation import Translation
from lib_lora_train.settings.toml import tables_in

PROGRAM = "a LoRA file"
_RENAMED = {"num_epochs": "max_train_epochs", "batch_size_per_device": "train_batch_size",
            "debiased_estimation": "debiased_estimation_loss"}
_OF_A_DATASET = {"batch_size_per_device": "train_batch_size", "resolution": "resolution", "enable_bucket": "enable_bucket",
                 "min_bucket_reso": "min_bucket_reso", "max_bucket_reso": "max_bucket_reso",
                 "bucket_no_upscale": "bucket_no_upscale"}
_OF_A_FOLDER = ("shuffle_caption", "keep_tokens", "flip_aug", "color_aug", "random_crop", "caption_prefix", "caption_suffix",
                "secondary_separator", "enable_wildcard", "keep_tokens_separator", "caption_dropout_rate",
                "caption_tag_dropout_rate")
_NOT_SETTINGS = ("session_id", "training_started_at", "training_finished_at", "output_name", "num_train_images",
                 "num_validation_images", "num_reg_images", "num_batches_per_epoch", "steps", "epoch", "total_batch_size",
                 "base_model_version", "sd_scripts_commit_hash", "sd_model_name", "sd_model_hash", "new_sd_model_hash",
                 "vae_name", "vae_hash", "new_vae_hash", "tag_frequency", "bucket_info", "dataset_dirs", "reg_dataset_dirs",
                 "zero_terminal_snr", "preset")
_CLASSES = {"lionoptimizer": "Lion", "sgd": "SGDNesterov"}
_B_LORA, _BOTH = re.compile(r"lora_unet_output_blocks_([01])_1_.*_attn[12]_"), "B-LoRA content and style"
_CONVOLUTION = re.compile(r"_resnets_|samplers_|_in_layers_|_out_layers_|_emb_layers_|_skip_connection|_0_op|_2_conv")
_ARGUMENT = re.compile(r"(\w+)=((?:\([^)]*\)|\[[^\]]*\]|[^,()]+)+)")


def read_header(header: Mapping[str, Any], *, name: str) -> Imported:
    """The settings of the run that made such a file. Raises SettingError where it does not say."""
    metadata = {key: str(value) for key, value in (header.get("__metadata__") or {}).items()}
    if "ot_config" in metadata:
        return onetrainer.read(tables_in(metadata["ot_config"], name=name, is_json=True))
    found = {key[3:]: value for key, value in metadata.items() if key.startswith("ss_")}
    if not found.keys() & {"learning_rate", "network_dim", "unet_lr"}:
        raise SettingError(f"{Path(name).name} does not say how it was trained", why="it has no such metadata",
                           remedy="ask whoever made it for the settings")
    translation = Translation(PROGRAM)
    for key, value in metadata.items():
        if key == "modelspec.trigger_phrase" and value:
            translation.add("trigger_word", value, origin=key, given=value)
        elif not key.startswith("ss_"):
            translation.unused(key, value, "it is about the file")
    _length(found, translation)
    for key, value in found.items():
        _setting(key, value, translation)
    text = any(tensor.startswith("lora_te") for tensor in header)
    translation.add("network_train_unet_only", not text, origin="layers", given="UNet and text encoder" if text else "UNet")
    if targets := _targets(header, convolutions="conv_dim" in found.get("network_args", "")):
        translation.add("network_targets", targets, origin="layers", given=targets)
    if not text and "text_encoder_lr" in translation.values:
        translation.values["text_encoder_lr"] = ""
    return translation.finish({})


def _targets(layers: Iterable[str], *, convolutions: bool) -> str:
    """Which layers of the UNet the file holds, "" where that cannot be told. `convolutions` are named by their rank."""
    unet = [layer for layer in layers if layer.startswith("lora_unet_")]
    if not unet:
        return "text encoder" if any(layer.startswith("lora_te") for layer in layers) else ""
    blocks = [_B_LORA.match(layer) for layer in unet]
    if all(blocks):
        return {"0": "B-LoRA content", "1": "B-LoRA style"}.get("".join({found[1] for found in blocks if found}), _BOTH)
    if any(map(_CONVOLUTION.search, unet)) and not convolutions:
        return "attention and convolutions"
    for part, name in (("_ff_net_", "attention and feed-forward"), ("_attn1_", "attention"), ("_attn2_", "cross-attention")):
        if any(part in layer for layer in unet):
            return name
    return ""


def _length(found: dict[str, str], translation: Translation) -> None:
    """How long the run was: its epochs where they say so, else its steps."""
    try:
        steps, epochs, batches, gathered = (int(found[name]) for name in (
            "max_train_steps", "num_epochs", "num_batches_per_epoch", "gradient_accumulation_steps"))
    except (KeyError, ValueError):
        return
    wanted = found.get("max_train_epochs") in (None, "None", str(epochs))
    by_epochs = wanted and -(-batches // max(1, gathered)) * epochs == steps
    why = "it follows from the epochs" if by_epochs else "the steps say when to end"
    for name in ("max_train_steps", "max_train_epochs") if by_epochs else ("num_epochs", "max_train_epochs"):
        if name in found:
            translation.unused(f"ss_{name}", found.pop(name), why)


def _setting(key: str, value: str, translation: Translation) -> None:
    origin = f"ss_{key}"
    if key in _NOT_SETTINGS:
        translation.unused(origin, value, "it is about that run, its model and its pictures")
    elif key == "optimizer":
        _optimizer(value, translation)
    elif key == "network_args":
        for name, inner in _object(value).items():
            translation.add_argument("network_args", f"{name}={inner}", origin=origin, given=f"{name}={inner}")
    elif key == "datasets":
        _datasets(value, translation)
    elif key == "resolution":
        translation.add("resolution", value.strip("()[] ").replace(" ", ""), origin=origin, given=value)
    else:
        name = _RENAMED.get(key, key)
        translation.add(name, _value(name, value), origin=origin, given=value)


def _optimizer(text: str, translation: Translation) -> None:
    """ "torch.optim.adamw.AdamW(weight_decay=0.1,betas=(0.9, 0.99))"."""
    name, _, arguments = text.partition("(")
    known = {choice.lower(): choice for choice in DECLARATIONS["optimizer_type"].choices} | _CLASSES
    translation.add("optimizer_type", known.get(name.rpartition(".")[2].lower(), name), origin="ss_optimizer", given=text)
    for key, value in _ARGUMENT.findall(arguments.removesuffix(")")):
        plain = value.strip().strip("()[]").replace(" ", "")
        if key == "weight_decay":
            translation.add(key, plain, origin="ss_optimizer", given=f"{key}={value}")
        else:
            translation.add_argument("optimizer_args", f"{key}={plain}", origin="ss_optimizer", given=f"{key}={value}")


def _datasets(text: str, translation: Translation) -> None:
    """The first dataset of a `dataset_config`, and the first folder of it."""
    listed = _object(text)
    first = listed[0] if isinstance(listed, list) and listed and isinstance(listed[0], dict) else {}
    folder = next(iter(first.get("subsets") or []), {})
    for name, target in _OF_A_DATASET.items():
        if first.get(name) is not None:
            translation.add(target, first[name], origin=f"ss_datasets.{name}", given=first[name])
    for name in _OF_A_FOLDER:
        if folder.get(name) is not None:
            translation.add(name, folder[name], origin=f"ss_datasets.subsets.{name}", given=folder[name])
    translation.unused("ss_datasets", text, "of its first folder; choose your own pictures")


def _value(name: str, text: str) -> object:
    """A value of the metadata, where "None" is what is off."""
    if text != "None":
        return _object(text) if text.startswith("[") and name.endswith("lr") else text  # a rate for each text encoder
    declaration = DECLARATIONS.get(name)
    off = declaration is not None and declaration.type is not str and declaration.minimum in (0, None)
    return declaration.type(0) if declaration and off else ""


def _object(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return {}
