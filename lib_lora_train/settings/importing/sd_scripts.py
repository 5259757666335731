"""Configuration files of kohya's scripts: of a run, of a dataset, or both in one.

A run's is flat or in tables of any name, which the scripts flatten; `[general]` and `[[datasets]]` are a `dataset_config`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from lib_lora_train.settings import kohya
from lib_lora_train.settings.importing.entries import Imported
from lib_lora_train.settings.importing.translation import Translation
from lib_lora_train.settings.toml import tables

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
        text = dataset_text(dataset.get("general", {}), dataset["datasets"])
        for name in dataset:
            translation.add("dataset_config", text, origin=name, given=f"{len(dataset[name])} entries")
    return translation


def completed(translation: Translation) -> Imported:
    """The settings, with what kohya's scripts do where the file names nothing."""
    values = translation.values
    left_out = defaults()
    if kohya.changes_nothing("", values.get("max_train_epochs", "")) and "epoch" not in values:
        left_out = {**left_out, "max_train_steps": 1600}
    return translation.finish(left_out)


def entries(table: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """(name, value) of everything in tables within tables."""
    for name, value in table.items():
        yield from entries(value) if isinstance(value, dict) else [(name, value)]


def dataset_text(general: Mapping[str, Any], datasets: list[Mapping[str, Any]]) -> str:
    """The text of a `dataset_config` with these tables."""
    lines = _table("[general]", general) if general else []
    for dataset in datasets:
        lines += _table("[[datasets]]", {name: value for name, value in dataset.items() if name != "subsets"})
        for subset in dataset.get("subsets", []):
            lines += _table("[[datasets.subsets]]", subset)
    return "\n".join(lines) + "\n"


def _table(title: str, values: Mapping[str, Any]) -> list[str]:
    return [title, *(f"{name} = {_literal(value)}" for name, value in values.items() if value is not None)]


def _literal(value: Any) -> str:
    """Of TOML: JSON's but for tables, which stand on one line."""
    if isinstance(value, dict):
        return f"{{{', '.join(f'{name} = {_literal(inner)}' for name, inner in value.items())}}}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_literal, value))}]"
    return json.dumps(value, ensure_ascii=False, default=str).replace("\x7f", "\\u007f")
