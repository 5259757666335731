"""The denoising loss of a batch, and the loss functions it can be made of.

The order of reductions is kohya's: elementwise in fp32, the mean over (C, h, w), times the image's weight, times the SNR
weight. The mean over the batch, which comes last, is in the weights: see `training.loop`. Besides the target there can be the
base model's own prediction ("reference"; see `training.preservation`): where a batch has "prior" weights, the model is held to
it, and with `dco_beta` its loss is compared with it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lib_lora_train.inputs.batch import Batch
from lib_lora_train.model.frozen import FrozenModel
from lib_lora_train.model.ops.layers import Adapter
from lib_lora_train.model.sd.schedule import NoiseSchedule
from lib_lora_train.model.sd.text import Conditioning, size_vector
from lib_lora_train.settings import LossSettings

LossFunction = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(prediction, target, timesteps) -> the loss of each element: [B, C, h, w] fp32 each, timesteps [B] int64."""


def mse(prediction: Tensor, target: Tensor, timesteps: Tensor) -> Tensor:
    """The squared error (kohya's loss_type "l2")."""
    return (prediction - target).square()


def mae(prediction: Tensor, target: Tensor, timesteps: Tensor) -> Tensor:
    """The absolute error (kohya's loss_type "l1")."""
    return (prediction - target).abs()


@dataclass(frozen=True, eq=False)
class Huber:
    """Pseudo-Huber losses, squared near zero and linear beyond c_t (Song & Dhariwal 2023, arXiv 2310.14189): kohya's loss_type
    "huber", 2c(√(e² + c²) - c), and "smooth_l1", the same without the factor c.

    thresholds   c_t of each timestep, [T] fp32 on the device of the timesteps
    """

    thresholds: Tensor
    smooth_l1: bool

    def __call__(self, prediction: Tensor, target: Tensor, timesteps: Tensor) -> Tensor:
        """See `LossFunction`."""
        c = self.thresholds[timesteps].reshape(-1, *(1,) * (prediction.ndim - 1))
        loss = 2 * (((prediction - target).square() + c ** 2).sqrt() - c)
        return loss if self.smooth_l1 else c * loss


def huber_thresholds(schedule: NoiseSchedule, *, huber_schedule: str, huber_c: float, huber_scale: float) -> Tensor:
    """c_t of each timestep, [T], by kohya's three schedules ("snr" has no scale)."""
    steps = len(schedule)
    if huber_schedule == "snr":
        sigmas = ((1 - schedule.alphas_cumprod) / schedule.alphas_cumprod).sqrt()
        return (1 - huber_c) / (1 + sigmas).square() + huber_c
    if huber_schedule == "exponential":
        t = torch.arange(steps, dtype=torch.float32, device=schedule.alphas_cumprod.device)
        return huber_scale * huber_c ** (t / steps)
    return torch.full((steps,), huber_c * huber_scale, device=schedule.alphas_cumprod.device)


LOSSES: dict[str, LossFunction] = {"l2": mse, "l1": mae}
"""By kohya's name: those that know no noise schedule."""


def loss_function(chosen: LossSettings, schedule: NoiseSchedule) -> LossFunction:
    """The function that the settings name, for a model of this schedule."""
    if chosen.loss_type in LOSSES:
        return LOSSES[chosen.loss_type]
    return Huber(huber_thresholds(schedule, huber_schedule=chosen.huber_schedule, huber_c=chosen.huber_c,
                                  huber_scale=chosen.huber_scale), smooth_l1=chosen.loss_type == "smooth_l1")


@dataclass(frozen=True)
class LossConfig:
    """What the loss is made of, and the dtype it is computed in. What is 0 or False is off; the other names are kohya's.

    summed      the loss is the sum over the batch; else that of each image, [B]
    dco_beta    β of direct consistency optimisation (Lee et al. 2024, arXiv 2402.12004), for batches with "reference"
    """

    dtype: torch.dtype
    min_snr_gamma: float = 0.0
    function: LossFunction = mse
    summed: bool = True
    debiased_estimation_loss: bool = False
    scale_v_pred_loss_like_noise_pred: bool = False
    v_pred_like_loss: float = 0.0
    dco_beta: float = 0.0


def denoising_loss(model: FrozenModel, batch: Batch, *, conditioning: Conditioning, adapters: Mapping[str, Adapter],
                   config: LossConfig, checkpointed: Collection[str] = frozenset()) -> Tensor:
    """The weighted denoising loss, 0-d fp32 (Ho et al. 2020, arXiv 2006.11239, eq. 14; the target is v where the model
    predicts v, Salimans & Ho 2022, arXiv 2202.00512).

    `batch` and `conditioning` are on the model's device. `adapters` are the UNet's; those of the text encoders are already in
    `conditioning`. `checkpointed` names the UNet's blocks that backward computes again. Nothing waits for the device.
    """
    prediction, target = prediction_and_target(model, batch, conditioning=conditioning, adapters=adapters, dtype=config.dtype,
                                               checkpointed=checkpointed)
    t, prior, reference = batch["timesteps"], None, None
    if "reference" in batch:
        prior = config.function(prediction, batch["reference"], t) if "prior" in batch else None
        reference = config.function(batch["reference"], target, t) if config.dco_beta else None
    return _weighted(config.function(prediction, target, t), model, batch, config, prior=prior, reference=reference)


