"""All randomness of a training step, as a pure function of (seed, step, micro-batch).

Drawn on the CPU from a generator of its own: the host's random state is not touched, the numbers are the same on every
device, and a run can go on at step n without having drawn the n before it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch


def draw(shape: Sequence[int], *, seed: int, step: int, micro: int, timesteps: int,
         noise_offset: float = 0.0) -> dict[str, torch.Tensor]:
    """The random numbers of a micro-batch of latents of `shape` [B, C, h, w], by the names they have in a batch:

    timesteps       [B] int64, uniform in [0, timesteps)
    noise           [B, C, h, w], N(0, 1) plus kohya's noise offset: a constant o·N(0, 1) for each image and channel
    latent_noise    [B, C, h, w], N(0, 1): what samples the VAE's posterior
    """
    generator = torch.Generator().manual_seed(seed_of(seed, "step", step, micro))
    t = torch.randint(0, timesteps, (shape[0],), generator=generator)
    noise = torch.randn(*shape, generator=generator)
    latent_noise = torch.randn(*shape, generator=generator)
    if noise_offset:
        noise = noise + noise_offset * torch.randn(shape[0], shape[1], 1, 1, generator=generator)
    return {"timesteps": t, "noise": noise, "latent_noise": latent_noise}


def seed_of(*parts: object) -> int:
    """A 63-bit seed from any values: close inputs give unrelated seeds, the same ones the same on every machine."""
    digest = hashlib.sha256("|".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
