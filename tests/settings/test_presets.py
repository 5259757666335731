"""The presets: readable, in their order, and changing only what they name."""

from __future__ import annotations

from pathlib import Path

import pytest

from lib_lora_train.errors import SettingError
from lib_lora_train.settings import DECLARATIONS, ignored, parse, read
from lib_lora_train.settings.presets import presets, read_preset

PURPOSES = ("Character", "Style", "Object", "Quick try")


def test_the_presets_stand_in_the_order_of_the_page():
    assert [p.name for p in presets()] == ["Character", "Style", "Object", "Low VRAM", "Quick try"]


def test_every_preset_is_possible_described_and_sets_nothing_that_is_ignored():
    for preset in presets():
        assert preset.description.endswith(".")
        assert ignored(parse(preset.values)) == [], preset.name
        for name, value in preset.values.items():
            assert type(value) is DECLARATIONS[name].type
            assert read(DECLARATIONS[name], value) == value


def test_each_purpose_undoes_the_others():
    named = {p.name: set(p.values) for p in presets()}
    assert all(named[purpose] == named["Character"] for purpose in PURPOSES)


def test_no_preset_touches_names_folders_or_pictures():
    for preset in presets():
        assert not {"output_name", "trigger_word", "overwrite", "resolution", "seed"} & set(preset.values)
        assert not [name for name in preset.values if DECLARATIONS[name].is_path]


@pytest.mark.parametrize("text", ["network_dim = ", "network_dimm = 4", "network_dim = 0", "name = 3"])
def test_a_preset_that_cannot_be_used_is_refused_with_a_sentence(tmp_path: Path, text: str):
    path = tmp_path / "mine.toml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(SettingError):
        read_preset(path)
