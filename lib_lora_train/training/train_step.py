"""Forward and backward of the micro-batches of a step, and what is done when they run out of memory."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType

import torch
from torch import Tensor

from lib_lora_train.adapters.dropout import DropoutKeys
from lib_lora_train.adapters.flat import FlatWeights
from lib_lora_train.errors import is_out_of_memory
from lib_lora_train.events import Report, Warned
from lib_lora_train.inputs.batch import Batch
from lib_lora_train.memory.step_config import StepConfig, offloaded
from lib_lora_train.model.frozen import FrozenModel
from lib_lora_train.model.ops.layers import Adapter
from lib_lora_train.training.compiled import CompiledLoss
from lib_lora_train.training.condition import Condition
from lib_lora_train.training.loss import LossConfig, denoising_loss, zero_prediction_loss
from lib_lora_train.training.precision import LossScaler
from lib_lora_train.training.preservation import with_reference


class TrainStep:
    """Computes losses and adds up their gradients, in the way that `config` says. `sums` are those since the last `clear`, [2]
    fp32 on the device: of the losses, which is also `loss`, and of what they would be if zero were predicted."""

    def __init__(self, model: FrozenModel, *, weights: FlatWeights, adapters: Mapping[str, Adapter], condition: Condition,
                 scaler: LossScaler, loss: LossConfig, config: StepConfig, report: Report,
                 compiled: bool = False, dropout_keys: DropoutKeys | None = None) -> None:
        """`adapters` are the UNet's; `dropout_keys` are given those of each micro-batch that has some. `compiled` lets
        torch.compile make the loss."""
        self.model, self.weights, self.config, self.loss_config = model, weights, config, loss
        self.sums = torch.zeros(2, device=model.device)
        self.loss = self.sums[0]
        self._adapters, self._condition, self._scaler, self._report = adapters, condition, scaler, report
        self._dropout_keys = dropout_keys or DropoutKeys()
        self._told_smaller = False  # of fewer pictures at once
        self._denoising_loss = CompiledLoss(report) if compiled else denoising_loss

    def forward(self, batch: Batch) -> Tensor:
        """The loss of a micro-batch, 0-d, with what backward needs."""
        batch = batch.to(self.model.device)
        if "prior" in batch or self.loss_config.dco_beta:
            batch = with_reference(self.model, batch, condition=self._condition, dtype=self.loss_config.dtype)
        self._dropout_keys.keys = batch["dropout"] if "dropout" in batch else None  # also for what backward computes again
        with offloaded() if self.config.offload else contextlib.nullcontext():
            return self._denoising_loss(
                self.model, batch, conditioning=self._condition.encode(batch), adapters=self._adapters, config=self.loss_config,
                checkpointed=self.config.checkpointed)

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a loss to those that are there, and the loss to `loss`."""
        self._scaler.scaled(loss).backward()
        self.weights.collect()
        self._dropout_keys.keys = None
        self.loss.add_(loss.detach())

    def add_zero_prediction(self, batch: Batch) -> None:
        """Add what the loss of this micro-batch would be if zero were predicted."""
        self.sums[1].add_(zero_prediction_loss(self.model, batch, self.loss_config))

    def clear(self) -> None:
        """Set gradients and sums to zero."""
        self._dropout_keys.keys = None
        self.weights.clear()
        self.sums.zero_()

    def release(self) -> None:
        """Hold nothing on the device between two steps but what is trained."""
        if self.model.device.type == "cuda":
            with torch.cuda.device(self.model.device):
                torch.cuda.empty_cache()

    def attempts(self, batches: Sequence[Batch]) -> Iterator[Attempt]:
        """Attempts at the gradients of a step, each to be entered with `with`, until one does not run out of memory. Each after
        the first takes less memory and more time, and computes the same. Raises the out-of-memory error where nothing is left
        to try."""
        while True:
            attempt = Attempt(self, batches)
            yield attempt
            if attempt.succeeded:
                return
            # Outside of the except clause: the error held the frames, and these the tensors that filled the memory.
            self.clear()
            self.release()

    def step_down(self, largest: int) -> bool:
        """Take less memory from now on, which is reported. False where nothing is left to give up."""
        config = self.config.step_down(largest=largest, blocks=self.model.unet.checkpointable,
                                       device_type=self.model.device.type)
        if config is None:
            return False
        if config.microbatch < self.config.microbatch and not self._told_smaller:
            self._told_smaller = True
            self._report(Warned(f"The memory was too small for {min(self.config.microbatch, largest)} pictures at once. The "
                                "run goes on with fewer at a time and learns the same, but each step takes longer; a smaller "
                                "batch or gradient checkpointing would avoid that."))
        elif config.microbatch == self.config.microbatch:
            means = "activations in ordinary memory" if config.offload else "gradient checkpointing"
            self._report(Warned(f"The memory was too small for one picture. The run goes on with {means} and learns the same, "
                                "but each step takes longer; a lower resolution would avoid that."))
        self.config = config
        return True


class Attempt:
    """One attempt at a step's gradients. `microbatches` are what to run forward and backward."""

    def __init__(self, train_step: TrainStep, batches: Sequence[Batch]) -> None:
        self.microbatches = [part for batch in batches for part in batch.split(train_step.config.microbatch)]
        self.succeeded = False
        self._train_step, self._largest = train_step, max(map(len, batches), default=0)

    def __enter__(self) -> Attempt:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> bool:
        self.succeeded = error is None
        return error is not None and is_out_of_memory(error) and self._train_step.step_down(self._largest)
