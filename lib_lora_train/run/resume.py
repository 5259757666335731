"""An interrupted run found again, and whether what is to go on is still that run.

A state says what it belongs to: all settings, the pictures and captions, the checkpoint. What would make it meaningless is
refused; what only makes the result another one than an uninterrupted run's is told, a sentence each.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from lib_lora_train.adapters.file import read_metadata
from lib_lora_train.dataset.buckets import Placement
from lib_lora_train.dataset.folder import Dataset
from lib_lora_train.errors import LoraFileError, ModelError, SettingError, translated
from lib_lora_train.host.port import LeasedModel
from lib_lora_train.memory.step_config import BaseDtype as Base
from lib_lora_train.model.fingerprint import sampled_fingerprint
from lib_lora_train.settings import Settings, flat, parse
from lib_lora_train.training import checkpoint as checkpoint_module
from lib_lora_train.training.checkpoint import FILE_NAME, TrainingState

# What the weights and moments are made of: no other value fits them.
FIXED = frozenset({"network_dim", "network_alpha", "network_train_unet_only", "network_weights", "optimizer_type"})
# What changes no step that is still to be made. Paths may change as long as the same files lie there; how long the run is
# is told apart, since it matters to the schedule.
FREE = frozenset({
    "train_data_dir", "reg_data_dir", "cache_latents_to_disk", "vae_batch_size", "gradient_checkpointing", "memory_plan",
    "memory_budget", "cpu_offload_checkpointing", "channels_last", "max_train_steps", "max_train_epochs", "output_name",
    "output_dir", "overwrite", "save_precision", "save_every_n_epochs", "save_every_n_steps", "save_state",
    "save_state_every_n_minutes", "save_state_on_train_end", "resume", "training_comment", "yield_to_generations",
    "cuda_graphs", "num_repeats"})
_END = 1 << 16  # bytes at each end of a picture's file that tell it from another of its size


@dataclasses.dataclass(frozen=True)
class ResumePoint:
    """Where a run goes on: `facts` are what its state says of itself."""

    path: Path
    metadata: Mapping[str, Any]

    @property
    def step(self) -> int:
        """Steps that were made."""
        return int(self.metadata["step"])

    @property
    def processes(self) -> int:
        """How many trained together."""
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
        try:
            return read_metadata(path).get("ss_training_started_at") == str(self.started_at)
        except LoraFileError:
            return False


def find(text: str, runs: Path) -> ResumePoint:
    """The state that `text` names: a run's name in `runs`, a run's folder, or a state's file.

    Raises LoraFileError where there is none or it cannot be read.
    """
    path = run_folder(text, runs) or Path(text)
    path = path / FILE_NAME if path.suffix != ".safetensors" else path
    facts = checkpoint_module.read_facts(path)
    known = {"settings": dict, "started_at": (int, float), "steps": int, "dataset": str, "checkpoint": dict}
    if not all(isinstance(facts.get(name), kind) for name, kind in known.items()):
        raise LoraFileError(f"{path} is not a training state", remedy=f"choose a run's folder or its {FILE_NAME}")
    return ResumePoint(path, facts)


def run_folder(text: str, runs: Path) -> Path | None:
    """The folder below `runs` that `text` names, by its name alone or as a path; None for anything that lies elsewhere."""
    plain = text not in ("", ".", "..") and not set(text) & set('/\\:')
    folder = runs / text if plain else Path(text)
    return folder if folder.is_dir() and folder.resolve().parent == runs.resolve() else None


def settings_of(point: ResumePoint, changes: Mapping[str, object]) -> Settings:
    """The settings to go on with: those of the run, but for `changes`. Raises SettingError."""
    return parse({**point.metadata["settings"], **changes, "resume": str(point.path.parent)})


def facts(settings: Settings, *, steps: int, processes: int, dataset: str, checkpoint: Mapping[str, str], started_at: float,
          dtype: torch.dtype, base: Base) -> dict[str, Any]:
    """What a state is told of its run; `base` is what the model was really held in. Reads a little of every picture; raises
    OutputError where one is gone."""
    return {
        "settings": flat(settings), "started_at": started_at, "steps": steps, "processes": processes,
        "dataset": dataset, "computed_in": str(dtype).removeprefix("torch."),
        "base": base,
        "checkpoint": dict(checkpoint)}


def checkpoint_facts(borrowed: LeasedModel) -> dict[str, str]:
    """What a state is told of the model."""
    return {"name": borrowed.checkpoint.name, "fingerprint": sampled_fingerprint(borrowed.tensors)}


def compare_settings(settings: Settings, point: ResumePoint, *, steps: int, processes: int = 1) -> list[str]:
    """A sentence for each setting that makes the result another one than an uninterrupted run's.

    `steps` is how many the run is to have now, in so many `processes`. Raises SettingError for a setting that cannot change
    on the way.
    """
    if steps < point.step:
        raise SettingError(f"The run has made {point.step} steps already, and would now end after {steps}",
                           remedy="raise max_train_steps (or max_train_epochs)")
    then, notes = point.metadata["settings"], []
    for name, now in flat(settings).items():
        before = then.get(name, now)
        if name in FREE or before == now or (name == "train_batch_size" and processes != point.processes):
            continue
        change = f"{name} is {now!r} and was {before!r}"
        if name in FIXED:
            raise SettingError(f"The run cannot go on: {change} until step {point.step}",
                               remedy=f"set it back to {before!r}, or start anew")
        notes.append(f"{change} until step {point.step}: the result will not be that of an uninterrupted run.")
    images, images_then = settings.optimizer.train_batch_size, then.get("train_batch_size", 1)
    if processes != point.processes and images * processes != images_then * point.processes:
        notes.append(f"A batch is now {images} × {processes} pictures (train_batch_size × processes) and was {images_then} "
                     f"× {point.processes} until step {point.step}: the result will not be that of an uninterrupted run.")
    before = point.metadata["steps"]
    schedule = settings.optimizer.lr_scheduler
    if steps != before and schedule != "constant":
        notes.append(f"The run now has {steps} steps and had {before} (max_train_steps, max_train_epochs): the learning "
                     f"rate of the schedule {schedule} is another one from here on.")
    return notes


def base_of(point: ResumePoint, settings: Settings) -> Base:
    """What the model was held in until the point, by the settings or the memory plan's choice; "" where the settings have
    changed since."""
    base = point.metadata.get("base", "")
    same = settings.memory.base_weights == point.metadata["settings"].get("base_weights")
    return base if same and base in ("int8", "fp8") else ""


def compare_checkpoint(now: Mapping[str, str], point: ResumePoint) -> None:
    """Raises ModelError unless the model is the one that the run began with."""
    then = point.metadata["checkpoint"]
    if now["fingerprint"] == then.get("fingerprint"):
        return
    named, loaded = then.get("name", "?"), now["name"]
    other = f"{loaded} is loaded and it began on {named}" if loaded != named else (
        f"{named} is not what it was: another file of this name, another VAE or another number format")
    raise ModelError("The run cannot go on with this checkpoint", why=other,
                     remedy="load the checkpoint and VAE it began with, or go on from its LoRA file (network_weights)")


def compare_data(now: Mapping[str, Any], point: ResumePoint) -> list[str]:
    """As `compare_settings`, for pictures, captions and precision."""
    then, notes = point.metadata, []
    if now["dataset"] != then["dataset"]:
        notes.append("The pictures, their captions or repeats are not those the run began with (train_data_dir): the result "
                     "will not be that of an uninterrupted run.")
    if now["computed_in"] != then.get("computed_in"):
        notes.append(f"The run now computes in {now['computed_in']} and began in {then.get('computed_in')} "
                     "(mixed_precision): the result will not be that of an uninterrupted run.")
    base, base_then = now["base"], then.get("base", now["base"])
    if base != base_then and now["settings"]["base_weights"] == then["settings"].get("base_weights"):
        own = "its own number format"
        notes.append(f"The model is now held in {base or own} and was held in {base_then or own} "
                     "(base_weights): the result will not be that of an uninterrupted run.")
    return notes


def dataset_fingerprint(dataset: Dataset, placements: Sequence[Placement]) -> str:
    """sha256 of what the run sees of its pictures: names, captions, repeats, crops, and of each file its length and both
    ends. Where the folder lies does not matter."""
    digest = hashlib.sha256()
    with translated("reading the pictures"):
        for example, placement in zip(dataset.examples, placements, strict=True):
            about = (example.folder, example.path.name, example.caption, example.repeats, example.is_regularisation,
                     placement.bucket, placement.resized, placement.crop)
            digest.update(json.dumps(about).encode())
            with example.path.open("rb") as file:
                digest.update(file.read(_END))
                size = file.seek(0, os.SEEK_END)
                file.seek(max(_END, size - _END))
                digest.update(file.read() + str(size).encode())
    return digest.hexdigest()
