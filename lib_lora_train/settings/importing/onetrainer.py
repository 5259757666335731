"""Settings of OneTrainer: JSON in tables, a whole configuration or a preset, which holds what differs from its defaults.

onetrainer.toml has what is only renamed, not needed or not possible; here is the rest.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path, PureWindowsPath
from typing import Any

from lib_lora_train.settings import kohya, named
from lib_lora_train.settings.importing.entries import Imported
from lib_lora_train.settings.importing.translation import Translation
from lib_lora_train.settings.toml import tables

PROGRAM = "OneTrainer"
_LOSSES = {"mse_strength": ("l2", 1.0), "mae_strength": ("l1", 0.0), "huber_strength": ("huber", 0.0)}
_UNITS = {"EPOCH": "epochs", "STEP": "steps"}
_MINUTES = {"SECOND": 1 / 60, "MINUTE": 1, "HOUR": 60}
_TEXT_ENCODERS = ("text_encoder", "text_encoder_2")
Computed = Iterator[tuple[str, object, tuple[str, ...]]]
"""(kohya's name, its value, the names of the file that it is made of)."""


def recognises(data: Mapping[str, Any]) -> bool:
    """Whether it holds names that only OneTrainer has."""
    return bool({"training_method", "base_model_name", "layer_filter_preset", "lora_rank", "model_type"} & data.keys()) and \
        "output_name" not in data and "train_data_dir" not in data


def read(data: Mapping[str, Any]) -> Imported:
    """The settings in such a file."""
    given, translation = dict(_leaves(data)), Translation(PROGRAM)
    left, refused = dict(given), dict(_refused(given))
    for part in (_loss, _schedule, _parts, _network, _intervals):
        for name, value, origins in part(given):
            translation.values[name] = value
            for origin in origins:
                if origin in left:
                    del left[origin]
                    translation.add(name, value, origin=origin, given=given[origin])
    if _trained(given) and "text_encoder.stop_training_after" not in given and int(given.get("epochs", 100)) > 30:
        translation.notes.append("OneTrainer ends the text encoder's training after 30 epochs; here it goes on to the end.")
    for name in [name for name in left if name in _table()["choices"]]:
        _choose(translation, name, left.pop(name))
    _arguments(translation, left)
    for name, value in left.items():
        if name in refused:
            translation.refuse(name, value, refused[name])
        else:
            _rest(translation, name, value)
    return translation.finish(_table()["defaults"])


@cache
def _table() -> dict[str, Any]:
    return tables(Path(__file__).with_name("onetrainer.toml"))


def _leaves(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in table.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _loss(given: Mapping[str, Any]) -> Computed:
    weight = given.get("loss_weight_fn", "CONSTANT")
    if weight in ("MIN_SNR_GAMMA", "MIN_SNR"):
        yield "min_snr_gamma", given.get("loss_weight_strength", 5.0), ("loss_weight_fn", "loss_weight_strength")
    elif weight == "DEBIASED_ESTIMATION":
        yield "debiased_estimation_loss", True, ("loss_weight_fn",)
    elif weight == "CONSTANT":
        yield "min_snr_gamma", 0, ("loss_weight_fn",)
    if len(used := _losses(given)) == 1:
        yield "loss_type", _LOSSES[used[0]][0], tuple(_LOSSES)
    if used == ["huber_strength"]:
        yield "huber_c", given.get("huber_delta", 1.0), ("huber_delta",)
        yield "huber_schedule", "constant", ()
    for name, target in (("min_noising_strength", "min_timestep"), ("max_noising_strength", "max_timestep")):
        if name in given:
            yield target, round(1000 * float(given[name])), (name,)
    normal = not (given.get("noising_bias") or given.get("noising_weight"))
    if normal and given.get("timestep_distribution") == "LOGIT_NORMAL":
        yield "timestep_distribution", "sigmoid", ("timestep_distribution",)
    if given.get("clip_grad_norm", 1.0) is None:
        yield "max_grad_norm", 0, ("clip_grad_norm",)
    if given.get("masked_training"):
        yield "unmasked_weight", given.get("unmasked_weight", 0.1), ("unmasked_weight",)


def _losses(given: Mapping[str, Any]) -> list[str]:
    return [name for name, (_, usual) in _LOSSES.items() if given.get(name, usual)]


def _schedule(given: Mapping[str, Any]) -> Computed:
    kind, cycles = given.get("learning_rate_scheduler", "CONSTANT"), given.get("learning_rate_cycles", 1.0)
    floor = float(given.get("learning_rate_min_factor") or 0)
    warmup = float(given.get("learning_rate_warmup_steps", 200) or 0)  # above 1 they are passes, else a share of the run
    gathered = int(given.get("gradient_accumulation_steps") or 1)
    yield "lr_warmup_steps", max(0.0, warmup) if warmup <= 1 else int(warmup / gathered), ("learning_rate_warmup_steps",)
    smooth = kind == "COSINE_WITH_RESTARTS"  # whole waves: of the half waves that others count, twice as many
    if smooth or (kind == "COSINE" and floor):
        yield "lr_scheduler", "cosine_with_min_lr", ("learning_rate_scheduler",)
    if smooth or kind == "COSINE_WITH_HARD_RESTARTS":
        yield "lr_scheduler_num_cycles", cycles * 2 if smooth else cycles, ("learning_rate_cycles",)
    if floor and kind not in ("CONSTANT", "ADAFACTOR"):
        yield "lr_scheduler_min_lr_ratio", floor, ("learning_rate_min_factor",)
    if given.get("ema", "OFF") != "OFF":
        yield "ema_decay", given.get("ema_decay", 0.999), ("ema", "ema_decay")


def _trained(given: Mapping[str, Any]) -> list[str]:
    """The text encoders that are trained."""
    both = _TEXT_ENCODERS if "XL" in str(given.get("model_type")) else _TEXT_ENCODERS[:1]
    return [part for part in both if given.get(f"{part}.train", True)]


def _parts(given: Mapping[str, Any]) -> Computed:
    trained = _trained(given)
    yield "network_train_unet_only", not trained, tuple(f"{part}.train" for part in _TEXT_ENCODERS)
    if not given.get("unet.train", True):
        yield "network_train_text_encoder_only", True, ("unet.train",)
    if trained and given.get(f"{trained[0]}.learning_rate") is not None:
        yield "text_encoder_lr", given[f"{trained[0]}.learning_rate"], (f"{trained[0]}.learning_rate",)
    if dropout := given.get("text_encoder.dropout_probability"):
        yield "caption_dropout_rate", dropout, ("text_encoder.dropout_probability",)
    if "text_encoder_layer_skip" in given:
        yield "clip_skip", int(given["text_encoder_layer_skip"] or 0) + 1, ("text_encoder_layer_skip",)


def _network(given: Mapping[str, Any]) -> Computed:
    if given.get("peft_type") == "LOKR":
        for name, target in (("lokr_dim", "network_dim"), ("lokr_decompose_factor", "factor"),
                             ("lokr_full_matrix", "full_matrix"), ("lokr_weight_decompose", "dora_wd")):
            if name in given:
                yield target, given[name], (name,)
    if "resolution" in given:  # several with commas; width and height with an x
        yield "resolution", str(given["resolution"]).replace(",", ";").replace("x", ","), ("resolution",)
    if path := str(given.get("output_model_destination") or ""):
        yield "output_name", PureWindowsPath(path).stem, ("output_model_destination",)


def _intervals(given: Mapping[str, Any]) -> Computed:
    for name, target in (("save_every", "save_every_n"), ("sample_after", "sample_every_n")):
        if unit := _UNITS.get(given.get(f"{name}_unit", "")):
            yield f"{target}_{unit}", given.get(name, 0), (name, f"{name}_unit")
    if given.get("save_every_unit") == "NEVER":
        yield "save_every_n_epochs", 0, ("save_every", "save_every_unit")
    if given.get("sample_after_unit") == "NEVER":
        yield "sample_images", False, ("sample_after", "sample_after_unit")
    if "backup_after" in given and (minutes := _MINUTES.get(given.get("backup_after_unit", "MINUTE"))):
        yield "save_state_every_n_minutes", float(given["backup_after"]) * minutes, ("backup_after", "backup_after_unit")


def _refused(given: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(name, why) of what would change the training and is not possible with these values."""
    yield "loss_weight_fn", f"noise levels are weighed by {named('min_snr_gamma')} here"
    if len(_losses(given)) != 1:
        yield from ((name, f"one kind of loss is counted, {named('loss_type')}") for name in _LOSSES)
    if given.get("learning_rate_scaler", "NONE") != "NONE":
        yield "learning_rate_scaler", "rates are not scaled by the batch; write the rate that is meant"
    if given.get("masked_training"):
        yield from ((name, "a mask weighs its picture's loss, each time") for name in (
            "unmasked_probability", "normalize_masked_area_loss") if given.get(name))
    trained = _trained(given)
    if len({given.get(f"{part}.learning_rate") for part in trained}) > 1:
        yield "text_encoder_2.learning_rate", f"both text encoders have one rate, {named('text_encoder_lr')}"
    for part in trained:
        if given.get(f"{part}.stop_training_after") and given.get(f"{part}.stop_training_after_unit", "NEVER") != "NEVER":
            yield from ((f"{part}.stop_training_after{of}", "the text encoder is trained to the end") for of in ("", "_unit"))
    if given.get("layer_filter") and given.get("layer_filter_preset", "full") not in _table()["choices"]["layer_filter_preset"]:
        yield "layer_filter", f"layers are chosen in {named('network_targets')}"


def _choose(translation: Translation, name: str, value: object) -> None:
    """A value that is another here."""
    choices = {key: ours for key, ours in _table()["choices"][name].items() if key != "name"}
    if str(value) in choices:
        translation.add(_table()["choices"][name]["name"], choices[str(value)], origin=name, given=value)
    elif kohya.changes_nothing("", value):
        translation.unused(name, value, "it is not set")
    else:
        translation.refuse(name, value, f"possible are {', '.join(choices)}")


def _arguments(translation: Translation, left: dict[str, Any]) -> None:
    """What the optimizer is told; the two betas are one argument."""
    betas = [f"optimizer.beta{number}" for number in (1, 2)]
    if all(left.get(beta) is not None for beta in betas):
        first, second = (left.pop(beta) for beta in betas)
        for beta, value in zip(betas, (first, second), strict=True):
            translation.add("optimizer_args", [f"betas={first},{second}"], origin=beta, given=value)
    for key in _table()["optimizer_args"].get(translation.values.get("optimizer_type", "AdamW"), ()):
        if left.get(f"optimizer.{key}") is not None:
            value = left.pop(f"optimizer.{key}")
            translation.add_argument("optimizer_args", f"{key}={value}", origin=f"optimizer.{key}", given=value)


def _rest(translation: Translation, name: str, value: object) -> None:
    """What is only renamed, not needed, or not possible."""
    table = _table()
    possible = {name: (why, values) for why, names in table["refused"].items() for name, values in names.items()}
    unused = [why for why, patterns in table["unused"].items()
              if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]
    if name in table["renamed"] and value is not None:
        translation.add(table["renamed"][name], value, origin=name, given=value)
    elif name in possible and value not in possible[name][1]:
        translation.refuse(name, value, possible[name][0])
    elif unused or name in possible or value is None:
        translation.unused(name, value, (*unused, "it is as here, or not set")[0])
    else:
        translation.refuse(name, value, "not known")
