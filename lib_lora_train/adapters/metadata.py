"""The metadata of a LoRA file, from what is known of its run. Every value is a string, as safetensors demands.

The names are those of kohya-ss/sd-scripts (`ss_…`), which the WebUI's page of LoRAs and the usual viewers
read, and of Stability's ModelSpec 1.0.1 (`modelspec.…`, https://github.com/Stability-AI/ModelSpec). Folders
are written by name and never by path: a LoRA is published.

Not here: the hashes of the file (`sshs_…`, `modelspec.hash_sha256`), which `file.save` adds.
"""

from __future__ import annotations

import base64
import datetime
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from lib_lora_train.errors import printable
from lib_lora_train.model.family import Family
from lib_lora_train.settings.presets import NO_PRESET

MODELSPEC = "1.0.1"

# The settings that kohya writes, under kohya's names; each becomes "ss_" + name. Others (paths above all) stay out.
SETTINGS = (
    "learning_rate", "unet_lr", "text_encoder_lr", "lr_scheduler", "lr_warmup_steps", "lr_scheduler_num_cycles",
    "network_dropout", "mixed_precision", "gradient_checkpointing", "gradient_accumulation_steps",
    "max_train_epochs", "max_train_steps", "seed", "max_grad_norm", "min_snr_gamma", "noise_offset",
    "multires_noise_iterations", "multires_noise_discount", "ip_noise_gamma", "scale_weight_norms",
    "noise_offset_random_strength", "ip_noise_gamma_random_strength", "adaptive_noise_scale",
    "debiased_estimation", "loss_type", "huber_schedule", "huber_scale", "huber_c", "prior_loss_weight", "caption_dropout_rate",
    "caption_dropout_every_n_epochs", "caption_tag_dropout_rate", "shuffle_caption", "keep_tokens", "color_aug", "flip_aug",
    "random_crop",
    "enable_bucket", "bucket_no_upscale", "min_bucket_reso", "max_bucket_reso", "training_comment")
OF_EMBEDDING = ("train_trigger_embedding", "embedding_vectors", "embedding_init_text", "embedding_lr",
                "stop_embedding_training")  # our own, written where the trigger word has vectors


@dataclass(frozen=True)
class TrainingMetadata:
    """What is known of a run when one of its files is written.

    resolution      (width, height) in pixels
    network_module, network_args   kohya's name of the kind of adapter, and what else it would be told
    dim, alpha      the adapters' rank and alpha
    steps, epoch    done when this file is written
    batch_size      images in one pass, on one device; `processes` of them train together
    started_at      seconds since 1970, as `finished_at`
    clip_skip       None where it does not apply or is not known
    checkpoint_…, vae_name   file names, the old 8-digit hash and the full sha256, each None where unknown
    dataset_dirs, reg_dataset_dirs   {folder: {"n_repeats", "img_count"}}
    tag_frequency   {folder: {tag: captions that hold it}}
    buckets         (width, height) -> images with their repeats, None without buckets
    datasets        what sd-scripts writes of each [[datasets]], for runs with several sizes or folders of their own
    aspect_error    mean difference between an image's and its bucket's width/height
    settings        the run's settings under kohya's names; those in `SETTINGS` are written, and the trigger word
    """

    family: Family
    v_prediction: bool
    zero_terminal_snr: bool
    resolution: tuple[int, int]
    dim: int
    alpha: float
    steps: int
    epoch: int
    total_epochs: int
    total_steps: int
    batches_per_epoch: int
    batch_size: int
    started_at: float
    finished_at: float | None = None
    processes: int = 1
    clip_skip: int | None = None
    checkpoint_name: str | None = None
    checkpoint_legacy_hash: str | None = None
    checkpoint_sha256: str | None = None
    vae_name: str | None = None
    dataset_dirs: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    reg_dataset_dirs: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    tag_frequency: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    buckets: Mapping[tuple[int, int], int] | None = None
    datasets: Sequence[Mapping[str, object]] = ()
    aspect_error: float = 0.0
    network_module: str = "networks.lora"
    network_args: Mapping[str, str] = field(default_factory=dict)
    optimizer: str = "torch.optim.adamw.AdamW"
    settings: Mapping[str, object] = field(default_factory=dict)


def describe(run: TrainingMetadata, name: str) -> dict[str, str]:
    """The metadata of the file `name`.safetensors.

    `name` is the file's stem: it becomes `ss_output_name`, the alias under which the WebUI lists the LoRA.
    A value that is None is written as kohya writes it, "None".
    """
    assert not name.endswith(".safetensors"), "the stem of the file, not its name"
    written = SETTINGS + OF_EMBEDDING if run.settings.get("train_trigger_embedding") else SETTINGS
    values = {f"ss_{setting}": run.settings[setting] for setting in written if setting in run.settings}
    values |= _run(run, name) | _dataset(run) | _model(run) | _modelspec(run, name)
    return {key: printable(str(value)) for key, value in values.items()}


