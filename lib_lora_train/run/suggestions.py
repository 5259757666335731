"""Settings proposed for a folder of pictures and a purpose, each with its reason; nothing is trained and no picture decoded.

What a purpose asks for is in the presets. Here it is fitted to what is there: how many pictures, how large, how they are
captioned, whether they have masks, the model's family, its memory, and a learning rate that was found on these pictures.
"""

from __future__ import annotations

import dataclasses
import itertools
import statistics
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from lib_lora_train.dataset.captions import split_tags
from lib_lora_train.dataset.masks import masks_of
from lib_lora_train.dataset.plan import MIN_VISITS, MIN_VISITS_PER_IMAGE
from lib_lora_train.errors import SettingError, counted
from lib_lora_train.events import Diagnosed, Planned, Step
from lib_lora_train.host.port import Host
from lib_lora_train.run.memory import predicted_memory
from lib_lora_train.run.optimizing import traits_of
from lib_lora_train.run.planning import RunPlan, plan_dataset
from lib_lora_train.run.rate_finder import SUFFIX, share_for
from lib_lora_train.run.record import read_events, read_settings
from lib_lora_train.settings import DECLARATIONS, Settings, Value, flat, parse
from lib_lora_train.settings.allowed_paths import check_allowed
from lib_lora_train.settings.dataset_config import with_text
from lib_lora_train.settings.presets import PURPOSES, name_and_version, presets

FEW, SMALL_SET = 10, 20
"""Fewer pictures than these are learnt by heart soon, and move the weights hard in the first steps."""
_EPOCHS, _WARM_UP = 10, 0.05
_LOWER = {1024: 768, 768: 512}
_DECIDE_THE_RATE = ("train_data_dir", "network_module", "network_dim", "network_alpha", "train_batch_size", "resolution")
_LOOKED_AT = 30  # past runs
_HALF = "Half the rank, as is usual: the learning rates that people name are meant for that."

Fits = Callable[[Settings], "bool | None"]
"""Whether such a run fits into the memory there is as it stands; None where nobody knows."""


@dataclasses.dataclass(frozen=True)
class Suggestion:
    """A value for a setting, and a sentence that says why."""

    setting: str
    value: Value
    reason: str


@dataclasses.dataclass(frozen=True)
class Suggestions:
    """What is proposed: one for each setting, what it comes to ("22 pictures × 10 repeats × 10 epochs / batch 2 = 1,100
    steps"), and what is known to fail or to be missing, a sentence each."""

    suggestions: tuple[Suggestion, ...]
    formula: str
    warnings: tuple[str, ...]


def suggest(settings: Settings, host: Host, *, purpose: str, fits: Fits = lambda settings: None) -> Suggestions:
    """What suits the pictures of these settings. Raises UserError where they cannot be planned, Interrupted."""
    if purpose not in PURPOSES:
        raise SettingError(f"{purpose!r} is no purpose", remedy=f"choose one of {', '.join(PURPOSES)}")
    check_allowed(settings, host.allowed)
    checkpoint = host.checkpoint()
    family = checkpoint.family if checkpoint else ""
    chosen = {name: value for name, value in _of_preset(purpose).items() if name != "learning_rate"}
    made: dict[str, Suggestion] = {}
    if traits_of(settings).adapts_rate:
        chosen |= {"learning_rate": 1.0, "unet_lr": 0.0}
        if settings.optimizer.unet_lr:
            made["unet_lr"] = Suggestion("unet_lr", 0.0, "It would take the place of the learning rate, and multiply what the "
                                         "optimizer finds.")
    settings = _with(settings, chosen)
    first = plan_dataset(settings, family=family, allowed=host.allowed)
    for suggestion in itertools.chain(_purpose(purpose), _images(first, family), _captions(first, purpose),
                                      _masks(first, host)):
        made[suggestion.setting] = suggestion
    for suggestion in _length(first, settings=_with(settings, _values(made)), fits=fits):
        made[suggestion.setting] = suggestion
    planned = plan_dataset(_with(settings, _values(made)), family=family, allowed=host.allowed).settings
    for suggestion in _rate(planned, host.runs_folder, checkpoint=checkpoint.name if checkpoint else ""):
        made[suggestion.setting] = suggestion
    final = _with(settings, _values(made))
    plan = plan_dataset(final, family=family, allowed=host.allowed)
    if first.dataset.images < SMALL_SET:
        steps = max(1, round(_WARM_UP * plan.schedule.steps))
        made["lr_warmup_steps"] = Suggestion("lr_warmup_steps", steps, "A twentieth of the steps: the first steps on a small "
                                             "set are the roughest.")
        plan = plan_dataset(_with(final, {"lr_warmup_steps": steps}), family=family, allowed=host.allowed)
    missing = [] if settings.dataset.trigger_word or purpose == "style" else [
        "There is no trigger word: choose a word of its own, which calls what is learnt."]
    return Suggestions(tuple(made.values()), formula_of(plan), (*missing, *plan.warnings))


