"""Settings that are suggested: what the pictures, the captions and the memory there is change of a purpose's preset."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest

from lib_lora_train import events
from lib_lora_train.errors import SettingError
from lib_lora_train.host.port import Checkpoint
from lib_lora_train.run.record import RunRecord, new_folder
from lib_lora_train.run.suggestions import Suggestions, suggest
from lib_lora_train.settings import Settings, parse
from tests.fake_host import FakeHost, images


@pytest.fixture
def fake(tmp_path: Path) -> FakeHost:
    return FakeHost(tmp_path)


def folder(tmp_path: Path, count: int, caption: str) -> Path:
    made = images(tmp_path / "set", count)
    for picture in made.glob("*.png"):
        picture.with_suffix(".txt").write_text(caption, encoding="utf-8")
    return made


def values(found: Suggestions) -> dict[str, object]:
    return {one.setting: one.value for one in found.suggestions}


def chosen(data: Path, **changes: object) -> Settings:
    return parse({"train_data_dir": str(data), "trigger_word": "zzk", **changes})


def test_each_setting_is_named_once_with_a_reason_and_the_formula_is_the_arithmetic(fake: FakeHost, tmp_path: Path):
    found = suggest(chosen(folder(tmp_path, 25, "a cat, sitting, red, outdoors, grass"), validation_split=0.0), fake,
                    purpose="style", fits=lambda settings: settings.optimizer.train_batch_size <= 2)
    named = values(found)
    assert len(named) == len(found.suggestions) and all(one.reason.endswith(".") for one in found.suggestions)
    assert named["train_batch_size"] == 2 and named["learning_rate"] == pytest.approx(1e-4 * math.sqrt(2), rel=0.05)
    # A hundred visits of each over ten epochs, two a step.
    assert found.formula == "25 pictures × 10 repeats × 10 epochs / batch 2 = 1,250 steps"
    assert parse({"train_data_dir": str(tmp_path), **named})


def test_captions_decide_whether_they_are_shuffled(fake: FakeHost, tmp_path: Path):
    tags = values(suggest(chosen(folder(tmp_path, 12, "1girl, smile, red dress, outdoors")), fake, purpose="character"))
    assert tags["shuffle_caption"] is True
    for text in (tmp_path / "set").glob("*.txt"):
        text.write_text("A girl in a red dress is smiling, outdoors.", encoding="utf-8")
    assert values(suggest(chosen(tmp_path / "set"), fake, purpose="character"))["shuffle_caption"] is False


def test_few_pictures_get_a_small_rank_and_a_warm_up_and_a_missing_word_is_told(fake: FakeHost, tmp_path: Path):
    found = suggest(chosen(folder(tmp_path, 6, "a cat"), trigger_word=""), fake, purpose="character")
    named = values(found)
    assert (named["network_dim"], named["network_alpha"], named["train_batch_size"]) == (8, 4.0, 1)
    steps = int(found.formula.rpartition("= ")[2].split()[0].replace(",", ""))
    assert named["lr_warmup_steps"] == round(0.05 * steps)
    assert any("trigger word" in text for text in found.warnings)


def test_small_pictures_lower_the_resolution_of_sdxl(fake: FakeHost, tmp_path: Path, monkeypatch):
    data = folder(tmp_path, 12, "a cat")  # far below 1024
    monkeypatch.setattr(fake, "checkpoint", lambda: dataclasses.replace(FakeHost.checkpoint(fake), family="sdxl"))
    assert isinstance(fake.checkpoint(), Checkpoint)
    named = values(suggest(chosen(data), fake, purpose="style"))
    assert named["resolution"] == "768" and named["network_dim"] == 16


def test_masks_that_are_there_are_heeded(fake: FakeHost, tmp_path: Path):
    data = folder(tmp_path, 10, "a cat")
    assert "masked_loss" not in values(suggest(chosen(data), fake, purpose="object"))
    picture = sorted(data.glob("*.png"))[0]
    (data / "masks").mkdir()
    (data / "masks" / picture.name).write_bytes(picture.read_bytes())
    assert values(suggest(chosen(data), fake, purpose="object"))["masked_loss"] is True


def test_a_rate_that_was_found_on_these_pictures_is_taken_for_adamw_and_a_third_for_lion(fake: FakeHost, tmp_path: Path):
    data = folder(tmp_path, 10, "a cat")
    before = values(suggest(chosen(data), fake, purpose="object"))
    assert before["learning_rate"] == 1e-4
    model = fake.checkpoint().name
    for name, dim, checkpoint, rate in (("zzk-learning-rate", before["network_dim"], model, 7e-4),
                                        ("wide-learning-rate", 77, model, 0.5),
                                        ("other-learning-rate", before["network_dim"], "another model", 0.6)):
        record = RunRecord(new_folder(fake.runs_folder, name), chosen(
            data, network_dim=dim, network_alpha=before["network_alpha"], optimizer_type="Prodigy", learning_rate=1.0))
        record.write(events.Planned(9, 1, 9, 1, 100, "", "64×64", checkpoint, 1))
        record.write(events.Step(100, 100, 1, 1, 0.1, 0.1, rate, 0.0, None, None))
        record.write(events.Diagnosed(100, "rate", "found", "learning_rate", str(rate)))
        record.close()
    assert values(suggest(chosen(data), fake, purpose="object"))["learning_rate"] == 7e-4
    lion = values(suggest(chosen(data, optimizer_type="Lion", unet_lr=1e-5), fake, purpose="object"))
    assert lion["unet_lr"] == pytest.approx(7e-4 / 3, rel=0.05) and "learning_rate" not in lion


def test_an_optimizer_that_finds_its_rate_keeps_the_factor_1_and_an_unknown_one_its_own(fake: FakeHost, tmp_path: Path):
    data = folder(tmp_path, 10, "a cat")
    pytest.importorskip("prodigyopt")
    prodigy = values(suggest(chosen(data, optimizer_type="Prodigy", learning_rate=1.0), fake, purpose="object"))
    assert prodigy["learning_rate"] == 1.0 and "unet_lr" not in prodigy
    own = values(suggest(chosen(data, optimizer_type="Prodigy", learning_rate=1.0, unet_lr=1e-4), fake, purpose="object"))
    assert parse({**own, "optimizer_type": "Prodigy"}).rates[0] == 1.0 and own["unet_lr"] == 0.0
    assert "learning_rate" not in values(suggest(chosen(data, optimizer_type="SGDNesterov"), fake, purpose="object"))


def test_a_batch_size_of_the_folders_own_is_left_to_them(fake: FakeHost, tmp_path: Path):
    data = folder(tmp_path, 12, "a cat")
    config = f'[[datasets]]\nbatch_size = 4\n[[datasets.subsets]]\nimage_dir = "{data.as_posix()}"\nnum_repeats = 7\n'
    found = suggest(parse({"dataset_config": config, "trigger_word": "zzk", "validation_split": 0.0}), fake, purpose="style",
                    fits=lambda settings: True)
    assert not {"train_batch_size", "num_repeats"} & values(found).keys()
    assert found.formula == "12 pictures × 7 repeats × 10 epochs / batch 4 = 210 steps"
    assert values(found)["learning_rate"] == pytest.approx(2e-4)  # the root of 4 times the usual


def test_a_purpose_that_is_none_is_refused(fake: FakeHost, tmp_path: Path):
    with pytest.raises(SettingError, match="is no purpose"):
        suggest(chosen(tmp_path), fake, purpose="food")
