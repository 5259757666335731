"""Settings in files: run.toml, presets, the record in a run's folder, and kohya's.

A file is flat (`network_dim = 16`) or sorted into tables of any name, as kohya's configuration files are; the
tables are only for the reader.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

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
    """Names and values of a TOML file, or of a JSON object as kohya_ss writes it, tables flattened. Raises SettingError if it
    cannot be read."""
    return flattened(tables(path), name=str(path))


def flattened(table: Mapping[str, Any], *, name: str) -> dict[str, object]:
    """Names and values of tables within tables. Raises SettingError, which calls the file `name`, where one stands twice."""
    flat: dict[str, object] = {}
    try:
        for key, value in entries(table):
            if key in flat:
                raise SettingError(f"{name} sets {key} twice", remedy="keep one of the two lines")
            flat[key] = value
    except RecursionError:
        raise SettingError(f"{name} cannot be read", why="its tables lie within each other a thousand times") from None
    return flat


def tables(path: Path) -> dict[str, Any]:
    """A TOML file's tables, or a JSON object. Raises SettingError if it cannot be read."""
    return tables_in(text_of(path), name=str(path), is_json=path.suffix.lower() == ".json")


def text_of(path: Path) -> str:
    """The text of such a file. Raises SettingError if it cannot be read."""
    try:
        return decoded(path.read_bytes(), name=str(path))
    except OSError as error:
        raise SettingError(f"{path} cannot be read", why=error.strerror or str(error)) from error


def decoded(data: bytes, *, name: str) -> str:
    """The text in the bytes of such a file. Raises SettingError, which calls it `name`."""
    try:
        # What PowerShell writes by default is UTF-16.
        return data.decode("utf-16" if data[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "utf-8-sig")
    except UnicodeDecodeError as error:
        kind = "JSON" if name.lower().endswith(".json") else "TOML"
        raise SettingError(f"{name} is not a {kind} file", why="its text is not UTF-8", remedy="save it as UTF-8") from error


def tables_in(text: str, *, name: str, is_json: bool = False) -> dict[str, Any]:
    """The tables of a TOML text, or a JSON object, which begins with a bracket. Raises SettingError, which calls it `name`."""
    kind, remedy = "TOML", ("in TOML true and false are written small, other words in quotes, and paths with \\ in "
                            "'single quotes'")
    try:
        if text.lstrip()[:1] != "{" and not is_json:
            return tomllib.loads(text)
        kind, remedy = "JSON", "mend this place, or save the file anew with the program that wrote it"
        found = json.loads(text, object_pairs_hook=_json_object)
        if not isinstance(found, dict):
            raise ValueError("it holds no names of settings")
        return found
    except (ValueError, RecursionError) as error:  # of TOML's and JSON's, and numbers of thousands of digits
        raise SettingError(f"{name} is not a {kind} file", why=str(error), remedy=remedy) from error


def _json_object(entries: list[tuple[str, Any]]) -> dict[str, Any]:
    """As TOML has it, a name stands once."""
    names = [name for name, _ in entries]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"{twice[0]} is set twice")
    return dict(entries)


def entries(table: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """(name, value) of everything in tables within tables."""
    for name, value in table.items():
        yield from entries(value) if isinstance(value, dict) else [(name, value)]


def write_toml(values: Mapping[str, Value]) -> str:
    """TOML text of flat settings, read back exactly by `read_toml`."""
    return "".join(f"{name} = {literal(value)}\n" for name, value in values.items())


def literal(value: Any) -> str:
    """A value as TOML has it: JSON's but for tables, which stand on one line."""
    if isinstance(value, dict):
        return f"{{{', '.join(f'{name} = {literal(inner)}' for name, inner in value.items())}}}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(literal, value))}]"
    if isinstance(value, float):
        return repr(value)  # 5e-05 and inf are TOML too
    # JSON's escapes are a subset of those of TOML's basic strings, but DEL must be escaped there too.
    return json.dumps(value, ensure_ascii=False, default=str).replace("\x7f", "\\u007f")
