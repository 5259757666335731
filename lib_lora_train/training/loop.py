"""The training loop. Saving, resume points, previews, stopping and pausing are callbacks; losses are reported as events."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from lib_lora_train.adapters.network import EMBEDDING_GROUP, AdapterNetwork
from lib_lora_train.distributed import SINGLE_PROCESS, ProcessGroup, rows_of
from lib_lora_train.errors import translated
from lib_lora_train.events import Report
from lib_lora_train.inputs.batch import Batch
from lib_lora_train.memory.step_config import StepConfig
from lib_lora_train.model.frozen import FrozenModel
from lib_lora_train.training.checkpoint import TrainingState, capture, restore
from lib_lora_train.training.condition import Condition
from lib_lora_train.training.cuda_graph import CudaGraphStep
from lib_lora_train.training.loss import LossConfig
from lib_lora_train.training.noise import NoiseConfig, draw, seed_of
from lib_lora_train.training.optimizers import OptimizerConfig, RunOptimizer, spec_of
from lib_lora_train.training.precision import LossScaler
from lib_lora_train.training.preservation import Preservation
from lib_lora_train.training.progress import LossReporter
from lib_lora_train.training.schedules import ScheduleConfig, learning_rate_factor
from lib_lora_train.training.train_step import TrainStep

EpochBatches = Callable[[int, int], Iterable[Batch]]
"""(epoch, start) -> the epoch's batches from the position `start` on."""


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The numbers of a run. Steps and epochs count from 1. After `embedding_steps` the vectors of words stay as they are.
    `cuda_graphs` and `compiled` speed a step up where they can."""

    steps: int
    epochs: int
    steps_per_epoch: int
    accumulation: int
    optimizer: OptimizerConfig
    schedule: ScheduleConfig
    unet_lr: float
    text_encoder_lr: float
    seed: int
    loss: LossConfig
    step: StepConfig
    noise: NoiseConfig = NoiseConfig()
    preservation: Preservation = Preservation()
    embedding_lr: float = 0.0
    embedding_steps: int = 0
    cuda_graphs: bool = False
    compiled: bool = False


class Callback(Protocol):
    """What happens between two steps. Both methods are called in every process that trains."""

    def before_step(self, progress: Progress) -> bool:
        """Called before each step. False ends the training there."""

    def after_step(self, progress: Progress) -> None:
        """Called after each step, when weights, optimizer and loss scaler agree."""


class Progress:
    """Where a training stands, for its callbacks; it may be kept and asked after the training has ended.

    step    the last step made
    """

    def __init__(self, step: int, *, train_step: TrainStep, network: AdapterNetwork, optimizer: RunOptimizer,
                 scaler: LossScaler, losses: LossReporter) -> None:
        self.step = step
        self._consistent = True  # whether weights, moments and scaler are those after `step`
        self._train_step, self._network, self._optimizer = train_step, network, optimizer
        self._scaler, self._losses = scaler, losses

    def begin_update(self) -> None:
        """From now on the state belongs to no step, until `advance`."""
        self._consistent = False

    def advance(self, step: int) -> None:
        """The state is that after `step`."""
        self.step, self._consistent = step, True

    def flush(self) -> None:
        """Wait for the losses of all steps made, and report them. Raises TrainingError where the training cannot go on."""
        # If that is raised, or the host objects to a step it hears of, the state must not be kept.
        consistent, self._consistent = self._consistent, False
        self._losses.flush()
        self._consistent = consistent

    @property
    def skipped(self) -> int:
        """Steps that were not applied, since their loss or gradients were not finite, of those reported."""
        return self._losses.skipped

    def release(self) -> None:
        """Give back the device's memory that is only held for the next steps: the model is going to be used by others."""
        self._train_step.release()

    def stored(self) -> list[Tensor]:
        """What is trained and its moments: all that takes memory on the device between two steps. Who moves it, in place, calls
        the network's `rebind` afterwards."""
        return [*self._network.stored(), *self._optimizer.stored()]

    @contextlib.contextmanager
    def weights(self) -> Iterator[Mapping[str, Tensor]]:
        """The LoRA's tensors as they are to be saved, under the names of its file, until the block is left."""
        try:
            self._optimizer.set_training(False)
            yield self._network.state_dict()
        finally:
            self._optimizer.set_training(True)

    def snapshot(self) -> TrainingState | None:
        """What `train` takes as `resumed` to go on from here; None while a step has only half happened. The tensors share
        memory with the running ones."""
        if not self._consistent:
            return None
        self.flush()
        return capture(self.step, network=self._network, optimizer=self._optimizer, scaler=self._scaler,
                       recent=self._losses.recent(), overflows=self._losses.overflows, skipped=self._losses.skipped)


