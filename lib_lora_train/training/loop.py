"""The training loop. It reads like the method; logging, saving and stopping consume its events.

Not here: what to do with the saved weights (the caller's `save`) and with the state to resume from (its `keep`), validation.
"""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Literal

import torch

from lib_lora_train.adapters.network import LoRANetwork
from lib_lora_train.distributed import SINGLE_PROCESS, ProcessGroup, rows_of
from lib_lora_train.errors import TrainingError, translated
from lib_lora_train.events import Report, Step
from lib_lora_train.inputs.batches import Batch
from lib_lora_train.model.frozen import FrozenModel
from lib_lora_train.training.checkpoint import TrainingState, capture, restore
from lib_lora_train.training.condition import Condition
from lib_lora_train.training.cuda_graph import Execution, recorder_for
from lib_lora_train.training.device_step import Work
from lib_lora_train.training.microbatches import InPieces, piece
from lib_lora_train.training.noise import draw
from lib_lora_train.training.optimizer import Stepper, learning_rate_factor
from lib_lora_train.training.precision import LossScaler
from lib_lora_train.training.progress import Arrived, LossLog, Speed
from lib_lora_train.training.step import StepInputs, StepOptions, prepare

Stop = Callable[[], Literal["", "stop", "save"]]
Release = Callable[[], None]
Pause = Callable[[Release], bool]
Snapshot = Callable[[], TrainingState | None]
Save = Callable[[int, int, Snapshot], None]
EpochBatches = Callable[[int, int], Iterable[Batch]]


@dataclasses.dataclass(frozen=True)
class LoopOptions:
    """The numbers of a run. Steps and epochs count from 1, `save_every_…` 0 is never.

    `cuda_graphs` are used where there are any; `compiled` lets torch.compile make the kernels where it can. `rows_at_once`
    is how many pictures of a batch are computed at once, None for all.
    """

    steps: int
    epochs: int
    steps_per_epoch: int
    accumulation: int
    schedule: str
    warmup: int
    cycles: int
    weight_decay: float
    max_grad_norm: float
    noise_offset: float
    unet_lr: float
    text_encoder_lr: float
    seed: int
    save_every_n_epochs: int
    save_every_n_steps: int
    step: StepOptions
    cuda_graphs: bool = True
    compiled: bool = False
    rows_at_once: int | None = None


def train(model: FrozenModel, *, network: LoRANetwork, epoch_batches: EpochBatches, condition: Condition,
          options: LoopOptions, save: Save, keep: Save, report: Report, stop: Stop, pause: Pause = lambda release: True,
          resumed: TrainingState | None = None, group: ProcessGroup = SINGLE_PROCESS) -> int:
    """Train `network` on `model`; returns the number of steps made (all of them, unless `stop` said otherwise).

    `epoch_batches(epoch, start)` gives an epoch's batches from the position `start` on, `condition` their text.
    `save(step, epoch, snapshot)` is called where a save is due, `keep` after every step; `snapshot()` is what `resumed`
    takes to go on from there, None while a step has only half happened. It may also be called after this function has
    returned or raised. `resumed` needs the network it belongs to. `pause(release)` is called between two steps, when the
    model may be used by others, who call `release` first; False ends the run as `stop` does. Each process
    of `group` trains its rows of a batch, and their gradients are summed.
    Raises TrainingError if the loss is no longer a number (the network then holds its last good weights) or if the memory
    runs out with one picture at a time and all that can be recomputed.
    """
    device, recorder = model.device, recorder_for(model.device, wanted=options.cuda_graphs and not options.step.offload)
    weights = network.flatten(options.unet_lr, options.text_encoder_lr, dtype=options.step.dtype)
    stepper = Stepper(weights, weight_decay=options.weight_decay, max_grad_norm=options.max_grad_norm,
                      captured=recorder is not None)
    scaler = LossScaler(device, enabled=options.step.dtype == torch.float16)
    work = Work(model, adapters=network.adapters().get("unet", {}), condition=condition, stepper=stepper, scaler=scaler,
                options=options.step)
    if options.compiled:
        work.compile(report)
    execution = Execution(work, recorder, report=report)
    in_pieces = InPieces(execution, report=report, most=options.rows_at_once)
    log, reporter = LossLog(device), _Reporter(options, report, stepper)
    begin = resumed.step if resumed else 0
    if resumed:
        restore(resumed, stepper=stepper, scaler=scaler)
        reporter.restore(resumed)
    whole: int | None = begin  # the step that weights, moments and scaler stand at; None while they do not agree

    def settle() -> None:
        nonlocal whole
        # Whoever hears of a step may object (a loss that is no number, a model that was changed): then nothing is whole.
        at, whole = whole, None
        reporter.tell(log.arrived(wait=True))
        whole = at

    def snapshot() -> TrainingState | None:
        if whole is None:
            return None
        settle()
        return capture(whole, network=network, stepper=stepper, scaler=scaler, recent=reporter.recent(),
                       overflows=reporter.overflows)

    with torch.enable_grad(), translated("training"):
        for step, epoch, micro_batches in _steps(epoch_batches, options, begin=begin):
            if group.any(bool(stop()) or not pause(execution.release)):
                settle()
                return step - 1
            stepper.set_factor(learning_rate_factor(
                options.schedule, step - 1, total=options.steps, warmup=options.warmup, cycles=options.cycles))
            in_pieces.gradients(_inputs(micro_batches, step, model=model, condition=condition, options=options, group=group))
            group.all_reduce_(weights.gradient)
            group.all_reduce_(work.loss)
            whole = None
            log.push(step, execution.finish())
            reporter.expect(step, epoch)
            reporter.tell(log.arrived())
            whole = step
            if _save_due(step, options):
                settle()
                save(step, epoch, snapshot)
            keep(step, epoch, snapshot)
        settle()
    return options.steps


