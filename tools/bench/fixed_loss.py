"""The loss on fixed images, timesteps and noise, for comparing two models, or one with and without its LoRA.

A training loss varies with every draw of timestep and noise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch

from lib_lora_train.inputs.batches import Batch
from lib_lora_train.model.frozen import FrozenModel
from lib_lora_train.model.layers import Adapter
from lib_lora_train.model.text import Conditioning
from lib_lora_train.training.noise import Draws, draw
from lib_lora_train.training.step import StepOptions, denoising_loss, prepare

Condition = Callable[[Batch], Conditioning]
TIMESTEPS = (100, 300, 500, 700, 900)


@torch.no_grad()
def fixed_loss(model: FrozenModel, batches: Iterable[Batch], condition: Condition, *, adapters: Mapping[str, Adapter],
               seed: int, timesteps: tuple[int, ...] = TIMESTEPS) -> dict[int, float]:
    """The plain denoising loss (no SNR weight) at each timestep, averaged over the images of `batches`.

    `adapters` are the UNet's. The noise of a batch depends on `seed`, its place and the timestep.
    """
    options = StepOptions(dtype=torch.float32, min_snr_gamma=0.0, recompute=frozenset())
    sums, images = dict.fromkeys(timesteps, 0.0), 0
    for place, batch in enumerate(batches):
        conditioning, count = condition(batch), len(batch.indices)
        for t in timesteps:
            drawn = draw(batch.mean.shape, seed=seed, step=place, micro=t, timesteps=1)
            draws = Draws(torch.full((count,), t), drawn.noise, drawn.latent_noise)
            # One synchronisation a timestep: this is a measurement, not a step.
            sums[t] += count * denoising_loss(model, inputs=prepare(batch, draws=draws, text=()), conditioning=conditioning,
                                              adapters=adapters, options=options).item()
        images += count
    return {t: total / images for t, total in sums.items()}
