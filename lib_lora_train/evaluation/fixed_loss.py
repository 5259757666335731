"""The denoising loss on fixed images, timesteps and noise, for comparing two models, or one with and without its LoRA.

A training loss varies with every draw of timestep and noise; this one changes with the weights alone. It has no SNR weight, and
nothing here draws from torch's random state.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lib_lora_train.adapters.base import merged
from lib_lora_train.adapters.network import AdapterNetwork
from lib_lora_train.inputs.batch import Batch
from lib_lora_train.model.frozen import FrozenModel
from lib_lora_train.model.ops.layers import Adapter, DeltaAdapter
from lib_lora_train.model.ops.weights import dense
from lib_lora_train.model.sd.text import Conditioning
from lib_lora_train.training.condition import Condition
from lib_lora_train.training.loss import LossConfig, denoising_loss
from lib_lora_train.training.noise import draw, seed_of

BANDS = 3
"""Thirds of the schedule: the LoRA's effect on details, on shapes and on the layout."""


def band_timesteps(steps: int, *, number: int = 0, images: int = 1) -> tuple[int, ...]:
    """A timestep in each third of a schedule of so many steps, for image `number` of so many images, which together cover a
    third evenly: the middle of the image's own part of it."""
    return tuple(int((band + (number + 0.5) / images) * steps / BANDS) for band in range(BANDS))


def fixed_inputs(batch: Batch, *, timestep: int, seed: int, number: int = 0) -> Batch:
    """The images of a batch at a timestep, with noise that depends on `seed`, `number`, the timestep and an image's row."""
    draws = draw(batch["mean"].shape, seed=seed, step=number, micro=timestep, timesteps=1)
    return batch.extended({**draws, "timesteps": torch.full((len(batch),), timestep), "weight": batch["loss_weight"]})


@torch.no_grad()
def fixed_losses(model: FrozenModel, inputs: Batch, conditioning: Conditioning, *, adapters: Mapping[str, Adapter],
                 dtype: torch.dtype = torch.float32) -> Tensor:
    """The loss of each row of `fixed_inputs`, [B] fp32 on the device. `adapters` are the UNet's; nothing waits."""
    return denoising_loss(model, inputs.to(model.device), conditioning=conditioning, adapters=adapters,
                          config=LossConfig(dtype, summed=False))


@dataclasses.dataclass(frozen=True, eq=False)
class FixedImage:
    """An image that is looked at again and again: its latents and its caption (`batch`, of one row on the CPU), and the
    timesteps. Its noise depends on the run's seed, its name and the timestep."""

    name: str
    batch: Batch
    timesteps: tuple[int, ...]


class FixedLoss:
    """The loss of a model on `FixedImage`s, with its LoRA and without it (the multiplier at 0, of text encoders too)."""

    def __init__(self, model: FrozenModel, network: AdapterNetwork, condition: Condition, *, dtype: torch.dtype,
                 seed: int, at_once: int = BANDS) -> None:
        """`at_once`: timesteps of an image that the UNet computes together."""
        self.model, self._network, self._condition, self._dtype, self._seed = model, network, condition, dtype, seed
        self._at_once = at_once
        self._norms: dict[str, Tensor] = {}

    @torch.no_grad()
    def of(self, images: Sequence[FixedImage], *, adapted: bool) -> list[list[float]]:
        """The loss of each image at each of its timesteps, one pass of the UNet each. Waits for the device once."""
        losses: list[Tensor] = []
        self._network.set_multiplier(float(adapted))
        try:
            for image in images:
                losses += self._losses(image)
        finally:
            self._network.set_multiplier(1.0)
        values = iter(torch.cat(losses).tolist() if losses else ())
        return [[next(values) for _ in image.timesteps] for image in images]

    def _losses(self, image: FixedImage) -> list[Tensor]:
        """The losses of an image in parts, on the device."""
        prepared = image.batch.extended(self._condition.prepare(image.batch.captions)).to(self.model.device)
        one = self._condition.encode(prepared)
        rows = [fixed_inputs(image.batch, timestep=t, seed=seed_of(self._seed, "fixed", image.name)) for t in image.timesteps]
        inputs = Batch({name: torch.cat([row[name] for row in rows]) for name in rows[0].tensors})
        return [fixed_losses(
            self.model, part, Conditioning(one.context.expand(len(part), -1, -1),
                                           None if one.pooled is None else one.pooled.expand(len(part), -1)),
            adapters=self._network.adapters().get("unet", {}), dtype=self._dtype) for part in inputs.split(self._at_once)]

    @torch.no_grad()
    def strength(self) -> dict[str, float]:
        """See `relative_change`, the median over the layers of each component."""
        ratios = relative_change(self.model, self._network, norms=self._norms)
        return {component: float(torch.stack(parts).median()) for component, parts in ratios.items()}


def relative_change(model: FrozenModel, network: AdapterNetwork, *, norms: dict[str, Tensor] | None = None
                    ) -> dict[str, list[Tensor]]:
    """How large the LoRA's change is beside the weights it changes: ‖ΔW‖ / ‖W‖ of each layer, 0-d, by component. `norms`
    keeps ‖W‖ by the layer's key from one call to the next."""
    ratios: dict[str, list[Tensor]] = {}
    norms, components = {} if norms is None else norms, model.components
    for target, layer in zip(network.targets, network.layers.values(), strict=True):
        weight = components[target.component][f"{target.module}.weight"]
        if isinstance(layer, DeltaAdapter):
            if (delta := layer.delta()) is None:
                continue
            down, up = delta.down.flatten(1), delta.up
            change = abs(delta.scale) * ((up.T @ up) * (down @ down.T)).sum().clamp(min=0).sqrt()  # ‖BA‖² = tr(BᵀB·AAᵀ)
        else:
            there = next(layer.parameters()).device  # text encoders that are not computed with may be elsewhere
            frozen = dense(weight, torch.float32).to(there)
            change = (merged(layer, frozen) - frozen).norm()
        if target.key not in norms:
            norms[target.key] = dense(weight, torch.float32).norm().clamp(min=1e-12).to(change.device)
        ratios.setdefault(target.component, []).append(change / norms[target.key])
    return ratios
