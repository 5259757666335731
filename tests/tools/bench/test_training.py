"""What the benchmark trains: the reference line, and changes to it."""

from __future__ import annotations

import pytest

from lib_lora_train.errors import SettingError
from tools.bench.training import FIXED, settings_of


def test_the_reference_line_is_the_one_that_methods_are_compared_with():
    settings = settings_of({})
    line = ("AdamW", 1e-4, 8, 4, "cosine")
    names = ("optimizer_type", "learning_rate", "network_dim", "network_alpha", "lr_scheduler")
    assert tuple(settings[name] for name in names) == line


def test_a_change_replaces_one_setting_and_leaves_the_others():
    changed = settings_of({"learning_rate": "1e-3"})
    assert changed["learning_rate"] == "1e-3"
    assert {**changed, "learning_rate": 1e-4} == settings_of({})


@pytest.mark.parametrize("name", FIXED)
def test_what_the_benchmark_sets_itself_cannot_be_set(name):
    with pytest.raises(SettingError, match=name):
        settings_of({name: "1"})


@pytest.mark.parametrize("changes", [{"learning_rat": 1}, {"network_dim": "many"}, {"network_dim": 0}])
def test_settings_are_checked_before_anything_is_done(changes):
    with pytest.raises(SettingError):
        settings_of(changes)
