"""Resuming a run: its resume point is found, and compared with the settings, images and checkpoint it is to go on with.

What no longer fits the saved weights and moments is refused. What changes the result compared with an uninterrupted run is
a warning.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from lib_lora_train.adapters.file import read_metadata
from lib_lora_train.dataset.buckets import Placement
from lib_lora_train.dataset.examples import Dataset, Masked
from lib_lora_train.errors import LoraFileError, ModelError, SettingError, counted, translated
from lib_lora_train.host.placement import weights_of
from lib_lora_train.host.port import LeasedModel
from lib_lora_train.memory.step_config import BaseDtype
from lib_lora_train.model.fingerprint import sampled_fingerprint
from lib_lora_train.model.frozen import FrozenModel
from lib_lora_train.settings import Settings, flat, named, parse
from lib_lora_train.settings.allowed_paths import is_run_name
from lib_lora_train.settings.network import BLOCK_RATES, BLOCK_SIZES, LORA_PLUS
from lib_lora_train.training import checkpoint as checkpoint_module
from lib_lora_train.training.checkpoint import FILE_NAME, TrainingState

# Other values of these do not fit the saved weights and moments.
FIXED = frozenset({"network_dim", "network_alpha", "network_train_unet_only", "network_weights", "optimizer_type",
                   "optimizer_args", "network_module", "dora_wd", "network_targets", "conv_dim", "conv_alpha", "factor",
                   "full_matrix", "rs_lora", *LORA_PLUS, *BLOCK_SIZES, *BLOCK_RATES, "block_lr_zero_threshold",
                   "train_trigger_embedding", "embedding_vectors", "embedding_init_text"})
# These change none of the steps to come. The files below changed paths are compared apart, and so is the length of the run,
# which matters to the schedule.
FREE = frozenset({
    "train_data_dir", "reg_data_dir", "conditioning_data_dir", "cache_latents_to_disk", "vae_batch_size",
    "gradient_checkpointing", "memory_plan", "memory_budget", "cpu_offload_checkpointing", "channels_last", "blocks_to_swap",
    "max_train_steps", "max_train_epochs", "max_train_minutes", "output_name", "output_dir", "overwrite", "save_precision",
    "save_every_n_epochs", "save_every_n_steps", "save_state", "save_state_every_n_minutes", "save_state_on_train_end",
    "resume", "training_comment", "preset", "yield_to_generations", "cuda_graphs", "num_repeats", "validation",
    "validate_every_n_steps", "early_stopping", "sample_images", "sample_prompts", "sample_every_n_steps",
    "sample_every_n_epochs", "sample_at_first", "log_with", "logging_dir", "log_prefix", "log_tracker_name",
    "wandb_run_name"})
_DIFFERENT = "the result will not be that of an uninterrupted run."
_END = 1 << 16  # bytes at each end of an image file that go into the fingerprint


@dataclasses.dataclass(frozen=True)
class ResumePoint:
    """A state's file that a run can go on from, and the metadata in it (see `describe`)."""

    path: Path
    metadata: Mapping[str, Any]

    @property
    def step(self) -> int:
        """The number of steps made."""
        return int(self.metadata["step"])

    @property
    def processes(self) -> int:
        """The number of processes that trained together."""
        return int(self.metadata.get("processes", 1))

    @property
    def started_at(self) -> float:
        """When the run first began, seconds since 1970."""
        return float(self.metadata["started_at"])

    def load(self) -> TrainingState:
        """The tensors too. Raises LoraFileError."""
        return checkpoint_module.read(self.path)[0]

    def wrote(self, path: Path) -> bool:
        """Whether the LoRA at `path` is an earlier save of this very run, which may be replaced."""
        return wrote(path, started_at=self.started_at)


def wrote(path: Path, *, started_at: float) -> bool:
    """Whether the run that began then wrote the LoRA at `path`."""
    try:
        return read_metadata(path).get("ss_training_started_at") == str(started_at)
    except LoraFileError:
        return False