def suggestions_for(values: Mapping[str, object], purpose: str, *, host: Host) -> dict[str, Any]:
    """`suggest` by names and plain values.

    Returns purpose ("" is read from the preset, else "character"), formula, warnings, and suggestions [{setting, label, value,
    now, reason}], `now` being what `values` say. Raises UserError.
    """
    settings = parse(values)
    now = flat(settings)
    preset = name_and_version(str(now["preset"]))[0].lower()
    purpose = purpose or (preset if preset in PURPOSES else PURPOSES[0])
    checkpoint = host.checkpoint()
    outline = host.outline() if checkpoint else None

    def fits(changed: Settings) -> bool | None:
        if outline is None or checkpoint is None:
            return None
        memory, _ = predicted_memory(plan_dataset(changed, family=checkpoint.family, allowed=host.allowed), host, outline)
        return None if memory.budget is None else not memory.missing and memory.passes == 1 and not memory.config.offload

    found = suggest(settings, host, purpose=purpose, fits=fits)
    return {"purpose": purpose, "formula": found.formula, "warnings": list(found.warnings), "suggestions": [
        {"setting": one.setting, "label": DECLARATIONS[one.setting].label, "value": one.value, "now": now[one.setting],
         "reason": one.reason} for one in found.suggestions]}


def formula_of(plan: RunPlan) -> str:
    """How many steps a run has, and why: "22 pictures × 10 repeats × 10 epochs / batch 2 = 1,100 steps"."""
    repeats = sorted({example.repeats for example in plan.dataset.examples if not example.is_regularisation})
    times = counted(repeats[0], "repeat") if len(repeats) == 1 else f"{repeats[0]} to {repeats[-1]} repeats"
    optimizer = plan.settings.optimizer
    batch = optimizer.train_batch_size * optimizer.gradient_accumulation_steps * plan.processes
    of_epochs = (f"{times} × {counted(plan.schedule.epochs, 'epoch')} / batch {batch} = "
                 f"{counted(plan.schedule.steps, 'step')}")
    if any(example.is_regularisation for example in plan.dataset.examples):
        return f"({counted(plan.dataset.images, 'picture')} + as many regularisation pictures) × {of_epochs}"
    return f"{counted(plan.dataset.images, 'picture')} × {of_epochs}"


def _of_preset(purpose: str) -> Mapping[str, Value]:
    return next(preset.values for preset in presets() if preset.name.lower() == purpose)


def _with(settings: Settings, values: Mapping[str, Value]) -> Settings:
    return parse({**flat(settings), **values})


def _values(made: Mapping[str, Suggestion]) -> dict[str, Value]:
    return {name: suggestion.value for name, suggestion in made.items()}


def _purpose(purpose: str) -> Iterator[Suggestion]:
    """What the preset of the purpose says."""
    values = _of_preset(purpose)
    reasons = {
        "network_dim": {"character": "Room for a face in all its moods.", "style": "A style is many small habits, which need "
                        "more room than one face.", "object": "One rigid thing is little to learn."}[purpose],
        "network_alpha": _HALF,
        "lr_scheduler": "The rate falls to nothing at the end, so that the last saves are steady.",
        "flip_aug": "A style is the same in a mirror, and mirrored pictures are new ones." if values["flip_aug"] else
                    "Faces, letters and logos are not the same in a mirror.",
        "caption_dropout_rate": "Now and then without any words, so that the style does not hang on them."
                                if values["caption_dropout_rate"] else "The words are what calls it.",
        "caption_tag_dropout_rate": "All tags of a caption are needed to tell it from its surroundings.",
        "min_snr_gamma": "Keeps noisy and clean steps of the training in balance.",
        "max_train_steps": "The epochs decide."}
    yield from (Suggestion(name, values[name], reason) for name, reason in reasons.items())
    yield Suggestion("network_train_unet_only", True, "A small set spoils the text encoder sooner than it helps.")


def _images(plan: RunPlan, family: str) -> Iterator[Suggestion]:
    """What the number and size of the pictures ask for."""
    images, rank = plan.dataset.images, plan.settings.network.network_dim
    if images < FEW and rank > 8:
        yield Suggestion("network_dim", 8, f"{counted(images, 'picture')} hold little, and a large LoRA would copy them.")
        yield Suggestion("network_alpha", 4.0, _HALF)
    elif family == "sdxl" and rank > 16:
        yield Suggestion("network_dim", 16, "Layers of SDXL are larger, and so is each rank.")
        yield Suggestion("network_alpha", 8.0, _HALF)
    side = round((plan.resolution[0] * plan.resolution[1]) ** 0.5)
    areas = [example.width * example.height for example in plan.dataset.examples if not example.is_regularisation]
    small = sum(area < 0.8 * side * side for area in areas)
    lower = _LOWER.get(side)
    if lower and 2 * small > len(areas):
        yield Suggestion("resolution", str(lower), "More than half of the pictures are smaller than the usual size, and a LoRA "
                         "learns the softness of enlarged ones.")


