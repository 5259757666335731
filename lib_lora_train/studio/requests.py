"""What a page or a program asks of the studio, read from JSON: checked here, so that nothing deeper meets a wrong type."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from lib_lora_train.errors import SettingError

_LONGEST_TEXT = 10_000
_BATCH = re.compile(r"[A-Za-z0-9_-]{1,64}")


@dataclasses.dataclass(frozen=True)
class Selection:
    """Pictures by name, or those that a filter lets through."""

    names: tuple[str, ...] | None
    filter: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def selection(body: Mapping[str, Any]) -> Selection:
    """From {"ids": [...]} or {"filter": {...}}; raises SettingError where there is neither."""
    if isinstance(body.get("ids"), list):
        names = body["ids"]
        if not all(isinstance(name, str) for name in names):
            raise SettingError('"ids" must be a list of names')
        return Selection(tuple(dict.fromkeys(names)))
    if isinstance(body.get("filter"), dict):
        return Selection(None, body["filter"])
    raise SettingError("No picture was named", why='the request holds neither "ids" nor "filter"')


def text(values: Mapping[str, Any], name: str, *, required: bool = False) -> str:
    """A text of the request, "" where it is left out; raises SettingError for anything else."""
    value = values.get(name, "")
    if not isinstance(value, str) or len(value) > _LONGEST_TEXT or (required and not value.strip()):
        raise SettingError(f'"{name}" must be {"a text that is not empty" if required else "a text"}',
                           why=f"at most {_LONGEST_TEXT} letters" if isinstance(value, str) and value.strip() else "")
    return value


def texts(values: Mapping[str, Any], name: str) -> list[str]:
    """A list of texts of the request, not empty; raises SettingError."""
    value = values.get(name)
    if not isinstance(value, list) or not value or not all(isinstance(one, str) and one.strip() for one in value):
        raise SettingError(f'"{name}" must be a list of texts')
    return list(value)


def switch(values: Mapping[str, Any], name: str) -> bool:
    """True or false, false where it is left out; raises SettingError."""
    value = values.get(name, False)
    if not isinstance(value, bool):
        raise SettingError(f'"{name}" must be true or false')
    return value


def integer(values: Mapping[str, Any], name: str, *, default: int, low: int, high: int) -> int:
    """A whole number within its bounds; raises SettingError."""
    value = values.get(name, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value != value or not low <= value <= high \
            or value != int(value):
        raise SettingError(f'"{name}" must be a whole number between {low} and {high}')
    return int(value)


def numbers(values: Mapping[str, Any], name: str, *, count: int) -> tuple[int, ...]:
    """Exactly `count` whole numbers; raises SettingError."""
    value = values.get(name)
    if not isinstance(value, list) or len(value) != count:
        raise SettingError(f'"{name}" must be a list of {count} whole numbers')
    return tuple(integer({name: one}, name, default=0, low=-10**6, high=10**6) for one in value)


def number_text(text: str) -> int:
    """A small number in an address; raises SettingError."""
    if not (text.isascii() and text.isdigit() and len(text) < 4):
        raise SettingError("That is not the number of a picture")
    return int(text)


def size(values: Mapping[str, Any], name: str, *, default: int) -> tuple[int, int]:
    """(width, height) from one number or two; raises SettingError."""
    value = values.get(name, default)
    if isinstance(value, list):
        across, down = numbers(values, name, count=2)
    else:
        across = down = integer(values, name, default=default, low=64, high=4096)
    if not (64 <= across <= 4096 and 64 <= down <= 4096):
        raise SettingError(f'"{name}" must lie between 64 and 4096 pixels')
    return across, down


def table(values: Mapping[str, Any], name: str) -> dict[str, Any]:
    """An object of the request, {} where it is left out; raises SettingError."""
    value = values.get(name, {})
    if not isinstance(value, dict):
        raise SettingError(f'"{name}" must be an object')
    return value


def batch_name(value: object) -> str:
    """What the page calls one heap of uploads; it becomes a folder's name."""
    if not isinstance(value, str) or not _BATCH.fullmatch(value):
        raise SettingError('"batch" must be up to 64 letters, digits, dashes and underscores')
    return value
