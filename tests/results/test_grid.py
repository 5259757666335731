"""The grid shows what the host samples for each save, weight, prompt and seed, and goes on where it was."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from lib_lora_train import events
from lib_lora_train.adapters import file
from lib_lora_train.errors import Interrupted, LoraFileError, SettingError
from lib_lora_train.host.port import RenderRequest, never
from lib_lora_train.results.grid import SampleOptions, read_grid, sample_grid
from lib_lora_train.run.record import RunRecord
from lib_lora_train.settings import parse
from tests.fake_host import FakeHost, images

OPTIONS = SampleOptions(steps=7, cfg_scale=2.0)


class SamplingHost(FakeHost):
    """Its image of a request is one colour that follows from it, as if every LoRA changed the model."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.requests: list[RenderRequest] = []
        self.before: Callable[[RenderRequest], None] = lambda request: None

    def render(self, request: RenderRequest, *, stop=never) -> list[Image.Image]:
        self.before(request)
        self.requests.append(request)
        return [self.image(dataclasses.replace(request, seed=request.seed + index)) for index in range(request.count)]

    @staticmethod
    def image(request: RenderRequest) -> Image.Image:
        colour = hashlib.sha256(f"{request.prompt} {request.seed}".encode()).digest()
        return Image.new("RGB", (request.width, request.height), tuple(colour[:3]))


class Run:
    """A run that is written without training; its pictures 0.png … are captioned "zzk, a cat 0" …"""

    def __init__(self, folder: Path, **settings: object) -> None:
        self.host = SamplingHost(folder)
        self.data = images(folder / "data", 4)
        for number in range(4):
            (self.data / f"{number}.txt").write_text(f"a cat {number}", encoding="utf-8")
        self.folder = self.host.runs_folder / "zzk-20261121-120000"
        self.record = RunRecord(self.folder, parse({
            "output_name": "zzk", "trigger_word": "zzk", "train_data_dir": str(self.data), **settings}))
        self.record.write(events.Planned(3, 1, 10, 10, 100, "3 pictures", "128×64", "model", 42))

    def save(self, stem: str, step: int, *, value: float = 1.0, folder: Path | None = None) -> Path:
        path = (folder or self.host.lora_folder) / f"{stem}.safetensors"
        file.save(path, {"lora_unet_a.lora_down.weight": torch.full((4, 2), value)}, {"ss_output_name": stem},
                  dtype=torch.float16)
        self.record.write(events.Saved(str(path), step, 1, stem == "zzk"))
        return path

    def grid(self, **changes: object):
        return sample_grid(self.host, self.folder, **{
            "weights": [1.0], "prompts": ["zzk, a dog", "a dog"], "seeds": [5, 6], "options": OPTIONS, **changes})


@pytest.fixture
def run(tmp_path: Path) -> Run:
    made = Run(tmp_path)
    made.save("zzk-000001", 50, value=1.0)
    made.save("zzk", 100, value=2.0)
    return made


def test_every_cell_is_what_the_host_samples_with_the_lora_in_the_prompt(run: Run) -> None:
    grid = run.grid(weights=[0.7, 1.0])
    assert [(column.save, column.weight) for column in grid.columns] == [
        ("", 0.0), ("zzk-000001", 0.7), ("zzk-000001", 1.0), ("zzk", 0.7), ("zzk", 1.0)]
    assert len(grid.cells) == 5 * 2 * 2 and all(cell.done for cell in grid.cells)
    assert [prompt.triggered for prompt in grid.prompts] == [True, False]
    tags = {("", 0.0): "", ("zzk-000001", 0.7): " <lora:zzk-000001:0.7>", ("zzk", 1.0): " <lora:zzk:1>"}
    for cell in grid.cells:
        column = grid.columns[cell.column]
        if (column.save, column.weight) in tags:
            prompt = grid.prompts[cell.prompt].text + tags[column.save, column.weight]
            request = RenderRequest(prompt, width=128, height=64, steps=7, cfg_scale=2.0, seed=cell.seed)
            with Image.open(run.folder / cell.file) as image:
                assert image.tobytes() == run.host.image(request).tobytes()
                assert image.info["parameters"] == (
                    f"{prompt}\nSteps: 7, Sampler: Euler, CFG scale: 2, Seed: {cell.seed}, Size: 128x64, Model: dreamshaper_8")


