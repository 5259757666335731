"""The routes of a run's results: what each answers, how it refuses, and that no other file gets out."""

from __future__ import annotations

import io
import json
import os
import sys
import threading
from pathlib import Path

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from PIL import Image

from lib_lora_train import api, events
from lib_lora_train.api import results
from lib_lora_train.errors import HostError, Interrupted
from lib_lora_train.host.port import Checkpoint
from lib_lora_train.run.queue import RunQueue
from lib_lora_train.run.runner import Runner
from lib_lora_train.settings import parse
from tests.fake_host import FakeJob, images
from tests.results.written_run import Run

TOKEN = "page-token"
PAGE = {"X-Lora-Train": TOKEN}


class Desk:
    """A server with one finished run, asked as the page asks."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.runner = folder, Runner()
        self.run = Run(folder)
        self.host = self.run.host
        self.early = self.run.save("zzk-000001", 50, value=1.0)
        self.sample = self.run.sample(50)
        self.final = self.run.save("zzk", 100, final=True, value=2.0)
        self.run.tell(events.Finished("done", "zzk is ready.", str(self.final), 100))
        self.run.record.close()
        self.id = self.run.folder.name
        app = FastAPI()
        api.install(app, runner=self.runner, host=self.host, token=TOKEN, api_enabled=False, credentials={})
        self.client = TestClient(app, base_url="http://localhost")
        self.tasks = results.results_for(self.host, self.runner).tasks

    def get(self, route: str = "", /, **query: str):
        return self.client.get(f"{api.PREFIX}/results{route}", params=query, headers=PAGE)

    def post(self, route: str, /, **body: object):
        return self.client.post(f"{api.PREFIX}/results/{route}", json=body, headers=PAGE)

    def start(self, name: str = "new"):
        """A training that goes on until the test ends."""
        data = self.folder / "data"
        settings = {"output_name": name, "train_data_dir": str(data if data.is_dir() else images(data))}
        return self.client.post(f"{api.PREFIX}/start", json={"settings": settings}, headers=PAGE)


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(tmp_path)


class Grid:
    """Stands in for the sampling and scoring of a grid, which goes on until the test says so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: dict[str, object] = {}
        self.began, self.go_on, self.scored = threading.Event(), threading.Event(), threading.Event()
        monkeypatch.setattr(results, "sample_grid", self.sample)
        monkeypatch.setattr(results, "score_grid", self.score)

    def sample(self, host, folder, *, on_progress, should_stop, saves, weights, prompts, seeds, extras, options):
        self.asked = {"folder": folder, "saves": saves, "weights": weights, "prompts": prompts, "seeds": seeds,
                      "extras": extras, "checkpoint": options.checkpoint}
        on_progress(1, 4)
        self.began.set()
        while not self.go_on.wait(0.01):
            if should_stop():
                raise Interrupted("The grid was stopped")

    def score(self, host, folder, *, on_progress, should_stop):
        self.scored.set()


@pytest.fixture
def grid(monkeypatch: pytest.MonkeyPatch, desk: Desk):
    made = Grid(monkeypatch)
    yield made
    made.go_on.set()
    assert desk.tasks.wait(60)


def test_the_newest_run_is_shown_unless_another_is_named(desk: Desk):
    assert desk.get().json()["run"] == desk.id
    found = desk.get(run=desk.id).json()
    assert [save["id"] for save in found["saves"]] == ["zzk-000001", "zzk"]
    assert found["size"] == [64, 64] and found["task"] is None and found["dataset"] == ""


def test_a_run_on_a_dataset_of_the_studio_says_which(tmp_path: Path):
    inside = tmp_path / "datasets" / "cats" / "10_zzk"
    run = Run(tmp_path, values={"train_data_dir": str(inside.parent)})
    run.record.close()
    shown = results.Results(run.host, Runner()).show(results.ResultsRequest(run=run.folder.name))
    assert shown["dataset"] == "cats"


def test_where_there_is_no_run_a_sentence_says_so(tmp_path: Path, desk: Desk):
    (tmp_path / "empty").mkdir()
    nothing = Run(tmp_path / "empty")
    nothing.record.close()
    desk.host.runs_folder = tmp_path / "nowhere"
    assert desk.get().status_code == 400 and "no run" in desk.get().json()["error"]


