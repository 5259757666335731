"""All settings of a run: `Settings`, made from a flat mapping of names and values.

Not here: reading presets (`presets/`) and anything that needs the dataset, the model or a device.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence

from lib_lora_train.errors import SettingError
from lib_lora_train.settings import kohya
from lib_lora_train.settings.areas import (
    CaptionSettings,
    DatasetSettings,
    EvaluationSettings,
    MemorySettings,
    OptimizerSettings,
    SaveSettings,
)
from lib_lora_train.settings.field import Declaration, Value, declarations, read
from lib_lora_train.settings.field import user_path as user_path
from lib_lora_train.settings.field import with_home as with_home
from lib_lora_train.settings.loss import LossSettings, MaskSettings, NoiseSettings, PreservationSettings
from lib_lora_train.settings.network import NetworkSettings
from lib_lora_train.settings.network_checks import check_network_settings, unused_of_network
from lib_lora_train.settings.tracking import TrackingSettings, unused_of_trackers


@dataclasses.dataclass(frozen=True)
class Settings:
    """One run's settings, an area each."""

    dataset: DatasetSettings = DatasetSettings()
    captions: CaptionSettings = CaptionSettings()
    network: NetworkSettings = NetworkSettings()
    optimizer: OptimizerSettings = OptimizerSettings()
    loss: LossSettings = LossSettings()
    noise: NoiseSettings = NoiseSettings()
    masks: MaskSettings = MaskSettings()
    preservation: PreservationSettings = PreservationSettings()
    memory: MemorySettings = MemorySettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    save: SaveSettings = SaveSettings()
    tracking: TrackingSettings = TrackingSettings()

    @property
    def rates(self) -> tuple[float, float]:
        """(UNet's, text encoder's) learning rate; 0 is not trained."""
        text = 0.0 if self.network.network_train_unet_only else self.optimizer.text_encoder_lr
        return self.optimizer.unet_lr or self.optimizer.learning_rate, text

    @property
    def embedding_rate(self) -> float:
        """The learning rate of the trigger word's vectors; 0 where they are not trained."""
        return self.network.embedding_lr if self.network.train_trigger_embedding else 0.0

    @property
    def encodes_text_in_steps(self) -> bool:
        """Whether the text encoders run in each step, since they or vectors that they read are trained."""
        return bool(self.rates[1] or self.embedding_rate)

    @property
    def encodes_in_steps(self) -> bool:
        """Whether images vary and are encoded anew at each step."""
        from lib_lora_train.settings.dataset_config import subsets_of  # which reads settings with `parse`

        return any(subset.dataset.color_aug or subset.dataset.random_crop for subset in subsets_of(self))


_OF_SCHEDULES = {
    "lr_scheduler_num_cycles": ("cosine_with_restarts", "cosine_with_min_lr", "warmup_stable_decay"),
    "lr_scheduler_power": ("polynomial",), "lr_decay_steps": ("warmup_stable_decay",),
    "lr_scheduler_min_lr_ratio": ("cosine_with_min_lr", "warmup_stable_decay", "polynomial"),
    "lr_scheduler_timescale": ("inverse_sqrt",)}
"""Settings that only these schedules look at."""
AREAS: dict[str, type] = {field.name: type(field.default) for field in dataclasses.fields(Settings)}
DECLARATIONS: dict[str, Declaration] = {
    declaration.name: declaration for area in AREAS.values() for declaration in declarations(area)}


def named(name: str) -> str:
    """A setting as every message names it: the page's label, and kohya's name in brackets."""
    return DECLARATIONS[name].named


def no_effect(name: str, why: str) -> str:
    """The sentence for a setting that is ignored."""
    return f"{named(name)} has no effect: {why}."


def parse(values: Mapping[str, object]) -> Settings:
    """Settings from names and values as typed; what is not named keeps its default. Raises SettingError for unknown names
    (all of them, with what a name of kohya's is here or the nearest known one), a wrong type or a value out of range, and for
    settings that contradict each other."""
    refuse_unknown(values)
    areas = {
        name: area(**{d.name: read(d, values[d.name]) for d in declarations(area) if d.name in values})
        for name, area in AREAS.items()}
    settings = Settings(**areas)
    if not settings.network.network_alpha:  # as in kohya's scripts
        network = dataclasses.replace(settings.network, network_alpha=float(settings.network.network_dim))
        settings = dataclasses.replace(settings, network=network)
    _check(settings)
    return settings


