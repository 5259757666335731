"""Whether the numbers of a run are sound: the model's weights, its loss before the first step, and the LoRA after the last."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import TypeVar

import torch

from lib_lora_train.adapters.network import AdapterNetwork
from lib_lora_train.errors import LoraFileError, ModelError, TrainingError, is_out_of_memory, some_of
from lib_lora_train.evaluation.fixed_loss import relative_change
from lib_lora_train.events import Verdict
from lib_lora_train.inputs.batch import Batch
from lib_lora_train.inputs.batches import Batches
from lib_lora_train.model.fingerprint import encoder_tensors, not_finite
from lib_lora_train.model.frozen import FrozenModel
from lib_lora_train.settings import named
from lib_lora_train.training.condition import Condition
from lib_lora_train.training.loop import Progress
from lib_lora_train.training.loss import LossConfig, denoising_loss, zero_prediction_loss
from lib_lora_train.training.noise import NoiseConfig, draw

_LEVELS = 2  # noise levels of the probe, evenly over those that are trained
_WORSE = 1.5
"""The model with a LoRA is at most so many times as far off as without, on a picture of the LoRA's own: training lowers it."""
_MOST_STRENGTH = 1.0  # good LoRAs stay below a third
_MOST_SKIPPED = 0.5

T = TypeVar("T")


def check_weights(model: FrozenModel) -> None:
    """Raise ModelError where a weight that a run computes with is not finite. The VAE's decoder is not among them."""
    texts = zip(model.architecture.family.text, model.text.encoders, strict=True)
    parts = {"UNet": model.unet.tensors, **{f"{spec.label}text encoder": encoder.tensors for spec, encoder in texts},
             "VAE": encoder_tensors(model.vae.tensors)}
    for part, tensors in parts.items():
        if bad := not_finite(tensors):
            raise ModelError(
                f"The checkpoint's {part} is damaged", why=f"{len(bad)} of its {len(tensors)} tensors hold values that are not "
                f"numbers ({some_of(bad, 2)})", remedy="choose another VAE; one that does not fit into fp16 needs "
                "--no-half-vae, with which the WebUI is started" if part == "VAE" else
                "download the checkpoint again, or choose another one; a merge with such a checkpoint is damaged too")