def test_only_the_runs_of_the_host_are_known(desk: Desk):
    for run in ("none", "../runs", "..", "/", "a/b", "\0", f"{desk.id}/../{desk.id}"):
        for answer in (desk.get(run=run), desk.get("/file", run=run, name=desk.sample), desk.get("/report", run=run),
                       desk.post("grid", run=run), desk.post("take", run=run, save="zzk"),
                       desk.post("delete", run=run, saves=["zzk"])):
            assert answer.status_code == 400 and list(answer.json()) == ["error"], run
    assert desk.early.exists() and desk.final.exists()


def test_a_picture_of_a_run_is_served_whole_or_small_and_may_be_kept(desk: Desk):
    whole = desk.get("/file", run=desk.id, name=desk.sample)
    assert whole.content == (desk.run.folder / desk.sample).read_bytes()
    assert whole.headers["content-type"] == "image/png" and whole.headers["x-content-type-options"] == "nosniff"
    assert "immutable" in whole.headers["cache-control"] and "private" in whole.headers["cache-control"]
    Image.new("RGB", (1024, 512), "red").save(desk.run.folder / "samples" / "large.png")
    small = Image.open(io.BytesIO(desk.get("/file", run=desk.id, name="samples/large.png", small="1").content))
    assert (small.format, small.size) == ("JPEG", (256, 128))


def test_no_other_file_is_served(desk: Desk):
    (desk.run.folder / "samples" / "sub").mkdir()
    for path in (desk.folder / "secret.png", desk.run.folder / "samples" / "sub" / "0.png", desk.run.folder / "0.png"):
        Image.new("RGB", (8, 8)).save(path)
    for name in ("", "0.png", "settings.toml", "events.jsonl", "samples", "samples/", "samples/../settings.toml",
                 "../zzk.safetensors", "/etc/passwd", str(desk.folder / "secret.png"), "samples/../../../secret.png",
                 "samples/..\\..\\..\\secret.png", "samples//0-50.png/..", "grid/cells.json", "samples/0-50.png\0",
                 "samples/C:0-50.png", "other/0.png", "samples/sub/0.png", "samples/none.png", "samples/..png"):
        refused = desk.get("/file", run=desk.id, name=name)
        assert refused.status_code == 400 and list(refused.json()) == ["error"], name


@pytest.mark.skipif(sys.platform == "win32", reason="links need rights there")
def test_a_link_out_of_the_folder_is_not_followed(desk: Desk):
    Image.new("RGB", (8, 8)).save(desk.folder / "secret.png")
    os.symlink(desk.folder / "secret.png", desk.run.folder / "samples" / "link.png")
    os.symlink(desk.folder, desk.run.folder / "grid")
    for name in ("samples/link.png", "grid/secret.png"):
        assert desk.get("/file", run=desk.id, name=name).status_code == 400


def test_nobody_but_the_page_may_ask(desk: Desk):
    for name in ("results", "results/task", "results/file", "results/report"):
        assert desk.client.get(f"{api.PREFIX}/{name}").status_code == 403
    for name in ("grid", "stop", "take", "delete", "sample"):
        assert desk.client.post(f"{api.PREFIX}/results/{name}", json={}).status_code == 403


def test_a_save_is_made_the_lora_and_what_was_written_is_said(desk: Desk):
    before = desk.early.read_bytes()
    taken = desk.post("take", run=desk.id, save="zzk-000001", weight=0.8).json()
    assert taken["path"] == str(desk.final) and taken["lora_text"] == "<lora:zzk:0.8>"
    assert json.loads(Path(taken["card"]).read_text(encoding="utf-8"))["preferred weight"] == 0.8
    assert all(Path(taken[name]).name in taken["message"] for name in ("path", "card", "preview", "kept"))
    assert desk.early.read_bytes() == before
    assert [save["is_result"] for save in desk.get().json()["saves"]] == [True, False]


def test_saves_are_deleted_but_not_the_lora_itself(desk: Desk):
    refused = desk.post("delete", run=desk.id, saves=["zzk-000001", "zzk"])
    assert refused.status_code == 400 and desk.early.exists()
    assert desk.post("delete", run=desk.id, saves=["zzk-000001"]).json() == {"deleted": ["zzk-000001.safetensors"]}
    assert not desk.early.exists() and desk.final.exists()
    assert desk.post("delete", run=desk.id).status_code == 400


def test_what_cannot_be_asked_for_begins_nothing(desk: Desk, grid: Grid):
    for body in ({"weights": [3]}, {"weights": ["much"]}, {"weights": [None]}, {"seeds": [-1]}, {"seeds": [1.5]},
                 {"extras": ["clip"]}, {"prompts": "one"}, {"saves": [1]}, {"checkpoint": 3}, {"run": 5}):
        refused = desk.post("grid", **{"run": desk.id, **body})
        assert refused.status_code == 400 and list(refused.json()) == ["error"], body
    assert not grid.began.is_set() and desk.get("/task").json() == {"task": None}


