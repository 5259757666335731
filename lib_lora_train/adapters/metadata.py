"""Facts about a run -> the metadata of its LoRA file. Every value is a string, as safetensors demands.

The names are those of kohya-ss/sd-scripts (`ss_…`), which the WebUI's Lora card and the usual viewers read, and
of Stability's ModelSpec (`modelspec.…`). Folders are written by name and never by path: a LoRA is published.

Not here: the two hashes of the file (`sshs_…`), which `file.save` adds.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

# The settings that kohya writes, under kohya's names; each becomes "ss_" + name. Others (paths above all) stay out.
SETTINGS = (
    "learning_rate", "unet_lr", "text_encoder_lr", "lr_scheduler", "lr_warmup_steps", "lr_scheduler_num_cycles",
    "network_dropout", "mixed_precision", "gradient_checkpointing", "gradient_accumulation_steps",
    "max_train_epochs", "max_train_steps", "seed", "max_grad_norm", "min_snr_gamma", "noise_offset",
    "multires_noise_iterations", "multires_noise_discount", "ip_noise_gamma", "scale_weight_norms",
    "debiased_estimation", "loss_type", "huber_c", "prior_loss_weight", "caption_dropout_rate",
    "caption_tag_dropout_rate", "shuffle_caption", "keep_tokens", "color_aug", "flip_aug", "random_crop",
    "enable_bucket", "bucket_no_upscale", "min_bucket_reso", "max_bucket_reso", "training_comment")

ARCHITECTURES = {"sd1": "stable-diffusion-v1", "sd2": "stable-diffusion-v2-512", "sdxl": "stable-diffusion-xl-v1-base"}


@dataclass(frozen=True)
class FolderFacts:
    """One dataset folder: `tags` counts how many captions hold each tag."""

    name: str
    repeats: int
    images: int
    tags: Mapping[str, int] = field(default_factory=dict)
    is_regularisation: bool = False


@dataclass(frozen=True)
class FileFacts:
    """A checkpoint or VAE: its file name, the old 8-digit hash and the full sha256, each None where unknown."""

    name: str | None = None
    legacy_hash: str | None = None
    sha256: str | None = None


@dataclass(frozen=True)
class TrainingFacts:
    """What is known of a run when one of its files is written.

    family          "sd1", "sd2" or "sdxl"
    resolution      (width, height) in pixels
    dim, alpha      the LoRA's rank and alpha
    steps, epoch    done when this file is written
    batch_size      pictures in one pass, on one device; `processes` of them train together
    started_at      seconds since 1970, as `finished_at`
    clip_skip       None where it does not apply (SDXL) or is not known
    buckets         (width, height) -> pictures with their repeats, None without buckets
    aspect_error    mean difference between a picture's and its bucket's width/height
    settings        the run's settings under kohya's names; those in `SETTINGS` are written
    """

    family: str
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
    checkpoint: FileFacts = FileFacts()
    vae: FileFacts = FileFacts()
    folders: Sequence[FolderFacts] = ()
    buckets: Mapping[tuple[int, int], int] | None = None
    aspect_error: float = 0.0
    optimizer: str = "torch.optim.adamw.AdamW"
    settings: Mapping[str, object] = field(default_factory=dict)


def describe(facts: TrainingFacts, name: str) -> dict[str, str]:
    """The metadata of the file `name`.safetensors.

    `name` is the file's stem: it becomes `ss_output_name`, the alias under which the WebUI lists the LoRA.
    A setting or fact that is None is written as kohya writes it, "None".
    """
    assert not name.endswith(".safetensors"), "the stem of the file, not its name"
    written = {setting: facts.settings[setting] for setting in SETTINGS if setting in facts.settings}
    values = {f"ss_{setting}": value for setting, value in written.items()}
    values |= _run(facts, name) | _dataset(facts) | _model(facts) | _modelspec(facts, name)
    return {key: str(value) for key, value in values.items()}


def base_model_version(family: str, *, v_prediction: bool) -> str:
    """kohya's name of the family: "sd_v1", "sd_v2" (and "_v" for v-prediction), or "sdxl_base_v1-0" as it is."""
    if family == "sdxl":
        return "sdxl_base_v1-0"
    return {"sd1": "sd_v1", "sd2": "sd_v2"}[family] + ("_v" if v_prediction else "")


