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
from tools.bench.evaluator import Effort
from tools.bench.joint_scorer import Extent
from tools.bench.quality import QualityPlan, run_quality

HASTE = Effort(texture=2, words=2, across=True, every=4, sampler_steps=1, samples=1)


@pytest.fixture
def few(tmp_path, monkeypatch) -> dict[str, Path]:
    """Datasets of few images, and a sheet of eight words."""
    real = real_images.load()
    indices = [0, 1, *real.indices("held_out")[:4].tolist(), *real.indices("other")[:2].tolist()]
    thin = real_images.RealImages(
        tuple(real.words[p] for p in indices), tuple(real.splits[p] for p in indices),
        {style: pixels[indices] for style, pixels in real.pixels.items()})
    monkeypatch.setattr(real_images, "load", lambda: thin)
    folders = {}
    for name, source, count in (("style", quality.STYLE, 2), ("subject", quality.SUBJECT, 4)):
        folders[name] = tmp_path / name
        folders[name].mkdir()
        for image in sorted(source.glob("*.png"))[:count]:
            for part in (image, image.with_suffix(".txt")):
                shutil.copy(part, folders[name])
    return folders


def test_a_run_writes_its_table_its_figures_and_its_sheets(few, host, tmp_path):
    said: list[str] = []
    plan = QualityPlan(tmp_path / "out", steps=2, subject_steps=1, effort=HASTE, changes={"network_dim": "2"}, **few)
    done = run_quality(plan, host, say=said.append)
    assert [row.name for row in done.style.rows] == [
        "real Noto", "real Twemoji", "base, the word alone", "base", "LoRA at 0", "LoRA at 0.5", "LoRA at 1"]
    assert [row.name for row in done.style.intermediate] == ["1 steps", "2 steps"]
    assert done.style.weight_0_is_base_model
    real = done.style.rows[1]
    assert real.feature == pytest.approx(0, abs=1e-5)  # the same images through the same VAE
    assert done.style.memorised[0].suspicious == 0
    # The pose that is kept back is not trained on.
    assert sorted(path.stem for path in (tmp_path / "out" / "subject").glob("*.png")) == sorted(
        path.stem for path in few["subject"].glob("*.png"))[:3]
    figures = json.loads((tmp_path / "out" / "quality.json").read_text(encoding="utf-8"))
    assert figures["settings"]["network_dim"] == "2" and figures["style"]["rows"][3]["style"] == done.style.rows[3].style
    assert figures["thorough"] is False
    assert "Not to be quoted" in (tmp_path / "out" / "quality.md").read_text(encoding="utf-8")
    assert (tmp_path / "out" / "style.png").is_file() and (tmp_path / "out" / "subject.png").is_file()
    judged = next(index for index, line in enumerate(said) if "Style scorer" in line)
    assert not any("step" in line and "/" in line for line in said[:judged])


def test_the_headline_stands_between_its_floor_and_its_ceiling_after_the_gates(few, host, tmp_path, monkeypatch):
    real, rows = real_images.load(), torch.arange(8)
    images = {style: (rows, pixels) for style, pixels in zip(
        (*styled_images.GRADED, "noto"), (*(1 - pixels for pixels in real.pixels.values()), *real.pixels.values(),
                                          real.pixels["noto"].flip(1)), strict=True)}
    monkeypatch.setattr(styled_images, "load", lambda real, packages: styled_images.StyledImages(
        real.words, real.splits, images))
    extent = Extent(style_steps=2, fits=2, word_steps=2, every=2, seeds=2, runs=2, scales=(2.0,), sampler_steps=1)
    done = run_quality(QualityPlan(tmp_path / "out", packages=tmp_path, extent=extent, detail=False, steps=1), host,
                       say=lambda text: None)
    assert [row.what for row in done.headlines] == ["real, after the VAE", "model alone, CFG 2", "LoRA, CFG 2"] * 4
    assert all(row.both <= min(row.style, row.word) for row in done.headlines)
    lora, alone = done.headlines[2], done.headlines[1]
    assert lora.gain == pytest.approx(lora.both - alone.both)
    text = (tmp_path / "out" / "quality.md").read_text(encoding="utf-8")
    assert 0 < text.index("### Gates") < text.index("### Headline")
    figures = json.loads((tmp_path / "out" / "quality.json").read_text(encoding="utf-8"))
    assert list(figures["gates"]) == list(styled_images.GRADED) and figures["scorers"] is None
    # Trained on the words that are for it, and on no other.
    assert sorted(path.stem for path in (tmp_path / "out" / "data" / "sticker").glob("*.png")) == sorted(
        word.replace(" ", "-") for word in real.words_of("style"))


def test_a_missing_dataset_is_told_before_anything_is_fitted(host, tmp_path, few):
    with pytest.raises(DatasetError, match="nothing-here"):
        run_quality(QualityPlan(tmp_path / "out", style=tmp_path / "nothing-here", subject=None), host, say=lambda text: None)
    assert not (tmp_path / "out").exists()


def test_a_setting_of_the_benchmarks_own_is_refused_before_anything_is_read(host, tmp_path):
    with pytest.raises(SettingError, match="seed_of_nothing"):
        run_quality(QualityPlan(tmp_path / "out", changes={"seed_of_nothing": 1}), host, say=lambda text: None)


@pytest.mark.parametrize("more, word", [
    (["--checkpoint", "nowhere.safetensors"], "nowhere"), (["--set", "max_train_steps=3"], "--steps"),
    (["--set", "rank"], "name=value"), (["--steps", "0"], "--steps 0")])
def test_bad_input_is_one_sentence_and_2(more, word, tiny_file, tmp_path, capsys):
    arguments = ["--checkpoint", str(tiny_file), "--out", str(tmp_path / "out"), *more]
    assert main(["quality", *arguments]) == 2
    told = capsys.readouterr()
    assert word in told.err and told.err.strip().count("\n") == 0 and told.out == ""
