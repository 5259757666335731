"""Configuration files of kohya's scripts: of a run, of a dataset, or both in one.

A run's is flat or in tables of any name, which the scripts flatten; `[general]` and `[[datasets]]` are a `dataset_config`.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from lib_lora_train.settings import kohya
from lib_lora_train.settings.dataset_config import KNOWN_NAMES
from lib_lora_train.settings.importing.entries import Imported
from lib_lora_train.settings.importing.translation import Translation
from lib_lora_train.settings.toml import entries, literal, tables

PROGRAM = "kohya's scripts"


def recognises(data: Mapping[str, Any]) -> bool:
    """Whether a file's tables hold a name that only kohya has."""
    module = str(dict(entries(data)).get("network_module", ""))
    return "datasets" in data or module.startswith(("networks.", "lycoris.")) or any(
        name in kohya.explanations() for name, _ in entries(data))


def read(data: Mapping[str, Any]) -> Imported:
    """The settings in such a file."""
    return completed(started(PROGRAM, data))


@cache
def defaults() -> dict[str, object]:
    """What kohya's scripts do where a file names nothing, where that is other than here."""
    return tables(Path(__file__).with_name("sd_scripts.toml"))["defaults"]


def started(program: str, data: Mapping[str, Any]) -> Translation:
    """The names and values of tables that hold kohya's names, and the dataset's tables as the text of a `dataset_config`."""
    translation = Translation(program)
    dataset = {name: data[name] for name in ("general", "datasets") if name in data and "datasets" in data}
    for name, value in entries({name: value for name, value in data.items() if name not in dataset}):
        translation.add(name, value)
    if dataset:
        add_folders(translation, dataset["datasets"], general=dataset.get("general", {}))
    return translation


def completed(translation: Translation) -> Imported:
    """The settings, with what kohya's scripts do where the file names nothing."""
    values = translation.values
    left_out = defaults()
    if kohya.changes_nothing("", values.get("max_train_epochs", "")) and "epoch" not in values:
        left_out = {**left_out, "max_train_steps": 1600}
    return translation.finish(left_out)


def add_folders(translation: Translation, datasets: list[Mapping[str, Any]], *, general: Mapping[str, Any]) -> None:
    """The tables of a dataset as the text of a `dataset_config`, without names that it cannot hold."""
    lines, told = list[str](), list[tuple[str, Any]]()

    def add(title: str, origin: str, values: Mapping[str, Any]) -> None:
        lines.append(title)
        for name, value in values.items():
            if name == "custom_attributes":
                lines.extend(f"{key} = {literal(inner)}" for key, inner in value.items() if key in KNOWN_NAMES)
                told.extend((f"{origin}.{key}", inner) for key, inner in value.items() if key in KNOWN_NAMES)
                values = {**values, **value}
            elif name in KNOWN_NAMES and value is not None:
                lines.append(f"{name} = {literal(value)}")
                told.append((f"{origin}.{name}", value))
        for name in values.keys() - KNOWN_NAMES - {"subsets"}:
            translation.refuse(f"{origin}.{name}", values[name], "there is no such setting of single folders")

    if general:
        add("[general]", "general", general)
    for number, dataset in enumerate(datasets, 1):
        add("[[datasets]]", f"datasets {number}", dataset)
        for index, subset in enumerate(dataset.get("subsets", []), 1):
            if "image_dir" in subset:
                add("[[datasets.subsets]]", f"subsets {number}.{index}", subset)
            else:
                translation.refuse(f"subsets {number}.{index}", ", ".join(subset), "it names no folder of pictures")
    for origin, value in told:
        translation.add("dataset_config", "\n".join(lines) + "\n", origin=origin, given=value)