def renamed(metadata: Mapping[str, str], name: str, *, trigger_word: str, thumbnail: bytes = b"") -> dict[str, str]:
    """The metadata of a file of ours for a copy of it called `name`.safetensors. `thumbnail` is a small JPEG of what it makes;
    without one it has none. A file from before ModelSpec 1.0.1 is brought up to it."""
    kept = {key: value for key, value in metadata.items() if key != "modelspec.thumbnail"}
    told = {"ss_output_name": name, "modelspec.title": name, "modelspec.sai_model_spec": MODELSPEC, **_trigger(trigger_word)}
    if thumbnail:
        told["modelspec.thumbnail"] = f"data:image/jpeg;base64,{base64.b64encode(thumbnail).decode()}"
    return kept | {key: printable(value) for key, value in told.items()}


def _run(run: TrainingMetadata, name: str) -> dict[str, object]:
    return {
        "ss_output_name": name,
        "ss_network_module": run.network_module,
        "ss_network_dim": run.dim,
        "ss_network_alpha": run.alpha,
        "ss_optimizer": run.optimizer,
        "ss_steps": run.steps,
        "ss_epoch": run.epoch,
        "ss_num_epochs": run.total_epochs,
        "ss_max_train_steps": run.total_steps,
        "ss_num_batches_per_epoch": run.batches_per_epoch,
        "ss_batch_size_per_device": run.batch_size,
        "ss_total_batch_size": run.batch_size * run.processes,
        "ss_training_started_at": run.started_at,
        "ss_training_finished_at": run.finished_at,
    } | ({"ss_network_args": json.dumps(dict(run.network_args))} if run.network_args else {}) | (
        {"ss_preset": run.settings["preset"]} if run.settings.get("preset") not in (None, NO_PRESET) else {})


def _dataset(run: TrainingMetadata) -> dict[str, object]:
    def images(folders: Mapping[str, Mapping[str, int]]) -> int:
        return sum(folder["n_repeats"] * folder["img_count"] for folder in folders.values())

    buckets = None if run.buckets is None else {
        "buckets": {str(index): {"resolution": list(size), "count": count}
                    for index, (size, count) in enumerate(run.buckets.items())},
        "mean_img_ar_error": run.aspect_error}
    return {
        **({"ss_datasets": _json(run.datasets)} if run.datasets else {}),
        "ss_resolution": tuple(run.resolution),
        "ss_num_train_images": images(run.dataset_dirs),
        "ss_num_reg_images": images(run.reg_dataset_dirs),
        "ss_dataset_dirs": _json(run.dataset_dirs),
        "ss_reg_dataset_dirs": _json(run.reg_dataset_dirs),
        "ss_tag_frequency": _json(run.tag_frequency),
        "ss_bucket_info": json.dumps(buckets),
    }


def _json(value: object) -> str:
    """ASCII, without what escapes of lone surrogates would bring in."""
    return json.dumps(json.loads(printable(json.dumps(value, ensure_ascii=False))))


def _model(run: TrainingMetadata) -> dict[str, object]:
    values: dict[str, object] = {
        "ss_v2": run.family.metadata.v2,
        "ss_base_model_version": run.family.metadata.base_version[run.v_prediction],
        "ss_clip_skip": run.clip_skip,
        "ss_zero_terminal_snr": run.zero_terminal_snr,
    }
    known = {"ss_sd_model_name": run.checkpoint_name, "ss_sd_model_hash": run.checkpoint_legacy_hash,
             "ss_new_sd_model_hash": run.checkpoint_sha256, "ss_vae_name": run.vae_name}
    return values | {key: value for key, value in known.items() if value is not None}


def _modelspec(run: TrainingMetadata, name: str) -> dict[str, object]:
    written_at = run.started_at if run.finished_at is None else run.finished_at
    values: dict[str, object] = {
        "modelspec.sai_model_spec": MODELSPEC,
        "modelspec.architecture": f"{run.family.metadata.architecture[run.v_prediction]}/lora",
        "modelspec.implementation": run.family.metadata.implementation,
        "modelspec.title": name,
        "modelspec.resolution": "{}x{}".format(*run.resolution),
        "modelspec.date": datetime.datetime.fromtimestamp(int(written_at), datetime.timezone.utc).isoformat(),
        "modelspec.prediction_type": "v" if run.v_prediction else "epsilon",
    }
    if run.clip_skip is not None:
        values["modelspec.encoder_layer"] = run.clip_skip
    if comment := run.settings.get("training_comment"):
        values["modelspec.description"] = comment
    return values | _trigger(str(run.settings.get("trigger_word") or ""))


def _trigger(word: str) -> dict[str, str]:
    """What calls the LoRA in a prompt, in words for a program and for a reader."""
    return {"modelspec.trigger_phrase": word, "modelspec.usage_hint": f"Trigger word: {word}"} if word else {}