def test_a_grid_is_painted_then_judged_and_its_progress_seen(desk: Desk, grid: Grid):
    asked = {"saves": ["zzk"], "weights": [0.5, 1], "prompts": ["a cat"], "seeds": [1, 2], "extras": ["unet"],
             "checkpoint": "x"}
    number = desk.post("grid", run=desk.id, **asked).json()["id"]
    assert grid.began.wait(60)
    task = desk.get("/task").json()["task"]
    assert (task["id"], task["run"], task["done"], task["total"], task["running"]) == (number, desk.id, 1, 4, True)
    assert grid.asked == {"folder": desk.run.folder, **asked}
    grid.go_on.set()
    assert desk.tasks.wait(60) and grid.scored.is_set()
    task = desk.get().json()["task"]
    assert task["outcome"] == "done" and task["message"]


def test_while_a_grid_is_painted_its_saves_stay_and_no_second_one_begins(desk: Desk, grid: Grid):
    desk.post("grid", run=desk.id)
    assert grid.began.wait(60)
    for refused in (desk.post("grid", run=desk.id), desk.post("take", run=desk.id, save="zzk-000001"),
                    desk.post("delete", run=desk.id, saves=["zzk-000001"]), desk.start()):
        assert refused.status_code == 409 and "grid" in refused.json()["error"].lower()
    assert desk.post("stop").json() == {"stopping": True}
    assert desk.tasks.wait(60)
    assert desk.get("/task").json()["task"]["outcome"] == "stopped" and not grid.scored.is_set()
    assert desk.post("stop").json() == {"stopping": False}


def test_a_grid_does_not_begin_while_a_training_has_the_model_unless_the_host_shares_it(
        desk: Desk, grid: Grid, job: FakeJob):
    assert desk.start().status_code == 200
    refused = desk.post("grid", run=desk.id)
    assert refused.status_code == 409 and "in use" in refused.json()["error"]
    desk.host.shares_model = lambda: True
    assert desk.post("grid", run=desk.id).status_code == 200
    assert grid.began.wait(60)
    with pytest.raises(HostError), desk.runner.other_model():
        pass
    desk.runner.stop(save=False)
    assert desk.runner.wait(60)
    assert desk.start("again").status_code == 200
    desk.runner.stop(save=False)
    assert desk.runner.wait(60)


def test_a_grid_does_not_begin_while_a_queued_run_has_another_model_loaded(desk: Desk, grid: Grid):
    refused, loaded = [], desk.host.checkpoint()

    def select(title: str) -> str:
        refused.append(desk.post("grid", run=desk.id))
        desk.host.checkpoint = lambda: Checkpoint("other", title, "sd1")
        return loaded.title

    desk.host.shares_model, desk.host.select = lambda: True, select
    queue = RunQueue(desk.host, desk.runner, desk.host.runs_folder, start=lambda entry, folder: None, watch=False)
    queue.add(parse({"output_name": "queued", "train_data_dir": str(images(desk.folder / "data"))}), checkpoint="other")
    queue.check()
    queue.close()
    assert [answer.status_code for answer in refused] == [409] and "queued run" in refused[0].json()["error"]
    assert desk.post("grid", run=desk.id).status_code == 200 and grid.began.wait(60)


def test_a_sample_now_is_refused_without_a_run_that_samples(desk: Desk, job: FakeJob):
    assert desk.post("sample").status_code == 409
    desk.start()
    assert desk.post("sample").status_code == 200
    desk.runner.stop(save=False)
    assert desk.runner.wait(60)
    assert desk.post("sample").status_code == 409


def test_the_report_is_a_page_that_may_run_nothing(desk: Desk):
    report = desk.get("/report", run=desk.id)
    assert report.headers["content-type"].startswith("text/html") and "zzk" in report.text
    assert "sandbox" in report.headers["content-security-policy"]


def test_a_refusal_of_the_host_is_told(desk: Desk, grid: Grid, monkeypatch: pytest.MonkeyPatch):
    def refuse(*_, **__):
        raise HostError("No model is loaded")
    monkeypatch.setattr(results, "sample_grid", refuse)
    desk.post("grid", run=desk.id)
    assert desk.tasks.wait(60)
    task = desk.get("/task").json()["task"]
    assert task["outcome"] == "failed" and "No model is loaded" in task["message"]
