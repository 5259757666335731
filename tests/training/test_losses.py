"""Losses and noise against sd-scripts' formulas (48d368fa: train_util.py, custom_train_functions.py), written out."""

from __future__ import annotations

import dataclasses
import hashlib
import math

import pytest
import torch
from torch.nn.functional import mse_loss

from lib_lora_train.model.sd.schedule import NoiseSchedule
from lib_lora_train.settings import parse
from lib_lora_train.training.loss import LossConfig, loss_function, prediction_and_target, weighted_by_snr, zero_prediction_loss
from lib_lora_train.training.noise import NoiseConfig, draw, pyramid_noise
from tests.training import small_run

SCHEDULE = NoiseSchedule.build(prediction_type="epsilon")
T = torch.tensor([0, 250, 999])
SHAPE = (3, 4, 8, 8)


def elements(seed: int) -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


def threshold(chosen, t: int) -> float:
    c, scale, alpha = chosen.huber_c, chosen.huber_scale, SCHEDULE.alphas_cumprod[t].item()
    if chosen.huber_schedule == "constant":
        return c * scale
    if chosen.huber_schedule == "exponential":
        return math.exp(math.log(c) / 1000 * t) * scale
    return (1 - c) / (1 + math.sqrt((1 - alpha) / alpha)) ** 2 + c


@pytest.mark.parametrize("schedule", ["constant", "exponential", "snr"])
@pytest.mark.parametrize("loss_type", ["huber", "smooth_l1"])
def test_huber_losses_are_sd_scripts(loss_type, schedule):
    chosen = parse({"loss_type": loss_type, "huber_schedule": schedule, "huber_c": 0.2, "huber_scale": 1.5}).loss
    prediction, target = elements(1), elements(2)
    loss = loss_function(chosen, SCHEDULE)(prediction, target, T)
    for row, t in enumerate(T.tolist()):
        c = threshold(chosen, t)
        expected = 2 * (torch.sqrt((prediction[row] - target[row]) ** 2 + c ** 2) - c)
        torch.testing.assert_close(loss[row], expected * c if loss_type == "huber" else expected, rtol=1e-4, atol=1e-6)


def test_l1_and_l2_are_torchs():
    prediction, target = elements(1), elements(2)
    for loss_type, theirs in (("l2", mse_loss), ("l1", torch.nn.functional.l1_loss)):
        ours = loss_function(parse({"loss_type": loss_type}).loss, SCHEDULE)
        torch.testing.assert_close(ours(prediction, target, T), theirs(prediction, target, reduction="none"))


SNR = torch.tensor([5000.0, 3.0, 0.05])
CAPPED = torch.tensor([1000.0, 3.0, 0.05])


@pytest.mark.parametrize("changes, v_prediction, expected", [
    ({"min_snr_gamma": 5.0}, False, torch.tensor([5 / 5000, 1.0, 1.0])),
    ({"scale_v_pred_loss_like_noise_pred": True}, True, CAPPED / (CAPPED + 1)),
    ({"v_pred_like_loss": 0.5}, False, 1 + 0.5 * (CAPPED + 1) / CAPPED),
    ({"debiased_estimation_loss": True}, False, 1 / CAPPED.sqrt()),
    ({"debiased_estimation_loss": True}, True, 1 / (CAPPED + 1)),
    ({"debiased_estimation_loss": True, "min_snr_gamma": 5.0}, True, SNR.clamp(max=5) / (SNR + 1) / (CAPPED + 1)),
])
def test_weights_by_noise_level_are_sd_scripts(changes, v_prediction, expected):
    loss = torch.tensor([2.0, 3.0, 4.0])
    weighted = weighted_by_snr(loss, SNR, LossConfig(torch.float32, **changes), v_prediction=v_prediction)
    torch.testing.assert_close(weighted, loss * expected)


