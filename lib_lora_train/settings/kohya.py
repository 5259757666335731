"""kohya's settings that we have under another name, do not need or cannot do yet, and what a file with them becomes here."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from lib_lora_train.settings.kohya_network import adopted_network
from lib_lora_train.settings.toml import tables

_SAME_METHOD = {"pagedadamw": "AdamW", "pagedadamw32bit": "AdamW"}
_EIGHT_BIT = {"adamw8bit": "AdamW", "pagedadamw8bit": "AdamW", "lion8bit": "Lion", "pagedlion8bit": "Lion"}
_DECAYING = ("", "adamw", "adamw8bit", "pagedadamw8bit", "pagedadamw", "pagedadamw32bit")
"""Optimizers whose weight decay is 0.01 in kohya's scripts, where none is given."""

_OTHER_NOISE = {"original": ("multires_noise_iterations", "multires_noise_discount"),
                "multires": ("noise_offset", "noise_offset_random_strength", "adaptive_noise_scale")}
"""kohya_ss's noise_offset_type -> what it stores beside it and does not use (its lora_gui.py)."""


ARGUMENTS = ("network_args", "optimizer_args", "lr_scheduler_args")
"""Lists of "key=value"."""


@dataclasses.dataclass(frozen=True)
class Adopted:
    """A file's values with kohya's names and conventions made ours, and what became of the others.

    values      ours; unknown names and what is not supported stay, for `parse` to refuse
    became      sentences, each beginning with the name that the file has
    unused      {name: why it is not needed here}
    """

    values: Mapping[str, object]
    became: tuple[str, ...]
    unused: Mapping[str, str]


def adopt(values: Mapping[str, object]) -> Adopted:
    """A file's values with kohya's names and conventions made ours. Where both epochs and steps stand in it, and for the weight
    decay that it leaves out, it means what kohya's scripts do."""
    table = name_table()
    values, became = adopted_network(values)
    theirs = {name: value for name, value in values.items() if name in explanations()}
    ours = {name: value for name, value in values.items() if name not in theirs and value not in ("", None)}
    left = {name: value for name, value in theirs.items() if not changes_nothing(name, value)}
    for name in [name for name in left if name in table["renamed"]]:
        value, target = left.pop(name), table["renamed"][name]
        # kohya_ss shows its number of epochs also where the steps decide.
        stronger = [other for other in (target, *(["max_train_steps"] if name == "epoch" else []))
                    if not changes_nothing(other, ours.get(other, ""))]
        if stronger:
            became.append(f"{name} is left out beside {stronger[0]}")
        else:
            ours[target] = f"{str(value).strip().removesuffix('%')}%" if name == "lr_warmup" else value
            became.append(f"{name} is read as {target} = {ours[target]}")
    for name in [name for name in left if name in table["switches"]]:
        del left[name]
        (target, value), = table["switches"][name].items()
        ours[target] = value
        became.append(f"{name} is read as {target} = {value}")
    if str(ours.get("bucket_reso_steps")).removesuffix(".0") in map(str, range(1, 8)):
        became.append(f"bucket_reso_steps = {ours['bucket_reso_steps']} is read as 8, a pixel of the latents")
        ours["bucket_reso_steps"] = 8
    became += _optimizer(ours)
    for name in _OTHER_NOISE.get(str(values.get("noise_offset_type")).lower(), ()):
        ours.pop(name, None)
    for name in ("v_parameterization", "zero_terminal_snr", "max_train_epochs"):
        if name in ours and changes_nothing(name, ours[name]):  # kohya_ss writes all of its settings, also those unset
            del ours[name]
    if "max_train_epochs" in ours and ours.pop("max_train_steps", None):
        became.append("max_train_steps is left out beside max_train_epochs, as kohya's scripts do")
    unused = {name: reason for reason, group in table["not_needed"].items() for name in group
              if left.pop(name, None) is not None}
    return Adopted({**ours, **left}, tuple(became), unused)


def _optimizer(ours: dict[str, object]) -> list[str]:
    """Makes kohya's optimizer ours; returns what became of it. Without bitsandbytes one in eight bits is the same in 32."""
    name, became = str(ours.get("optimizer_type", "")).lower(), []
    eight_bit = {} if importlib.util.find_spec("bitsandbytes") else _EIGHT_BIT
    if same := (_SAME_METHOD | eight_bit).get(name):
        why = ", without the package bitsandbytes" if name in eight_bit else ""
        became.append(f"optimizer_type = {ours['optimizer_type']} is read as {same}, the same method{why}")
        ours["optimizer_type"] = same
    given = "weight_decay" in ours or "weight_decay" in str(ours.get("optimizer_args"))
    if not given and not default_weight_decay(name):
        ours["weight_decay"] = 0
        became.append(f"weight_decay is 0, as kohya's scripts have it for {ours['optimizer_type']}")
    return became


def default_weight_decay(optimizer_type: str) -> float:
    """What kohya's scripts have where none is given."""
    return 0.01 if optimizer_type.lower() in _DECAYING else 0.0


@cache
def name_table() -> dict[str, dict[str, object]]:
    """kohya.toml: what names of kohya's become, sorted by kind."""
    return tables(Path(__file__).with_name("kohya.toml"))


@cache
def explanations() -> dict[str, str]:
    """{name of kohya's: what it is here, for a sentence}."""
    table = name_table()
    found = {name: f"kohya's, here {ours}" for name, ours in table["renamed"].items()}
    found |= {name: f"kohya's, here {ours} = {value}"
              for name, switch in table["switches"].items() for ours, value in switch.items()}
    for kind, words in (("not_needed", "not needed here"), ("not_supported", "not supported")):
        found |= {name: f"kohya's, {words}: {reason}" for reason, group in table[kind].items() for name in group}
    return found


def changes_nothing(name: str, value: object) -> bool:
    """Whether this value of a setting of kohya's is that of one who leaves it alone."""
    text = str(value).strip().lower().removesuffix(".0")
    return text in ("", "0", "none", "false", "no", "[]", "{}") or text in map(str, name_table()["neutral"].get(name, ()))
