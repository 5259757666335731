"""Whatever fails, wherever: the host is as it was, the run says what happened, and the next run is a good one.

The table in docs/reliability.md is made by `python -m tests.run.test_faults` from what these tests run.
"""

from __future__ import annotations

import hashlib
import math
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from lib_lora_train import events
from lib_lora_train.host.standalone import StandaloneHost
from lib_lora_train.inputs.batch import Batch
from lib_lora_train.model.frozen import FrozenModel
from lib_lora_train.run.planning import plan_job
from lib_lora_train.run.record import RunRecord, past_run, read_events
from lib_lora_train.run.runner import Runner
from lib_lora_train.settings import parse
from lib_lora_train.training import train_step
from tests.injection import FAULTS, PLACES, Place, inject
from tests.jobs import run_settings
from tools import tiny_checkpoint

# Of a full memory and of a disk that refuses there are two kinds each: the places take turns.
KINDS = (("the GPU's memory is full", "the memory is full"), ("the disk is full", "access is denied"))

ONE_STEP = {"max_train_steps": 1, "save_every_n_steps": 0}  # enough for the run after a fault


def faults_at(place: Place) -> list[str]:
    return ["an unexpected error", *(names[PLACES.index(place) % 2] for names in KINDS)]


@pytest.fixture(scope="module")
def place_of_work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The smallest checkpoint, and two images."""
    folder = tmp_path_factory.mktemp("faults")
    tiny_checkpoint.write(folder, size=tiny_checkpoint.SHALLOW)
    (folder / "pictures").mkdir()
    for number in range(2):
        Image.new("RGB", (64, 64), (90 * number, 80, 120)).save(folder / "pictures" / f"{number}.png")
    return folder


@pytest.fixture
def host(place_of_work: Path, tmp_path: Path) -> StandaloneHost:
    host = StandaloneHost(place_of_work / "tiny.safetensors", lora_folder=tmp_path / "loras", runs_folder=tmp_path / "runs")
    with host.lease() as borrowed:  # some tensors as the WebUI has them
        for tensor in list(borrowed.tensors.values())[::2]:
            tensor.requires_grad_(tensor.is_floating_point())
    return host


@pytest.fixture(scope="module")
def reference(place_of_work: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """What a run learns that nothing disturbs."""
    folder = tmp_path_factory.mktemp("reference")
    undisturbed = StandaloneHost(place_of_work / "tiny.safetensors", lora_folder=folder, runs_folder=folder / "runs")
    finished = run_settings(settings(place_of_work, **ONE_STEP), undisturbed, report=lambda _: None, stop=lambda: "")
    return load_file(finished.path)


def settings(place_of_work: Path, **changes: object):
    return parse({"train_data_dir": str(place_of_work / "pictures"), "output_name": "zzk", "resolution": "64",
                  "min_bucket_reso": 64, "num_repeats": 1, "max_train_steps": 2, "network_dim": 1, "sample_images": False,
                  "validation": False, "overwrite": True, "save_every_n_epochs": 0,
                  "save_every_n_steps": 1, "save_precision": "float", "learning_rate": 1e-3, **changes})


def surroundings(host: StandaloneHost) -> dict[str, Any]:
    """All that a run must leave as it was: the model, and what belongs to the whole process or thread."""
    with host.lease() as borrowed:  # and it can be lent: no lock is left behind
        tensors = {name: (id(t), hashlib.sha256(t.detach().numpy().tobytes()).hexdigest(), t.dtype, t.device, t.requires_grad,
                          t.grad is None, len(t._backward_hooks or ())) for name, t in borrowed.tensors.items()}
    return {
        "tensors": tensors, "torch": torch.get_rng_state().numpy().tobytes(), "random": random.getstate(),
        "numpy": [part if isinstance(part, (str, int, float)) else part.tobytes() for part in np.random.get_state()],
        "grad": torch.is_grad_enabled(), "autocast": torch.is_autocast_enabled(), "dtype": torch.get_default_dtype(),
        "threads": torch.get_num_threads(), "deterministic": torch.are_deterministic_algorithms_enabled()}


def assert_the_next_run_is_good(host: StandaloneHost, place_of_work: Path, reference: dict[str, torch.Tensor]) -> None:
    runner = Runner()
    runner.start(plan_job(settings(place_of_work, **ONE_STEP), host), host)
    assert runner.wait(120) and runner.status().finished.outcome == "done"
    learnt = load_file(runner.status().finished.path)
    assert learnt.keys() == reference.keys() and all(torch.equal(learnt[key], reference[key]) for key in learnt)


@pytest.mark.parametrize("place", PLACES, ids=lambda place: place.name)
def test_after_any_fault_the_host_is_as_it_was_and_the_next_run_is_good(
        place: Place, host: StandaloneHost, place_of_work: Path, reference: dict[str, torch.Tensor]) -> None:
    before = surroundings(host)
    for name in faults_at(place):
        runner = Runner()
        undo = inject(place, FAULTS[name], host)
        try:
            runner.start(plan_job(settings(place_of_work), host), host)
            assert runner.wait(120)
        finally:
            undo()
        assert surroundings(host) == before, name
        assert_told(runner, host, place, name)
        for leftover in host.lora_folder.iterdir():
            assert leftover.suffix == ".safetensors" and load_file(leftover), f"{name}: {leftover} is not whole"
    assert_the_next_run_is_good(host, place_of_work, reference)


def assert_told(runner: Runner, host: StandaloneHost, place: Place, fault: str) -> None:
    """The last event and the run's folder agree, in one sentence; a fault that costs little only warns."""
    status = runner.status()
    finished, seen = status.finished, list(read_events(host.runs_folder / status.run))
    assert seen[-1] == finished and "\n" not in finished.message, fault
    assert past_run(host.runs_folder / status.run).outcome == finished.outcome
    if place.survives(fault):
        assert finished.outcome == "done" and any(isinstance(event, events.Warned) for event in seen), (fault, finished)
        return
    assert finished.outcome == "failed" and finished.message.endswith("."), (fault, finished)
    said = {"an unexpected error": "RuntimeError: injected", "the GPU's memory is full": "memory ran out",
            "the memory is full": "memory ran out", "the disk is full": "No space left", "access is denied": "denied"}
    assert said[fault] in finished.message, (fault, finished)
    if place.learnt:
        assert list(host.lora_folder.glob("zzk*.safetensors")), f"{fault}: what was learnt is lost"


