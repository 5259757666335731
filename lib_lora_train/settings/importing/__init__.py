"""Settings of other programs, and of a LoRA file ("train like this one"), as settings of ours.

Each format has a module with `recognises` and `read`. All are read into kohya's names first and go through `settings/kohya.py`
to ours, so that what becomes possible here is taken from every format. A file of our own is held to its names.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from lib_lora_train.errors import SettingError
from lib_lora_train.settings import DECLARATIONS, refuse_unknown
from lib_lora_train.settings.field import read
from lib_lora_train.settings.importing import kohya_gui, lora_easy, lora_file, lora_scripts, onetrainer, sd_scripts
from lib_lora_train.settings.importing.entries import OURS, Entry, Imported
from lib_lora_train.settings.toml import decoded, flattened, tables_in
from lib_lora_train.storage.content import header_of

FORMATS = (onetrainer, lora_easy, kohya_gui, lora_scripts, sd_scripts)


def import_file(path: Path) -> Imported:
    """The settings in a file: TOML or JSON of ours or another program's, or a LoRA. Raises SettingError."""
    try:
        with path.open("rb") as file:
            return _import(file, name=str(path))
    except OSError as error:
        raise SettingError(f"{path} cannot be read", why=error.strerror or str(error)) from error


def import_bytes(data: bytes, *, name: str) -> Imported:
    """As `import_file`, of a file's bytes; of a LoRA its header is enough."""
    return _import(io.BytesIO(data), name=name)


def _import(file: BinaryIO, *, name: str) -> Imported:
    if name.lower().endswith(".safetensors"):
        try:
            header = header_of(file)
        except ValueError as error:
            raise SettingError(f"{Path(name).name} is no LoRA file",
                               why="it has no header as safetensors files have") from error
        return _guarded(lambda: lora_file.read_header(header, name=name), name)
    data = tables_in(decoded(file.read(), name=name), name=name, is_json=name.lower().endswith(".json"))
    return import_tables(data, name=name)


def import_tables(data: Mapping[str, Any], *, name: str) -> Imported:
    """As `import_file`, of what stood in it."""
    def read_it() -> Imported:
        format = next((format for format in FORMATS if format.recognises(data)), None)
        return format.read(data) if format else _ours(data, name=name)
    return _guarded(read_it, name)


def _guarded(read_it: Callable[[], Imported], name: str) -> Imported:
    """What was read. Values of no kind that the program writes are refused with a sentence."""
    try:
        return read_it()
    except SettingError:
        raise
    except (AttributeError, TypeError, ValueError, KeyError, RecursionError) as error:
        raise SettingError(f"{name} cannot be read", why=f"it holds something of another kind than there ({error})") from error


def _ours(data: Mapping[str, Any], *, name: str) -> Imported:
    """A file of our own: a run's, or a preset."""
    about = data.get("preset") if isinstance(data.get("preset"), dict) else {}
    values = flattened({table: inner for table, inner in data.items() if not (about and table == "preset")}, name=name)
    refuse_unknown(values)
    given = {key: read(DECLARATIONS[key], value) for key, value in values.items()}
    notes = (f"This is the preset {about.get('name') or Path(name).stem}.",) if about else ()
    return Imported(OURS, given, tuple(Entry(key, value, "taken") for key, value in given.items()), {}, notes)