def find(text: str, runs: Path) -> ResumePoint:
    """The resume point that `text` names: a run's name in `runs`, a run's folder, or a state's file. Raises LoraFileError
    where there is none or it cannot be read."""
    path = run_folder(text, runs) or Path(text)
    path = path / FILE_NAME if path.suffix != ".safetensors" else path
    metadata = checkpoint_module.read_metadata(path)
    known = {"settings": dict, "started_at": (int, float), "steps": int, "dataset": str, "checkpoint": dict}
    if not all(isinstance(metadata.get(name), kind) for name, kind in known.items()):
        raise LoraFileError(f"{path} is not a training state", remedy=f"choose a run's folder or its {FILE_NAME}")
    return ResumePoint(path, metadata)


def run_folder(text: str, runs: Path) -> Path | None:
    """The folder in `runs` that `text` names, as a name or a path; None for anything elsewhere."""
    folder = runs / text if is_run_name(text) else Path(text)
    return folder if os.path.isdir(folder) and folder.resolve().parent == runs.resolve() else None


def settings_of(resume_point: ResumePoint, changes: Mapping[str, object]) -> Settings:
    """The settings of the run with `changes`, to go on with. Raises SettingError."""
    return parse({**resume_point.metadata["settings"], **changes, "resume": str(resume_point.path.parent)})


def with_recorded_split(settings: Settings, resume_point: ResumePoint | None) -> Settings:
    """`settings`, holding no image out where the run to go on with began before any were: its images stay the same."""
    if resume_point is None or "validation_split" in resume_point.metadata["settings"]:
        return settings
    return dataclasses.replace(settings, evaluation=dataclasses.replace(settings.evaluation, validation_split=0.0))


def describe(settings: Settings, *, steps: int, processes: int, dataset: str, checkpoint: Mapping[str, str], started_at: float,
             dtype: torch.dtype, base_dtype: BaseDtype) -> dict[str, Any]:
    """The metadata of a run's states; `dataset` is a `dataset_fingerprint`, `base_dtype` what the model is held in."""
    return {
        "settings": flat(settings), "started_at": started_at, "steps": steps, "processes": processes, "dataset": dataset,
        "computed_in": str(dtype).removeprefix("torch."), "base": base_dtype, "checkpoint": dict(checkpoint)}


def describe_checkpoint(leased: LeasedModel, model: FrozenModel) -> dict[str, str]:
    """The model's part of the metadata: its name, what its weights are told by, and the noise schedule it is trained on."""
    zero = ", zero terminal SNR" if model.architecture.zero_terminal_snr else ""
    return {"name": leased.checkpoint.name, "weights": sampled_fingerprint(weights_of(leased.tensors)),
            "schedule": model.schedule.prediction_type + zero}


def compare_settings(settings: Settings, resume_point: ResumePoint, *, steps: int, processes: int = 1) -> list[str]:
    """A warning for each setting that changes the result compared with an uninterrupted run. `steps` and `processes` are the
    run's new numbers. Raises SettingError for a setting that cannot change."""
    then, before, made = resume_point.metadata["settings"], resume_point.metadata["steps"], resume_point.step
    if steps < made:
        raise SettingError(f"The run has made {counted(made, 'step')} already, and would now end after {steps}",
                           remedy=f"raise {named('max_train_steps')} or {named('max_train_epochs')}")
    warnings = []
    for name, value in flat(settings).items():
        old = then.get(name, value)
        if name in FREE or old == value or (name == "train_batch_size" and processes != resume_point.processes):
            continue
        change = f"{named(name)} is {value!r} and was {old!r} until step {made}"
        if name in FIXED:
            raise SettingError(f"The run cannot go on: {change}", remedy=f"set it back to {old!r}, or start anew")
        warnings.append(f"{change}: {_DIFFERENT}")
    images, images_then = settings.optimizer.train_batch_size, then.get("train_batch_size", 1)
    if processes != resume_point.processes and images * processes != images_then * resume_point.processes:
        warnings.append(f"A batch is now {images} × {processes} pictures ({named('train_batch_size')} × processes) and was "
                        f"{images_then} × {resume_point.processes} until step {made}: {_DIFFERENT}")
    schedule = settings.optimizer.lr_scheduler
    if steps != before and schedule != "constant":
        warnings.append(f"The run now has {counted(steps, 'step')} and had {before}, by {named('max_train_steps')} or "
                        f"{named('max_train_epochs')}: the learning rate of the schedule {schedule} is another one from "
                        "here on.")
    return warnings