def _inputs(micro_batches: Sequence[Batch], step: int, *, model: FrozenModel, condition: Condition, options: LoopOptions,
            group: ProcessGroup) -> list[StepInputs]:
    """What a step's losses depend on. Random numbers and text are the whole batch's, of which each process takes its rows."""
    result = []
    for micro, batch in enumerate(micro_batches):
        draws = draw(batch.mean.shape, seed=options.seed, step=step, micro=micro, timesteps=len(model.schedule),
                     noise_offset=options.noise_offset)
        text = condition.prepare(batch.captions)
        whole = prepare(batch, draws=draws, text=text, micro_batches=len(micro_batches))
        result.append(piece(whole, rows_of(len(whole), group)))
    return result


def _steps(epoch_batches: EpochBatches, options: LoopOptions, *, begin: int) -> Iterator[tuple[int, int, list[Batch]]]:
    """(step, epoch, micro-batches) for the steps after `begin`; an epoch's last step may hold fewer micro-batches."""
    step, (epochs, steps) = begin, divmod(begin, options.steps_per_epoch)
    if step >= options.steps:
        return
    for epoch in range(1 + epochs, options.epochs + 1):
        gathered: list[Batch] = []
        start, steps = steps * options.accumulation, 0
        for batch in epoch_batches(epoch, start):
            gathered.append(batch)
            if len(gathered) == options.accumulation:
                step += 1
                yield step, epoch, gathered
                gathered = []
                if step == options.steps:
                    return
        if gathered:
            step += 1
            yield step, epoch, gathered
            if step == options.steps:
                return


def _save_due(step: int, options: LoopOptions) -> bool:
    """Not after the last step: that is the result, which the caller saves."""
    if step == options.steps:
        return False
    if options.save_every_n_steps and step % options.save_every_n_steps == 0:
        return True
    span = options.save_every_n_epochs * options.steps_per_epoch
    return bool(span) and step % span == 0


# Loss scaling starts at 2^16: after so many halvings in a row there is no scale at which the gradients fit.
_MOST_OVERFLOWS = 30


class _Reporter:
    """Turns arrived losses into Step events, in order, and a loss that is not a number into the end of the run."""

    def __init__(self, options: LoopOptions, report: Report, stepper: Stepper) -> None:
        self._options, self._report, self._stepper = options, report, stepper
        self._recent: collections.deque[float] = collections.deque(maxlen=max(10, options.steps_per_epoch))
        self._expected: dict[int, tuple[int, float, float]] = {}
        self._speed = Speed()
        self.overflows = 0

    def recent(self) -> tuple[float, ...]:
        """The losses that the shown average is made of."""
        return tuple(self._recent)

    def restore(self, state: TrainingState) -> None:
        """Go on with the average of an interrupted run."""
        self._recent.extend(state.recent)
        self.overflows = state.overflows

    def expect(self, step: int, epoch: int) -> None:
        """Remember what was in force in a step whose loss is still on its way."""
        rates = self._stepper.rates()
        self._expected[step] = (epoch, rates.get("unet", 0.0), rates.get("text_encoder", 0.0))

    def tell(self, arrived: list[Arrived]) -> None:
        for one in arrived:
            epoch, learning_rate, text_encoder_lr = self._expected.pop(one.step)
            if not math.isfinite(one.loss):
                raise TrainingError(
                    f"The loss is no longer a number at step {one.step}", why="the training has become unstable",
                    remedy="lower the learning rate; with fp16 also try bf16 or no as precision, and a VAE that is "
                           "made for half precision")
            self.overflows = self.overflows + 1 if one.overflowed else 0
            if self.overflows >= _MOST_OVERFLOWS:
                raise TrainingError(
                    f"The last {self.overflows} steps could not be used", why="their gradients were too large for numbers",
                    remedy="lower the learning rate, or take bf16 or no as precision")
            self._recent.append(one.loss)
            speed = self._speed.tick()
            left = (self._options.steps - one.step) / speed if speed else None
            self._report(Step(
                step=one.step, total=self._options.steps, epoch=epoch, epochs=self._options.epochs, loss=one.loss,
                average_loss=sum(self._recent) / len(self._recent), learning_rate=learning_rate,
                text_encoder_lr=text_encoder_lr, steps_per_second=speed, seconds_left=left, skipped=one.overflowed))
