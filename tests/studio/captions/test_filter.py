"""Filters take what they say; a pattern that would run for ever does not."""

from __future__ import annotations

import contextlib
import itertools

import pytest

from lib_lora_train.errors import SettingError
from lib_lora_train.studio.captions import patterns
from lib_lora_train.studio.captions.filter import Filter
from lib_lora_train.studio.captions.patterns import Pattern
from lib_lora_train.studio.requests import validated

CAPTIONS = ("1girl, Blue Eyes, smile", "1boy, blue hair", "", "a photo of a dog, blue eyes")


@pytest.mark.parametrize(("wanted", "taken"), [
    (Filter(), [0, 1, 2, 3]),
    (Filter(all_of=("blue eyes",)), [0, 3]),
    (Filter(all_of=("BLUE EYES ", "smile")), [0]),
    (Filter(any_of=("1boy", "smile")), [0, 1]),
    (Filter(none_of=("blue eyes",)), [1, 2]),
    (Filter(all_of=("blue eyes",), none_of=("1girl",)), [3]),
    (Filter(prefix="blue"), [0, 1, 3]), (Filter(prefix="Blue E"), [0, 3]), (Filter(prefix="eyes"), []),
    (Filter(suffix="HAIR"), [1]),
    (Filter(prefix="blue", suffix="smile"), [0]),
    (Filter(text="EYES, s"), [0]),
    (Filter(regex=r"^1(girl|boy)\b"), [0, 1]), (Filter(regex=r"BLUE\s\w{4}$"), [1, 3]),
    (Filter(empty_only=True), [2]), (Filter(all_of=("",)), [0, 1, 2, 3]),
])
def test_filters(wanted: Filter, taken: list[int]) -> None:
    accepts = wanted.accepts()
    assert [index for index, caption in enumerate(CAPTIONS) if accepts(caption)] == taken


@pytest.mark.parametrize("pattern", [r"((a|aa)+)+$", r"(a+)(a+)(a+)(a+)\1\2\3\4b", r"(.*?a){25}.*zz"])
def test_a_pattern_that_would_run_for_ever_is_given_up_in_a_sentence(pattern: str) -> None:
    text = "a" * 4000 + "b!"
    with pytest.raises(SettingError, match="takes too long"):
        Pattern(pattern, seconds=0.05).found_in(text)
    with pytest.raises(SettingError, match="takes too long"):
        Pattern(pattern, seconds=0.05).replaced(text, "x")


@pytest.mark.parametrize(("each", "given_up"), [(0.0001, False), (0.001, True)])
def test_many_captions_alone_use_up_no_time_but_slow_ones_together_do(
        monkeypatch: pytest.MonkeyPatch, each: float, given_up: bool) -> None:
    clock = itertools.count()
    monkeypatch.setattr(patterns.time, "thread_time", lambda: next(clock) * each)
    pattern = Pattern("a", seconds=1.0)
    with pytest.raises(SettingError, match="takes too long") if given_up else contextlib.nullcontext():
        for _ in range(20_000):
            pattern.found_in("a")


def test_filters_come_as_json() -> None:
    assert validated(Filter, {}) == Filter()
    assert validated(Filter, {"all_of": ["a"], "text": "b", "empty_only": True}) == Filter(("a",), text="b", empty_only=True)


@pytest.mark.parametrize("values", [{"every": ["a"]}, {"all_of": "a"}, {"all_of": [1]}, {"text": 3}, {"changed_only": 1},
                                    {"empty_only": "yes"}])
def test_json_that_is_no_filter_is_refused(values: dict) -> None:
    with pytest.raises(SettingError):
        validated(Filter, values)