def _run(facts: TrainingFacts, name: str) -> dict[str, object]:
    return {
        "ss_output_name": name,
        "ss_network_module": "networks.lora",
        "ss_network_dim": facts.dim,
        "ss_network_alpha": facts.alpha,
        "ss_optimizer": facts.optimizer,
        "ss_steps": facts.steps,
        "ss_epoch": facts.epoch,
        "ss_num_epochs": facts.total_epochs,
        "ss_max_train_steps": facts.total_steps,
        "ss_num_batches_per_epoch": facts.batches_per_epoch,
        "ss_batch_size_per_device": facts.batch_size,
        "ss_total_batch_size": facts.batch_size * facts.processes,
        "ss_training_started_at": facts.started_at,
        "ss_training_finished_at": facts.finished_at,
    }


def _dataset(facts: TrainingFacts) -> dict[str, object]:
    images = [folder for folder in facts.folders if not folder.is_regularisation]
    regularisation = [folder for folder in facts.folders if folder.is_regularisation]
    buckets = None if facts.buckets is None else {
        "buckets": {str(index): {"resolution": list(size), "count": count}
                    for index, (size, count) in enumerate(facts.buckets.items())},
        "mean_img_ar_error": facts.aspect_error}
    return {
        "ss_resolution": tuple(facts.resolution),
        "ss_num_train_images": sum(folder.images * folder.repeats for folder in images),
        "ss_num_reg_images": sum(folder.images * folder.repeats for folder in regularisation),
        "ss_dataset_dirs": _folders_json(images),
        "ss_reg_dataset_dirs": _folders_json(regularisation),
        "ss_tag_frequency": json.dumps({folder.name: dict(folder.tags) for folder in images}),
        "ss_bucket_info": json.dumps(buckets),
    }


def _folders_json(folders: Sequence[FolderFacts]) -> str:
    return json.dumps({folder.name: {"n_repeats": folder.repeats, "img_count": folder.images} for folder in folders})


def _model(facts: TrainingFacts) -> dict[str, object]:
    values: dict[str, object] = {
        "ss_v2": facts.family == "sd2",
        "ss_base_model_version": base_model_version(facts.family, v_prediction=facts.v_prediction),
        "ss_clip_skip": facts.clip_skip,
        "ss_zero_terminal_snr": facts.zero_terminal_snr,
    }
    for part, file in (("sd_model", facts.checkpoint), ("vae", facts.vae)):
        known = {f"ss_{part}_name": file.name, f"ss_{part}_hash": file.legacy_hash, f"ss_new_{part}_hash": file.sha256}
        values |= {key: value for key, value in known.items() if value is not None}
    return values


def _modelspec(facts: TrainingFacts, name: str) -> dict[str, object]:
    architecture = ARCHITECTURES[facts.family]
    if facts.family == "sd2" and facts.v_prediction:
        architecture = "stable-diffusion-v2-768-v"
    written_at = facts.started_at if facts.finished_at is None else facts.finished_at
    values: dict[str, object] = {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": f"{architecture}/lora",
        # Which naming the keys follow: sgm's for SDXL, Diffusers' otherwise.
        "modelspec.implementation":
            "https://github.com/Stability-AI/generative-models" if facts.family == "sdxl" else "diffusers",
        "modelspec.title": name,
        "modelspec.resolution": "{}x{}".format(*facts.resolution),
        "modelspec.date": datetime.datetime.fromtimestamp(int(written_at), datetime.timezone.utc).isoformat(),
        "modelspec.prediction_type": "v" if facts.v_prediction else "epsilon",
    }
    if facts.clip_skip is not None:
        values["modelspec.encoder_layer"] = facts.clip_skip
    return values
