"""Measures the LoRA on fixed images and noise while it is trained, and changes nothing of the training.

Everything here is a function of the run's seed and the weights: nothing draws from torch's random state, writes to the
optimizer or takes a batch from the prefetcher. What is measured are the weights that would be saved.
Rank 0 alone measures; the other processes wait at their next exchange. Whatever goes wrong is told once and ends nothing.
"""

from __future__ import annotations

import logging
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from lib_lora_train.adapters.network import AdapterNetwork
from lib_lora_train.dataset.held_out import name_of
from lib_lora_train.distributed import ProcessGroup
from lib_lora_train.errors import counted, is_out_of_memory
from lib_lora_train.evaluation.fixed_loss import BANDS, FixedImage, FixedLoss, band_timesteps
from lib_lora_train.evaluation.schedule import Measurements, plan_measurements, spread
from lib_lora_train.events import HeldOut, ImageLosses, Measured, Report, Warned
from lib_lora_train.inputs.batch import Batch
from lib_lora_train.inputs.batches import Batches
from lib_lora_train.inputs.vae_batches import EncodingBudget
from lib_lora_train.model.frozen import FrozenModel
from lib_lora_train.run.callbacks import Stop
from lib_lora_train.run.inputs import Text, held_out_batches
from lib_lora_train.run.planning import RunPlan
from lib_lora_train.run.saver import NoSaver, Saver, save_steps
from lib_lora_train.training.loop import Progress, TrainConfig

log = logging.getLogger(__name__)
_FORWARD_AND_BACKWARD = 3  # passes: backward computes two products where forward computes one
_DVAR_LEAST, _DVAR_SHARE = 8, 0.15  # measurements, and the share of the variance over all of them below which it ends

T = TypeVar("T")
_Losses = tuple[tuple[float, ...], tuple[float, ...]]
"""Means for each band, of training images and of held-out ones."""


