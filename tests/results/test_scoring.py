"""Scores tell a copy from an image that was not trained on, and are kept."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image, ImageDraw

from lib_lora_train import events
from lib_lora_train.errors import Interrupted, SettingError
from lib_lora_train.evaluation.scores import spread_of, tag_recall
from lib_lora_train.host.port import RenderRequest, never
from lib_lora_train.host.standalone import StandaloneHost
from lib_lora_train.results.grid import SampleOptions, sample_grid
from lib_lora_train.results.overview import overview
from lib_lora_train.results.recommend import recommend
from lib_lora_train.results.scoring import Scores, read_scores, score_grid
from lib_lora_train.tagging.captioner import Description, Tag
from tests.results.test_grid import Run

COLOURS = ("red", "green", "blue", "black", "orange")


class CopyingHost(StandaloneHost):
    """Each save samples what a test says: by its weight, one of the run's own pictures."""

    shown: dict[str, Path]
    leases = 0

    def lease(self, *, stop=never):
        CopyingHost.leases += 1
        return super().lease(stop=stop)

    def render(self, request: RenderRequest, *, stop=never) -> list[Image.Image]:
        name = next((name for name in self.shown if name in request.prompt), "")
        if "zzk," not in request.prompt:
            name = "drifts" if name == "copies" else ""
        return [Image.open(self.shown[name]).convert("RGB")]


@pytest.fixture(scope="module")
def scored(tiny_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Run, Scores]]:
    folder = tmp_path_factory.mktemp("scores")
    run = Run(folder)
    for number, colour in enumerate(COLOURS):
        image = Image.new("RGB", (64, 64), "white")
        ImageDraw.Draw(image).ellipse((8 * number, 8 * number, 32 + 8 * number, 32 + 4 * number), fill=colour)
        image.save(run.data / f"{number}.png" if number < 4 else folder / "other.png")
    run.record.write(events.HeldOut(("0.png", "1.png"), False))
    for number, name in enumerate(("copies", "learnt")):
        run.save(name, 50 + number, value=number)
    run.host = CopyingHost(tiny_file, lora_folder=run.host.lora_folder, runs_folder=run.host.runs_folder)
    run.host.shown = {"copies": run.data / "2.png", "learnt": run.data / "1.png", "": folder / "other.png",
                      "drifts": run.data / "3.png"}
    sample_grid(run.host, run.folder, weights=[1.0], seeds=[1, 2], prompts=["zzk, a cat", "a cat"],
                options=SampleOptions(size=(64, 64)))
    with pytest.raises(Interrupted):
        score_grid(run.host, run.folder, should_stop=lambda: read_scores(run.folder) is not None)
    yield run, score_grid(run.host, run.folder)


def test_a_copy_a_drift_and_a_likeness_are_told_from_each_other(scored: tuple[Run, Scores]) -> None:
    unadapted, copies, learnt = scored[1].columns
    assert [one.column.save for one in scored[1].columns] == ["", "copies", "learnt"]
    # The second save shows a held-out picture itself, the first one that was trained.
    assert learnt.copy_risk.mean < 0.01 < unadapted.copy_risk.mean < 100 < copies.copy_risk.mean
    assert learnt.likeness.mean > max(copies.likeness.mean, unadapted.likeness.mean)
    assert copies.drift.mean > 0.001 > abs(learnt.drift.mean)
    assert unadapted.drift.mean == pytest.approx(0, abs=1e-5)
    assert all(-1 <= one.prompt_following.mean <= 1 and one.tag_recall.mean is None for one in scored[1].columns)
    assert learnt.likeness.deviation == pytest.approx(0, abs=1e-6)  # both seeds show the same
    found = recommend(scored[0].folder)
    assert found is not None and (found.save, found.weight) == ("learnt", 1.0) and found.order[-1] == ("copies", 1.0)


def test_scores_are_kept_and_only_what_is_new_is_asked(scored: tuple[Run, Scores]) -> None:
    run, scores = scored
    assert read_scores(run.folder) == scores
    told: list[tuple[int, int]] = []
    assert score_grid(run.host, run.folder, on_progress=lambda *at: told.append(at)) == scores and not told
    data = scores.to_dict()
    assert len(data["images"]) == 3 * 2 * 2 and data["columns"][1]["likeness"]["mean"] == scores.columns[1].likeness.mean


def test_a_run_without_a_grid_or_with_a_damaged_one_has_no_scores(scored: tuple[Run, Scores], tmp_path: Path) -> None:
    run = scored[0]
    copy = tmp_path / "copy"
    shutil.copytree(run.folder, copy, ignore=shutil.ignore_patterns(".lock"))
    (copy / "grid" / "scores.json").write_bytes(b"{")
    assert read_scores(copy) is None
    (copy / "grid" / "cells.json").write_bytes(b"[]")
    with pytest.raises(SettingError):
        score_grid(run.host, copy)


def test_the_spread_is_that_of_the_means_of_each_seed() -> None:
    spread = spread_of([[1.0, 3.0], [4.0], []])
    assert (spread.mean, spread.deviation) == (3.0, pytest.approx(2 ** 0.5))
    assert spread_of([[2.0]]).deviation is None and spread_of([[], []]).mean is None


def test_the_page_is_told_the_scores_of_each_column_and_image_and_what_they_recommend(scored: tuple[Run, Scores]) -> None:
    run, scores = scored
    found, told, best = overview(run.folder), scores.to_dict(), recommend(run.folder)
    assert best is not None and found["recommended"] == best.to_dict()
    columns = [{name: value for name, value in one.items() if name != "leaves"} for one in found["grid"]["scores"]]
    assert columns == told["columns"] and len(told["columns"]) == len(found["grid"]["columns"])
    assert {cell["file"]: cell["scores"] for cell in found["grid"]["cells"]} == told["images"]


def test_tag_recall_is_the_share_of_the_captions_tags_that_a_tagger_finds() -> None:
    class Tagger:
        def describe(self, images):
            return [Description((Tag("long_hair", 0.9), Tag("1girl", 0.8), Tag("tree", 0.7)))]

    image = Image.new("RGB", (8, 8))
    assert tag_recall(Tagger(), image, "1girl, Long hair, umbrella, smile") == 0.5
    assert tag_recall(Tagger(), image, "") is None
