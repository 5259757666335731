"""The user's presets: TOML files in a folder of the host's, offered beside the built-in ones, and given away as they are."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from pathlib import Path

from lib_lora_train.dataset.listing import file_key
from lib_lora_train.errors import OutputError, SettingError, translated
from lib_lora_train.run.output import checked_name
from lib_lora_train.settings import flat, parse
from lib_lora_train.settings.presets import CHANGED, IDENTITY, NO_PRESET, Preset, presets
from lib_lora_train.settings.presets import read_preset as read_file
from lib_lora_train.settings.toml import write_toml
from lib_lora_train.storage.atomic import remove, replace, write_atomic

log = logging.getLogger(__name__)
_DESCRIPTION, _POSITION = "A preset of your own.", 1000


def offered(folder: Path) -> tuple[Preset, ...]:
    """The built-in presets and those in the user's `folder`, which are called as their files. One that cannot be used is left
    out and logged."""
    return (*presets(), *own_presets(folder))


def own_presets(folder: Path) -> tuple[Preset, ...]:
    """Those in the user's `folder`, by name."""
    found = []
    for path in sorted(folder.glob("*.toml"), key=lambda path: file_key(path.stem)):
        try:
            found.append(_read(path))
        except SettingError as error:
            log.warning("The preset %s is left out: %s", path.name, error)
    return tuple(found)


def find_preset(name: str, folder: Path) -> Preset:
    """The preset of that name. Raises SettingError where there is none, with the names there are."""
    known = {file_key(preset.name): preset for preset in offered(folder)}
    if file_key(name) not in known:
        raise SettingError(f"There is no preset called {name!r}", remedy=f"choose {', '.join(p.name for p in known.values())}")
    return known[file_key(name)]


def save_preset(name: str, values: Mapping[str, object], folder: Path) -> Preset:
    """Keep these settings, but for what belongs to one LoRA, under a name of the user's; over an older one its version is one
    more. Raises OutputError for a name that is not possible, SettingError for settings that are not."""
    path = _path(name, folder)
    kept = {key: value for key, value in flat(parse(values)).items() if key not in IDENTITY}
    before = next((preset for preset in own_presets(folder) if file_key(preset.name) == file_key(name)), None)
    version, about = (before.version + (dict(before.values) != kept), before.description) if before else (1, _DESCRIPTION)
    path = folder / f"{before.name}.toml" if before else path
    saved = Preset(path.stem, about, _POSITION, kept, version, own=True)
    with translated("saving the preset"):
        write_atomic(path, preset_text(saved).encode())
    return saved


def rename_preset(name: str, to: str, folder: Path) -> Preset:
    """Give the user's preset another name. Raises OutputError where that is taken or not possible."""
    old, new = _existing(name, folder), _path(to, folder)
    preset = _read(old)
    if any(file_key(p.name) == file_key(new.stem) != file_key(old.stem) for p in own_presets(folder)):
        raise OutputError(f"There is a preset called {to!r} already", remedy="choose another name")
    renamed = dataclasses.replace(preset, name=new.stem)
    with translated("renaming the preset"):
        write_atomic(old, preset_text(renamed).encode())
        replace(old, new)
    return renamed


def delete_preset(name: str, folder: Path) -> Preset:
    """Remove the user's preset for good; returns it. Raises SettingError where there is none of that name."""
    preset = _read(_existing(name, folder))
    with translated("deleting the preset"):
        remove(folder / f"{preset.name}.toml")
    return preset


def preset_text(preset: Preset) -> str:
    """The file of a preset, to be given away."""
    about = write_toml({"name": preset.name, "description": preset.description, "version": preset.version})
    return f"[preset]\n{about}\n[settings]\n{write_toml(preset.values)}"


def _read(path: Path) -> Preset:
    return dataclasses.replace(read_file(path), name=path.stem, own=True)


def _existing(name: str, folder: Path) -> Path:
    for preset in own_presets(folder):
        if file_key(preset.name) == file_key(name):
            return folder / f"{preset.name}.toml"
    raise SettingError(f"{name!r} is no preset of your own", why="those that come with the extension stay as they are")


def _path(name: str, folder: Path) -> Path:
    """Where a preset of that name is kept."""
    stem = checked_name(name.strip(), what="preset")
    if any(file_key(stem) == file_key(taken) for taken in (NO_PRESET, *(p.name for p in presets()))) or CHANGED in stem:
        raise OutputError(f"A preset cannot be called {name!r}", why="that is the name of one that comes with the extension",
                          remedy="choose another name")
    return folder / f"{stem}.toml"