def prediction_and_target(model: FrozenModel, batch: Batch, *, conditioning: Conditioning, adapters: Mapping[str, Adapter],
                          dtype: torch.dtype, checkpointed: Collection[str] = frozenset()) -> tuple[Tensor, Tensor]:
    """What the model predicts of a noised batch, computed in `dtype`, and what it should predict: [B, C, h, w] fp32 each."""
    schedule, noise, t = model.schedule, batch["noise"], batch["timesteps"]
    noised = noise + batch["perturbation"] if "perturbation" in batch else noise
    # A fresh sample of the VAE's posterior at each step, as an uncached run would draw.
    x_0 = (batch["mean"] + batch["std"] * batch["latent_noise"]) * model.architecture.latent_scale

    y = None
    if conditioning.pooled is not None:
        original, crop, target_size = batch["sizes"].split(2, dim=1)
        y = size_vector(conditioning.pooled, original=original, crop=crop, target=target_size).to(dtype)
    prediction = model.unet(schedule.add_noise(x_0, noised, t).to(dtype), t, conditioning.context.to(dtype), y,
                            adapters=adapters, checkpointed=checkpointed)
    return prediction.float(), schedule.target(x_0, noise, t).float()


@torch.no_grad()
def zero_prediction_loss(model: FrozenModel, batch: Batch, config: LossConfig) -> Tensor:
    """What `denoising_loss` would be of a model that predicts zero everywhere, 0-d fp32: whoever is above it knows less than
    nothing. About 1 without SNR weights. The base model's prediction is taken as the target: it is close to it."""
    x_0 = (batch["mean"] + batch["std"] * batch["latent_noise"]) * model.architecture.latent_scale
    target = model.schedule.target(x_0, batch["noise"], batch["timesteps"]).float()
    loss = config.function(torch.zeros_like(target), target, batch["timesteps"])
    return _weighted(loss, model, batch, config, prior=loss if "prior" in batch else None,
                     reference=torch.zeros_like(loss) if config.dco_beta else None)


def _weighted(loss: Tensor, model: FrozenModel, batch: Batch, config: LossConfig, *, prior: Tensor | None = None,
              reference: Tensor | None = None) -> Tensor:
    """The sum of the loss of each element [B, C, h, w], with masks and weights; of each image where that is asked for. `prior`
    is the loss towards the base model's prediction, `reference` the base model's own."""
    if "mask" in batch:
        loss = loss * batch["mask"]
        reference = None if reference is None else reference * batch["mask"]
    if prior is not None:
        loss = loss + prior * batch["prior"]
    snr, v_prediction = model.schedule.snr(batch["timesteps"]), model.schedule.prediction_type == "v_prediction"
    if reference is None:
        per_image = weighted_by_snr(loss.mean(dim=(1, 2, 3)) * batch["weight"], snr, config, v_prediction=v_prediction)
    else:
        # -log σ(-β·w(t)·(e - e_base)), where w(t) stands for the schedule's part of β_t.
        behind = weighted_by_snr((loss - reference).mean(dim=(1, 2, 3)), snr, config, v_prediction=v_prediction)
        per_image = F.softplus(config.dco_beta * behind) * batch["weight"]
    return per_image.sum() if config.summed else per_image


def weighted_by_snr(loss: Tensor, snr: Tensor, config: LossConfig, *, v_prediction: bool) -> Tensor:
    """The loss of each image [B] with the weights of its noise level, in kohya's order. At pure noise (s = 0) a weight that has
    no bound there is 0."""
    capped = snr.clamp(max=1000)  # kohya's bound, for the first timesteps
    like_noise = capped / (capped + 1)  # of a loss in v: that of the same error in ε
    if config.min_snr_gamma:
        loss = loss * min_snr_weight(snr, gamma=config.min_snr_gamma, v_prediction=v_prediction)
    if config.scale_v_pred_loss_like_noise_pred:
        loss = loss * like_noise
    if config.v_pred_like_loss:
        loss = loss + loss * torch.nan_to_num(1 / like_noise, posinf=0.0) * config.v_pred_like_loss
    if config.debiased_estimation_loss:  # Yu et al. 2023, arXiv 2310.08442
        loss = loss * (1 / (capped + 1) if v_prediction else torch.nan_to_num(capped.rsqrt(), posinf=0.0))
    return loss


def min_snr_weight(snr: Tensor, *, gamma: float, v_prediction: bool) -> Tensor:
    """Min-SNR-γ (Hang et al. 2023, arXiv 2303.09556): min(s,γ)/s for ε, min(s,γ)/(s+1) for v. Shapes [B] -> [B]."""
    clamped = torch.clamp(snr, max=gamma)
    if v_prediction:
        return clamped / (snr + 1)
    # Pure noise (s = 0, a schedule with zero terminal SNR): the limit of s/s, not 0/0.
    return torch.nan_to_num(clamped / snr, nan=1.0)
