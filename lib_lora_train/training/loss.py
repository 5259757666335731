"""The denoising loss of a batch, and the loss functions it can be made of.

The order of reductions is kohya's: elementwise in fp32, the mean over (C, h, w), times the image's weight, times the SNR
weight. The mean over the batch, which comes last, is in the weights: see `training.loop`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lib_lora_train.inputs.batch import Batch
from lib_lora_train.model.frozen import FrozenModel
from lib_lora_train.model.ops.layers import Adapter
from lib_lora_train.model.sd.text import Conditioning, size_vector

LossFunction = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(prediction, target, timesteps) -> the loss of each element: [B, C, h, w] fp32 each, timesteps [B] int64."""


def mse(prediction: Tensor, target: Tensor, timesteps: Tensor) -> Tensor:
    """The squared error (kohya's loss_type "l2")."""
    return (prediction - target).square()


LOSSES: dict[str, LossFunction] = {"l2": mse}
"""By kohya's name."""


@dataclass(frozen=True)
class LossConfig:
    """What the loss is made of, and the dtype it is computed in. `min_snr_gamma` 0 is off; where it is not `summed`, the loss
    is that of each image, [B]."""

    dtype: torch.dtype
    min_snr_gamma: float = 0.0
    function: LossFunction = mse
    summed: bool = True


def denoising_loss(model: FrozenModel, batch: Batch, *, conditioning: Conditioning, adapters: Mapping[str, Adapter],
                   config: LossConfig, checkpointed: Collection[str] = frozenset()) -> Tensor:
    """The weighted denoising loss, 0-d fp32 (Ho et al. 2020, arXiv 2006.11239, eq. 14; the target is v where the model
    predicts v, Salimans & Ho 2022, arXiv 2202.00512).

    `batch` and `conditioning` are on the model's device. `adapters` are the UNet's; those of the text encoders are already in
    `conditioning`. `checkpointed` names the UNet's blocks that backward computes again. Nothing waits for the device.
    """
    prediction, target = prediction_and_target(model, batch, conditioning=conditioning, adapters=adapters, dtype=config.dtype,
                                               checkpointed=checkpointed)
    return _weighted(config.function(prediction, target, batch["timesteps"]), model, batch, config)


def prediction_and_target(model: FrozenModel, batch: Batch, *, conditioning: Conditioning, adapters: Mapping[str, Adapter],
                          dtype: torch.dtype, checkpointed: Collection[str] = frozenset()) -> tuple[Tensor, Tensor]:
    """What the model predicts of a noised batch, computed in `dtype`, and what it should predict: [B, C, h, w] fp32 each."""
    schedule, noise, t = model.schedule, batch["noise"], batch["timesteps"]
    # A fresh sample of the VAE's posterior at each step, as an uncached run would draw.
    x_0 = (batch["mean"] + batch["std"] * batch["latent_noise"]) * model.architecture.latent_scale

    y = None
    if conditioning.pooled is not None:
        original, crop, target_size = batch["sizes"].split(2, dim=1)
        y = size_vector(conditioning.pooled, original=original, crop=crop, target=target_size).to(dtype)
    prediction = model.unet(schedule.add_noise(x_0, noise, t).to(dtype), t, conditioning.context.to(dtype), y,
                            adapters=adapters, checkpointed=checkpointed)
    return prediction.float(), schedule.target(x_0, noise, t).float()


@torch.no_grad()
def zero_prediction_loss(model: FrozenModel, batch: Batch, config: LossConfig) -> Tensor:
    """What `denoising_loss` would be of a model that predicts zero everywhere, 0-d fp32: whoever is above it knows less than
    nothing. About 1 without SNR weights."""
    x_0 = (batch["mean"] + batch["std"] * batch["latent_noise"]) * model.architecture.latent_scale
    target = model.schedule.target(x_0, batch["noise"], batch["timesteps"]).float()
    return _weighted(config.function(torch.zeros_like(target), target, batch["timesteps"]), model, batch, config)


def _weighted(loss: Tensor, model: FrozenModel, batch: Batch, config: LossConfig) -> Tensor:
    """The sum of the loss of each element [B, C, h, w], with mask and weights; of each image where that is asked for."""
    schedule, t = model.schedule, batch["timesteps"]
    if "mask" in batch:
        loss = loss * batch["mask"]
    per_image = loss.mean(dim=(1, 2, 3)) * batch["weight"]
    if config.min_snr_gamma:
        per_image = per_image * min_snr_weight(schedule.snr(t), gamma=config.min_snr_gamma,
                                               v_prediction=schedule.prediction_type == "v_prediction")
    return per_image.sum() if config.summed else per_image


def min_snr_weight(snr: Tensor, *, gamma: float, v_prediction: bool) -> Tensor:
    """Min-SNR-γ (Hang et al. 2023, arXiv 2303.09556): min(s,γ)/s for ε, min(s,γ)/(s+1) for v. Shapes [B] -> [B]."""
    clamped = torch.clamp(snr, max=gamma)
    if v_prediction:
        return clamped / (snr + 1)
    # Pure noise (s = 0, a schedule with zero terminal SNR): the limit of s/s, not 0/0.
    return torch.nan_to_num(clamped / snr, nan=1.0)
