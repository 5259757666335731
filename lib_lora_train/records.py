"""Frozen dataclasses from the plain data that JSON holds, with the type of each value checked.

What lies in a run's folder may be damaged, edited, or of another version; who reads it finds a value of the declared type or
none at all. Types are `int`, `float`, `str`, `bool`, words (`Literal`), `X | None`, `tuple[X, ...]`, `tuple[X, Y]`,
`dict[str, X]` and other such dataclasses.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

T = TypeVar("T")


def from_plain(cls: type[T], data: object) -> T:
    """A `cls` of these values by name. Names that it does not know are left out, None is NaN where a float is to be. Raises
    TypeError for a value of another type and where one is missing."""
    if not isinstance(data, Mapping):
        raise TypeError(f"{data!r} holds no {cls.__name__}")
    kinds = _types_of(cls)
    return cls(**{name: _value(value, kinds[name]) for name, value in data.items() if name in kinds})


@functools.cache
def _types_of(cls: type) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}  # type: ignore[arg-type]


def _value(value: object, kind: Any) -> Any:
    origin, of = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return None if value is None else _value(value, next(one for one in of if one is not type(None)))
    if dataclasses.is_dataclass(kind):
        return from_plain(kind, value)  # type: ignore[arg-type]
    if origin is tuple and isinstance(value, list):
        each = of[:1] * len(value) if of[1:] == (...,) else of
        if len(each) == len(value):
            return tuple(map(_value, value, each))
    elif origin is dict and isinstance(value, dict):
        return {name: _value(entry, of[1]) for name, entry in value.items()}
    elif kind is float:
        if value is None:
            return math.nan
        if isinstance(value, float) or type(value) is int and abs(value) < 2**1000:  # a larger one would be no float
            return value
    elif isinstance(value, str if origin is typing.Literal else kind if origin is None else ()) and (
            isinstance(value, bool) == (kind is bool)):
        return value
    raise TypeError(f"{value!r} is no {kind}")
