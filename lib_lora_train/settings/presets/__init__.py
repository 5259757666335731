"""Named settings in TOML files beside this one: a [preset] table that says for whom it is, and the settings it changes.

A preset changes only what it names. Those for a purpose name the same settings, so that each undoes the other;
`Low VRAM` names what memory depends on and is put on top of any of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from lib_lora_train.errors import SettingError
from lib_lora_train.settings import DECLARATIONS, Value, parse, read
from lib_lora_train.settings.toml import read_toml


@dataclasses.dataclass(frozen=True)
class Preset:
    """Settings under a name. `position` is its place in the list."""

    name: str
    description: str
    position: int
    values: Mapping[str, Value]


def presets(folder: Path = Path(__file__).parent) -> tuple[Preset, ...]:
    """The presets in `folder`, in their order. Raises SettingError for a file that cannot be read or used."""
    return tuple(sorted((read_preset(path) for path in folder.glob("*.toml")), key=lambda p: (p.position, p.name)))


def read_preset(path: Path) -> Preset:
    """The preset in a TOML file; its settings are checked as a user's would be. Raises SettingError."""
    entries = read_toml(path)
    name, description = entries.pop("name", path.stem), entries.pop("description", "")
    position = entries.pop("position", 1000)
    if not isinstance(name, str) or not isinstance(description, str) or not isinstance(position, int):
        raise SettingError(f"{path} is not a preset", why="name and description must be texts, position a number")
    parse(entries)
    return Preset(name, description, position, {key: read(DECLARATIONS[key], value) for key, value in entries.items()})
