"""Settings in TOML files: run.toml, presets, and the record in a run's folder.

A file is flat (`network_dim = 16`) or sorted into tables of any name, as kohya's configuration files are; the
tables are only for the reader.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from lib_lora_train.errors import SettingError
from lib_lora_train.settings.field import Value

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    try:
        import tomli as tomllib
    except ModuleNotFoundError:
        # Every virtual environment the WebUI makes has pip, and pip has carried tomli since 21.2.
        from pip._vendor import tomli as tomllib


def read_toml(path: Path) -> dict[str, object]:
    """Names and values of a TOML file, tables flattened. Raises SettingError if it cannot be read."""
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise SettingError(f"{path} cannot be read", why=error.strerror or str(error)) from error
    except (ValueError, RecursionError) as error:  # of TOML's, of UTF-8, and numbers of thousands of digits
        raise SettingError(f"{path} is not a TOML file", why=str(error)) from error
    flat: dict[str, object] = {}
    for name, value in data.items():
        entries = value.items() if isinstance(value, dict) else [(name, value)]
        for key, entry in entries:
            if key in flat:
                raise SettingError(f"{path} sets {key} twice", remedy="keep one of the two lines")
            flat[key] = entry
    return flat


def write_toml(values: Mapping[str, Value]) -> str:
    """TOML text of flat settings, read back exactly by `read_toml`."""
    return "".join(f"{name} = {_literal(value)}\n" for name, value in values.items())


def _literal(value: Value) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        # JSON's escapes are a subset of those of TOML's basic strings, but DEL must be escaped there too.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return repr(value)  # 5e-05 is TOML too
