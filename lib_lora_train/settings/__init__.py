"""All settings of a run: `Settings`, made from a flat mapping of names and values.

Not here: reading presets (`presets/`) and anything that needs the dataset, the model or a device.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping, Sequence

from lib_lora_train.errors import SettingError
from lib_lora_train.settings import kohya
from lib_lora_train.settings.areas import (
    CaptionSettings,
    DatasetSettings,
    LossSettings,
    MemorySettings,
    NetworkSettings,
    OptimizerSettings,
    SaveSettings,
)
from lib_lora_train.settings.field import Declaration, Value, declarations, read
from lib_lora_train.settings.field import user_path as user_path
from lib_lora_train.settings.field import with_home as with_home


@dataclasses.dataclass(frozen=True)
class Settings:
    """One run's settings, an area each."""

    dataset: DatasetSettings = DatasetSettings()
    captions: CaptionSettings = CaptionSettings()
    network: NetworkSettings = NetworkSettings()
    optimizer: OptimizerSettings = OptimizerSettings()
    loss: LossSettings = LossSettings()
    memory: MemorySettings = MemorySettings()
    save: SaveSettings = SaveSettings()

    @property
    def rates(self) -> tuple[float, float]:
        """(UNet's, text encoder's) learning rate; 0 is not trained."""
        text = 0.0 if self.network.network_train_unet_only else self.optimizer.text_encoder_lr
        return self.optimizer.unet_lr or self.optimizer.learning_rate, text

    @property
    def encodes_in_steps(self) -> bool:
        """Whether images vary and are encoded anew at each step."""
        return self.dataset.color_aug or self.dataset.random_crop


AREAS: dict[str, type] = {field.name: type(field.default) for field in dataclasses.fields(Settings)}
DECLARATIONS: dict[str, Declaration] = {
    declaration.name: declaration for area in AREAS.values() for declaration in declarations(area)}


def parse(values: Mapping[str, object]) -> Settings:
    """Settings from names and values as typed; what is not named keeps its default. Raises SettingError for unknown names
    (all of them, with what a name of kohya's is here or the nearest known one), a wrong type or a value out of range, and for
    settings that contradict each other."""
    if unknown := [name for name in values if name not in DECLARATIONS]:
        raise _unknown(unknown)
    areas = {
        name: area(**{d.name: read(d, values[d.name]) for d in declarations(area) if d.name in values})
        for name, area in AREAS.items()}
    settings = Settings(**areas)
    if not settings.network.network_alpha:  # as in kohya's scripts
        network = dataclasses.replace(settings.network, network_alpha=float(settings.network.network_dim))
        settings = dataclasses.replace(settings, network=network)
    _check(settings)
    return settings


def _unknown(names: Sequence[str]) -> SettingError:
    """The refusal of all names that are no settings."""
    known = kohya.explanations()
    near = {name: difflib.get_close_matches(name, [*DECLARATIONS, *known], n=1) for name in names}
    told = {name: known.get(name) or "".join(f"did you mean {other!r}?" for other in near[name]) for name in names}
    listed = ", ".join(f"{name!r}{f' ({text})' if text else ''}" for name, text in told.items())
    what = f"There {'is no setting' if len(names) == 1 else 'are no settings'} called {listed}"
    return SettingError(what, remedy="`train --help` lists the settings")


def assignment(text: str) -> tuple[str, str]:
    """(name, value) of NAME=VALUE, as a command line's --set has it; raises SettingError."""
    name, equals, value = text.partition("=")
    if not equals:
        raise SettingError(f"--set {text} is not an assignment", remedy="write --set name=value")
    return name.strip(), value.strip()


def flat(settings: Settings) -> dict[str, Value]:
    """All settings by name: the inverse of `parse`."""
    return {name: value for area in AREAS for name, value in vars(getattr(settings, area)).items()}


