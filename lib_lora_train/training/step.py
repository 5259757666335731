"""One micro-batch's loss: a pure function of (weights, inputs), the inputs prepared on the CPU, the rest on the device.

Not here: the text (`condition.py`), what is done with the gradients (`work.py`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lib_lora_train.inputs.batches import Batch
from lib_lora_train.model.frozen import FrozenModel
from lib_lora_train.model.ops.layers import Adapter
from lib_lora_train.model.sd.text import Conditioning, size_vector
from lib_lora_train.training.loss import min_snr_weight, weighted_losses
from lib_lora_train.training.noise import Draws


@dataclasses.dataclass(frozen=True)
class StepOptions:
    """What a step needs to know beside its inputs. `min_snr_gamma` 0 is off.

    `recompute` names the units of the UNet (`UNet.checkpointable`) that backward computes again instead of keeping their
    activations; `offload` keeps activations in the CPU's memory until backward.
    """

    dtype: torch.dtype
    min_snr_gamma: float
    recompute: frozenset[str]
    offload: bool = False


@dataclasses.dataclass(frozen=True, eq=False)
class StepInputs:
    """All that a micro-batch's loss depends on beside the weights: tensors with a row for each picture, and no numbers.

    mean, std, latent_noise, noise   [B, 4, h, w] fp32: the VAE's posterior, what samples it, and what is to be predicted
    timesteps                        [B] int64
    share                            [B] fp32: what each picture's loss counts for; the loss is the sum
    sizes                            [B, 6] fp32: original (height, width), crop (top, left), target (height, width)
    text                             what the run's `Condition` prepared
    """

    mean: Tensor
    std: Tensor
    latent_noise: Tensor
    noise: Tensor
    timesteps: Tensor
    share: Tensor
    sizes: Tensor
    text: tuple[Tensor, ...]

    def __len__(self) -> int:
        """B, the number of pictures."""
        return len(self.timesteps)

    def tensors(self) -> tuple[Tensor, ...]:
        """All of them in a fixed order."""
        return (self.mean, self.std, self.latent_noise, self.noise, self.timesteps, self.share, self.sizes, *self.text)

    @classmethod
    def of(cls, tensors: Sequence[Tensor]) -> StepInputs:
        """The inputs whose `tensors` these are."""
        return cls(*tensors[:7], text=tuple(tensors[7:]))


def prepare(batch: Batch, *, draws: Draws, text: tuple[Tensor, ...], micro_batches: int = 1) -> StepInputs:
    """A batch's inputs, where its latents are (the rest on the CPU). Its loss is the mean over its pictures, divided by the
    number of micro-batches that a step adds up."""
    return StepInputs(
        mean=batch.mean, std=batch.std, latent_noise=draws.latent_noise, noise=draws.noise, timesteps=draws.timesteps,
        share=batch.loss_weight / (len(batch.loss_weight) * micro_batches),
        sizes=torch.cat([batch.original_size, batch.crop, batch.target_size], dim=1).float(), text=text)


def denoising_loss(model: FrozenModel, *, inputs: StepInputs, conditioning: Conditioning, adapters: Mapping[str, Adapter],
                   options: StepOptions) -> Tensor:
    """The weighted denoising loss, 0-d fp32 on the model's device (Ho et al. 2020, arXiv 2006.11239, eq. 14; the target is v
    where the model predicts v, Salimans & Ho 2022, arXiv 2202.00512).

    `adapters` are the UNet's; those of the text encoders are already in `conditioning`. Inputs on the device are used as
    they are; nothing waits for it.
    """
    device, dtype, schedule = model.device, options.dtype, model.schedule
    mean, std, latent_noise, noise, t, share, sizes = (tensor.to(device) for tensor in inputs.tensors()[:7])
    # A fresh sample of the VAE's posterior at each step, as an uncached run would draw.
    x_0 = (mean + std * latent_noise) * model.architecture.latent_scale

    y = None
    if conditioning.pooled is not None:
        original, crop, target = sizes.split(2, dim=1)
        y = size_vector(conditioning.pooled.to(device), original=original, crop=crop, target=target).to(dtype)
    prediction = model.unet(schedule.add_noise(x_0, noise, t).to(dtype), t, conditioning.context.to(device, dtype), y,
                            adapters=adapters, checkpointed=options.recompute)

    snr_weight = None
    if options.min_snr_gamma:
        snr_weight = min_snr_weight(
            schedule.snr(t), gamma=options.min_snr_gamma, v_prediction=schedule.prediction_type == "v_prediction")
    return weighted_losses(prediction, schedule.target(x_0, noise, t), example_weight=share, snr_weight=snr_weight).sum()