@dataclasses.dataclass(frozen=True, eq=False)
class Probe:
    """The loss of one picture of the run at some noise levels, with the same noise whenever it is asked. `rows` are batches of
    one image, `unadapted` is the loss of the model without the LoRA, before the training."""

    model: FrozenModel
    network: AdapterNetwork
    condition: Condition
    config: LossConfig
    rows: tuple[Batch, ...]
    unadapted: float | None = None

    @classmethod
    def of(cls, batches: Batches, *, model: FrozenModel, network: AdapterNetwork, condition: Condition, config: LossConfig,
           seed: int, noise: NoiseConfig, continued: str) -> Probe:
        """One with the first image of the run's first batch. Raises TrainingError or ModelError where the model's loss is not a
        number, and LoraFileError where the LoRA of the file `continued` ("" for a new one) makes it none."""
        batch = batches.finish(batches.prepare(1, 0, indices=batches.order(1)[0]))
        shape, (low, high) = batch["mean"].shape[1:], noise.timestep_range(len(model.schedule))
        draws = draw((_LEVELS, *shape), seed=seed, step=0, micro=0, timesteps=len(model.schedule))
        draws["timesteps"] = low + torch.arange(1, 2 * _LEVELS, 2) * (high - low) // (2 * _LEVELS)
        image = batch.extended({**condition.prepare(batch.captions), "weight": torch.ones(len(batch))}).rows(slice(0, 1))
        rows = tuple(image.extended({name: tensor[level:level + 1] for name, tensor in draws.items()}).to(model.device)
                     for level in range(_LEVELS))
        config = dataclasses.replace(config, dco_beta=0.0)  # of the picture alone, not beside the model without the LoRA
        probe = cls(model, network, condition, config, rows)
        return dataclasses.replace(probe, unadapted=_unless_full(lambda: probe.check_model(continued=continued)))

    @torch.no_grad()
    def loss(self, *, adapted: bool, dtype: torch.dtype | None = None) -> float:
        """The mean loss, with or without the LoRA."""
        config, layers = dataclasses.replace(self.config, dtype=dtype or self.config.dtype), self.network.layers.values()
        try:
            for layer in layers:
                layer.multiplier = float(adapted)
            return sum(float(denoising_loss(
                self.model, row, conditioning=self.condition.encode(row, adapted=adapted),
                adapters=self.network.adapters().get("unet", {}), config=config)) for row in self.rows) / len(self.rows)
        finally:
            for layer in layers:
                layer.multiplier = 1.0

    def zero_loss(self) -> float:
        """The mean loss of predicting nothing."""
        return sum(float(zero_prediction_loss(self.model, row, self.config)) for row in self.rows) / len(self.rows)

    def check_model(self, *, continued: str) -> float:
        """The loss of the model without the LoRA. Raises as `of`; the weights are finite (see `check_weights`)."""
        unadapted = self.loss(adapted=False)
        if not math.isfinite(unadapted):
            what = "The model computes values that are not numbers, although its weights are"
            if math.isfinite(self.loss(adapted=False, dtype=torch.float32)):
                raise TrainingError(what, why=f"its activations overflow in {self.config.dtype}, and not in float32",
                                    remedy=f"take no as {named('mixed_precision')}, or bf16 (RTX 30 and later)")
            raise ModelError(what, why="its activations overflow", remedy="choose another checkpoint")
        if continued and not math.isfinite(self.loss(adapted=True)):
            raise LoraFileError(f"{continued} cannot be continued",
                                why="with it the model computes values that are not numbers",
                                remedy=f"choose an earlier save of it, or another one, {named('network_weights')}")
        return unadapted

    @torch.no_grad()
    def strength(self) -> float:
        """See `relative_change`: the median over all layers."""
        ratios = [ratio for layers in relative_change(self.model, self.network).values() for ratio in layers]
        return float(torch.stack(ratios).median()) if ratios else 0.0

    def verdict(self, progress: Progress) -> tuple[Verdict, str]:
        """What the LoRA is worth after a training, and why where it is ruined."""
        if self.model.unet.layers.released or self.unadapted is None:
            return "", ""  # the run was stopped while others had the model, or had no memory to look
        return _unless_full(lambda: self._verdict(progress)) or ("", "")

    def _verdict(self, progress: Progress) -> tuple[Verdict, str]:
        with progress.weights():
            return verdict_of(
                loss=self.loss(adapted=True), unadapted=self.unadapted, zero_loss=self.zero_loss(), strength=self.strength(),
                skipped=progress.skipped / max(1, progress.step))


def verdict_of(*, loss: float, unadapted: float, zero_loss: float, strength: float, skipped: float) -> tuple[Verdict, str]:
    """What a LoRA is worth, and why where it is ruined. `loss` is the model's with it, `unadapted` without it, `zero_loss` that
    of predicting nothing, on the same picture and noise. `strength` as `Probe.strength`; `skipped` is a share of the steps."""
    if not math.isfinite(loss):
        return "ruined", "with it the model computes values that are not numbers"
    if skipped > _MOST_SKIPPED:
        return "ruined", f"{skipped:.0%} of the steps were skipped, because their numbers were not finite"
    if strength > _MOST_STRENGTH:
        return "ruined", f"its change of the model is {strength:.3g} times as large as the model's own weights"
    if loss > unadapted and loss > min(zero_loss, _WORSE * unadapted):
        return "ruined", (f"on a picture of its own the model's loss is {loss:.3f} with it and {unadapted:.3f} without it; to "
                          f"predict nothing is {zero_loss:.3f}")
    return "healthy", ""


def _unless_full(compute: Callable[[], T]) -> T | None:
    """What `compute` returns; None where the memory does not suffice, which must not end a run whose result is not saved."""
    try:
        return compute()
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        return None