def resolution_of(text: str, *, default: int) -> tuple[int, int]:
    """(width, height) in pixels from "auto", "512" or "768,512"; raises SettingError."""
    if text == "auto":
        return default, default
    parts = [part.strip() for part in text.strip("[]()").replace("x", ",").split(",")]
    if len(parts) not in (1, 2) or not all(part.isascii() and part.isdigit() for part in parts):
        raise SettingError(f"resolution = {text!r} is not possible", why="it must be auto, a number like 512, or "
                           "width,height like 768,512")
    width, height = int(parts[0]), int(parts[-1])
    if not (64 <= width <= 4096 and 64 <= height <= 4096):
        raise SettingError(f"resolution = {text!r} is not possible", why="both sides must lie between 64 and 4096 pixels")
    return width, height


def ignored(settings: Settings) -> list[str]:
    """One sentence for each setting the user changed that has no effect beside the others."""
    default, notes = Settings(), []
    captions, optimizer, dataset, memory = settings.captions, settings.optimizer, settings.dataset, settings.memory
    if captions.keep_tokens != default.captions.keep_tokens and not (
            captions.shuffle_caption or captions.caption_tag_dropout_rate):
        notes.append("keep_tokens has no effect: tags are neither shuffled nor dropped.")
    if optimizer.lr_scheduler != "cosine_with_restarts" and (
            optimizer.lr_scheduler_num_cycles != default.optimizer.lr_scheduler_num_cycles):
        notes.append(f"lr_scheduler_num_cycles has no effect with the schedule {optimizer.lr_scheduler}.")
    if optimizer.unet_lr and optimizer.learning_rate != default.optimizer.learning_rate:
        notes.append("learning_rate has no effect: unet_lr takes its place.")
    if settings.network.network_weights:
        notes += [f"{name} has no effect: it is taken from the LoRA that is continued (network_weights)."
                  for name in ("network_dim", "network_alpha")
                  if getattr(settings.network, name) != getattr(default.network, name)]
    if optimizer.text_encoder_lr != default.optimizer.text_encoder_lr and settings.network.network_train_unet_only:
        notes.append("text_encoder_lr has no effect: only the UNet is trained (network_train_unet_only).")
    if dataset.prior_loss_weight != default.dataset.prior_loss_weight and not dataset.reg_data_dir:
        notes.append("prior_loss_weight has no effect: there is no regularisation folder.")
    if settings.encodes_in_steps:
        notes += [f"{name} has no effect: with colour changes or random crop pictures are encoded anew." for name, wanted in (
            ("cache_latents_to_disk", dataset.cache_latents_to_disk), ("cuda_graphs", memory.cuda_graphs == "on")) if wanted]
    elif memory.cuda_graphs == "on" and memory.cpu_offload_checkpointing:
        notes.append("cuda_graphs has no effect: activations are in ordinary memory (cpu_offload_checkpointing).")
    if memory.memory_budget and memory.memory_plan == "manual":
        notes.append("memory_budget has no effect on the steps: they are made as was chosen (memory_plan).")
    if not settings.save.save_state and (
            settings.save.save_state_every_n_minutes != default.save.save_state_every_n_minutes):
        notes.append("save_state_every_n_minutes has no effect: no resume point is kept (save_state).")
    unused, why = (), ""
    if not dataset.enable_bucket:
        unused = ("min_bucket_reso", "max_bucket_reso", "bucket_reso_steps", "bucket_no_upscale")
        why = "aspect buckets are off"
    elif dataset.bucket_no_upscale:
        unused, why = ("min_bucket_reso", "max_bucket_reso"), "with bucket_no_upscale a picture's own size counts"
    notes += [f"{name} has no effect: {why}." for name in unused
              if getattr(dataset, name) != getattr(default.dataset, name)]
    if optimizer.max_train_steps and optimizer.max_train_epochs != default.optimizer.max_train_epochs:
        notes.append("max_train_epochs has no effect: max_train_steps says when to end.")
    return notes


def _check(settings: Settings) -> None:
    dataset = settings.dataset
    resolution_of(dataset.resolution, default=512)
    if dataset.min_bucket_reso > dataset.max_bucket_reso:
        raise SettingError(f"min_bucket_reso = {dataset.min_bucket_reso} is not possible",
                           why=f"max_bucket_reso is smaller ({dataset.max_bucket_reso})")
    if dataset.bucket_reso_steps % 8:
        raise SettingError(f"bucket_reso_steps = {dataset.bucket_reso_steps} is not possible",
                           why="it must be a multiple of 8, the size of one latent")
