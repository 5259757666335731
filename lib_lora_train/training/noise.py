"""All randomness of a training step, as a pure function of (seed, step, micro-batch).

Drawn on the CPU from a generator of its own: the host's random state is not touched, the numbers are the same on every
device, and a run can go on at step n without having drawn the n before it. What a setting adds to the noise comes from a
generator of its own too, so that switching one on does not change the others.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class NoiseConfig:
    """What is drawn for a step. The names are kohya's, but for `timestep_distribution` (OneTrainer's)."""

    noise_offset: float = 0.0
    noise_offset_random_strength: bool = False
    adaptive_noise_scale: float = 0.0
    multires_noise_iterations: int = 0
    multires_noise_discount: float = 0.3
    ip_noise_gamma: float = 0.0
    ip_noise_gamma_random_strength: bool = False
    min_timestep: int = 0
    max_timestep: int = 1000
    timestep_distribution: str = "uniform"

    def timestep_range(self, timesteps: int) -> tuple[int, int]:
        """(lowest, highest + 1) of those that are drawn from a schedule of so many."""
        high = min(self.max_timestep, timesteps)
        return min(self.min_timestep, high - 1), high


PLAIN = NoiseConfig()


def draw(shape: Sequence[int], *, seed: int, step: int, micro: int, timesteps: int, config: NoiseConfig = PLAIN,
         latents: tuple[Tensor, Tensor] | None = None) -> dict[str, Tensor]:
    """The random numbers of a micro-batch of latents of `shape` [B, C, h, w], by the names they have in a batch:

    timesteps       [B] int64, within the config's range of [0, timesteps)
    noise           [B, C, h, w], N(0, 1) plus what the config adds
    latent_noise    [B, C, h, w], N(0, 1): what samples the VAE's posterior
    perturbation    [B, C, h, w], only with ip_noise_gamma: what is added to the noise in x_t and not in the target

    `latents` are mean and standard deviation of the scaled latents; adaptive_noise_scale needs them.
    """
    def generator(*purpose: str) -> torch.Generator:
        return torch.Generator().manual_seed(seed_of(seed, "step", step, micro, *purpose))

    main, (low, high) = generator(), config.timestep_range(timesteps)
    t = torch.randint(low, high, (shape[0],), generator=main)
    if config.timestep_distribution != "uniform":
        level = _level(config.timestep_distribution, shape[0], generator("timesteps"))
        t = low + (level * (high - low)).long().clamp(max=high - low - 1)
    noise = torch.randn(*shape, generator=main)
    latent_noise = torch.randn(*shape, generator=main)
    if config.noise_offset:
        offset = torch.randn(shape[0], shape[1], 1, 1, generator=main)
        random = generator("offset") if config.noise_offset_random_strength else None
        strength = _strength(config.noise_offset, shape[0], random)
        if config.adaptive_noise_scale and latents is not None:
            x_0 = latents[0].cpu() + latents[1].cpu() * latent_noise
            strength = (strength + config.adaptive_noise_scale * x_0.mean(dim=(2, 3), keepdim=True).abs()).clamp(min=0.0)
        noise = noise + strength * offset
    if config.multires_noise_iterations:
        noise = pyramid_noise(noise, iterations=config.multires_noise_iterations, discount=config.multires_noise_discount,
                              generator=generator("multires"))
    draws = {"timesteps": t, "noise": noise, "latent_noise": latent_noise}
    if config.ip_noise_gamma:
        own = generator("perturbation")
        perturbation = torch.randn(*shape, generator=own)
        random = own if config.ip_noise_gamma_random_strength else None
        draws["perturbation"] = _strength(config.ip_noise_gamma, shape[0], random) * perturbation
    return draws


def pyramid_noise(noise: Tensor, *, iterations: int, discount: float, generator: torch.Generator) -> Tensor:
    """Noise with coarser noise added: scaled up from ever smaller sizes (by r^i, r in [2, 4) drawn anew each time), each
    `discount` times as strong as the one before, and all of it brought back to a standard deviation of 1 (Whitaker 2023,
    "Multi-Resolution Noise for Diffusion Model Training"; sd-scripts' `pyramid_noise_like`)."""
    batch, channels, height, width = noise.shape
    for i in range(iterations):
        r = 2.0 + 2.0 * torch.rand(1, generator=generator).item()
        rows, columns = max(1, int(height / r ** i)), max(1, int(width / r ** i))
        coarse = torch.randn(batch, channels, rows, columns, generator=generator)
        noise = noise + discount ** i * F.interpolate(coarse, size=(height, width), mode="bilinear")
        if rows == 1 or columns == 1:
            break
    return noise / noise.std()


def _level(distribution: str, count: int, generator: torch.Generator) -> Tensor:
    """[count] noise levels in [0, 1): logit-normal (Esser et al. 2024, arXiv 2403.03206), or with a density that falls or
    rises in proportion to the level."""
    if distribution == "sigmoid":
        return torch.randn(count, generator=generator).sigmoid()
    root = torch.rand(count, generator=generator).sqrt()
    return root if distribution == "high_noise" else 1.0 - root


def _strength(most: float, count: int, random: torch.Generator | None) -> float | Tensor:
    """`most`, or a number in [0, most) for each image where it is to be random: [count, 1, 1, 1]."""
    return most if random is None else most * torch.rand(count, 1, 1, 1, generator=random)


def seed_of(*parts: object) -> int:
    """A 63-bit seed from any values: close inputs give unrelated seeds, the same ones the same on every machine."""
    digest = hashlib.sha256("|".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
