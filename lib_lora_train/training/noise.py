"""All randomness of a training step, as a pure function of (seed, step, micro-batch).

Drawn on the CPU from a generator of its own: the host's random state is not touched, the numbers are the same on every
device, and a run can go on at step n without having drawn the n before it.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence

import torch


@dataclasses.dataclass(frozen=True)
class Draws:
    """The random numbers of one micro-batch: timesteps [B] int64, noise [B,C,h,w], latent_noise [B,C,h,w]."""

    timesteps: torch.Tensor
    noise: torch.Tensor
    latent_noise: torch.Tensor


def draw(shape: Sequence[int], *, seed: int, step: int, micro: int, timesteps: int, noise_offset: float = 0.0) -> Draws:
    """Draws for latents of `shape` [B,C,h,w]: t uniform in [0, timesteps), noise N(0,1) plus kohya's noise offset,
    a constant o·N(0,1) per example and channel; and the noise that samples the VAE's posterior."""
    generator = torch.Generator().manual_seed(seed_of(seed, "step", step, micro))
    t = torch.randint(0, timesteps, (shape[0],), generator=generator)
    noise = torch.randn(*shape, generator=generator)
    latent_noise = torch.randn(*shape, generator=generator)
    if noise_offset:
        noise = noise + noise_offset * torch.randn(shape[0], shape[1], 1, 1, generator=generator)
    return Draws(t, noise, latent_noise)


def seed_of(*parts: object) -> int:
    """A 63-bit seed from any values: close inputs give unrelated seeds, the same ones the same on every machine."""
    digest = hashlib.sha256("|".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
