"""The loss on fixed images, timesteps and noise, for comparing two models, or one with and without its LoRA.

A training loss varies with every draw of timestep and noise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch

from lib_lora_train.inputs.batch import Batch
from lib_lora_train.model.frozen import FrozenModel
from lib_lora_train.model.ops.layers import Adapter
from lib_lora_train.model.sd.text import Conditioning
from lib_lora_train.training.loss import LossConfig, denoising_loss
from lib_lora_train.training.noise import draw

Condition = Callable[[Batch], Conditioning]
TIMESTEPS = (100, 300, 500, 700, 900)


@torch.no_grad()
def fixed_loss(model: FrozenModel, batches: Iterable[Batch], condition: Condition, *, adapters: Mapping[str, Adapter],
               seed: int, timesteps: tuple[int, ...] = TIMESTEPS) -> dict[int, float]:
    """The plain denoising loss (no SNR weight) at each timestep, averaged over the images of `batches`.

    `adapters` are the UNet's. The noise of a batch depends on `seed`, its position and the timestep.
    """
    sums, images = dict.fromkeys(timesteps, 0.0), 0
    for position, batch in enumerate(batches):
        conditioning, count = condition(batch), len(batch)
        for t in timesteps:
            draws = draw(batch["mean"].shape, seed=seed, step=position, micro=t, timesteps=1)
            inputs = batch.extended({**draws, "timesteps": torch.full((count,), t), "weight": batch["loss_weight"] / count})
            # One synchronisation a timestep: this is a measurement, not a step.
            sums[t] += count * denoising_loss(model, inputs.to(model.device), conditioning=conditioning, adapters=adapters,
                                              config=LossConfig(torch.float32)).item()
        images += count
    return {t: total / images for t, total in sums.items()}