def test_an_image_that_is_damaged_is_sampled_again_and_no_other(run: Run) -> None:
    files = [run.folder / cell.file for cell in run.grid().cells]
    whole = [path.read_bytes() for path in files]
    files[1].write_bytes(b"")
    files[2].write_bytes(whole[2][:60])
    run.host.requests.clear()
    assert all(cell.done for cell in run.grid().cells)
    assert len(run.host.requests) == 2 and [path.read_bytes() for path in files] == whole


@pytest.mark.parametrize("change", [
    {"columns": []}, {"columns": 3}, {"cells": [{"column": 9, "prompt": 0, "seed": 1, "file": "grid/a.png"}]},
    {"cells": [{"column": 0, "prompt": 0, "seed": 1, "file": ["grid/a.png"]}]}, {"prompts": [{"text": 3, "triggered": True}]},
    {"options": {"size": [64]}}, {"notes": None}])
def test_a_grid_whose_file_is_damaged_is_none(run: Run, change: dict[str, object]) -> None:
    run.grid()
    path = run.folder / "grid" / "cells.json"
    path.write_text(json.dumps({**json.loads(path.read_bytes()), **change}), encoding="utf-8")
    assert read_grid(run.folder) is None


def test_a_grid_that_was_stopped_or_killed_goes_on_where_it_was(run: Run) -> None:
    class Killed(BaseException):
        pass

    def kill(request: RenderRequest) -> None:
        if len(run.host.requests) == 5:
            raise Killed

    with pytest.raises(Interrupted):
        run.grid(should_stop=lambda: len(run.host.requests) == 2)
    run.host.before = kill
    with pytest.raises(Killed):
        run.grid()
    found = read_grid(run.folder)
    assert found is not None and found.to_dict()["progress"] == {"done": 5, "total": 12}
    run.host.before, told = lambda request: None, []
    assert run.grid(on_progress=lambda done, total: told.append((done, total))) == read_grid(run.folder)
    assert told == [(done, 12) for done in range(5, 13)]
    assert len(run.host.requests) == 12 == len(set(run.host.requests))
    run.grid(weights=[1.0, 0.5])  # another grid of the run samples what is new in it
    assert len(run.host.requests) == 12 + 8


def test_a_save_that_is_gone_elsewhere_or_refused_is_told_and_the_others_go_on(run: Run, tmp_path: Path) -> None:
    gone, elsewhere = run.save("zzk-000002", 60), run.save("zzk-000003", 70, folder=tmp_path / "elsewhere")
    run.save("zzk-000004", 80, value=4.0)
    gone.unlink()

    def refuse(request: RenderRequest) -> None:
        if "zzk-000004" in request.prompt:
            raise LoraFileError("zzk-000004 does not fit")
        if "zzk-000001" in request.prompt:
            (run.host.lora_folder / "zzk.safetensors").unlink(missing_ok=True)  # while the grid is sampled

    run.host.before = refuse
    grid = run.grid(saves=[gone.stem, elsewhere.stem, "zzk-000004", "zzk-000001", "zzk"])
    problems = {column.save: column.problem for column in grid.columns}
    assert not problems[""] and not problems["zzk-000001"]
    assert all(name in problems[name] for name in (gone.stem, elsewhere.stem, "zzk-000004"))
    assert "zzk is gone" in problems["zzk"]
    done = {grid.columns[cell.column].save for cell in grid.cells if cell.done}
    assert done == {"", "zzk-000001"} == {grid.columns[cell.column].save for cell in grid.wanted}
    assert read_grid(run.folder) == grid