def quantized_dtype(resume_point: ResumePoint, settings: Settings) -> BaseDtype:
    """The eight-bit dtype that the model was held in; "" for none, or where base_weights has changed since."""
    base = resume_point.metadata.get("base", "")
    same = settings.memory.base_weights == resume_point.metadata["settings"].get("base_weights")
    return base if same and base in ("int8", "fp8") else ""


def compare_checkpoint(leased: LeasedModel, now: Mapping[str, str], resume_point: ResumePoint) -> None:
    """Raise ModelError unless the model, `now` described, is the one that the run began with."""
    then = resume_point.metadata["checkpoint"]
    # Older states were told by all tensors, the noise schedule's among them.
    same = (now["weights"] == then["weights"] if "weights" in then
            else sampled_fingerprint(leased.tensors) == then.get("fingerprint"))
    if same:
        return
    first, loaded = then.get("name", "?"), now["name"]
    other = f"{loaded} is loaded and it began on {first}" if loaded != first else (
        f"{first} is not what it was: another file of this name, another VAE or another number format")
    raise ModelError("The run cannot go on with this checkpoint", why=other,
                     remedy="load the checkpoint and VAE it began with, or go on from its LoRA file, "
                            f"{named('network_weights')}")


def compare_data(now: Mapping[str, Any], resume_point: ResumePoint) -> list[str]:
    """As `compare_settings`, for images, captions and precision."""
    then, warnings = resume_point.metadata, []
    if now["dataset"] != then["dataset"]:
        warnings.append(f"The pictures, their captions or repeats are not those the run began with, "
                        f"{named('train_data_dir')}: {_DIFFERENT}")
    if now["computed_in"] != then.get("computed_in"):
        warnings.append(f"The run now computes in {now['computed_in']} and began in {then.get('computed_in')} "
                        f"({named('mixed_precision')}): {_DIFFERENT}")
    schedule, schedule_then = now["checkpoint"]["schedule"], then["checkpoint"].get("schedule")
    if schedule_then not in (None, schedule) and all(now["settings"][name] == then["settings"].get(name)
                                                     for name in ("v_parameterization", "zero_terminal_snr")):
        warnings.append(f"The model is now trained on the noise schedule {schedule} and was on {schedule_then} "
                        f"({named('v_parameterization')}, {named('zero_terminal_snr')}): {_DIFFERENT}")
    base, base_then, own = now["base"], then.get("base", now["base"]), "its own number format"
    if base != base_then and now["settings"]["base_weights"] == then["settings"].get("base_weights"):
        warnings.append(f"The model is now held in {base or own} and was held in {base_then or own} "
                        f"({named('base_weights')}): {_DIFFERENT}")
    return warnings


def dataset_fingerprint(dataset: Dataset, placements: Sequence[Placement],
                        masks: Mapping[Masked, Path] = MappingProxyType({})) -> str:
    """The sha256 of the dataset as the run sees it: names, captions, repeats, crops, and the length and both ends of each
    image file and of its mask. Its folder's path does not matter. Raises OutputError where a file is gone."""
    digest = hashlib.sha256()
    with translated("reading the pictures"):
        for example, placement in zip(dataset.examples, placements, strict=True):
            about = (example.folder, example.path.name, example.caption, example.repeats, example.is_regularisation,
                     placement.bucket, placement.resized, placement.crop, *example.captions)
            digest.update(json.dumps(about).encode())
            for path in filter(None, (example.path, masks.get(example.masked))):
                digest.update(ends_of(path))
    return digest.hexdigest()


def ends_of(path: Path) -> bytes:
    """The first and the last bytes of a file, and its size: what tells an image from another. Raises OSError."""
    with path.open("rb") as file:
        first = file.read(_END)
        size = file.seek(0, os.SEEK_END)
        file.seek(max(_END, size - _END))
        return first + file.read() + str(size).encode()
