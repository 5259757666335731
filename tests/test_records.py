"""Frozen dataclasses from plain data: as they were written, or not at all."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Literal

import pytest

from lib_lora_train.records import from_plain


@dataclasses.dataclass(frozen=True)
class Inner:
    name: str
    share: float = 0.5


@dataclasses.dataclass(frozen=True)
class Outer:
    count: int
    on: bool
    word: Literal["", "a"]
    size: tuple[int, int] | None
    inner: tuple[Inner, ...]
    table: dict[str, float]
    maybe: float | None = None


OUTER = Outer(3, True, "a", (4, 5), (Inner("x"), Inner("y", 0.25)), {"k": 1.5}, 2.0)


@pytest.mark.parametrize("value", [OUTER, dataclasses.replace(OUTER, size=None, inner=(), table={}, maybe=None)])
def test_what_was_written_comes_back(value: Outer) -> None:
    assert from_plain(Outer, json.loads(json.dumps({**dataclasses.asdict(value), "of a later version": 1}))) == value


def test_none_is_nan_where_a_number_is_to_be_and_none_where_none_may_be() -> None:
    assert math.isnan(from_plain(Inner, {"name": "x", "share": None}).share)


@pytest.mark.parametrize("change", [
    {"count": 1.0}, {"count": True}, {"count": None}, {"on": 1}, {"word": 1}, {"size": [1]}, {"size": [1, 2.5]}, {"size": "12"},
    {"inner": [{"name": 1}]}, {"inner": [{}]}, {"inner": [None]}, {"inner": "ab"}, {"table": []}, {"table": {"k": "1"}},
    {"maybe": "1"}, {"maybe": 10**400}, {"maybe": False}])
def test_a_value_of_another_type_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(TypeError):
        from_plain(Outer, json.loads(json.dumps({**dataclasses.asdict(OUTER), **change})))


@pytest.mark.parametrize("data", [None, [], "x", {}])
def test_what_holds_no_values_by_name_or_lacks_one_is_refused(data: object) -> None:
    with pytest.raises(TypeError):
        from_plain(Outer, data)
