"""kohya's settings that we have under another name, do not need or cannot do yet, and what a file with them becomes here."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from lib_lora_train.errors import counted
from lib_lora_train.settings.kohya_network import adopted_network
from lib_lora_train.settings.toml import tables

_SAME_METHOD = {"pagedadamw": "AdamW", "pagedadamw32bit": "AdamW"}
_EIGHT_BIT = {"adamw8bit": "AdamW", "pagedadamw8bit": "AdamW", "lion8bit": "Lion"}
_DECAYING = ("", "adamw", "adamw8bit", "pagedadamw8bit", "pagedadamw", "pagedadamw32bit")
"""Optimizers whose weight decay is 0.01 in kohya's scripts, where none is given."""

_OTHER_NOISE = {"original": ("multires_noise_iterations", "multires_noise_discount"),
                "multires": ("noise_offset", "noise_offset_random_strength", "adaptive_noise_scale")}
"""kohya_ss's noise_offset_type -> what it stores beside it and does not use (its lora_gui.py)."""


def adopted(values: Mapping[str, object]) -> tuple[dict[str, object], list[str]]:
    """A file's values with kohya's names and conventions made ours, and sentences that tell what became of them. Unknown names
    and what is not supported stay for `parse` to refuse."""
    table = _table()
    values, became = adopted_network(values)
    theirs = {name: value for name, value in values.items() if name in explanations()}
    ours = {name: value for name, value in values.items() if name not in theirs and value not in ("", None)}
    left = {name: value for name, value in theirs.items() if not _changes_nothing(name, value)}
    for name in [name for name in left if name in table["renamed"]]:
        value, target = left.pop(name), table["renamed"][name]
        # kohya_ss shows its number of epochs also where the steps decide.
        stronger = [other for other in (target, *(["max_train_steps"] if name == "epoch" else []))
                    if not _changes_nothing(other, ours.get(other, ""))]
        if stronger:
            became.append(f"{name} is left out beside {stronger[0]}")
        else:
            ours[target] = f"{str(value).strip().removesuffix('%')}%" if name == "lr_warmup" else value
            became.append(f"{name} is read as {target} = {ours[target]}")
    became += _optimizer(ours, left, of_kohya=bool(theirs))
    for name in _OTHER_NOISE.get(str(values.get("noise_offset_type")).lower(), ()):
        ours.pop(name, None)
    if theirs:
        for name in ("v_parameterization", "zero_terminal_snr", "max_train_epochs"):
            if name in ours and _changes_nothing(name, ours[name]):  # kohya_ss writes all of its settings, also those unset
                del ours[name]
        if "max_train_epochs" in ours and ours.pop("max_train_steps", None):
            became.append("max_train_steps is left out beside max_train_epochs, as kohya's scripts do")
    unused = [f"{', '.join(found)} ({reason})" for reason, group in table["not_needed"].items()
              if (found := [name for name in group if left.pop(name, None) is not None])]
    notes = [f"Of kohya's settings {'; '.join(became)}."] if became else []
    if unused:
        notes.append(f"Not needed here, of kohya's settings: {'; '.join(unused)}.")
    if neutral := sum(_changes_nothing(name, value) for name, value in theirs.items()):
        notes.append(f"{counted(neutral, 'setting')} of kohya's had values that change nothing here.")
    if theirs and "network_train_unet_only" not in ours:
        notes.append("Only the UNet is trained: kohya's scripts train the text encoder too unless told otherwise, here "
                     "network_train_unet_only = false does.")
    return {**ours, **left}, notes


def _optimizer(ours: dict[str, object], left: dict[str, object], *, of_kohya: bool) -> list[str]:
    """Makes kohya's optimizer ours, also one that is `left`; returns what became of it. Without bitsandbytes one in eight bits
    becomes the same one in 32."""
    became = []
    for switch, meant in (("use_8bit_adam", "AdamW8bit"), ("use_lion_optimizer", "Lion")):
        if switch in left and not ours.get("optimizer_type"):
            del left[switch]
            ours["optimizer_type"], _ = meant, became.append(f"{switch} is read as optimizer_type = {meant}")
    name = str(ours.get("optimizer_type", "")).lower()
    eight_bit = {} if importlib.util.find_spec("bitsandbytes") else _EIGHT_BIT
    if same := (_SAME_METHOD | eight_bit).get(name):
        why = ", without the package bitsandbytes" if name in eight_bit else ""
        became.append(f"optimizer_type = {ours['optimizer_type']} is read as {same}, the same method{why}")
        ours["optimizer_type"] = same
    given = "weight_decay" in ours or "weight_decay" in str(ours.get("optimizer_args"))
    if of_kohya and name not in _DECAYING and not given:
        ours["weight_decay"] = 0
        became.append(f"weight_decay is 0, as kohya's scripts have it for {ours['optimizer_type']}")
    return became


@cache
def _table() -> dict[str, dict[str, object]]:
    return tables(Path(__file__).with_name("kohya.toml"))


@cache
def explanations() -> dict[str, str]:
    """{name of kohya's: what it is here, for a sentence}."""
    table = _table()
    found = {name: f"kohya's, here {ours}" for name, ours in table["renamed"].items()}
    for kind, words in (("not_needed", "not needed here"), ("not_supported", "not supported")):
        found |= {name: f"kohya's, {words}: {reason}" for reason, group in table[kind].items() for name in group}
    return found


def _changes_nothing(name: str, value: object) -> bool:
    text = str(value).strip().lower().removesuffix(".0")
    return text in ("", "0", "none", "false", "no", "[]", "{}") or text in map(str, _table()["neutral"].get(name, ()))