@pytest.mark.parametrize("place", PLACES, ids=lambda place: place.name)
def test_a_second_ctrl_c_ends_at_once_and_leaves_the_host_as_it_was(
        place: Place, host: StandaloneHost, place_of_work: Path) -> None:
    """On the command line, where the job has the main thread; the first Ctrl+C only asks to stop."""
    before, chosen = surroundings(host), settings(place_of_work)
    record = RunRecord(host.runs_folder / "zzk", chosen)
    undo = inject(place, FAULTS["Ctrl+C"], host)
    try:
        with pytest.raises(KeyboardInterrupt):
            run_settings(chosen, host, report=record.write, stop=lambda: "", folder=record.folder)
    finally:
        undo()
        record.close()
    assert surroundings(host) == before
    assert past_run(record.folder).outcome in ("interrupted", "done")


@pytest.mark.parametrize("step", [1, 2])
def test_a_loss_that_is_no_number_at_any_step_is_skipped_and_leaves_the_host_as_it_was(
        step: int, host: StandaloneHost, place_of_work: Path, reference: dict[str, torch.Tensor],
        monkeypatch: pytest.MonkeyPatch) -> None:
    original, calls = train_step.denoising_loss, []

    def poisoned(model: FrozenModel, batch: Batch, **given: Any) -> torch.Tensor:
        calls.append(1)
        return original(model, batch, **given) * (math.nan if len(calls) == step else 1)
    before, runner = surroundings(host), Runner()
    with monkeypatch.context() as patch:
        patch.setattr(train_step, "denoising_loss", poisoned)
        runner.start(plan_job(settings(place_of_work), host), host)
        assert runner.wait(120)
    status = runner.status()
    assert status.finished.outcome == "done" and status.step.skipped_steps == 1
    assert any(f"step {step} " in warning for warning in status.warnings)
    assert surroundings(host) == before
    assert_the_next_run_is_good(host, place_of_work, reference)


def table() -> str:
    """The faults and places above as a table: what the run comes to. That it does, the tests say."""
    rows = ["| | " + " | ".join(FAULTS) + " |", "|---|" + "---|" * len(FAULTS)]
    for place in PLACES:
        cells = ["ends at once" if fault == "Ctrl+C" else
                 "done, warned" if place.survives(fault) else
                 "failed, kept" if place.learnt else "failed" for fault in FAULTS]
        rows.append(f"| {place.name} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


if __name__ == "__main__":
    sys.stdout.write(table() + "\n")
