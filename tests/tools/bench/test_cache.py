"""`bench cache`: each kind of work is measured on the images it says; no figure of time is scored."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from lib_lora_train.errors import SettingError
from lib_lora_train.inputs.latents import CachedLatents
from tools.bench import cache
from tools.bench.cache import InstantVAE, make_dataset, random_vae, run_cache


def test_the_figures_are_written_and_what_was_made_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "MOST_ENCODED", {"cpu": 2})
    monkeypatch.setattr(cache, "BOUND", 2 * 2 * 4 * 8 * 8 * 4)  # two images of 64²
    said: list[str] = []
    text = run_cache(images=20, size="64", output=tmp_path, say=said.append, device="cpu")
    figures = json.loads((tmp_path / "cache.json").read_text(encoding="utf-8"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache.json", "cache.md"]
    assert (tmp_path / "cache.md").read_text(encoding="utf-8") == text and len(said) == 9
    assert len(figures["rates"]) == 6 and all(rate["without"] > 0 and rate["with_threads"] > 0 for rate in figures["rates"])
    assert [one["images"] for one in figures["grown"]] == [2, 20]
    # Each file: 2 KiB of numbers and a header.
    assert all(2048 < one["latents"] / one["images"] < 4096 for one in figures["grown"])
    assert all(rate["name"] in text for rate in figures["rates"])


def test_every_image_is_another_file_and_becomes_latents_of_the_size(tmp_path: Path) -> None:
    dataset, placements = make_dataset(tmp_path / "made", images=25, size=(64, 96))
    assert len({example.path.read_bytes() for example in dataset.examples}) == 25
    assert {(placement.original, placement.bucket) for placement in placements} == {((96, 144), (64, 96))}
    source = CachedLatents.build(InstantVAE(), dataset, placements)
    assert source.finish([24], [source.prepare(24, None)[0]]).shape == (1, 2, 4, 12, 8)


def test_the_random_vae_gives_finite_latents_of_ordinary_size() -> None:
    mean, std = random_vae(32, torch.device("cpu")).encode(torch.rand(2, 3, 64, 64) * 2 - 1)
    assert mean.shape == std.shape == (2, 4, 8, 8)
    assert torch.isfinite(mean).all() and 0.01 < float(mean.std()) < 100 and 0 < float(std.max()) < 10


def test_a_number_of_images_or_a_size_there_is_none_of_is_refused(tmp_path: Path) -> None:
    for images, size in ((0, "64"), (5, "wide")):
        with pytest.raises(SettingError):
            run_cache(images=images, size=size, output=tmp_path, say=lambda text: None)
    assert list(tmp_path.iterdir()) == []