def train(model: FrozenModel, *, network: AdapterNetwork, epoch_batches: EpochBatches, condition: Condition,
          config: TrainConfig, report: Report, callbacks: Sequence[Callback] = (), resumed: TrainingState | None = None,
          group: ProcessGroup = SINGLE_PROCESS) -> Progress:
    """Train `network` on `model`; returns how far it came: to the last step, unless a callback ended the training.

    `condition` makes the text of a batch. `resumed` needs the network it belongs to. Of each batch every process of the `group`
    trains its rows, and all add up their gradients.
    A step whose loss or gradients are not finite is not applied. Raises TrainingError if that happens too often in a row (the
    network then holds its last good weights) or if the memory runs out with one image at a time.
    """
    device, rates = model.device, (config.unet_lr, config.text_encoder_lr, config.embedding_lr)
    weights = network.flatten(*rates, dtype=config.loss.dtype)
    optimizer = RunOptimizer(weights, spec_of(config.optimizer.name), config.optimizer, pairs=network.pairs())
    # With β the gradients are up to β/2 times as large: a scale that fits them at once spares steps that would be skipped.
    scaler = LossScaler(device, enabled=config.loss.dtype == torch.float16,
                        initial=65536.0 / max(1.0, config.loss.dco_beta / 2))
    make_step = CudaGraphStep if config.cuda_graphs and device.type == "cuda" else TrainStep
    train_step = make_step(model, weights=weights, adapters=network.training_adapters().get("unet", {}), condition=condition,
                           scaler=scaler, loss=config.loss, config=config.step, report=report, compiled=config.compiled,
                           dropout_keys=network.dropout_keys)
    losses = LossReporter(device, steps=config.steps, epochs=config.epochs, steps_per_epoch=config.steps_per_epoch,
                          report=report)
    progress = Progress(resumed.step if resumed else 0, train_step=train_step, network=network, optimizer=optimizer,
                        scaler=scaler, losses=losses)
    if resumed:
        restore(resumed, optimizer=optimizer, scaler=scaler)
        losses.restore(resumed)

    with torch.enable_grad(), translated("training"):
        for step, epoch, batches in _steps(epoch_batches, config, begin=progress.step):
            if group.any(not all(callback.before_step(progress) for callback in callbacks)):
                break
            optimizer.set_learning_rate(learning_rate_factor(config.schedule, step - 1),
                                        stopped={EMBEDDING_GROUP} if step > config.embedding_steps else ())
            inputs = [part for micro, batch in enumerate(batches) for part in _inputs(
                batch, step, micro, len(batches), model=model, condition=condition, config=config, group=group,
                dropout=bool(network.dropout))]
            for attempt in train_step.attempts(inputs):
                with attempt:
                    for batch in attempt.microbatches:
                        batch = batch.to(device)
                        # No name for the loss: its graph holds the model's weights, which others may want between two steps.
                        train_step.backward(train_step.forward(batch))
                        train_step.add_zero_prediction(batch)
            group.all_reduce_(weights.gradient)
            group.all_reduce_(train_step.sums)

            progress.begin_update()
            norm = optimizer.clip(scaler.inverse())
            overflowed = ~(norm.isfinite() & train_step.loss.isfinite())
            optimizer.step(overflowed)
            scaler.update(overflowed)
            losses.push(step, epoch, train_step.sums, overflowed, norm=norm, rates=optimizer.learning_rates())
            train_step.clear()
            progress.advance(step)
            for callback in callbacks:
                callback.after_step(progress)
        progress.flush()
    return progress


def _inputs(batch: Batch, step: int, micro: int, micro_batches: int, *, model: FrozenModel, condition: Condition,
            config: TrainConfig, group: ProcessGroup, dropout: bool) -> list[Batch]:
    """A batch with all that its loss depends on, and what is trained beside it. Random numbers, text and weights are the whole
    batch's, of which each process takes its rows: how a batch is cut changes nothing but the order in which numbers are
    added."""
    scale = model.architecture.latent_scale
    draws = draw(batch["mean"].shape, seed=config.seed, step=step, micro=micro, timesteps=len(model.schedule),
                 config=config.noise, latents=(batch["mean"] * scale, batch["std"] * scale))
    weight = batch["loss_weight"] / (len(batch) * micro_batches)
    if dropout:
        keys = [[seed_of(config.seed, "dropout", step, micro, row) & 0xFFFFFFFF for row in (number, "all")]
                for number in range(len(batch))]
        draws = {**draws, "dropout": torch.tensor(keys)}
    whole = batch.extended({**draws, "weight": weight, **condition.prepare(batch.captions)})
    return [part.rows(rows_of(len(whole), group)) for part in config.preservation.inputs(whole, condition)]


def _steps(epoch_batches: EpochBatches, config: TrainConfig, *, begin: int) -> Iterator[tuple[int, int, list[Batch]]]:
    """(step, epoch, micro-batches) for the steps after `begin`; an epoch's last step may hold fewer micro-batches."""
    step, (epochs, steps) = begin, divmod(begin, config.steps_per_epoch)
    for epoch in range(1 + epochs, config.epochs + 1):
        batches = iter(epoch_batches(epoch, steps * config.accumulation)) if step < config.steps else iter(())
        steps = 0
        while step < config.steps and (micro_batches := list(itertools.islice(batches, config.accumulation))):
            step += 1
            yield step, epoch, micro_batches
