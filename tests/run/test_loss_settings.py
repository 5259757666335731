"""What the settings of loss and noise make of a run."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from lib_lora_train.errors import SettingError
from lib_lora_train.run import job
from lib_lora_train.settings import parse
from lib_lora_train.training.loop import TrainConfig
from lib_lora_train.training.loss import LossConfig, loss_function
from lib_lora_train.training.noise import NoiseConfig
from tests.jobs import run_settings
from tests.run.test_job import settings


class _AtTheLoopError(Exception):
    """Raised where the training would begin."""


def config_of(images, host, monkeypatch, **changes) -> TrainConfig:
    """What a run of these settings trains with."""
    seen = []

    def train(model, *, config, **rest):
        seen.append((model, config))
        raise _AtTheLoopError
    monkeypatch.setattr(job, "train", train)
    with pytest.raises(_AtTheLoopError):
        run_settings(settings(images, **changes), host, report=lambda event: None, stop=lambda: "")
    return seen[0]


def test_each_setting_of_loss_and_noise_reaches_the_training(images, host, monkeypatch):
    noise = {"noise_offset": 0.05, "noise_offset_random_strength": True, "adaptive_noise_scale": 0.01,
             "multires_noise_iterations": 6, "multires_noise_discount": 0.2, "ip_noise_gamma": 0.1,
             "ip_noise_gamma_random_strength": True, "min_timestep": 100, "max_timestep": 900,
             "timestep_distribution": "sigmoid"}
    loss = {"min_snr_gamma": 3.0, "debiased_estimation_loss": True, "v_pred_like_loss": 0.5}
    huber = {"loss_type": "huber", "huber_schedule": "exponential", "huber_c": 0.2, "huber_scale": 2.0}
    model, config = config_of(images, host, monkeypatch, **noise, **loss, **huber)
    assert {field.name for field in dataclasses.fields(NoiseConfig)} == noise.keys()
    assert config.noise == NoiseConfig(**noise)
    assert dataclasses.replace(config.loss, function=None) == LossConfig(torch.float32, function=None, **loss)
    prediction, target, t = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8), torch.tensor([0, 999])
    expected = loss_function(parse(huber).loss, model.schedule)(prediction, target, t)
    assert torch.equal(config.loss.function(prediction, target, t), expected)


@pytest.mark.parametrize("changes", [
    {"scale_v_pred_loss_like_noise_pred": True}, {"v_pred_like_loss": 0.5, "v_parameterization": "on"}])
def test_a_loss_for_another_kind_of_model_is_refused_by_name(images, host, changes):
    with pytest.raises(SettingError, match=next(iter(changes))):
        run_settings(settings(images, **changes), host, report=lambda event: None, stop=lambda: "")
