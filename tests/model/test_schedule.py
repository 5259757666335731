"""The schedule equals ldm's and diffusers'."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr
from ldm.modules.diffusionmodules.util import make_beta_schedule

from lib_lora_train.model.sd.schedule import NoiseSchedule, rescaled_to_zero_terminal_snr, scaled_linear_alphas_cumprod

T = torch.tensor([0, 1, 250, 500, 998, 999])


def reference(**changes: object) -> DDPMScheduler:
    return DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", **changes)


def images() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(6, 4, 8, 8, generator=generator), torch.randn(6, 4, 8, 8, generator=generator)


def test_the_default_alphas_are_ldms() -> None:
    betas = torch.as_tensor(make_beta_schedule("linear", 1000, linear_start=0.00085, linear_end=0.012))
    expected = torch.cumprod(1 - betas.double(), dim=0)
    schedule = NoiseSchedule.build(prediction_type="epsilon")
    assert schedule.alphas_cumprod.dtype == torch.float32 and len(schedule) == 1000
    assert torch.allclose(schedule.alphas_cumprod.double(), expected, rtol=1e-6)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_noised_latents_and_targets_equal_diffusers(prediction_type: str) -> None:
    x_0, noise = images()
    schedule, theirs = NoiseSchedule.build(prediction_type=prediction_type), reference()
    assert torch.allclose(schedule.add_noise(x_0, noise, T), theirs.add_noise(x_0, noise, T), atol=1e-5)
    expected = noise if prediction_type == "epsilon" else theirs.get_velocity(x_0, noise, T)
    assert torch.allclose(schedule.target(x_0, noise, T), expected, atol=1e-5)


def test_the_signal_to_noise_ratio_equals_diffusers() -> None:
    assert torch.allclose(NoiseSchedule.build(prediction_type="epsilon").snr(T), compute_snr(reference(), T), rtol=1e-3)


def test_zero_terminal_snr_equals_diffusers_and_ends_at_zero() -> None:
    ours = rescaled_to_zero_terminal_snr(scaled_linear_alphas_cumprod())
    theirs = reference(rescale_betas_zero_snr=True).alphas_cumprod
    assert ours[-1] == 0 and ours[0] == scaled_linear_alphas_cumprod()[0]
    # diffusers goes there by way of fp32 betas
    assert torch.allclose(ours, theirs, atol=2e-5)
    assert torch.allclose(rescaled_to_zero_terminal_snr(ours), ours, atol=1e-7)
    assert NoiseSchedule.build(prediction_type="v_prediction", zero_terminal_snr=True).snr(torch.tensor([999])) == 0


def test_at_zero_snr_the_input_is_noise_and_v_is_the_picture_negated() -> None:
    x_0, noise = images()
    schedule, last = NoiseSchedule.build(prediction_type="v_prediction", zero_terminal_snr=True), torch.full((6,), 999)
    assert torch.equal(schedule.add_noise(x_0, noise, last), noise)
    assert torch.equal(schedule.target(x_0, noise, last), -x_0)


def test_the_hosts_alphas_are_taken_as_they_are() -> None:
    theirs = torch.linspace(0.99, 0.01, 1000)
    assert torch.equal(NoiseSchedule.build(prediction_type="epsilon", alphas_cumprod=theirs).alphas_cumprod, theirs)
