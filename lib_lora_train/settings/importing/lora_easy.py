"""Settings of LoRA Easy Training Scripts (derrian-distro): TOML, a table for each part of its window, each with `args` and
`dataset_args`, and `[[subsets]]`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lib_lora_train.settings.importing import sd_scripts
from lib_lora_train.settings.importing.entries import Imported
from lib_lora_train.settings.importing.translation import Translation

PROGRAM = "LoRA Easy Training Scripts"
_RENAMED = {"warmup_ratio": "lr_warmup_steps", "batch_size": "train_batch_size"}
_ONLY_THERE = {name: "only its window uses it" for name in (
    "easy_name", "tag_occurrence", "tag_file_location", "save_toml", "save_toml_location", "name")}
_SCHEDULES = {"Rex": "rex", "RexAnnealingWarmRestarts": "rex", "CosineAnnealingWarmRestarts": "cosine_with_restarts"}
_LYCORIS = ("locon", "loha", "lokr", "ia3", "dylora", "full", "glora", "diag-oft", "boft")


def recognises(data: Mapping[str, Any]) -> bool:
    """Whether its tables are the parts of that window."""
    return any(isinstance(table, dict) and ("args" in table or "dataset_args" in table) for table in data.values())


def read(data: Mapping[str, Any]) -> Imported:
    """The settings in such a file."""
    translation = Translation(PROGRAM)
    for part, table in data.items():
        if part == "subsets" or not isinstance(table, dict):
            continue
        for kind, values in table.items():
            of_part = values if kind in ("args", "dataset_args") and isinstance(values, dict) else {kind: values}
            for name, value in of_part.items():
                _add(translation, f"{part}.{name}", name, value)
    subsets = [dict(subset) for subset in data.get("subsets", [])]
    if subsets:
        translation.unused("subsets.name", [subset.pop("name", "") for subset in subsets], _ONLY_THERE["name"])
        sd_scripts.add_folders(translation, [{"subsets": subsets}], general={})
    return sd_scripts.completed(translation)


def _add(translation: Translation, origin: str, name: str, value: Any) -> None:
    if name == "train_mode":
        if value == "lora":
            translation.unused(origin, value, "a LoRA is what is trained")
        else:
            translation.refuse(origin, value, "only LoRAs are trained")
    elif isinstance(value, dict) and origin.startswith("extra_args."):
        _add(translation, origin.removeprefix("extra_args."), name, value.get("value"))
    elif isinstance(value, dict):  # network_args, optimizer_args, lr_scheduler_args
        if not value:
            translation.unused(origin, value, "it is empty")
        for key, inner in value.items():
            _add_inner(translation, f"{origin}.{key}", name, key, inner)
    elif name in _ONLY_THERE:
        translation.unused(origin, value, _ONLY_THERE[name])
    elif name == "lr_scheduler_type" and (schedule := _SCHEDULES.get(str(value).rpartition(".")[2])):
        translation.add("lr_scheduler", schedule, origin=origin, given=value)
    elif name == "lr_scheduler" and "lr_scheduler" in translation.values:
        translation.unused(origin, value, "the type of the schedule goes before it")
    else:
        translation.add(_RENAMED.get(name, name), value, origin=origin, given=value)


def _add_inner(translation: Translation, origin: str, name: str, key: str, value: Any) -> None:
    text = ",".join(map(str, value)) if isinstance(value, list) else value
    translation.add_argument(name, f"{key}={text}", origin=origin, given=value)
    if name == "network_args" and key == "algo":
        translation.values.setdefault("network_module", "lycoris.kohya" if value in _LYCORIS else "networks.lora")
