"""Says in words how a run goes: listens to its events, and adds a `Diagnosed` where there is something new to say."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import torch

from lib_lora_train.adapters.network import AdapterNetwork
from lib_lora_train.dataset.captions import with_trigger_word
from lib_lora_train.distributed import ProcessGroup
from lib_lora_train.evaluation.diagnosis import Gains, RunSummary, diagnose
from lib_lora_train.evaluation.schedule import spread
from lib_lora_train.evaluation.words_check import MOST_PASSES, Question, WordsCheck, check_words, different, questions, texts_of
from lib_lora_train.events import Diagnosed, Event, Measured, Report, Saved, Step, Verdict, Warned
from lib_lora_train.inputs.batches import Batches
from lib_lora_train.model.frozen import FrozenModel
from lib_lora_train.run.inputs import Text
from lib_lora_train.run.measuring import attempt
from lib_lora_train.run.optimizing import schedule_config, traits_of
from lib_lora_train.run.planning import RunPlan
from lib_lora_train.run.record import read_events
from lib_lora_train.training.schedules import learning_rate_factor

_COMPARED, _ASKED = 64, 6  # images that are compared with each other, and that the words are asked about
_MOST_SHARE = 0.25  # of the UNet's passes in training, which are three a step: a shorter run's words are not asked about

T = TypeVar("T")


class Diagnosing:
    """A `Report` that passes every event on. It says nothing in processes above rank 0, or where nothing is measured."""

    def __init__(self, plan: RunPlan, batches: Batches, model: FrozenModel, *, group: ProcessGroup, folder: Path | None,
                 report: Report) -> None:
        """To be made while the VAE is on the device. In `folder` is what an interrupted run said."""
        self._plan, self._model, self._report, self._words = plan, model, report, WordsCheck()
        self._curve, self._saves, self._skipped, self._said = list[Gains](), list[Saved](), 0, None
        self._spent = tuple(itertools.accumulate(_rates(plan)))
        self._active = not group.rank and plan.settings.evaluation.validation
        self._questions: tuple[Question, ...] = ()
        settings = plan.settings  # vectors of its own replace what the trigger word means already
        self._trigger_word = "" if settings.network.train_trigger_embedding else settings.dataset.trigger_word
        self._summary: RunSummary | None = None
        if self._active:
            self._summary = self._attempt(lambda: self._look(batches)) or _summary(plan, compared=0, alike=0)
        for event in read_events(folder) if self._active and plan.resume_point and folder else ():
            if getattr(event, "step", 0) <= plan.resume_point.step:
                self._see(event)

    @property
    def texts(self) -> tuple[str, ...]:
        """All that the text encoders are asked for."""
        return texts_of(self._questions, trigger_word=self._trigger_word)

    def __call__(self, event: Event) -> None:
        """Pass it on, and say what is new after a measurement."""
        self._report(event)
        if self._active:
            self._see(event)
            if isinstance(event, Measured) and self._curve:
                self._say(ended=False)

    def ask(self, network: AdapterNetwork, text: Text, *, dtype: torch.dtype) -> None:
        """Ask the model without the LoRA about the words, before the first step."""
        def look() -> WordsCheck:
            network.set_multiplier(0.0)
            try:
                return check_words(self._model, self._questions, text.evaluated, dtype=dtype,
                                   trigger_word=self._trigger_word)
            finally:
                network.set_multiplier(1.0)
        if self._questions:
            self._words = self._attempt(look) or self._words

    def end(self, verdict: tuple[Verdict, str]) -> str:
        """What is said of the result, "" for nothing; reported where it is new. `verdict`: see `verdict_of`."""
        if self._active and self._curve:
            self._say(verdict=verdict, ended=True)
        return self._said.message if self._said else ""

    def _see(self, event: Event) -> None:
        if isinstance(event, Measured):
            gains = self._attempt(lambda: Gains.of(event, spent=self._spent[min(event.step, len(self._spent) - 1)]))
            self._curve += filter(None, [gains])
        elif isinstance(event, Saved):
            self._saves.append(event)
        elif isinstance(event, Step):
            self._skipped = event.skipped_steps
        elif isinstance(event, Diagnosed):
            self._said = event

    def _say(self, *, verdict: tuple[Verdict, str] = ("", ""), ended: bool) -> None:
        step = self._curve[-1].measured.step
        found = self._attempt(lambda: diagnose(
            self._curve, run=self._summary, words=self._words, saves=self._saves, skipped=self._skipped / max(1, step),
            verdict=verdict, ended=ended))
        if found and (self._said is None or (found.finding, found.message) != (self._said.finding, self._said.message)):
            self._said = found
            self._report(found)

    def _look(self, batches: Batches) -> RunSummary:
        trained = list({example.path: index for index, example in enumerate(self._plan.dataset.examples)
                        if not example.is_regularisation}.values())  # each once, also of those trained at several sizes
        seed = self._plan.settings.optimizer.seed
        optimizer = self._plan.settings.optimizer
        visits = self._plan.schedule.steps * optimizer.train_batch_size * optimizer.gradient_accumulation_steps
        if MOST_PASSES <= _MOST_SHARE * 3 * visits:
            images = [batches.fixed(index) for index in spread(trained, _ASKED, seed=seed)]
            self._questions = questions(images, steps=len(self._model.schedule))
        compared = () if self._plan.settings.encodes_in_steps else spread(trained, _COMPARED, seed=seed)
        alike = len(compared) - different([batches.fixed(index)["mean"][0] for index in compared])
        return _summary(self._plan, compared=len(compared), alike=alike)

    def _attempt(self, look: Callable[[], T]) -> T | None:
        return attempt(look, tell=lambda why: self._report(Warned(f"The verdict on this run is not complete: {why}.")))


def _rates(plan: RunPlan) -> Sequence[float]:
    """0, and the share of all of the run's learning rates that each step has."""
    steps = plan.schedule.steps
    schedule = schedule_config(plan.settings, steps=steps)
    factors = [learning_rate_factor(schedule, step) for step in range(steps)]
    whole = sum(factors) or 1.0
    return 0.0, *(factor / whole for factor in factors)


def _summary(plan: RunPlan, *, compared: int, alike: int) -> RunSummary:
    """`alike` of the images that were compared are near-duplicates of others among them."""
    settings = plan.settings
    trained = {example.path: example for example in plan.dataset.examples if not example.is_regularisation}.values()
    unet_lr, text_encoder_lr = settings.rates
    optimizer, network = traits_of(settings), settings.network
    return RunSummary(
        length="max_train_steps" if settings.optimizer.max_train_steps else "max_train_epochs",
        unet_rate="unet_lr" if settings.optimizer.unet_lr else "learning_rate", unet_lr=unet_lr,
        text_encoder_lr=text_encoder_lr, rank=network.network_dim,
        alpha=network.network_dim if network.network_module == "OFT" else network.network_alpha,  # there it is no strength
        trigger_word=settings.dataset.trigger_word, images=len(trained),
        different=len(trained) if not alike else round((1 - alike / compared) * len(trained)),
        captioned=sum(example.caption.strip() not in ("", with_trigger_word("", example.trigger_word)) for example in trained),
        held_out=bool(plan.held_out) and not plan.held_out_derived, finds_rate=optimizer.adapts_rate or optimizer.own_rate)