def refuse_unknown(values: Iterable[str]) -> None:
    """Raise SettingError for the names that are no settings, all of them at once."""
    if names := [name for name in values if name not in DECLARATIONS]:
        raise _unknown(names)


def _unknown(names: Sequence[str]) -> SettingError:
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
    """(width, height) in pixels from "auto", "512" or "768,512"; of several ("512;768") the largest. Raises SettingError."""
    return max((_size(part.strip(), written=text, default=default) for part in text.split(";")), key=math.prod)


def _size(text: str, *, written: str, default: int) -> tuple[int, int]:
    if text == "auto":
        return default, default
    parts = [part.strip() for part in text.strip("[]()").replace("x", ",").split(",")]
    if len(parts) not in (1, 2) or not all(part.isascii() and part.isdigit() for part in parts):
        raise SettingError(f"{named('resolution')} = {written!r} is not possible", why="it must be auto, a number like "
                           "512, or width,height like 768,512; several with ; between them")
    width, height = int(parts[0]), int(parts[-1])
    if not (64 <= width <= 4096 and 64 <= height <= 4096):
        raise SettingError(f"{named('resolution')} = {written!r} is not possible",
                           why="both sides must lie between 64 and 4096 pixels")
    return width, height


def ignored(settings: Settings) -> list[str]:
    """One sentence for each setting the user changed that has no effect beside the others."""
    from lib_lora_train.settings.dataset_config import subsets_of

    default, now, found = flat(Settings()), flat(settings), list[tuple[str, str]]()

    def unused(why: str, *names: str) -> None:
        found.extend((name, why) for name in names if now[name] != default[name])

    subsets = subsets_of(settings)
    captions = [subset.captions for subset in subsets]
    if not any(each.shuffle_caption or each.caption_tag_dropout_rate or each.token_warmup_step for each in captions):
        unused("tags are neither shuffled nor dropped", "keep_tokens")
    if not any(each.token_warmup_step for each in captions):
        unused("there is no tag warm-up", "token_warmup_min")
    if not any(subset.dataset.rotate_aug_degrees for subset in subsets):
        unused("nothing is turned", "rotate_aug_variants")
    elif settings.encodes_in_steps:
        unused("with colour changes or random crop each visit is turned anew", "rotate_aug_variants")
    for name, schedules in _OF_SCHEDULES.items():
        if now["lr_scheduler"] not in schedules:
            unused(f"the schedule is {now['lr_scheduler']}", name)
    if now["unet_lr"]:
        unused(f"{named('unet_lr')} takes its place", "learning_rate")
    for name, why in unused_of_network(settings.network):
        unused(why, name)
    if now["network_train_unet_only"]:
        unused(f"only the UNet is trained, {named('network_train_unet_only')}", "text_encoder_lr")
    if not now["train_trigger_embedding"]:
        unused(f"{named('train_trigger_embedding')} is off", "embedding_vectors", "embedding_init_text", "embedding_lr",
               "stop_embedding_training")
    if not now["reg_data_dir"] and not any(each.is_reg for each in subsets):
        unused(f"there is no {named('reg_data_dir')}", "prior_loss_weight")
    if settings.encodes_in_steps:
        unused("with colour changes or random crop pictures are encoded anew", "cache_latents_to_disk", "cuda_graphs")
    elif now["cpu_offload_checkpointing"]:
        unused(f"activations are in ordinary memory, {named('cpu_offload_checkpointing')}", "cuda_graphs")
    if now["memory_plan"] == "manual":
        unused(f"steps are made as was chosen, {named('memory_plan')}", "memory_budget")
    if not now["save_state"]:
        unused(f"no resume point is kept, {named('save_state')}", "save_state_every_n_minutes")
    if not now["enable_bucket"]:
        unused("aspect buckets are off", "min_bucket_reso", "max_bucket_reso", "bucket_reso_steps", "bucket_no_upscale")
    elif now["bucket_no_upscale"]:
        unused(f"with {named('bucket_no_upscale')} a picture's own size counts", "min_bucket_reso", "max_bucket_reso")
    if not now["validation"]:
        unused(f"nothing is measured, {named('validation')}", "validate_every_n_steps", "early_stopping")
    if not now["sample_images"]:
        unused(f"nothing is sampled, {named('sample_images')}", "sample_prompts", "sample_every_n_steps",
               "sample_every_n_epochs", "sample_at_first")
    elif now["sample_every_n_epochs"]:
        unused(f"{named('sample_every_n_epochs')} takes its place", "sample_every_n_steps")
    if now["log_with"] in ("none", "tensorboard"):
        unused(f"{named('log_with')} is {now['log_with']}", *unused_of_trackers(settings.tracking))
    if now["max_train_steps"]:
        unused(f"{named('max_train_steps')} says when to end", "max_train_epochs")
    _ignored_of_loss(now, unused, masked=any(each.masks.masked_loss or each.masks.alpha_mask for each in subsets),
                     triggered=any(each.dataset.trigger_word for each in subsets))
    return [no_effect(name, why) for name, why in found]


