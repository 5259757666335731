"""One micro-batch's loss: a pure function of (weights, batch, randomness)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch

from lib_lora_train.cache.batches import Batch
from lib_lora_train.model.frozen import FrozenModel
from lib_lora_train.model.layers import Adapter
from lib_lora_train.model.text import Conditioning, size_vector
from lib_lora_train.training.loss import min_snr_weight, weighted_loss
from lib_lora_train.training.noise import Draws


@dataclasses.dataclass(frozen=True)
class StepOptions:
    """What a step needs to know beside its inputs. `min_snr_gamma` 0 is off.

    `recompute` names the units of the UNet (`UNet.units`) that backward computes again instead of keeping their activations.
    """

    dtype: torch.dtype
    min_snr_gamma: float
    recompute: frozenset[str]


def denoising_loss(model: FrozenModel, *, batch: Batch, conditioning: Conditioning, draws: Draws,
                   adapters: Mapping[str, Adapter], options: StepOptions) -> torch.Tensor:
    """The weighted denoising loss of a batch, 0-d fp32 on the model's device (Ho et al. 2020, arXiv 2006.11239, eq. 14;
    the target is v where the model predicts v, Salimans & Ho 2022, arXiv 2202.00512).

    `adapters` are the UNet's; those of the text encoders are already in `conditioning`.
    """
    device, dtype, schedule = model.device, options.dtype, model.schedule
    mean, std = batch.mean.to(device, non_blocking=True), batch.std.to(device, non_blocking=True)
    t = draws.timesteps.to(device, non_blocking=True)
    noise = draws.noise.to(device, non_blocking=True)
    # A fresh sample of the VAE's posterior at each step, as an uncached run would draw.
    x_0 = (mean + std * draws.latent_noise.to(device, non_blocking=True)) * model.architecture.latent_scale

    y = None
    if conditioning.pooled is not None:
        y = size_vector(conditioning.pooled, original=batch.original_size, crop=batch.crop, target=batch.target_size)
        y = y.to(device, dtype, non_blocking=True)
    prediction = model.unet(
        schedule.add_noise(x_0, noise, t).to(dtype), t, conditioning.context.to(device, dtype, non_blocking=True), y,
        adapters=adapters, recompute=options.recompute)

    snr_weight = None
    if options.min_snr_gamma:
        snr_weight = min_snr_weight(
            schedule.snr(t), gamma=options.min_snr_gamma, v_prediction=schedule.prediction_type == "v_prediction")
    return weighted_loss(prediction, schedule.target(x_0, noise, t),
                         example_weight=batch.loss_weight.to(device, non_blocking=True), snr_weight=snr_weight)