@dataclass(frozen=True, eq=False)
class MeasuredImages:
    """The images that a run is measured on; none where it is not. `looked_at` are those whose own loss is told at the end."""

    plan: Measurements | None = None
    training: tuple[FixedImage, ...] = ()
    held_out: tuple[FixedImage, ...] = ()
    looked_at: tuple[FixedImage, ...] = ()

    @classmethod
    def of(cls, plan: RunPlan, batches: Batches, model: FrozenModel, *, budget: EncodingBudget, group: ProcessGroup,
           report: Report) -> MeasuredImages:
        """Those of a plan, encoded: to be called while the VAE is on the device."""
        if group.rank or not plan.settings.evaluation.validation:
            return cls()
        found = attempt(lambda: cls._encoded(plan, batches, model, budget=budget, report=report),
                        tell=lambda why: report(Warned(f"This run is not measured: {why}.")))
        return found or cls()

    @classmethod
    def _encoded(cls, plan: RunPlan, batches: Batches, model: FrozenModel, *, budget: EncodingBudget,
                 report: Report) -> MeasuredImages:
        dataset, seed, steps = plan.dataset, plan.settings.optimizer.seed, len(model.schedule)
        trained = [index for index, example in enumerate(dataset.examples) if not example.is_regularisation]
        measurements = measurements_of(plan)

        def images(found: Sequence[tuple[str, Batch]]) -> tuple[FixedImage, ...]:
            return tuple(FixedImage(name, batch, band_timesteps(steps, number=number, images=len(found)))
                         for number, (name, batch) in enumerate(found))

        def own(count: int) -> list[tuple[str, Batch]]:
            return [(name_of(dataset.examples[index].path, dataset.folder), batches.fixed(index))
                    for index in spread(trained, count, seed=seed)]
        levels = band_timesteps(steps) if measurements.levels == BANDS else (steps // 2,)
        chosen = spread(plan.held_out, measurements.held_out, seed=seed)
        return cls(measurements, images(own(measurements.training)),
                   images(list(held_out_batches(chosen, plan, model, budget=budget, report=report).items())),
                   tuple(FixedImage(name, batch, levels) for name, batch in own(measurements.looked_at)))

    @property
    def captions(self) -> tuple[str, ...]:
        """All captions that the model is asked about."""
        return tuple(dict.fromkeys(caption for image in (*self.training, *self.held_out, *self.looked_at)
                                   for caption in image.batch.captions))


def measurements_of(plan: RunPlan) -> Measurements:
    """What is measured of a run."""
    schedule = plan.schedule
    visits = sum(example.repeats for example in plan.dataset.examples) * schedule.steps / schedule.steps_per_epoch
    return plan_measurements(
        passes=int(_FORWARD_AND_BACKWARD * visits / plan.processes), steps=schedule.steps, saves=save_steps(plan),
        training=plan.dataset.images, held_out=len(plan.held_out), every=plan.settings.evaluation.validate_every_n_steps)


class Measuring:
    """The callback that reports `Measured`, and `ImageLosses` at the end. `stopped` says why it ended the training early, as
    the end of a sentence, "" where it did not."""

    def __init__(self, plan: RunPlan, images: MeasuredImages, *, model: FrozenModel, network: AdapterNetwork, text: Text,
                 config: TrainConfig, saver: Saver | NoSaver, report: Report) -> None:
        self._plan, self._images, self._saver, self._report = plan, images, saver, report
        step = config.step  # where it must spare memory, no more is computed at once than by a step
        self._loss = FixedLoss(model, network, text.evaluated, dtype=config.loss.dtype, seed=config.seed,
                               at_once=min(BANDS, step.microbatch) if step.checkpointed or step.offload else BANDS)
        self._steps = frozenset(images.plan.steps if images.plan else ())
        self._unadapted: _Losses | None = None
        self._history: list[float] = []
        self._leads, self._saved, self._measured, self._told = isinstance(saver, Saver), len(saver.saved), -1, False
        self.stopped = ""

    def begin(self, *, continued: bool) -> None:
        """Measure the model without the LoRA, and report it as step 0; with the LoRA, too, where it is one that is `continued`.
        A resumed run finds the same numbers as its beginning did."""
        names = tuple(name_of(image.example.path, self._plan.dataset.folder) for image in self._plan.held_out)
        if names and self._leads:
            self._report(HeldOut(names, self._plan.held_out_derived))
        if not self._images.plan:
            return
        self._unadapted = self._attempt(lambda: self._bands(adapted=False), step=0)
        if self._unadapted is None or self._plan.resume_point and self._plan.settings.network.network_weights:
            return
        found = None
        if continued and not self._plan.resume_point:
            found = self._attempt(lambda: (self._bands(adapted=True), self._loss.strength()), step=0)
        self._tell(0, *(found or (self._unadapted, {})))

    def before_step(self, progress: Progress) -> bool:
        """See `Callback`."""
        return not self.stopped

    def after_step(self, progress: Progress) -> None:
        """See `Callback`: measure where it is due. The last step is left to `end`, when the result is safe."""
        if progress.step in self._steps and progress.step < self._plan.schedule.steps:
            self._measure(progress, path=self._saver.saved[-1] if len(self._saver.saved) > self._saved else "")
        self._saved = len(self._saver.saved)

    def end(self, progress: Progress, *, path: str, stop: Stop) -> None:
        """After the last step, when the result is at `path`: measure it, and each image while nobody wants the run to end."""
        if self._unadapted is None or self._loss.model.unet.layers.released:
            return
        if self._measured != progress.step:
            self._measure(progress, path=path)
        images = []
        for image in self._images.looked_at:
            pair = None if stop() else self._attempt(lambda image=image: self._of_image(image, progress), step=progress.step)
            if pair is None:
                break
            images.append((image.name, *pair))
        if images:
            self._report(ImageLosses(progress.step, *zip(*images, strict=True)))

    def _measure(self, progress: Progress, *, path: str) -> None:
        if self._unadapted is None:
            return
        progress.flush()  # so that what is told is told in order
        found = self._attempt(lambda: self._look(progress), step=progress.step)
        if found is None:
            progress.release()
            return
        self._measured = progress.step
        losses, strength = found
        self._tell(progress.step, losses, strength, path=path)
        self._history.append(statistics.fmean(losses[0]))
        if self._plan.settings.evaluation.early_stopping and stands_still(self._history):
            self.stopped = f"its loss on fixed noise has stood still ({counted(len(self._history), 'measurement')})"

    def _look(self, progress: Progress) -> tuple[_Losses, Mapping[str, float]]:
        """Losses and strength of the weights that would be saved."""
        with progress.weights():
            return self._bands(adapted=True), self._loss.strength()

    def _of_image(self, image: FixedImage, progress: Progress) -> list[float]:
        """Its mean loss with the weights that would be saved, and without the LoRA."""
        with progress.weights():
            return [statistics.fmean(self._loss.of([image], adapted=adapted)[0]) for adapted in (True, False)]

    def _bands(self, *, adapted: bool) -> _Losses:
        """The mean losses in each band, of training images and of held-out ones."""
        training, held_out = (
            tuple(statistics.fmean(band) for band in zip(*self._loss.of(images, adapted=adapted), strict=True))
            for images in (self._images.training, self._images.held_out))
        return training, held_out

    def _tell(self, step: int, losses: _Losses, strength: Mapping[str, float], *,
              path: str = "") -> None:
        assert self._unadapted is not None
        self._report(Measured(step, self._plan.epoch_of(step), losses[0], self._unadapted[0], losses[1], self._unadapted[1],
                              dict(strength), path))

    def _attempt(self, look: Callable[[], T], *, step: int) -> T | None:
        """What `look` returns; None where it fails, which is told once."""
        return attempt(look, tell=lambda why: self._warn(f"The LoRA could not be measured at step {step}: {why}."))

    def _warn(self, text: str) -> None:
        if not self._told:
            self._told = True
            self._report(Warned(f"{text} The training goes on."))


def attempt(look: Callable[[], T], *, tell: Callable[[str], None]) -> T | None:
    """What `look` returns, for what only looks at a training; None where it fails: `tell` then hears why."""
    try:
        return look()
    except Exception as error:  # whatever it is: it must not cost the hours that a training took
        full = is_out_of_memory(error)
        if not full:
            log.exception("Looking at the training failed; the training goes on")
        why = "the memory does not suffice" if full else str(error).rstrip(".") or type(error).__name__
    tell(why)
    return None


def stands_still(losses: Sequence[float]) -> bool:
    """Whether a loss on fixed noise no longer changes (DVAR, Voronov et al. 2023, arXiv 2302.04841): its variance over a
    window, here the last half, is a small share of that over all measurements."""
    if len(losses) < _DVAR_LEAST or not all(map(math.isfinite, losses)):
        return False
    return statistics.pvariance(losses[len(losses) // 2:]) <= _DVAR_SHARE * statistics.pvariance(losses)