@pytest.mark.parametrize("changes", [{"debiased_estimation_loss": True}, {"v_pred_like_loss": 1.0}, {"min_snr_gamma": 5.0}])
def test_pure_noise_gives_finite_weights(changes):
    loss = weighted_by_snr(torch.ones(1), torch.zeros(1), LossConfig(torch.float32, **changes), v_prediction=False)
    assert loss.isfinite().all()


@pytest.mark.parametrize("loss_type", ["l1", "l2", "huber", "smooth_l1"])
def test_to_predict_nothing_is_that_loss_of_a_zero(loss_type):
    model, batch = small_run.model("sd1"), small_run.batch(1, rows=2)
    draws = draw(batch["mean"].shape, seed=0, step=1, micro=0, timesteps=1000)
    function = loss_function(parse({"loss_type": loss_type}).loss, model.schedule)
    zero = zero_prediction_loss(model, batch.extended({**draws, "weight": torch.ones(2)}),
                                LossConfig(torch.float32, function=function))
    noise = draws["noise"]
    expected = function(torch.zeros_like(noise), noise, draws["timesteps"]).mean(dim=(1, 2, 3)).sum()
    torch.testing.assert_close(zero, expected)


# --- noise ------------------------------------------------------------------------------------------------------------

def drawn(config: NoiseConfig, *, rows: int = 4, step: int = 1, latents=None) -> dict[str, torch.Tensor]:
    return draw((rows, 4, 16, 16), seed=5, step=step, micro=0, timesteps=1000, config=config, latents=latents)


PLAIN = drawn(NoiseConfig())
CHANGES = {
    "noise_offset": 0.1, "multires_noise_iterations": 6, "ip_noise_gamma": 0.1, "min_timestep": 700, "max_timestep": 300,
    "timestep_distribution": "high_noise"}


@pytest.mark.parametrize("name", CHANGES)
def test_what_one_setting_draws_leaves_what_the_others_draw(name):
    """And defaults draw what they always drew."""
    changed = drawn(NoiseConfig(**{name: CHANGES[name]}))
    touched = {"noise_offset": {"noise"}, "multires_noise_iterations": {"noise"}, "ip_noise_gamma": {"perturbation"}}.get(
        name, {"timesteps"})
    assert {key for key in changed if key not in PLAIN or not torch.equal(changed[key], PLAIN[key])} == touched
    seed = int.from_bytes(hashlib.sha256(b"5|step|1|0").digest()[:8], "little") >> 1
    generator = torch.Generator().manual_seed(seed)
    assert torch.equal(PLAIN["timesteps"], torch.randint(0, 1000, (4,), generator=generator))
    assert torch.equal(PLAIN["noise"], torch.randn(4, 4, 16, 16, generator=generator))


def test_a_random_noise_offset_is_a_share_of_it_drawn_for_each_image():
    full = drawn(NoiseConfig(noise_offset=0.2), rows=64)["noise"]
    plain = drawn(NoiseConfig(), rows=64)["noise"]
    random = drawn(NoiseConfig(noise_offset=0.2, noise_offset_random_strength=True), rows=64)["noise"]
    shares = ((random - plain) / (full - plain)).mean(dim=(1, 2, 3))
    assert 0 <= shares.min() and shares.max() < 1.001 and shares.std() > 0.2


def test_an_adaptive_noise_offset_follows_the_latents_means():
    mean, std = torch.randn(4, 4, 16, 16) + 2, torch.rand(4, 4, 16, 16)
    x_0 = mean + std * PLAIN["latent_noise"]
    for scale in (0.1, -0.08):
        noise = drawn(NoiseConfig(noise_offset=0.1, adaptive_noise_scale=scale), latents=(mean, std))["noise"]
        fixed = drawn(NoiseConfig(noise_offset=0.1))["noise"]
        offset = torch.clamp(0.1 + scale * torch.abs(x_0.mean(dim=(2, 3), keepdim=True)), 0.0, None)
        torch.testing.assert_close(noise - PLAIN["noise"], (fixed - PLAIN["noise"]) / 0.1 * offset, rtol=1e-3, atol=1e-5)


