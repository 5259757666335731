"""Weights to save that are not those that are trained: what is saved, sampled, measured and judged, and what goes on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from lib_lora_train import events
from lib_lora_train.training.optimizer_kinds import Traits
from lib_lora_train.training.optimizers import OPTIMIZERS
from tests.run.test_job import metadata, of, settings
from tests.run.test_resume import EXACT, going_on, interrupted, run
from tests.run.test_sampling import pixels

SAMPLED = {"sample_images": True, "sample_prompts": "a cat --s 1 --w 64 --h 64", "sample_every_n_steps": 1}


class Emptied(torch.optim.SGD):
    """Its weights to save are all zero."""

    def train(self):
        pass

    @torch.no_grad()
    def eval(self):
        for group in self.param_groups:
            for weight in group["params"]:
                weight.zero_()


class EmptiedSpec:
    class_name = "Emptied"

    def traits(self, arguments):
        return Traits(accepts_flat=True, averages=True)

    def check(self, arguments):
        pass

    def build(self, groups, *, arguments, pairs=()):
        return Emptied(groups)


def test_what_is_saved_sampled_measured_and_judged_are_the_weights_to_save(images, host, monkeypatch):
    monkeypatch.setitem(OPTIMIZERS, "Emptied", EmptiedSpec())
    chosen = settings(images, optimizer_type="Emptied", learning_rate=10, max_train_steps=2, validation=True,
                      validate_every_n_steps=1, **SAMPLED)
    folder = host.runs_folder / "zzk-1"
    folder.mkdir(parents=True)
    finished, seen = run(chosen, host, folder)
    assert not any(tensor.any() for key, tensor in load_file(finished.path).items() if "alpha" not in key)
    measured = of(events.Measured, seen)
    assert len(measured) == 3 and all(m.training == m.unadapted_training for m in measured)
    samples = [pixels(folder / sample.file) for sample in of(events.Sampled, seen)]
    assert len(samples) == 3 and all(np.array_equal(sample, samples[0]) for sample in samples)
    assert finished.verdict == "healthy"  # what is trained at this rate is ruined


def test_a_run_with_a_moving_average_saves_it_and_resumes_to_the_same_bytes(images, host):
    chosen = settings(images, **{**EXACT, "max_train_steps": 4}, ema_decay=0.9)
    straight = load_file(run(chosen, host, None)[0].path)
    folder = interrupted(chosen, host)
    kept, saved = load_file(folder / "state.safetensors"), load_file(Path(host.lora_folder) / "zzk-step00000002.safetensors")
    up = next(key for key in saved if key.endswith("lora_up.weight"))
    assert not torch.equal(saved[up], kept[f"lora.{up}"])
    averages = {tensor.numpy().tobytes() for key, tensor in kept.items() if key.startswith("optimizer.ema.")}
    assert saved[up].flatten(1).numpy().tobytes() in averages
    resumed = load_file(run(going_on(chosen, folder), host, folder)[0].path)
    assert all(torch.equal(straight[key], resumed[key]) for key in straight)


def test_a_schedule_free_run_saves_averages_and_resumes_to_the_same_bytes_also_where_it_is_sampled_and_measured(images, host):
    pytest.importorskip("schedulefree")
    changes = {**EXACT, "max_train_steps": 4, "optimizer_type": "AdamWScheduleFree", "optimizer_args": "betas=0.8,0.99"}
    chosen = settings(images, **changes)
    finished, _ = run(chosen, host, None)
    straight = load_file(finished.path)
    assert metadata(finished.path)["ss_optimizer"] == (
        "schedulefree.adamw_schedulefree.AdamWScheduleFree(weight_decay=0.01,betas=(0.8, 0.99))")
    (host.runs_folder / "zzk-1").mkdir(parents=True)
    folder = interrupted(settings(images, **changes, **SAMPLED, validation=True), host)
    kept = load_file(folder / "state.safetensors")
    saved = load_file(Path(host.lora_folder) / "zzk-step00000002.safetensors")
    trained = {key.removeprefix("lora."): tensor for key, tensor in kept.items() if key.startswith("lora.")}
    ups = [key for key in saved if key.endswith("lora_up.weight")]
    for number, key in enumerate(key for key in saved if "alpha" not in key):
        if key in ups:  # x = (y - (1 - β1) z) / β1
            x = (trained[key] - 0.2 * kept[f"optimizer.{number}.z"].view_as(trained[key])) / 0.8
            torch.testing.assert_close(saved[key], x, rtol=1e-4, atol=1e-6)
    assert any(not torch.equal(saved[key], trained[key]) for key in ups)
    resumed = load_file(run(going_on(chosen, folder), host, folder)[0].path)
    assert all(torch.equal(straight[key], resumed[key]) for key in straight)
