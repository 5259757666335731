"""Processes that are killed at the worst moments of a save: what lay there before is whole, and the run goes on.

Each is a real training process on the small checkpoint. `tools/kill_test.py` does the same at random moments, hundreds of
times.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from safetensors.torch import load_file

from lib_lora_train.adapters.file import inspect
from lib_lora_train.api import service
from lib_lora_train.host.standalone import StandaloneHost
from lib_lora_train.run.record import past_runs
from lib_lora_train.run.runner import Runner

ROOT = Path(__file__).resolve().parents[2]
STATE = "state.safetensors"
SETTINGS = {"output_name": "zzk", "resolution": "64", "min_bucket_reso": 64, "num_repeats": 1, "network_dim": 2,
            "sample_images": False, "validation": False,
            "max_train_steps": 4, "save_every_n_steps": 2, "save_precision": "float"}

# Trains, and kills itself when a file called NAME is about to take its place for the COUNT-th time.
CHILD = """
import os, signal, sys
from lib_lora_train.storage import atomic
from lib_lora_train.__main__ import main
moment, name, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
replace, left = os.replace, [count]
def die():
    os.kill(os.getpid(), getattr(signal, "SIGKILL", signal.SIGTERM))
def dying(source, target):
    left[0] -= os.path.basename(target) == name
    if left[0]:
        return replace(source, target)
    if moment == "torn":
        os.truncate(source, os.path.getsize(source) // 2)
    if moment == "after":
        replace(source, target)
    die()
atomic.os.replace = dying
main(sys.argv[4:])
"""


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    for number, color in enumerate(("red", "blue", "green")):
        Image.new("RGB", (64, 64), color).save(folder / f"{number}.png")
    return folder


def train(host: StandaloneHost, start) -> Path:
    """The result of a run that `start(runner)` starts."""
    runner = Runner()
    start(runner)
    assert runner.wait(120)
    finished = runner.status().finished
    assert finished.outcome == "done", finished.message
    return Path(finished.path)


@pytest.fixture(scope="module")
def straight(images, tiny_file, tmp_path_factory) -> dict:
    """What an uninterrupted run makes."""
    place = tmp_path_factory.mktemp("straight")
    host = StandaloneHost(tiny_file, lora_folder=place, runs_folder=place / "runs")
    return load_file(train(host, lambda runner: service.start(
        {**SETTINGS, "train_data_dir": str(images)}, runner=runner, host=host)))


@pytest.mark.parametrize("moment, name, count, resumable", [
    ("torn", STATE, 1, None), ("after", STATE, 1, 2), ("torn", "zzk.safetensors", 1, 2),
    ("after", "zzk.safetensors", 1, 2)])
def test_killed_in_the_middle_of_a_save_nothing_is_torn_and_the_run_goes_on(
        images, straight, tiny_file, tmp_path, moment, name, count, resumable):
    arguments = ["train", "--checkpoint", tiny_file, "--data", images, "--output-dir", tmp_path]
    arguments += [part for key, value in SETTINGS.items() for part in ("--set", f"{key}={value}")]
    done = subprocess.run([sys.executable, "-c", CHILD, moment, name, str(count), *map(str, arguments)], cwd=ROOT, text=True,
                          capture_output=True, check=False)
    assert done.returncode not in (0, 1, 2), done.stderr
    host = StandaloneHost(tiny_file, lora_folder=tmp_path, runs_folder=tmp_path / "runs")
    past, = past_runs(host.runs_folder)
    assert (past.outcome, past.total, past.resume_step) == ("interrupted", 4, resumable)
    assert all(inspect(path).hash_ok for path in tmp_path.glob("*.safetensors"))

    def start(runner: Runner) -> None:
        if resumable is None:
            service.start({**SETTINGS, "train_data_dir": str(images)}, runner=runner, host=host)
        else:
            assert service.resume(past.id, {}, runner=runner, host=host) == past.id
            assert service.runs(host)[0]["outcome"] == "running"
    again = load_file(train(host, start))
    assert again.keys() == straight.keys() and all((again[key] == straight[key]).all() for key in straight)
    assert not list(tmp_path.glob(".*.part")), "what the killed process left is gone"
    assert {run.id: run.outcome for run in past_runs(host.runs_folder)}[past.id] == (
        "done" if resumable else "interrupted")