def test_multires_noise_is_sd_scripts_pyramid():
    noise = torch.randn(2, 4, 24, 16)
    ours = pyramid_noise(noise, iterations=6, discount=0.3, generator=torch.Generator().manual_seed(1))
    generator, theirs = torch.Generator().manual_seed(1), noise.clone()
    upsample = torch.nn.Upsample(size=(24, 16), mode="bilinear")
    for i in range(6):
        r = torch.rand(1, generator=generator).item() * 2 + 2
        height, width = max(1, int(24 / r ** i)), max(1, int(16 / r ** i))
        theirs += upsample(torch.randn(2, 4, height, width, generator=generator)) * 0.3 ** i
        if height == 1 or width == 1:
            break
    torch.testing.assert_close(ours, theirs / theirs.std())


def test_input_perturbation_is_in_what_the_model_sees_and_not_in_the_target():
    """Ning et al. 2023, arXiv 2301.11706: x_t has ε + γξ, the target is ε."""
    model, batch = small_run.model("sd1"), small_run.batch(1, rows=2)
    seen = []

    class Spy:
        def __call__(self, x, *arguments, **options):
            seen.append(x)
            return torch.zeros_like(x)
    spied = dataclasses.replace(model, unet=Spy())
    draws = draw(batch["mean"].shape, seed=0, step=1, micro=0, timesteps=1000, config=NoiseConfig(ip_noise_gamma=0.3))
    text = model.text.encode([model.text.tokenize(caption) for caption in batch.captions])
    _, target = prediction_and_target(spied, batch.extended(draws), conditioning=text, adapters={}, dtype=torch.float32)
    x_0 = (batch["mean"] + batch["std"] * draws["latent_noise"]) * model.architecture.latent_scale
    alpha = model.schedule.alphas_cumprod[draws["timesteps"]].reshape(-1, 1, 1, 1)
    xi = draws["perturbation"] / 0.3
    assert xi.std().item() == pytest.approx(1, abs=0.1)
    torch.testing.assert_close(seen[0], alpha.sqrt() * x_0 + (1 - alpha).sqrt() * (draws["noise"] + 0.3 * xi))
    torch.testing.assert_close(target, draws["noise"])


def test_a_random_input_perturbation_is_a_share_of_it():
    full, random = (drawn(NoiseConfig(ip_noise_gamma=0.2, ip_noise_gamma_random_strength=chosen), rows=64)["perturbation"]
                    for chosen in (False, True))
    shares = (random / full).mean(dim=(1, 2, 3))
    assert 0 <= shares.min() and shares.max() < 1.001 and shares.std() > 0.2


@pytest.mark.parametrize("distribution, mean, deviation", [
    ("uniform", 1 / 2, math.sqrt(1 / 12)), ("low_noise", 1 / 3, math.sqrt(1 / 18)), ("high_noise", 2 / 3, math.sqrt(1 / 18)),
    ("sigmoid", 1 / 2, 0.2083)])  # of the logit-normal with mean 0 and deviation 1: Atchison & Shen 1980
def test_noise_levels_are_spread_as_their_name_says(distribution, mean, deviation):
    config = NoiseConfig(min_timestep=200, max_timestep=700, timestep_distribution=distribution)
    t = torch.cat([draw((512, 1, 1, 1), seed=3, step=step, micro=0, timesteps=1000, config=config)["timesteps"]
                   for step in range(20)])
    assert t.min() >= 200 and t.max() < 700
    level = (t - 200 + 0.5) / 500
    assert level.mean().item() == pytest.approx(mean, abs=0.01) and level.std().item() == pytest.approx(deviation, abs=0.01)


def test_a_range_beyond_the_schedule_ends_with_it():
    assert draw((8, 1, 1, 1), seed=0, step=0, micro=0, timesteps=10)["timesteps"].max() < 10