def _ignored_of_loss(now: Mapping[str, Value], unused: Callable[..., None], *, masked: bool, triggered: bool) -> None:
    """The part of `ignored` that is about loss, noise, masks and preservation."""
    if now["loss_type"] not in ("huber", "smooth_l1"):
        unused(f"the loss is {now['loss_type']}", "huber_schedule", "huber_c", "huber_scale")
    elif now["huber_schedule"] == "snr":
        unused("the schedule snr has no scale", "huber_scale")
    if not now["noise_offset"]:
        unused(f"there is no {named('noise_offset')}", "noise_offset_random_strength", "adaptive_noise_scale")
    if not now["multires_noise_iterations"]:
        unused(f"there is no {named('multires_noise_iterations')}", "multires_noise_discount")
    if not now["ip_noise_gamma"]:
        unused(f"there is no {named('ip_noise_gamma')}", "ip_noise_gamma_random_strength")
    if not now["masked_loss"]:
        unused(f"{named('masked_loss')} is off", "conditioning_data_dir")
    if not masked:
        unused(f"neither {named('masked_loss')} nor {named('alpha_mask')} is on", "unmasked_weight",
               "masked_prior_preservation_weight")
    kind = now["preservation"]
    if kind not in ("dop", "dco"):
        unused(f"{named('preservation')} is set to {kind}", "preservation_class")
    elif not triggered:
        unused("it takes the place of a trigger word, and there is none", "preservation_class")
    if kind not in ("dop", "blank"):
        unused(f"{named('preservation')} is set to {kind}", "preservation_weight")
    if kind != "dco":
        unused(f"{named('preservation')} is set to {kind}", "dco_beta")


def _check(settings: Settings) -> None:
    dataset = settings.dataset
    check_network_settings(settings.network)
    if not any((*settings.rates, settings.embedding_rate)):
        raise SettingError("Nothing would be trained", why="all learning rates are 0", remedy=f"raise {named('learning_rate')}")
    resolution_of(dataset.resolution, default=512)
    if not settings.captions.caption_separator:
        raise SettingError(f"{named('caption_separator')} is empty", remedy="write what stands between two tags, as a comma")
    if dataset.min_bucket_reso > dataset.max_bucket_reso:
        raise SettingError(f"{named('min_bucket_reso')} = {dataset.min_bucket_reso} is not possible",
                           why=f"{named('max_bucket_reso')} is smaller: {dataset.max_bucket_reso}")
    if dataset.bucket_reso_steps % 8:
        raise SettingError(f"{named('bucket_reso_steps')} = {dataset.bucket_reso_steps} is not possible",
                           why="it must be a multiple of 8, the size of one latent")
    noise, loss = settings.noise, settings.loss
    if noise.min_timestep >= noise.max_timestep:
        raise SettingError(f"{named('min_timestep')} = {noise.min_timestep} is not possible",
                           why=f"{named('max_timestep')} = {noise.max_timestep} is not above it",
                           remedy=f"lower it to {noise.max_timestep - 1} or less")
    if loss.scale_v_pred_loss_like_noise_pred and loss.v_pred_like_loss:
        raise SettingError(
            f"{named('scale_v_pred_loss_like_noise_pred')} and {named('v_pred_like_loss')} are not possible together",
            why="one is for models that predict v, the other for those that predict noise", remedy="switch one of them off")
    # Folders may have trigger words of their own, which are only known once a file with them is read.
    check_preservation(settings.preservation, triggers=[settings.dataset.trigger_word, settings.dataset.dataset_config])


def check_preservation(chosen: PreservationSettings, *, triggers: Iterable[str]) -> None:
    """Raises SettingError where dop has no words to exchange; `triggers` are the trigger words of all folders."""
    for name, needed, what in (("preservation_class", chosen.preservation_class, "cat for a cat's name"),
                               ("trigger_word", any(triggers), "the word that calls what is learnt")):
        if chosen.preservation == "dop" and not needed:
            raise SettingError(f"{named('preservation')} = dop needs {named(name)}",
                               why="it puts the class word in the trigger word's place",
                               remedy=f"write {what}, or take blank or dco, which can do without")
