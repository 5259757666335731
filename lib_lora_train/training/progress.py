"""Losses and speed of a running training, read off the device without waiting for it, and reported as events."""

from __future__ import annotations

import collections
import dataclasses
import math
import time
from collections.abc import Mapping

import torch
from torch import Tensor

from lib_lora_train.adapters.network import EMBEDDING_GROUP
from lib_lora_train.errors import TrainingError
from lib_lora_train.events import Report, Step, Warned
from lib_lora_train.settings import named
from lib_lora_train.training.checkpoint import TrainingState

# Loss scaling starts at 2^16: after so many halvings in a row there is no scale at which the gradients fit.
_MOST_OVERFLOWS = 30
_WINDOW = 10  # losses whose average is compared with predicting nothing: a single one depends on its noise level
_WORSE = 1.25  # times the first loss, relative to predicting nothing: some small models are no better than that


@dataclasses.dataclass(frozen=True, eq=False)
class _Pending:
    """A step whose loss is on its way: `result` is (loss, loss of predicting zero, 1 if the step was not applied, the
    gradients' norm), readable once `arrived` is passed."""

    step: int
    epoch: int
    rates: Mapping[str, float]
    result: Tensor
    arrived: torch.cuda.Event | None


class LossReporter:
    """Turns losses into Step events, in order, and too many in a row that are not numbers into the end of the training.

    On CUDA each step's numbers are copied to pinned memory behind the step's own kernels and picked up once the device has
    passed them, usually a step or two later. Elsewhere they are there at once.
    """

    def __init__(self, device: torch.device, *, steps: int, epochs: int, steps_per_epoch: int, report: Report) -> None:
        self._device, self._steps, self._epochs, self._report = device, steps, epochs, report
        self._recent: collections.deque[float] = collections.deque(maxlen=max(10, steps_per_epoch))
        self._pending: collections.deque[_Pending] = collections.deque()
        self._times: collections.deque[float] = collections.deque(maxlen=21)
        self._compared: collections.deque[tuple[float, float]] = collections.deque(maxlen=_WINDOW)
        self._bound = 0.0  # of the losses, relative to predicting nothing
        self._told_worse = self._told_not_finite = False
        self.overflows = 0
        """Steps in a row that were not applied, since their gradients or their loss were not finite."""
        self.skipped = 0
        """All such steps of the run."""

    def recent(self) -> tuple[float, ...]:
        """The losses that the reported average is made of, oldest first."""
        return tuple(self._recent)

    def restore(self, state: TrainingState) -> None:
        """Go on with the average of an interrupted run."""
        self._recent.extend(state.recent)
        self.overflows, self.skipped = state.overflows, state.skipped

    def push(self, step: int, epoch: int, sums: Tensor, overflowed: Tensor, *, norm: Tensor,
             rates: Mapping[str, float]) -> None:
        """A step was made: remember its numbers, and report those that have arrived. `sums` are the loss and that of
        predicting zero, [2] on the device as `overflowed` and the gradients' `norm`, 0-d."""
        result, arrived = torch.cat([sums, torch.stack([overflowed.float(), norm])]), None
        if self._device.type == "cuda":
            # The copy goes on the stream of the loss's GPU, an event on that of the thread's current one: they are the same
            # only if we say so (the WebUI's --device-id chooses a GPU without making it the current one).
            with torch.cuda.device(self._device):
                on_device, result, arrived = result, torch.empty(len(result), pin_memory=True), torch.cuda.Event()
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
        loss, zero_loss, overflowed, norm = pending.result.tolist()
        skipped, finite = bool(overflowed), math.isfinite(loss)
        self.overflows, self.skipped = self.overflows + 1 if skipped else 0, self.skipped + skipped
        if self.overflows >= _MOST_OVERFLOWS:
            raise self._unusable(finite)
        if finite:
            self._recent.append(loss)
            self._compare(pending, loss, zero_loss)
        elif not self._told_not_finite:
            self._told_not_finite = True
            self._report(Warned(f"The loss of step {pending.step} is not a number: such a step is skipped and counted."))
        speed = self._steps_per_second()
        average = sum(self._recent) / len(self._recent) if self._recent else math.nan
        self._report(Step(
            step=pending.step, total=self._steps, epoch=pending.epoch, epochs=self._epochs, loss=loss,
            average_loss=average, learning_rate=pending.rates.get("unet", 0.0),
            text_encoder_lr=pending.rates.get("text_encoder", 0.0), steps_per_second=speed,
            seconds_left=(self._steps - pending.step) / speed if speed else None, skipped=skipped,
            skipped_steps=self.skipped, gradient_norm=norm))

    def _compare(self, pending: _Pending, loss: float, zero_loss: float) -> None:
        """Warn once where the losses are above those of predicting nothing."""
        self._bound = self._bound or max(1.0, _WORSE * loss / zero_loss if zero_loss else 1.0)
        self._compared.append((loss, zero_loss))
        own, nothing = (sum(losses) / _WINDOW for losses in zip(*self._compared, strict=True))
        if len(self._compared) == _WINDOW and own > nothing * self._bound and not self._told_worse:
            self._told_worse = True
            rate = max((rate for name, rate in pending.rates.items() if name != EMBEDDING_GROUP), default=0.0)
            self._report(Warned(
                f"At step {pending.step} the loss is above that of predicting nothing ({own:.3f} instead of {nothing:.3f} "
                f"over {_WINDOW} steps), so that the LoRA would be of no use: stop, and lower the learning rate ({rate:.3g} at "
                "this step; 1e-4 is usual)."))

    def _unusable(self, finite: bool) -> TrainingError:
        """The end of a training whose steps can no longer be applied; `finite`: whether the last one's loss is a number."""
        why, remedy = "their gradients were too large for numbers", "lower the learning rate, or take no as precision"
        if not finite and self._recent:
            why = "their loss is no longer a number, because the training has become unstable"
        elif not finite:
            why = "their loss was never a number, although the weights are: the model's activations overflow"
            remedy = f"take no as {named('mixed_precision')}, or choose another checkpoint"
        return TrainingError(f"The last {self.overflows} steps could not be used", why=why, remedy=remedy)

    def _steps_per_second(self) -> float | None:
        """Over the last 20 steps, without the first, which warms up; None before the third."""
        self._times.append(time.perf_counter())
        times = list(self._times)
        times = times if len(times) == 21 else times[1:]
        passed = times[-1] - times[0] if len(times) > 1 else 0.0
        return (len(times) - 1) / passed if passed > 0 else None
