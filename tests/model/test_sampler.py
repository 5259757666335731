"""The sampler against diffusers' Euler scheduler, on a network simple enough to call from both sides."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from diffusers import EulerDiscreteScheduler

from lib_lora_train.model import frozen
from lib_lora_train.model.architecture import VAEConfig
from lib_lora_train.model.sampler import SampleRequest, sample_batch, sigmas
from lib_lora_train.model.sd.schedule import NoiseSchedule
from lib_lora_train.model.sd.text import Conditioning

REQUEST = SampleRequest("a", width=64, height=64, steps=28, cfg_scale=3.0, seed=5)
# 28 steps fall on whole timesteps (999 = 27 · 37), where it does not matter that diffusers interpolates σ and we log σ.


def _network(x, t, context, y=None, *, adapters=None):
    """Depends on everything a UNet depends on, smoothly and not linearly."""
    return torch.tanh(x * 0.7 + context.mean(dim=(1, 2))[:, None, None, None]) + t.float()[:, None, None, None] / 2000


def _model(prediction_type):
    text = SimpleNamespace(
        tokenize=lambda prompt, **_: prompt,
        encode=lambda texts, **_: Conditioning(torch.tensor([0.3 if t else -0.2 for t in texts])[:, None, None], None))
    return SimpleNamespace(
        unet=_network, text=text, device=torch.device("cpu"), schedule=NoiseSchedule.build(prediction_type=prediction_type),
        architecture=SimpleNamespace(latent_scale=0.5, vae=VAEConfig(4, (1,) * 4, (1,) * 4)))


def _scheduler(prediction_type):
    return EulerDiscreteScheduler(
        num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
        timestep_spacing="linspace", prediction_type=prediction_type)


def test_noise_levels_are_those_of_diffusers():
    theirs = _scheduler("epsilon")
    theirs.set_timesteps(28)
    ours = sigmas(NoiseSchedule.build(prediction_type="epsilon").alphas_cumprod, 28)
    assert torch.allclose(ours, theirs.sigmas, rtol=1e-4)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_latents_are_those_of_diffusers_euler(prediction_type):
    scheduler = _scheduler(prediction_type)
    scheduler.set_timesteps(REQUEST.steps)
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(REQUEST.seed)) * scheduler.sigmas[0]
    context = torch.tensor([-0.2, 0.3])[:, None, None]
    for t in scheduler.timesteps:
        output = _network(scheduler.scale_model_input(torch.cat([x, x]), t), t.expand(2), context)
        unconditional, conditional = output.chunk(2)
        x = scheduler.step(unconditional + REQUEST.cfg_scale * (conditional - unconditional), t, x).prev_sample
    ours = sample_batch(_model(prediction_type), [REQUEST])
    assert ((ours - x / 0.5).abs().max() / x.abs().max()).item() < 1e-4


def test_a_seed_gives_one_image_and_another_seed_another():
    one = sample_batch(_model("epsilon"), [REQUEST])
    assert torch.equal(one, sample_batch(_model("epsilon"), [REQUEST]))
    assert not torch.equal(one, sample_batch(_model("epsilon"), [SampleRequest("a", width=64, height=64, seed=6)]))


def test_a_scale_of_one_is_the_limit_of_scales_near_one():
    def sample(scale: float) -> torch.Tensor:
        return sample_batch(_model("epsilon"), [dataclasses.replace(REQUEST, cfg_scale=scale)])
    assert torch.allclose(sample(1.0), sample(1.0 + 1e-6), atol=1e-4)


def test_sampling_leaves_the_global_random_state_alone():
    before = torch.get_rng_state()
    sample_batch(_model("epsilon"), [REQUEST])
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("scale", [1.0, 3.0])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_images_sampled_together_are_those_sampled_one_by_one(prediction_type, scale):
    model = _model(prediction_type)
    requests = [dataclasses.replace(REQUEST, prompt=prompt, seed=seed, cfg_scale=scale)
                for prompt, seed in (("a", 5), ("", 6), ("a", 7), ("a", 5))]
    together = sample_batch(model, requests)
    for row, request in enumerate(requests):
        assert torch.allclose(together[row:row + 1], sample_batch(model, [request]), atol=1e-5, rtol=1e-5)
    assert torch.allclose(together[0], together[3], atol=1e-5) and not torch.allclose(together[0], together[2], atol=1e-2)


def test_a_real_model_samples_the_same_images_together_and_one_by_one(host):
    with host.lease() as leased:
        model = frozen.build(leased.tensors, hints=leased.hints, tokenizers=leased.tokenizers)
    requests = [SampleRequest(prompt, width=64, height=64, steps=3, cfg_scale=4.0, seed=seed, negative_prompt=negative)
                for prompt, seed, negative in (("red cat", 1, ""), ("blue", 2, "photo"), ("red cat", 3, ""))]
    one_by_one = torch.cat([sample_batch(model, [request]) for request in requests])
    together = sample_batch(model, requests)
    assert (together - one_by_one).abs().max() < 1e-5 * one_by_one.abs().max()


def test_requests_of_different_sizes_are_not_sampled_together():
    with pytest.raises(AssertionError):
        sample_batch(_model("epsilon"), [REQUEST, dataclasses.replace(REQUEST, width=128)])
