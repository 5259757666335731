"""Settings of the page kohya_ss, as it saves them: a flat JSON object, numbers often as text, "" for what is not set."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
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
    if not command_line:
        if "additional_parameters" in data:
            translation.unused("additional_parameters", "", "it is empty")
    else:
        try:
            parameters = list(_parameters(shlex.split(command_line)))
            for name, value in parameters:
                if name in translation.values and name.endswith("_args"):
                    translation.add_argument(name, " ".join(value), origin=f"additional_parameters: --{name}", given=value)
                else:
                    shown = value[0] if len(value) == 1 else value or True
                    translation.add(name, shown, origin=f"additional_parameters: --{name}", given=shown)
        except ValueError as error:
            translation.refuse("additional_parameters", command_line, f"it is no command line: {error}")
    _parts(translation.values)
    return sd_scripts.completed(translation)


def _parameters(words: list[str]) -> Iterator[tuple[str, list[str]]]:
    """(name, values) of each --name of a command line; a word before the first of them is a ValueError."""
    name, values = "", list[str]()
    for word in words:
        if not word.startswith("--"):
            if not name:
                raise ValueError(f"{word!r} belongs to no --name")
            values.append(word)
            continue
        if name:
            yield name, values
        name, equals, value = word[2:].partition("=")
        values = [value] if equals else []
    if name:
        yield name, values


def _parts(values: dict[str, object]) -> None:
    """Which parts are trained, as the page decides by their rates (its lora_gui.py): a rate of 0 leaves its part alone, two of
    them train both at the learning rate."""
    unet, text = (not kohya.changes_nothing("", values.get(name, "")) for name in ("unet_lr", "text_encoder_lr"))
    values.setdefault("network_train_unet_only", unet and not text)
    if unet != text and text:
        values.setdefault("network_train_text_encoder_only", True)
    if not unet and not text:
        values["text_encoder_lr"] = values.get("learning_rate", "")
