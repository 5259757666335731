"""Losses and speed of a running training, read off the device without waiting for it, and reported as events."""

from __future__ import annotations

import collections
import dataclasses
import math
import time
from collections.abc import Mapping

import torch
from torch import Tensor

from lib_lora_train.errors import TrainingError
from lib_lora_train.events import Report, Step
from lib_lora_train.training.checkpoint import TrainingState

# Loss scaling starts at 2^16: after so many halvings in a row there is no scale at which the gradients fit.
_MOST_OVERFLOWS = 30


@dataclasses.dataclass(frozen=True, eq=False)
class _Pending:
    """A step whose loss is on its way: `result` is (loss, 1 if the gradients overflowed), readable once `arrived` is passed."""

    step: int
    epoch: int
    rates: Mapping[str, float]
    result: Tensor
    arrived: torch.cuda.Event | None


class LossReporter:
    """Turns losses into Step events, in order, and a loss that is not a number into the end of the training.

    On CUDA each step's numbers are copied to pinned memory behind the step's own kernels and picked up once the device has
    passed them, usually a step or two later. Elsewhere they are there at once.
    """

    def __init__(self, device: torch.device, *, steps: int, epochs: int, steps_per_epoch: int, report: Report) -> None:
        self._device, self._steps, self._epochs, self._report = device, steps, epochs, report
        self._recent: collections.deque[float] = collections.deque(maxlen=max(10, steps_per_epoch))
        self._pending: collections.deque[_Pending] = collections.deque()
        self._times: collections.deque[float] = collections.deque(maxlen=21)
        self.overflows = 0
        """Steps in a row whose gradients overflowed."""

    def recent(self) -> tuple[float, ...]:
        """The losses that the reported average is made of, oldest first."""
        return tuple(self._recent)

    def restore(self, state: TrainingState) -> None:
        """Go on with the average of an interrupted run."""
        self._recent.extend(state.recent)
        self.overflows = state.overflows

    def push(self, step: int, epoch: int, loss: Tensor, overflowed: Tensor, *, rates: Mapping[str, float]) -> None:
        """A step was made: remember its numbers (0-d tensors on the device), and report those that have arrived."""
        result, arrived = torch.stack([loss, overflowed.float()]), None
        if self._device.type == "cuda":
            # The copy goes on the stream of the loss's GPU, an event on that of the thread's current one: they are the same
            # only if we say so (the WebUI's --device-id chooses a GPU without making it the current one).
            with torch.cuda.device(self._device):
                on_device, result, arrived = result, torch.empty(2, pin_memory=True), torch.cuda.Event()
                result.copy_(on_device, non_blocking=True)
                arrived.record()
        self._pending.append(_Pending(step, epoch, rates, result, arrived))
        while self._pending and (self._pending[0].arrived is None or self._pending[0].arrived.query()):
            self._tell(self._pending.popleft())

    def flush(self) -> None:
        """Wait for all that is pending and report it."""
        while self._pending:
            if self._pending[0].arrived is not None:
                self._pending[0].arrived.synchronize()
            self._tell(self._pending.popleft())

    def _tell(self, pending: _Pending) -> None:
        """Report a step. Raises TrainingError where the training cannot go on."""
        loss, overflowed = pending.result.tolist()
        if not math.isfinite(loss):
            raise TrainingError(
                f"The loss is no longer a number at step {pending.step}", why="the training has become unstable",
                remedy="lower the learning rate; with fp16 also try bf16 or no as precision, and a VAE that is made for half "
                       "precision")
        self.overflows = self.overflows + 1 if overflowed else 0
        if self.overflows >= _MOST_OVERFLOWS:
            raise TrainingError(
                f"The last {self.overflows} steps could not be used", why="their gradients were too large for numbers",
                remedy="lower the learning rate, or take bf16 or no as precision")
        self._recent.append(loss)
        speed = self._steps_per_second()
        self._report(Step(
            step=pending.step, total=self._steps, epoch=pending.epoch, epochs=self._epochs, loss=loss,
            average_loss=sum(self._recent) / len(self._recent), learning_rate=pending.rates.get("unet", 0.0),
            text_encoder_lr=pending.rates.get("text_encoder", 0.0), steps_per_second=speed,
            seconds_left=(self._steps - pending.step) / speed if speed else None, skipped=bool(overflowed)))

    def _steps_per_second(self) -> float | None:
        """Over the last 20 steps, without the first, which warms up; None before the third."""
        self._times.append(time.perf_counter())
        times = list(self._times)
        times = times if len(times) == 21 else times[1:]
        passed = times[-1] - times[0] if len(times) > 1 else 0.0
        return (len(times) - 1) / passed if passed > 0 else None
