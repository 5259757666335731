"""Named settings in TOML files beside this one: a [preset] table that says for whom it is, and the settings it changes.

Whoever changes a number raises the `version`: runs and files say which they were made with, and a page that remembers another
says so.

A preset changes only what it names. Those for a purpose name the same settings, so that each undoes the other;
`Low VRAM` names what memory depends on and is put on top of any of them.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from lib_lora_train.errors import SettingError
from lib_lora_train.settings import DECLARATIONS, Value, parse, read
from lib_lora_train.settings.toml import read_toml

NO_PRESET = str(DECLARATIONS["preset"].default)
CHANGED = ", changed"
"""Behind the name of a preset of whose settings one was changed since."""
PURPOSES = ("character", "style", "object")
"""What a LoRA may be for; each has a preset of its name."""
IDENTITY = frozenset({"output_name", "output_dir", "train_data_dir", "dataset_config", "trigger_word", "reg_data_dir",
                      "network_weights", "training_comment", "overwrite", "resume", "preset"})
"""What belongs to one LoRA and not to a way of training; no preset and no "Default" touches it."""
_RECORDED = re.compile(rf"(.*?)(?: \(version (\d+)\))?(?:{CHANGED})?", re.DOTALL)


@dataclasses.dataclass(frozen=True)
class Preset:
    """Settings under a name. `position` is its place in the list, `own` says that it is the user's."""

    name: str
    description: str
    position: int
    values: Mapping[str, Value]
    version: int = 1
    own: bool = False

    def recorded(self, chosen: Mapping[str, object]) -> str:
        """What a run with these settings says of it: "Style (version 1)", and whether one of its settings is another."""
        changed = any(chosen.get(name) != value for name, value in self.values.items())
        return f"{self.name} (version {self.version}){CHANGED * changed}"


@cache
def presets() -> tuple[Preset, ...]:
    """The presets beside this file, in their order."""
    found = map(read_preset, Path(__file__).parent.glob("*.toml"))
    return tuple(sorted(found, key=lambda preset: (preset.position, preset.name)))


def name_and_version(text: str) -> tuple[str, int]:
    """("Style", 1) of "Style (version 1), changed"; 0 where it names no version."""
    found = _RECORDED.fullmatch(text)
    return (found[1], int(found[2] or 0)) if found else (text, 0)


def read_preset(path: Path) -> Preset:
    """The preset in a TOML file; its settings are checked as a user's would be. Raises SettingError."""
    entries = read_toml(path)
    name, description = entries.pop("name", path.stem), entries.pop("description", "")
    position = entries.pop("position", 1000)
    version = entries.pop("version", 1)
    if not (isinstance(name, str) and isinstance(description, str) and isinstance(position, int) and isinstance(version, int)):
        raise SettingError(f"{path} is not a preset", why="name and description must be texts, position and version numbers")
    parse(entries)
    values = {key: read(DECLARATIONS[key], value) for key, value in entries.items()}
    return Preset(name, description, position, values, version)