def test_a_save_that_was_written_anew_is_sampled_anew(run: Run) -> None:
    run.grid()
    before = len(run.host.requests)
    run.save("zzk", 100, value=3.0)
    run.grid()
    assert {request.prompt for request in run.host.requests[before:]} == {"zzk, a dog <lora:zzk:1>", "a dog <lora:zzk:1>"}


@pytest.mark.parametrize(("changes", "error"), [
    ({"saves": ["of another run"]}, SettingError), ({"extras": ["nothing"]}, SettingError),
    ({"weights": [float("nan")]}, SettingError), ({"seeds": [-1]}, SettingError),
    ({"prompts": ["zzk <lora:not-there:1>"]}, LoraFileError), ({"seeds": range(5000)}, SettingError)])
def test_what_cannot_be_sampled_is_refused_before_anything_is(run: Run, changes: dict, error: type) -> None:
    with pytest.raises(error):
        run.grid(**changes)
    assert not run.host.requests and read_grid(run.folder) is None


def test_the_parts_and_the_average_of_the_last_saves_are_columns(run: Run) -> None:
    found: list[torch.Tensor] = []

    def look(request: RenderRequest) -> None:
        if "average" in request.prompt:
            path, = run.host.lora_folder.rglob("zzk-average.safetensors")
            found.append(file.load(path).tensors["lora_unet_a.lora_down.weight"])

    run.host.before = look
    grid = run.grid(extras=["text", "unet", "average"])
    asked = [request.prompt.removeprefix("zzk, a dog ") for request in run.host.requests if "zzk, a dog" in request.prompt]
    assert asked[-6::2] == ["<lora:zzk:0:1>", "<lora:zzk:1:0>", "<lora:zzk-average:1>"]
    assert torch.equal(found[0], torch.full((4, 2), 1.5, dtype=torch.float16))
    # The host's folder is as it was, and the average stays with the run.
    assert sorted(path.name for path in run.host.lora_folder.rglob("*")) == ["zzk-000001.safetensors", "zzk.safetensors"]
    assert (run.folder / "grid" / "zzk-average.safetensors").is_file() and len(grid.columns) == 6


def test_a_save_that_changes_nothing_is_told(run: Run) -> None:
    run.host.image = lambda request: Image.new("RGB", (128, 64), (9, request.seed, 9))
    notes = run.grid().notes
    assert [name for name in ("<lora:zzk-000001:1>", "<lora:zzk:1>") if any(name in note for note in notes)] == [
        "<lora:zzk-000001:1>", "<lora:zzk:1>"]


@pytest.mark.parametrize(("held_out", "prompts", "noted"), [
    (("1.png", "3.png"), ["zzk, a cat 1", "zzk, a cat 3", "a cat 1"], False),
    ((), ["zzk, a cat 0", "zzk, a cat 1", "zzk, a cat 2", "a cat 0"], True)])
def test_the_usual_prompts_are_captions_that_were_held_out_and_one_without_the_trigger_word(
        run: Run, held_out: tuple, prompts: list, noted: bool) -> None:
    run.record.write(events.HeldOut(held_out, False))
    grid = run.grid(prompts=[], saves=["zzk"])
    assert [prompt.text for prompt in grid.prompts] == prompts
    assert [prompt.triggered for prompt in grid.prompts] == ["zzk" in text for text in prompts]
    assert any("held out" in note for note in grid.notes) == noted


def test_the_usual_saves_are_five_over_the_run_with_the_last(tmp_path: Path) -> None:
    run = Run(tmp_path)
    for step in range(10, 131, 10):
        run.save("zzk" if step == 130 else f"zzk-step{step:08d}", step)
    steps = [int(column.save.removeprefix("zzk-step")) for column in run.grid().columns[1:] if column.save != "zzk"]
    assert steps == [10, 40, 70, 100] and run.grid().columns[-1].save == "zzk"
