"""Preservation images lie in kohya's layout, whole, and a second call goes on where the first ended."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from PIL import Image

from lib_lora_train.errors import Interrupted, ModelError, SettingError
from lib_lora_train.evaluation.class_images import ClassImages, make_class_images
from lib_lora_train.host.standalone import StandaloneHost
from tests.scanned_folder import scan

PROMPTS = ("a red cat", "a blue cat")


def make(host, folder: Path, count: int, **changes) -> ClassImages:
    return make_class_images(host, **{"prompts": PROMPTS, "count": count, "folder": folder, "size": (64, 128), "steps": 1,
                                        "seed": 5, **changes})


def contents(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted((folder / "1_class").iterdir())}


def test_a_training_reads_them_as_regularisation_pictures(host, images, tmp_path):
    assert make(host, tmp_path / "reg", 3) == ClassImages(tmp_path / "reg", made=3, found=0)
    found = scan(images, max_train_epochs=1, num_repeats=1, reg_data_dir=tmp_path / "reg")
    regularisation = [example for example in found.examples if example.is_regularisation]
    assert [(e.caption, e.folder, e.width, e.height) for e in regularisation] == [
        (prompt, "1_class", 64, 128) for prompt in (PROMPTS[0], PROMPTS[1], PROMPTS[0])]


def test_a_second_call_paints_what_one_call_would_have_painted(host, tmp_path):
    make(host, tmp_path / "whole", 3)
    asked = []
    with pytest.raises(Interrupted):
        make(host, tmp_path / "parts", 3, should_stop=lambda: len(asked) > 1, on_progress=lambda *of: asked.append(of))
    assert asked == [(0, 3), (1, 3)] and len(contents(tmp_path / "parts")) == 2
    progress = []
    done = make(host, tmp_path / "parts", 3, on_progress=lambda *of: progress.append(of))
    assert (done.made, done.found, progress) == (2, 1, [(1, 3), (2, 3), (3, 3)])
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")
    with host.lease():
        pass


def test_nobody_is_asked_for_the_model_where_all_are_there(host, tmp_path):
    make(host, tmp_path, 2)
    nothing = StandaloneHost(None, lora_folder=tmp_path, runs_folder=tmp_path / "runs")
    assert make(nothing, tmp_path, 2) == ClassImages(tmp_path, made=0, found=2)


def test_pictures_of_other_prompts_stay_and_do_not_count(host, tmp_path):
    (tmp_path / "1_class").mkdir()
    Image.new("RGB", (8, 8), "red").save(tmp_path / "1_class" / "000001.png")
    Image.new("RGB", (8, 8), "red").save(tmp_path / "1_class" / "mine.jpg")
    (tmp_path / "1_class" / "000001.txt").write_text("a dog", encoding="utf-8")
    before = contents(tmp_path)
    assert make(host, tmp_path, 1).made == 1
    after = contents(tmp_path)
    assert after.items() >= before.items() and set(after) - set(before) == {"000002.png", "000002.txt"}


def test_a_caption_whose_picture_was_never_written_counts_for_nothing(host, tmp_path):
    (tmp_path / "1_class").mkdir()
    (tmp_path / "1_class" / "000001.txt").write_text("a red cat", encoding="utf-8")
    assert make(host, tmp_path, 1) == ClassImages(tmp_path, made=1, found=0)
    assert sorted(contents(tmp_path)) == ["000001.png", "000001.txt"]


def test_a_picture_says_how_it_was_made(host, tmp_path):
    make(host, tmp_path, 2, cfg=3.5, negative_prompt="photo")
    with Image.open(tmp_path / "1_class" / "000002.png") as image:
        assert image.text["parameters"] == (
            "a blue cat\nNegative prompt: photo\nSteps: 1, Sampler: Euler, CFG scale: 3.5, Seed: 6, Size: 64x128, Model: tiny")


@pytest.mark.parametrize("changes", [
    {"prompts": ["  "]}, {"count": 0}, {"count": 20_000}, {"size": (100, 64)}, {"size": (0, 64)}], ids=str)
def test_what_is_not_possible_is_said_before_anything_is_painted(host, tmp_path, changes):
    with pytest.raises(SettingError):
        make(host, tmp_path / "reg", **{"count": 2, **changes})
    assert not (tmp_path / "reg").exists()


def test_a_model_that_cannot_be_read_leaves_nothing_behind(tmp_path):
    (tmp_path / "broken.safetensors").write_bytes(b"no model")
    broken = StandaloneHost(tmp_path / "broken.safetensors", lora_folder=tmp_path, runs_folder=tmp_path / "runs")
    with pytest.raises(ModelError):
        make(broken, tmp_path / "reg", 1)
    assert not (tmp_path / "reg").exists()
