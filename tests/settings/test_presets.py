"""The presets: readable, in their order, and changing only what they name."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest

from lib_lora_train.dataset.plan import plain_folder_repeats, plan_run
from lib_lora_train.errors import SettingError
from lib_lora_train.run.saver import save_steps
from lib_lora_train.settings import DECLARATIONS, ignored, parse, read
from lib_lora_train.settings.presets import presets, read_preset
from tests.jobs import plan_of

# Numbers of a version stay as they are, so that no update changes a training silently: whoever changes one raises the version.
VERSIONS = {
    "Character": (1, "3d936285f990"), "Style": (1, "083174cab257"), "Object": (1, "4b1142eb475b"),
    "Low VRAM": (1, "1e69b2ed8d34"), "Quick try": (1, "9f9100d98ea3")}
PURPOSES = ("Character", "Style", "Object", "Quick try")


def test_the_presets_stand_in_the_order_of_the_page():
    assert [p.name for p in presets()] == ["Character", "Style", "Object", "Low VRAM", "Quick try"]


def test_a_presets_numbers_are_those_of_its_version():
    def digest(values: dict) -> str:
        return hashlib.sha256(json.dumps(dict(values), sort_keys=True).encode()).hexdigest()[:12]
    assert {preset.name: (preset.version, digest(preset.values)) for preset in presets()} == VERSIONS


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


@pytest.mark.parametrize("images", [5, 20, 200])
def test_every_purpose_leaves_several_saves_to_choose_from(tmp_path: Path, images: int):
    for preset in presets():
        settings = parse({**preset.values, "train_data_dir": str(tmp_path)})
        optimizer = settings.optimizer
        visits = images * plain_folder_repeats(images, max_train_epochs=optimizer.max_train_epochs)
        schedule = plan_run({(512, 512): visits}, train_batch_size=optimizer.train_batch_size, gradient_accumulation_steps=1,
                            max_train_epochs=optimizer.max_train_epochs, max_train_steps=optimizer.max_train_steps)
        assert 3 <= len(save_steps(replace(plan_of(settings), schedule=schedule))) <= 10, preset.name


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
