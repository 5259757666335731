"""Two real processes that train one LoRA by the command line: the result is that of one process at twice the batch, and what
happens when one of them goes."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from lib_lora_train import events
from lib_lora_train.adapters.file import inspect
from lib_lora_train.host.standalone import StandaloneHost
from lib_lora_train.run.record import past_runs
from lib_lora_train.settings import parse
from tests.distributed.processes import ROOT, clean_environment, close, running
from tests.jobs import run_settings
from tools import tiny_checkpoint

SETTINGS = {"output_name": "zzk", "resolution": "64", "min_bucket_reso": 64, "network_dim": 2, "sample_images": False,
            "validation": False, "save_precision": "float",
            "learning_rate": 0.01, "text_encoder_lr": 0.01, "lr_scheduler": "constant", "max_train_steps": 4,
            "overwrite": True, "num_repeats": 1}
WIDE = {"resolution": "128", "bucket_reso_steps": 64}
# Two rounds of one AdamW step tell nearly nothing apart where a gradient is nearly 0; over all weights it averages out.
SAME = 2e-3
LONG = ", ".join(f"word{number}" for number in range(60))  # more than one chunk of 75 tokens


@pytest.fixture(scope="module")
def tiny_file(tmp_path_factory) -> Path:
    """Of two levels: with four some norms are over two numbers, and AdamW follows the rounding of what is left of gradients."""
    return tiny_checkpoint.write(tmp_path_factory.mktemp("checkpoint"), size=tiny_checkpoint.SHALLOW)


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """Seven images of two shapes, one of them with a long caption, and three of a general class beside them."""
    place = tmp_path_factory.mktemp("data")
    for folder, count in (("pictures/1_zzk", 7), ("class/1_thing", 3)):
        (place / folder).mkdir(parents=True)
        for number in range(count):
            size = (192, 64) if number % 3 == 2 else (64, 64)
            Image.linear_gradient("L").resize(size).rotate(50 * number).convert("RGB").save(place / folder / f"{number}.png")
            (place / folder / f"{number}.txt").write_text(LONG if number == 1 else f"thing number {number}", encoding="utf-8")
    return place / "pictures"


def command(settings: dict, checkpoint: Path, *more: object) -> list[object]:
    return ["train", "--checkpoint", checkpoint, "--json", *more,
            *(part for name, value in settings.items() for part in ("--set", f"{name}={value}"))]


def seen(lines: list[str]) -> list[events.Event]:
    return [events.from_dict(json.loads(line)) for line in lines]


def losses(told: list[events.Event]) -> list[float]:
    return [event.loss for event in told if isinstance(event, events.Step)]


def alone(settings: dict, checkpoint: Path, folder: Path) -> tuple[dict[str, torch.Tensor], list[float]]:
    """What one process makes of `settings`: its weights and its losses."""
    told: list[events.Event] = []
    host = StandaloneHost(checkpoint, lora_folder=folder, runs_folder=folder / "runs")
    chosen = parse({**settings, "output_dir": str(folder)})
    return load_file(run_settings(chosen, host, report=told.append, stop=lambda: "").path), losses(told)


def apart(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """How far two LoRAs are apart, as a part of what was learnt: |a - b| / |b| over all up weights, which begin at 0."""
    assert one.keys() == other.keys()
    names = [name for name in one if name.endswith("lora_up.weight")]
    a, b = (torch.cat([tensors[name].double().flatten() for name in names]) for tensors in (one, other))
    assert float(b.norm()) > 0.01
    return float((a - b).norm() / b.norm())


@pytest.mark.skipif(sys.platform == "win32", reason="torchrun needs a torch that was built with libuv")
def test_two_processes_that_torchrun_starts_learn_what_one_learns_with_twice_the_batch(images, tiny_file, tmp_path):
    """Buckets of 5 and 2 images with 3 of a class beside them, so that batches are uneven and one process goes without;
    text encoders on captions of any length, accumulation, regularisation, min-SNR weights, pictures made anew at each visit,
    and one process that runs out of memory."""
    chosen = {**SETTINGS, **WIDE, "train_data_dir": images, "reg_data_dir": images.parent / "class", "flip_aug": True,
              "network_train_unet_only": False, "color_aug": True, "random_crop": True, "caption_tag_dropout_rate": 0.2,
              "prior_loss_weight": 0.5, "min_snr_gamma": 2, "gradient_accumulation_steps": 2, "train_batch_size": 2,
              "multires_noise_iterations": 3, "preservation": "blank",
              "validation": True}
    launcher = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m",
         "tests.distributed.short_of_memory", *map(str, command({**chosen, "output_dir": tmp_path / "two"}, tiny_file))],
        cwd=ROOT, env=clean_environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        output, errors = launcher.communicate()
    finally:
        close(launcher)
    assert launcher.returncode == 0, errors
    told = seen(output.splitlines())
    assert sum(isinstance(event, events.Finished) for event in told) == 1, "only the first one prints"
    weights, curve = alone({**chosen, "train_batch_size": 4}, tiny_file, tmp_path / "one")
    assert losses(told) == pytest.approx(curve, rel=1e-3)
    assert apart(load_file(tmp_path / "two" / "zzk.safetensors"), weights) < SAME
    made = inspect(tmp_path / "two" / "zzk.safetensors").metadata
    assert (made["ss_batch_size_per_device"], made["ss_total_batch_size"]) == ("2", "4")
    assert len(list((tmp_path / "two" / "runs").iterdir())) == 1, "only the first one records"


def test_after_a_kill_the_other_ends_by_itself_and_both_go_on_from_what_was_kept(images, tiny_file, tmp_path):
    chosen = {**SETTINGS, "train_data_dir": images, "output_dir": tmp_path, "save_every_n_steps": 2}
    words = ["-m", "lib_lora_train", *command({**chosen, "max_train_steps": 2000}, tiny_file)]
    with running([words, words], tmp_path) as started:
        assert '"saved"' in started.until('"step": 2, "epoch": 1, "final": false')[-1]
        started.processes[1].kill()
        assert '"failed"' in started.until("finished")[-1]
        assert started.end()[0] == 1
        said, = started.errors().strip().splitlines()[-1:]
        assert said.startswith("Another of the 2 processes ended unexpectedly") and "what was learnt until then is in" in said
    run, = past_runs(tmp_path / "runs")
    assert run.outcome == "failed" and run.resume_step >= 2
    kept = sorted(tmp_path.glob("*.safetensors"))
    assert kept and all(inspect(path).hash_ok for path in kept)

    steps = run.resume_step + 2
    words = ["-m", "lib_lora_train", *command({"max_train_steps": steps}, tiny_file, "--resume", tmp_path / "runs" / run.id)]
    with running([words, words], tmp_path) as started:
        told = seen(started.until("finished"))
        assert started.end() == [0, 0], started.errors()
    assert not [event.message for event in told if isinstance(event, events.Warned) and "processes" in event.message]
    weights, curve = alone({**chosen, "train_batch_size": 2, "max_train_steps": steps}, tiny_file, tmp_path / "one")
    assert losses(told) == pytest.approx(curve[-2:], rel=1e-2)
    assert apart(load_file(tmp_path / "zzk.safetensors"), weights) < SAME * steps


@pytest.mark.skipif(sys.platform == "win32", reason="Windows sends Ctrl+C to the whole console")
def test_ctrl_c_in_one_process_ends_all_after_the_same_step_and_keeps_what_was_learnt(images, tiny_file, tmp_path):
    chosen = {**SETTINGS, "train_data_dir": images, "output_dir": tmp_path, "max_train_steps": 2000}
    words = ["-m", "lib_lora_train", *command(chosen, tiny_file)]
    with running([words, words], tmp_path) as started:
        assert '"step"' in started.until('"step": 2')[-1]
        started.processes[1].send_signal(signal.SIGINT)
        finished = seen(started.until("finished"))[-1]
        assert started.end() == [130, 0], started.errors()
    assert finished.outcome == "stopped" and inspect(tmp_path / "zzk.safetensors").metadata["ss_steps"] == str(finished.steps)


def test_processes_that_were_started_differently_are_refused_in_one_sentence(images, tiny_file, tmp_path):
    chosen = {**SETTINGS, "train_data_dir": images, "output_dir": tmp_path}
    different = [["-m", "lib_lora_train", *command({**chosen, "learning_rate": rate}, tiny_file, "--no-record")]
                 for rate in (0.01, 0.02)]
    with running(different, tmp_path) as started:
        assert started.end() == [2, 2]
        assert started.errors().endswith(
            "The processes do not train the same thing: learning_rate is 0.01 in process 0 and 0.02 in process 1; start all "
            "of them with the same command, on the same files.\n")
        assert "do not train" not in started.errors(1), "it is told once"
    assert not list(tmp_path.glob("*.safetensors"))


def test_what_one_process_cannot_find_the_others_are_told(images, tiny_file, tmp_path):
    chosen = {**SETTINGS, "train_data_dir": images, "output_dir": tmp_path}
    words = [["-m", "lib_lora_train", *command(chosen, checkpoint, "--no-record")]
             for checkpoint in (tiny_file, tmp_path / "elsewhere.safetensors")]
    with running(words, tmp_path) as started:
        assert started.end() == [1, 2]
        missing = f"The checkpoint {tmp_path / 'elsewhere.safetensors'} does not exist"
        # Torch may add lines of its own about connections that were closed.
        assert f"Process 1 of 2 ended: {missing}; check the path.\n" in started.errors()
        assert f"Process 1: {missing}; check the path.\n" in started.errors(1)
