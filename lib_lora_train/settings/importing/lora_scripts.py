"""Settings of lora-scripts (SD-Trainer of akegarasu), as it keeps them of each run: TOML with sd-scripts' names and some of the
page's own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lib_lora_train.errors import SettingError
from lib_lora_train.settings.importing import sd_scripts
from lib_lora_train.settings.importing.entries import Imported
from lib_lora_train.settings.importing.translation import Translation
from lib_lora_train.settings.toml import entries, tables_in

PROGRAM = "lora-scripts (SD-Trainer)"
_ONLY_THERE = ("model_train_type", "lycoris_algo", "optimizer_args_custom", "network_args_custom", "enable_block_weights",
               "enable_base_weight", "ui_custom_params", "enable_preview", "lr_restart_cycles", "prodigy_d_coef")
_ARGUMENTS = {"lycoris_algo": ("network_args", "algo"), "lokr_factor": ("network_args", "factor"),
              "dropout": ("network_args", "dropout"), "dylora_unit": ("network_args", "unit"),
              "prodigy_d0": ("optimizer_args", "d0"), "prodigy_d_coef": ("optimizer_args", "d_coef")}
_LISTS = {"optimizer_args_custom": "optimizer_args", "network_args_custom": "network_args",
          "optimizer_args": "optimizer_args", "network_args": "network_args"}
_PROMPT = {"negative_prompts": "n", "sample_width": "w", "sample_height": "h", "sample_cfg": "l", "sample_steps": "s",
           "sample_seed": "d"}


def recognises(data: Mapping[str, Any]) -> bool:
    """Whether it holds a name that only this page has, or is one of its presets."""
    return any(name in _ONLY_THERE for name, _ in entries(data)) or {"metadata", "data"} == data.keys()


def read(data: Mapping[str, Any]) -> Imported:
    """The settings in such a file. The TOML in `ui_custom_params` goes before all other fields, as there."""
    found = dict(entries({name: value for name, value in data.items() if name != "metadata"}))
    translation = Translation(PROGRAM)
    custom = str(found.pop("ui_custom_params", "") or "")
    try:
        found |= dict(entries(tables_in(custom, name="ui_custom_params")))
        if custom.strip():
            translation.unused("ui_custom_params", custom, "each of its settings is listed by itself")
    except SettingError as error:
        translation.refuse("ui_custom_params", custom, error.reason)
    for name in data.get("metadata", {}):
        translation.unused(f"metadata.{name}", data["metadata"][name], "it says what the preset is")
    _prompt(found, translation)
    for name, value in found.items():
        if name in _ARGUMENTS and value not in ("", None):
            target, key = _ARGUMENTS[name]
            translation.add_argument(target, f"{key}={value}", origin=name, given=value)
        elif name in _LISTS and isinstance(value, list) and value:
            for argument in value:
                translation.add_argument(_LISTS[name], str(argument), origin=name, given=argument)
        else:
            translation.add(_LISTS.get(name, name), value, origin=name, given=value)
    return sd_scripts.completed(translation)


def _prompt(found: dict[str, Any], translation: Translation) -> None:
    """The fields of the preview as one line of kohya's prompts."""
    given = {name: found.pop(name) for name in ("positive_prompts", *_PROMPT) if name in found}
    if found.get("prompt_file") or not given.get("positive_prompts"):
        for name, value in given.items():
            translation.unused(name, value, "prompt_file goes before it" if found.get("prompt_file") else "there is no prompt")
        return
    flags = (f"--{key} {given[name]}" for name, key in _PROMPT.items() if name in given)
    line = " ".join([str(given["positive_prompts"]), *flags])
    for name, value in given.items():
        translation.add("sample_prompts", line, origin=name, given=value)
