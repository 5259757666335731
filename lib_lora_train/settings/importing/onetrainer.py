"""Settings of OneTrainer: JSON in tables, a whole configuration or a preset, which holds what differs from its defaults."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path, PureWindowsPath
from typing import Any

from lib_lora_train.settings import DECLARATIONS, named
from lib_lora_train.settings.importing.entries import Imported
from lib_lora_train.settings.importing.translation import Translation
from lib_lora_train.settings.toml import tables

PROGRAM = "OneTrainer"
_LOSSES = {"mse_strength": ("l2", 1.0), "mae_strength": ("l1", 0.0), "huber_strength": ("huber", 0.0)}
_EVERY = {"save_every": "save_every_n", "sample_after": "sample_every_n"}
_UNITS = {"EPOCH": "epochs", "STEP": "steps"}
_MINUTES = {"SECOND": 1 / 60, "MINUTE": 1, "HOUR": 60}


def recognises(data: Mapping[str, Any]) -> bool:
    """Whether it holds names that only OneTrainer has."""
    return bool({"training_method", "base_model_name", "layer_filter_preset", "lora_rank", "model_type"} & data.keys()) and \
        "output_name" not in data and "train_data_dir" not in data


def read(data: Mapping[str, Any]) -> Imported:
    """The settings in such a file."""
    return _Reading(dict(_leaves(data))).imported()


@cache
def _table() -> dict[str, Any]:
    return tables(Path(__file__).with_name("onetrainer.toml"))


def _leaves(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in table.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


class _Reading:
    """One file. What is more than a renaming has a method here; each takes the names out of `left` that it read."""

    def __init__(self, given: dict[str, Any]) -> None:
        self.given, self.left = given, dict(given)
        self.translation = Translation(PROGRAM)

    def imported(self) -> Imported:
        """All of it, in this order."""
        for part in (self._loss, self._noise, self._schedule, self._text_encoders, self._network, self._masks, self._ema,
                     self._intervals, self._names, self._choices, self._optimizer):
            part()
        for name, value in self.left.items():
            self._rest(name, value)
        return self.translation.finish(_table()["defaults"])

    def _rest(self, name: str, value: object) -> None:
        """What is only renamed, not needed, or not possible."""
        table = _table()
        if name in table["renamed"]:
            if value is None:
                self.translation.unused(name, value, "it is not set")
            else:
                self.translation.add(table["renamed"][name], value, origin=name, given=value)
            return
        for why, names in table["refused"].items():
            if name in names:
                if value in names[name]:
                    self.translation.unused(name, value, "it is as here")
                else:
                    self.translation.refuse(name, value, why)
                return
        for why, patterns in table["unused"].items():
            if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns):
                self.translation.unused(name, value, why)
                return
        self.translation.refuse(name, value, "not known")

    def _pop(self, name: str, default: Any = None) -> Any:
        """(the value of `name` in the file or its default there); it is read then."""
        return self.left.pop(name, default)

    def _add(self, name: str, value: object, *origins: str, otherwise: str = "") -> None:
        """A setting made of these names of the file; where we have none of the kind, `otherwise` says why."""
        for origin in origins:
            self.left.pop(origin, None)
            if origin in self.given:
                if otherwise and name not in DECLARATIONS:
                    self.translation.refuse(origin, self.given[origin], otherwise)
                else:
                    self.translation.add(name, value, origin=origin, given=self.given[origin])

    def _refuse(self, name: str, why: str) -> None:
        self.translation.refuse(name, self.left.pop(name, ""), why)

    def _unused(self, name: str, why: str) -> None:
        if name in self.left:
            self.translation.unused(name, self.left.pop(name), why)

    def _loss(self) -> None:
        weight = self.given.get("loss_weight_fn", "CONSTANT")
        if weight in ("MIN_SNR_GAMMA", "MIN_SNR"):
            self._add("min_snr_gamma", self.given.get("loss_weight_strength", 5.0), "loss_weight_fn", "loss_weight_strength")
        elif weight == "DEBIASED_ESTIMATION":
            self._add("debiased_estimation_loss", True, "loss_weight_fn")
        elif weight == "CONSTANT":
            self._add("min_snr_gamma", 0, "loss_weight_fn")
        else:
            self._refuse("loss_weight_fn", f"noise levels are weighed by {named('min_snr_gamma')} here")
        used = [name for name, (_, usual) in _LOSSES.items() if self.given.get(name, usual)]
        names = [name for name in _LOSSES if name in self.left]
        if len(used) == 1:
            self._add("loss_type", _LOSSES[used[0]][0], *names)
        for name in names if len(used) != 1 else ():
            self._refuse(name, f"one kind of loss is counted, {named('loss_type')}")
        if used == ["huber_strength"]:
            self._add("huber_c", self.given.get("huber_delta", 1.0), "huber_delta")
            self.translation.values["huber_schedule"] = "constant"

    def _noise(self) -> None:
        for name, target in (("min_noising_strength", "min_timestep"), ("max_noising_strength", "max_timestep")):
            if name in self.left:
                self._add(target, round(1000 * float(self.given[name])), name)
        if self.given.get("force_v_prediction"):
            self._add("v_parameterization", "on", "force_v_prediction", "force_epsilon_prediction")
        elif self.given.get("force_epsilon_prediction"):
            self._add("v_parameterization", "off", "force_v_prediction", "force_epsilon_prediction")
        for name in ("force_v_prediction", "force_epsilon_prediction"):
            self._unused(name, "the checkpoint says it")
        if self.given.get("rescale_noise_scheduler_to_zero_terminal_snr"):
            self._add("zero_terminal_snr", "on", "rescale_noise_scheduler_to_zero_terminal_snr")
        self._unused("rescale_noise_scheduler_to_zero_terminal_snr", "the checkpoint says it")

    def _schedule(self) -> None:
        kind, cycles = self.given.get("learning_rate_scheduler", "CONSTANT"), self.given.get("learning_rate_cycles", 1.0)
        floor = float(self.given.get("learning_rate_min_factor") or 0)
        gathered = int(self.given.get("gradient_accumulation_steps") or 1)
        if "learning_rate_warmup_steps" in self.left:  # above 1 they are passes, else a share of the run
            warmup = float(self.given["learning_rate_warmup_steps"] or 0)
            share = max(0.0, warmup) if warmup <= 1 else int(warmup / gathered)
            self._add("lr_warmup_steps", share, "learning_rate_warmup_steps")
        elif gathered > 1:
            self.translation.values["lr_warmup_steps"] = 200 // gathered
        smooth = kind == "COSINE_WITH_RESTARTS"  # whole waves: of the half waves that others count, twice as many
        if smooth or (kind == "COSINE" and floor):
            self._add("lr_scheduler", "cosine_with_min_lr", "learning_rate_scheduler")
        if smooth or kind == "COSINE_WITH_HARD_RESTARTS":
            self._add("lr_scheduler_num_cycles", cycles * 2 if smooth else cycles, "learning_rate_cycles")
        self._unused("learning_rate_cycles", "it belongs to schedules with restarts")
        if floor and kind not in ("CONSTANT", "ADAFACTOR"):
            self._add("lr_scheduler_min_lr_ratio", floor, "learning_rate_min_factor")
        self._unused("learning_rate_min_factor", "it is off")
        scaler = self.given.get("learning_rate_scaler", "NONE")
        if scaler == "NONE":
            self._unused("learning_rate_scaler", "it is off")
        else:
            self._refuse("learning_rate_scaler", "rates are not scaled by the batch; write the rate that is meant")

    def _text_encoders(self) -> None:
        both = ("text_encoder", "text_encoder_2")
        trained = [part for part in both if self.given.get(f"{part}.train", True) and (
            part == "text_encoder" or "XL" in str(self.given.get("model_type")))]
        self._add("network_train_unet_only", not trained, *(f"{part}.train" for part in both))
        if not self._pop("unet.train", True):
            self._add("network_train_text_encoder_only", True, "unet.train")
        elif "unet.train" in self.given:
            self.translation.unused("unet.train", True, "the UNet is trained")
        for part in both:
            if part not in trained:
                for name in ("learning_rate", "stop_training_after", "stop_training_after_unit", "dropout_probability"):
                    self._unused(f"{part}.{name}", "it is not trained")
                continue
            if self.given.get(f"{part}.learning_rate") is None:
                self._unused(f"{part}.learning_rate", "it is not set")
            elif part == trained[0]:
                self._add("text_encoder_lr", self.given[f"{part}.learning_rate"], f"{part}.learning_rate")
            elif self.given[f"{part}.learning_rate"] == self.translation.values.get("text_encoder_lr"):
                self._unused(f"{part}.learning_rate", "it is that of the first")
            else:
                self._refuse(f"{part}.learning_rate", f"both text encoders have one rate, {named('text_encoder_lr')}")
            ends = self.given.get(f"{part}.stop_training_after") and self.given.get(
                f"{part}.stop_training_after_unit", "NEVER") != "NEVER"
            for name in ("stop_training_after", "stop_training_after_unit"):
                if f"{part}.{name}" in self.left:
                    (self._refuse if ends else self._unused)(f"{part}.{name}", "the text encoder is trained to the end")
        dropout = "text_encoder.dropout_probability"
        if self.given.get(dropout):
            self._add("caption_dropout_rate", self.given[dropout], dropout)
        for part in both:
            self._unused(f"{part}.dropout_probability", "it is off, or that of the first")
        if "text_encoder_layer_skip" in self.left:
            self._add("clip_skip", int(self.given["text_encoder_layer_skip"] or 0) + 1, "text_encoder_layer_skip")

    def _network(self) -> None:
        if self.given.get("peft_type") == "LOKR":
            for name, target in (("lokr_dim", "network_dim"), ("lokr_decompose_factor", "factor"),
                                 ("lokr_full_matrix", "full_matrix"), ("lokr_weight_decompose", "dora_wd")):
                self._add(target, self.given.get(name), name, otherwise="there is no such setting")
        if self.given.get("layer_filter"):
            self._refuse("layer_filter", f"layers are chosen in {named('network_targets')}")

    def _masks(self) -> None:
        if self.given.get("masked_training"):
            self._add("unmasked_weight", self.given.get("unmasked_weight", 0.1), "unmasked_weight", otherwise="not there")
            return
        for name in ("unmasked_probability", "unmasked_weight", "normalize_masked_area_loss",
                     "masked_prior_preservation_weight"):
            self._unused(name, "no masks are used")

    def _ema(self) -> None:
        if self.given.get("ema", "OFF") == "OFF":
            self._unused("ema", "it is off")
        elif "ema_decay" in DECLARATIONS:
            self._add("ema_decay", self.given.get("ema_decay", 0.999), "ema", "ema_decay")
        else:
            self._refuse("ema", "there is no average of the weights")

    def _intervals(self) -> None:
        for name, target in _EVERY.items():
            number, unit = self.given.get(name), self.given.get(f"{name}_unit", "NEVER")
            found = [key for key in (name, f"{name}_unit") if key in self.given]
            if unit in _UNITS:
                self._add(f"{target}_{_UNITS[unit]}", number, *found)
            elif unit == "NEVER" and name == "save_every":
                self._add("save_every_n_epochs", 0, *found)
            elif unit == "NEVER":
                self._add("sample_images", False, *found)
            for key in found:
                self._unused(key, "samples and saves are made by steps or epochs here")
        unit = self.given.get("backup_after_unit", "MINUTE")
        found = [key for key in ("backup_after", "backup_after_unit") if key in self.given]
        if unit in _MINUTES:
            self._add("save_state_every_n_minutes", float(self.given.get("backup_after", 30)) * _MINUTES[unit], *found)
        for key in found:
            self._unused(key, "a resume point is kept every few minutes here")

    def _names(self) -> None:
        if path := str(self.given.get("output_model_destination") or ""):
            self._add("output_name", PureWindowsPath(path).stem, "output_model_destination")

    def _choices(self) -> None:
        """Names of values that are others here."""
        for name, choices in _table()["choices"].items():
            value = self.left.get(name)
            if value is None:
                self._unused(name, "it is not set")
            elif value in choices and value != "name":
                self._add(choices["name"], choices[value], name, otherwise=f"only {value} is not another here")
            else:
                self._refuse(name, f"possible are {', '.join(key for key in choices if key != 'name')}")

    def _optimizer(self) -> None:
        names: list[str] = _table()["optimizer_args"].get(self.translation.values.get("optimizer_type", "AdamW"), [])
        betas = [f"optimizer.beta{number}" for number in (1, 2)]
        if all(self.given.get(beta) is not None for beta in betas):
            text = f"betas={self.given[betas[0]]},{self.given[betas[1]]}"
            self.translation.add_argument("optimizer_args", text, origin=betas[0], given=self.given[betas[0]])
            self.translation.unused(betas[1], self._pop(betas[1]), "it is told with the first")
            self._pop(betas[0])
        for name in [name for name in self.left if name.startswith("optimizer.") and name != "optimizer.weight_decay"]:
            key, value = name.removeprefix("optimizer."), self.left[name]
            if key in names and value is not None:
                self.translation.add_argument("optimizer_args", f"{key}={value}", origin=name, given=self._pop(name))
            elif key not in ("stochastic_rounding", "fused_back_pass"):
                self._unused(name, "it is not set, or belongs to other optimizers")
