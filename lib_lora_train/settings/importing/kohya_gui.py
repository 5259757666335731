"""Settings of the page kohya_ss, as it saves them: a flat JSON object, numbers often as text, "" for what is not set."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from lib_lora_train.settings import kohya
from lib_lora_train.settings.importing import sd_scripts
from lib_lora_train.settings.importing.entries import Imported

PROGRAM = "kohya_ss"
_ONLY_THERE = ("LoRA_type", "max_resolution", "epoch", "lr_warmup", "lora_network_weights", "additional_parameters",
               "model_list")


def recognises(data: Mapping[str, Any]) -> bool:
    """Whether it holds names that only this page has."""
    return sum(name in data for name in _ONLY_THERE) >= 2


def read(data: Mapping[str, Any]) -> Imported:
    """The settings in such a file. What stands in `additional_parameters`, a command line, goes before the fields."""
    translation = sd_scripts.started(PROGRAM, {name: value for name, value in data.items() if name != "additional_parameters"})
    command_line = str(data.get("additional_parameters") or "").strip()
    try:
        for name, values in _parameters(command_line):
            origin = f"additional_parameters: --{name}"
            if name in translation.values and name in kohya.ARGUMENTS:
                translation.add_argument(name, " ".join(values), origin=origin, given=values)
            else:
                shown = values[0] if len(values) == 1 else values or True
                translation.add(name, shown, origin=origin, given=shown)
    except ValueError as error:
        translation.refuse("additional_parameters", command_line, f"it is no command line: {error}")
    if "additional_parameters" in data and not command_line:
        translation.unused("additional_parameters", "", "it is empty")
    _parts(translation.values)
    return sd_scripts.completed(translation)


def _parameters(command_line: str) -> list[tuple[str, list[str]]]:
    """(name, values) of each --name=value, --name value… or --name. Raises ValueError."""
    found: list[tuple[str, list[str]]] = []
    for word in shlex.split(command_line):
        if word.startswith("--"):
            name, _, value = word[2:].partition("=")
            found.append((name, [value] if value else []))
        elif found:
            found[-1][1].append(word)
        else:
            raise ValueError(f"{word!r} belongs to no --name")
    return found


def _parts(values: dict[str, object]) -> None:
    """Which parts are trained, as the page decides by their rates (its lora_gui.py): a rate of 0 leaves its part alone, two of
    them train both at the learning rate."""
    unet, text = (not kohya.changes_nothing("", values.get(name, "")) for name in ("unet_lr", "text_encoder_lr"))
    values.setdefault("network_train_unet_only", unet and not text)
    if unet != text and text:
        values.setdefault("network_train_text_encoder_only", True)
    if not unet and not text:
        values["text_encoder_lr"] = values.get("learning_rate", "")