def _captions(plan: RunPlan, purpose: str) -> Iterator[Suggestion]:
    """What kind of captions there are, and what may be done with them while training."""
    lines = [line for example in plan.dataset.examples if not example.is_regularisation for line in example.lines]
    tags = [len(split_tags(line)) for line in lines]
    if statistics.median(tags or [0]) >= 4:
        yield Suggestion("shuffle_caption", purpose != "object", "The captions are tags, whose order says nothing."
                         if purpose != "object" else "What is said of a thing should keep its order.")
    else:
        yield Suggestion("shuffle_caption", False, "The captions are sentences or a few words, which lose their sense when "
                         "they are shuffled.")
        yield Suggestion("caption_tag_dropout_rate", 0.0, "The captions are no lists of tags.")
    if plan.settings.dataset.trigger_word:
        yield Suggestion("keep_tokens", 1, "The trigger word stands first, and stays there.")


def _masks(plan: RunPlan, host: Host) -> Iterator[Suggestion]:
    """Whether masks that are there are heeded."""
    masked = _with(plan.settings, {"masked_loss": True})
    dataset = dataclasses.replace(plan.dataset, examples=tuple(
        dataclasses.replace(example, subset=dataclasses.replace(example.subset, masks=masked.masks))
        for example in plan.dataset.examples))
    found = len({image for image, _ in masks_of(dataset, may_read=host.allowed.may_read if host.allowed else None)})
    if found:
        yield Suggestion("masked_loss", True, f"{found} of {counted(plan.dataset.images, 'picture')} have a mask, and only "
                         "what is white in it should be learnt.")


def _length(plan: RunPlan, *, settings: Settings, fits: Fits) -> Iterator[Suggestion]:
    """Epochs, repeats and batch."""
    images = plan.dataset.images
    yield Suggestion("max_train_epochs", _EPOCHS, "Ten, with a save after every second: five to choose from.")
    yield Suggestion("save_every_n_epochs", 2, "Five saves to choose from.")
    if plan.settings.dataset.dataset_config:
        return  # which has repeats and batch size of its own
    if plan.dataset.layout == "plain":
        yield Suggestion("num_repeats", 0, f"As many as show each picture about {MIN_VISITS_PER_IMAGE} times, and all of them "
                         f"{MIN_VISITS:,} times.")
    batch = next((size for size in (4, 2) if size * 5 <= images and fits(
        _with(settings, {"train_batch_size": size}))), 1)
    yield Suggestion("train_batch_size", batch, "A step is steadier with several pictures, and they fit into the memory."
                     if batch > 1 else "One picture a step needs the least memory.")


def _rate(settings: Settings, runs_folder: Path, *, checkpoint: str) -> Iterator[Suggestion]:
    """The learning rate that was found on these pictures, or what is usual; none where nobody knows."""
    name, traits = "unet_lr" if settings.optimizer.unet_lr else "learning_rate", traits_of(settings)
    if traits.adapts_rate:
        yield Suggestion("learning_rate", 1.0, "The optimizer finds the rate itself, and multiplies it by this.")
        return
    try:
        share = share_for(settings)
    except SettingError:
        return
    if found := found_rate(settings, runs_folder, checkpoint=checkpoint):
        yield Suggestion(name, float(f"{share * found:.1e}"), "Found on these pictures by the rate finder.")
        return
    usual = 1e-4 * share * settings.optimizer.train_batch_size ** 0.5
    yield Suggestion(name, float(f"{usual:.1e}"), "What is usual for this optimizer and batch size. 'Find learning rate' finds "
                     "the one for these pictures.")


def found_rate(settings: Settings, runs_folder: Path, *, checkpoint: str) -> float:
    """AdamW's rate as the rate finder found it last for these pictures, on the model of this name and with what else decides
    it; 0 where it did not look."""
    wanted = _deciding(flat(settings))
    for folder in sorted(runs_folder.glob(f"*{SUFFIX}*"), key=lambda run: run.name[-15:], reverse=True)[:_LOOKED_AT]:
        events = list(read_events(folder))
        steps = [event.learning_rate for event in events if isinstance(event, Step)]
        rate = any(isinstance(event, Diagnosed) and event.finding == "rate" for event in events)
        model = next((event.checkpoint for event in events if isinstance(event, Planned)), "")
        if steps and rate and model == checkpoint and _deciding(read_settings(folder)) == wanted:
            return steps[-1]
    return 0.0


def _deciding(values: Mapping[str, Any]) -> dict[str, Any]:
    """What the rate depends on; the folders of a dataset_config by its text, in which they are named."""
    defaults = flat(Settings())
    found = {name: values.get(name, defaults[name]) for name in _DECIDE_THE_RATE}
    if config := values.get("dataset_config"):
        text = with_text(parse({"dataset_config": config})).dataset.dataset_config
        return {**found, "dataset_config": text, "train_data_dir": "", "train_batch_size": 0, "resolution": ""}
    return {**found, "train_data_dir": str(Path(str(found["train_data_dir"])).absolute())}
