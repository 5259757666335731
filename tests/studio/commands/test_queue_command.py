"""The command `queue`: it works on the file that the page's queue works on, and trains what waits there."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from lib_lora_train.__main__ import main
from lib_lora_train.host.standalone import StandaloneHost
from lib_lora_train.results.start import queue_on
from lib_lora_train.run.queue_file import FILE_NAME
from lib_lora_train.run.runner import Runner
from lib_lora_train.studio.commands import queue as queue_command

SMALL = ("resolution=64", "min_bucket_reso=64", "num_repeats=1", "max_train_steps=1", "network_dim=2", "sample_images=false",
         "validation=false", "save_every_n_epochs=0")


@pytest.fixture
def loras(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(queue_command, "_POLL_SECONDS", 0.01)
    return tmp_path / "loras"


def queue(loras: Path, action: str, *arguments: str) -> int:
    return main(["queue", action, *arguments, "--output-dir", str(loras)])


def add(loras: Path, images: Path, name: str, *more: str) -> int:
    return queue(loras, "add", "--data", str(images), "--name", name, *more, *(part for s in SMALL for part in ("--set", s)))


def listed(loras: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    capsys.readouterr()
    assert queue(loras, "list", "--json") == 0
    return {entry["name"]: entry["state"] for entry in json.loads(capsys.readouterr().out)["entries"]}


def test_runs_are_added_ordered_and_trained_one_after_the_other_each_on_its_checkpoint(
        loras: Path, images: Path, tiny_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    models = tmp_path / "models"
    shutil.copytree(tiny_file.parent, models)
    for path in [path for path in models.iterdir() if path.is_file()]:
        shutil.copy(path, path.with_stem("other"))
    lost = tmp_path / "lost"
    shutil.copytree(images, lost)
    assert add(loras, images, "one") == add(loras, lost, "two") == 0
    assert add(loras, images, "three", "--checkpoint", "other.safetensors") == 0
    assert add(loras, images, "four", "--checkpoint", "gone.safetensors") == 0
    assert queue(loras, "move", "three", "1") == 0 and list(listed(loras, capsys)) == ["three", "one", "two", "four"]
    shutil.rmtree(lost)
    assert queue(loras, "run", "--checkpoint", str(models / tiny_file.name)) == 1
    told = capsys.readouterr().err
    assert listed(loras, capsys) == {"three": "done", "one": "done", "two": "failed", "four": "failed"}
    assert {path.stem for path in loras.glob("*.safetensors")} == {"one", "three"}
    assert "lost does not exist" in told and "gone.safetensors is not here" in told
    planned = [(run.name.split("-")[0], json.loads(line)["checkpoint"]) for run in (loras / "runs").iterdir() if run.is_dir()
               for line in (run / "events.jsonl").read_text().splitlines() if '"planned"' in line]
    assert sorted(planned) == [("one", "tiny"), ("three", "other")]
    assert queue(loras, "remove", "four") == 0 and queue(loras, "retry", "two") == 0 and queue(loras, "hold") == 0
    assert listed(loras, capsys) == {"three": "done", "one": "done", "two": "waiting"}
    assert queue(loras, "run", "--checkpoint", str(models / tiny_file.name)) == 0
    assert listed(loras, capsys)["two"] == "waiting"


def test_while_another_program_has_the_queue_it_is_shown_and_not_changed(
        loras: Path, images: Path, capsys: pytest.CaptureFixture[str]):
    assert add(loras, images, "one") == 0
    host = StandaloneHost(None, lora_folder=loras, runs_folder=loras / "runs")
    other = queue_on(host, Runner(), watch=False)
    other.open()
    before = (loras / "runs" / FILE_NAME).read_bytes()
    assert add(loras, images, "two") == queue(loras, "remove", "one") == queue(loras, "hold") == 1
    assert "another program works on it" in capsys.readouterr().err
    assert listed(loras, capsys) == {"one": "waiting"} and (loras / "runs" / FILE_NAME).read_bytes() == before
    other.close()
    assert queue(loras, "remove", "one") == 0


def test_what_is_added_can_be_trained_from_another_folder(
        loras: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text("a girl\n")
    assert add(loras, images, "one", "--set", "sample_prompts=prompts.txt") == 0
    kept = json.loads((loras / "runs" / FILE_NAME).read_text(encoding="utf-8"))["entries"][0]["settings"]
    assert kept["sample_prompts"] == str(tmp_path / "prompts.txt")


@pytest.mark.parametrize("arguments", [("move", "none", "1"), ("remove", "none"), ("retry", "none"), ("webhook", "ftp://x/y")])
def test_what_is_not_there_or_not_possible_is_refused_in_a_sentence(
        loras: Path, images: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...]):
    assert add(loras, images, "one") == 0 and add(loras, images, "two", "--after", "25:00") == 2
    assert queue(loras, *arguments) == 2
    assert "Traceback" not in capsys.readouterr().err and listed(loras, capsys) == {"one": "waiting"}
