"""Sampling images from the frozen model, with or without a LoRA in training.

Euler's method on the probability-flow ODE with the parametrisation of Karras et al. 2022 (arXiv 2206.00364, algorithm 2
without churn), sigmas evenly spaced in timesteps: what the WebUI calls "Euler" with the schedule "Automatic".
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from PIL import Image

from lib_lora_train.model.architecture import UNET_COMPONENT, VAEConfig
from lib_lora_train.model.frozen import FrozenModel
from lib_lora_train.model.ops.layers import Adapter
from lib_lora_train.model.sd.text import Conditioning


@dataclasses.dataclass(frozen=True)
class SampleRequest:
    """What to sample. Sizes in pixels, multiples of 8 times the UNet's deepest stride."""

    prompt: str
    negative_prompt: str = ""
    width: int = 512
    height: int = 512
    steps: int = 20
    cfg_scale: float = 7.0
    seed: int = 1


def sigmas(alphas_cumprod: torch.Tensor, steps: int) -> torch.Tensor:
    """[steps + 1] noise levels, falling, the last 0; interpolated in log sigma at evenly spaced timesteps."""
    log_sigmas = _all_sigmas(alphas_cumprod).log()
    t = torch.linspace(len(log_sigmas) - 1, 0, steps, device=log_sigmas.device)
    low = t.floor().long()
    high, weight = t.ceil().long(), t.frac()
    interpolated = ((1 - weight) * log_sigmas[low] + weight * log_sigmas[high]).exp()
    return torch.cat([interpolated, interpolated.new_zeros(1)])


@torch.no_grad()
def sample_batch(model: FrozenModel, requests: Sequence[SampleRequest], *, clip_skip: int = 1,
                 dtype: torch.dtype = torch.float32, adapters: Mapping[str, Mapping[str, Adapter]] | None = None,
                 conditioning: Conditioning | None = None, one_by_one: bool = False,
                 on_step: Callable[[int, int], None] | None = None) -> torch.Tensor:
    """Latents [B,4,h,w] in the VAE's own scale, one for each request. `adapters` are a network's, by component; the noise is
    drawn on the CPU. `conditioning` is what `encode_prompts` said of the requests, where the text encoders are not at hand.
    `one_by_one` takes less memory and more time: the UNet never sees two rows at once.

    The requests may differ in prompts and seeds only. Where their prompts differ in length by whole chunks of 75 tokens,
    the shorter ones get empty chunks, as a negative prompt does beside a longer one.
    """
    first, adapters, device = requests[0], adapters or {}, model.device
    assert all(dataclasses.replace(r, prompt="", negative_prompt="", seed=0)
               == dataclasses.replace(first, prompt="", negative_prompt="", seed=0) for r in requests)
    if conditioning is None:
        conditioning = encode_prompts(model, requests, clip_skip=clip_skip, adapters=adapters)
    rows = len(conditioning.context)
    size = (first.height, first.width)
    y = conditioning.vector(original=size, crop=(0, 0), target=size)
    context, y = conditioning.context.to(device, dtype), None if y is None else y.to(device, dtype)
    parts = [slice(row, row + 1) for row in range(rows)] if one_by_one else [slice(0, rows)]
    levels = sigmas(model.schedule.alphas_cumprod, first.steps).to(device)
    log_sigmas = _all_sigmas(model.schedule.alphas_cumprod).log().to(device)

    x = _start_noise(requests, model.architecture.vae).to(device) * levels[0]
    for i in range(first.steps):
        sigma = levels[i]
        t = _timestep(sigma, log_sigmas).expand(rows)
        c_in = (sigma ** 2 + 1).rsqrt()
        shown = (x * c_in).repeat(rows // len(requests), 1, 1, 1)
        output = torch.cat([model.unet(shown[part].to(dtype), t[part], context[part], None if y is None else y[part],
                                       adapters=adapters.get(UNET_COMPONENT, {})) for part in parts]).float()
        if first.cfg_scale != 1:
            unconditional, conditional = output.chunk(2)
            output = unconditional + first.cfg_scale * (conditional - unconditional)
        if model.schedule.prediction_type == "v_prediction":
            # x̂_0 = x/(σ²+1) − v·σ/√(σ²+1), and from it the noise direction (x − x̂_0)/σ.
            output = (x - (x / (sigma ** 2 + 1) - output * sigma * c_in)) / sigma
        x = x + output * (levels[i + 1] - sigma)
        if on_step:
            on_step(i + 1, first.steps)
    return x / model.architecture.latent_scale


@torch.no_grad()
def encode_prompts(model: FrozenModel, requests: Sequence[SampleRequest], *, clip_skip: int = 1,
                   adapters: Mapping[str, Mapping[str, Adapter]] | None = None) -> Conditioning:
    """The condition of the requests' negative prompts, then that of their prompts; each different text is encoded once. At a
    scale of 1 the negative prompts have no effect and are left out, and with them half of the computation."""
    prompts = [request.prompt for request in requests]
    if requests[0].cfg_scale != 1:
        prompts = [*(request.negative_prompt for request in requests), *prompts]
    different, adapters = list(dict.fromkeys(prompts)), adapters or {}
    encoded = model.text.encode([model.text.tokenize(prompt, adapters=adapters) for prompt in different], clip_skip=clip_skip,
                                adapters=adapters)
    rows = [different.index(prompt) for prompt in prompts]
    return Conditioning(encoded.context[rows], None if encoded.pooled is None else encoded.pooled[rows])


@torch.no_grad()
def to_image(model: FrozenModel, latents: torch.Tensor) -> Image.Image:
    """The first of `latents` [B,4,h,w] (the VAE's own scale) as an RGB image."""
    pixels = model.vae.decode(latents[:1])[0].float().clamp(-1, 1)
    # Truncated and not rounded, as the WebUI does, so that its image is ours.
    array = ((pixels + 1) * 127.5).to(torch.uint8).permute(1, 2, 0).cpu().numpy()
    return Image.fromarray(np.ascontiguousarray(array), "RGB")


def _all_sigmas(alphas_cumprod: torch.Tensor) -> torch.Tensor:
    """σ = √((1−ᾱ)/ᾱ); with zero terminal SNR the last is infinite, so ᾱ is clamped above zero as in the WebUI."""
    alphas_cumprod = alphas_cumprod.float().clamp(min=4.8973451890853435e-08)
    return ((1 - alphas_cumprod) / alphas_cumprod).sqrt()


def _timestep(sigma: torch.Tensor, log_sigmas: torch.Tensor) -> torch.Tensor:
    """The (fractional) timestep whose noise level is `sigma`, linear in log sigma between the table's entries."""
    position = torch.searchsorted(log_sigmas, sigma.log()).clamp(1, len(log_sigmas) - 1)
    low, high = log_sigmas[position - 1], log_sigmas[position]
    return position - 1 + ((sigma.log() - low) / (high - low)).clamp(0, 1)


def _start_noise(requests: Sequence[SampleRequest], vae: VAEConfig) -> torch.Tensor:
    """[B, C, h, w] on the CPU; an image's noise depends on its own seed alone."""
    shape = (1, vae.latent_channels, requests[0].height // vae.factor, requests[0].width // vae.factor)
    return torch.cat([torch.randn(shape, generator=torch.Generator().manual_seed(r.seed)) for r in requests])
