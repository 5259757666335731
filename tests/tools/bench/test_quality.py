"""The whole road on a model that has learnt nothing and on few images: what is written, refused and repeated."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from lib_lora_train.errors import DatasetError, SettingError
from tools.bench import quality, real_images, styled_images
from tools.bench.command import main
from tools.bench.joint_scorer import Extent
from tools.bench.quality import QualityPlan, run_quality
from tools.bench.style_scorer import StyleEffort
from tools.bench.word_scorer import WordEffort

HASTE = Extent(StyleEffort(steps=2, fits=2), WordEffort(variants=0, steps=2, fits=1), repainted=2, every=2, seeds=2, runs=2,
               scales=(2.0,), sampler_steps=1)


@pytest.fixture
def few(tmp_path, monkeypatch) -> Path:
    """The subject's dataset with four images, and a sheet of eight words in few styles."""
    real = real_images.load()
    indices = [0, 1, *real.indices("held_out")[:4].tolist(), *real.indices("other")[:2].tolist()]
    thin = real_images.RealImages(
        tuple(real.words[p] for p in indices), tuple(real.splits[p] for p in indices),
        {style: pixels[indices] for style, pixels in real.pixels.items()})
    monkeypatch.setattr(real_images, "load", lambda: thin)
    rows = torch.arange(8)
    images = {style: (rows, pixels) for style, pixels in zip(
        (*styled_images.GRADED, "noto"), (*(1 - pixels for pixels in thin.pixels.values()), *thin.pixels.values(),
                                          thin.pixels["noto"].flip(1)), strict=True)}
    monkeypatch.setattr(styled_images, "load", lambda real, packages: styled_images.StyledImages(
        thin.words, thin.splits, images))
    folder = tmp_path / "subject"
    folder.mkdir()
    for image in sorted(quality.SUBJECT.glob("*.png"))[:4]:
        for part in (image, image.with_suffix(".txt")):
            shutil.copy(part, folder)
    return folder


def test_the_headline_stands_between_its_floor_and_its_ceiling_after_the_gates(few, host, tmp_path):
    real = real_images.load()
    plan = QualityPlan(tmp_path / "out", packages=tmp_path, extent=HASTE, subject=few, steps=1, subject_steps=1,
                       changes={"network_dim": "2"}, varied={"learning_rate=1e-3": {"learning_rate": "1e-3"}})
    done = run_quality(plan, host, say=lambda text: None)
    assert [row.what for row in done.headlines] == [
        "real, after the VAE", "model alone, CFG 2", "LoRA, CFG 2", "learning_rate=1e-3, CFG 2"] * 4
    assert all(row.both <= min(row.style, row.word) for row in done.headlines)
    lora, alone = done.headlines[2], done.headlines[1]
    assert lora.gain == pytest.approx(lora.both - alone.both)
    text = (tmp_path / "out" / "quality.md").read_text(encoding="utf-8")
    assert 0 < text.index("### Gates") < text.index("### Headline") < text.index("### Subjects")
    assert "Not to be quoted" in text
    figures = json.loads((tmp_path / "out" / "quality.json").read_text(encoding="utf-8"))
    assert list(figures["gates"]) == list(styled_images.GRADED) and figures["settings"]["network_dim"] == "2"
    # Trained on the words that are for it, and on no other.
    assert sorted(path.stem for path in (tmp_path / "out" / "data" / "sticker").glob("*.png")) == sorted(
        word.replace(" ", "-") for word in real.words_of("style"))
    # The pose that is kept back is not trained on.
    assert sorted(path.stem for path in (tmp_path / "out" / "subject" / "character").glob("*.png")) == sorted(
        path.stem for path in few.glob("*.png"))[:3]
    assert [(row.subject, row.what) for row in done.subject] == [
        (subject, what) for subject in ("character", "jug")
        for what in ("real ones", "real emoji (mistaken)", "model alone, CFG 2", "LoRA, CFG 2")]
    assert all((tmp_path / "out" / f"{name}.png").is_file() for name in (*styled_images.GRADED, "character", "jug"))


def test_a_missing_dataset_is_told_before_anything_is_fitted(host, tmp_path, few):
    with pytest.raises(DatasetError, match="nothing-here"):
        run_quality(QualityPlan(tmp_path / "out", tmp_path, subject=tmp_path / "nothing-here"), host, say=lambda text: None)
    assert not (tmp_path / "out").exists()


def test_a_setting_of_the_benchmarks_own_is_refused_before_anything_is_read(host, tmp_path):
    with pytest.raises(SettingError, match="seed_of_nothing"):
        run_quality(QualityPlan(tmp_path / "out", tmp_path, changes={"seed_of_nothing": 1}), host, say=lambda text: None)


@pytest.mark.parametrize("more, word", [
    (["--checkpoint", "nowhere.safetensors"], "nowhere"), (["--set", "max_train_steps=3"], "--steps"),
    (["--set", "rank"], "name=value"), (["--steps", "0"], "--steps 0"), (["--runs", "0"], "--runs 0"),
    (["--style", "oil"], "oil"),
    (["--vary", "rank=1,2"], "rank")])
def test_bad_input_is_one_sentence_and_2(more, word, tiny_file, tmp_path, capsys):
    arguments = ["--checkpoint", str(tiny_file), "--out", str(tmp_path / "out"), *more]
    assert main(["quality", *arguments]) == 2
    told = capsys.readouterr()
    assert word in told.err and told.err.strip().count("\n") == 0 and told.out == ""
