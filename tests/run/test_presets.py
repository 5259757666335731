"""The user's presets: files in one folder, whose names every system takes, with a version that tells other numbers apart."""

from __future__ import annotations

from pathlib import Path

import pytest

from lib_lora_train.errors import OutputError, SettingError, UserError
from lib_lora_train.run.presets import delete_preset, find_preset, offered, own_presets, preset_text, rename_preset, save_preset
from lib_lora_train.settings.importing import import_bytes
from lib_lora_train.settings.presets import IDENTITY, presets


def test_a_preset_keeps_all_settings_but_those_of_one_lora_and_its_version_grows_with_its_numbers(tmp_path: Path):
    saved = save_preset("Mine", {"network_dim": 5, "output_name": "zzk", "train_data_dir": "x", "keep_tokens": 3}, tmp_path)
    assert (saved.version, saved.own, saved.values["network_dim"], saved.values["keep_tokens"]) == (1, True, 5, 3)
    assert not IDENTITY & saved.values.keys()
    assert save_preset("Mine", {"network_dim": 5, "keep_tokens": 3, "output_name": "other"}, tmp_path).version == 1
    assert save_preset("mine", {"network_dim": 6}, tmp_path).version == 2 and len(list(tmp_path.iterdir())) == 1
    assert [preset.name for preset in offered(tmp_path)][:len(presets())] == [preset.name for preset in presets()]
    assert find_preset("MINE", tmp_path).values["network_dim"] == 6


def test_a_preset_is_renamed_deleted_and_given_away(tmp_path: Path):
    save_preset("Mine", {"network_dim": 5}, tmp_path)
    save_preset("Mine", {"network_dim": 6}, tmp_path)
    save_preset("Other", {}, tmp_path)
    moved = rename_preset("Mine", "猫 é", tmp_path)
    assert (moved.name, moved.version, moved.values["network_dim"]) == ("猫 é", 2, 6)
    assert rename_preset("Other", "OTHER", tmp_path).name == "OTHER"
    assert [preset.name for preset in own_presets(tmp_path)] == ["OTHER", "猫 é"]
    with pytest.raises(OutputError):
        rename_preset("OTHER", "猫 é", tmp_path)
    shared = import_bytes(preset_text(moved).encode(), name="x.toml")
    assert dict(shared.values) == dict(moved.values) and not shared.foreign
    delete_preset("OTHER", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["猫 é.toml"]


@pytest.mark.parametrize("name", ["", " ", "a/b", "..", "../x", "C:x", "nul", "a.", "x\0", "Style", "default", "a" * 200,
                                  "a, changed"])
def test_a_name_that_is_no_files_or_a_built_in_presets_is_refused(tmp_path: Path, name: str):
    folder = tmp_path / "presets"
    for refused in (lambda: save_preset(name, {}, folder), lambda: delete_preset(name, folder),
                    lambda: rename_preset(name, "x", folder)):
        with pytest.raises(UserError):
            refused()
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_no_preset_hides_no_other(tmp_path: Path):
    save_preset("Mine", {}, tmp_path)
    for number, text in enumerate((b"\xff", b"network_dimm = 4", b"[preset]\nversion = 'x'\n", b'{"a": 1}')):
        (tmp_path / f"{number}.toml").write_bytes(text)
    assert [preset.name for preset in own_presets(tmp_path)] == ["Mine"]
    assert own_presets(tmp_path / "nowhere") == ()
    with pytest.raises(SettingError, match="Mine"):
        find_preset("Nobody", tmp_path)
