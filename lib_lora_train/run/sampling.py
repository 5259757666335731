"""The samples of a run: the same prompts and seeds again and again, with the LoRA as it is between two steps.

Nothing of it reaches the training: no random number is drawn from torch's own generator, the weights are only read, and
whatever goes wrong is told once and costs a sample.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from PIL import Image

from lib_lora_train.adapters.network import AdapterNetwork
from lib_lora_train.adapters.stack import Stack, WeightedLora, find_lora, load_stack, stacked
from lib_lora_train.dataset.buckets import Size
from lib_lora_train.errors import Interrupted, LoraTrainError, TrainingError, is_out_of_memory, plain_line, translated
from lib_lora_train.evaluation.infotext import png_of
from lib_lora_train.evaluation.prompts import SamplePrompt, fitted
from lib_lora_train.events import Report, Sampled, Stage, Warned
from lib_lora_train.host.port import LeasedModel
from lib_lora_train.memory.step_config import StepConfig
from lib_lora_train.model.architecture import UNET_COMPONENT
from lib_lora_train.model.frozen import FrozenModel
from lib_lora_train.model.sampler import SampleRequest, encode_prompts, sample_batch, to_image
from lib_lora_train.model.sd.text import Conditioning
from lib_lora_train.run.callbacks import Pause, Stop
from lib_lora_train.run.memory import reachable_decoder
from lib_lora_train.run.planning import RunPlan
from lib_lora_train.settings import named
from lib_lora_train.storage.atomic import write_atomic
from lib_lora_train.training.loop import Progress

log = logging.getLogger(__name__)
FOLDER = "samples"
_SHARE, _MOST_SETS = 0.06, 12
"""Of the training's UNet passes that samples may take where nobody says how often, and how many sets there are at most."""
_PASSES = 3  # of the UNet that a training image takes: forward, and a backward of twice as much


@dataclasses.dataclass(frozen=True, eq=False)
class _Sample:
    """A prompt that can be sampled. Its conditions, of the model without and with the LoRA in training, are None where they are
    computed each time, by text encoders that are trained."""

    index: int
    prompt: SamplePrompt
    loras: tuple[WeightedLora, ...]
    unadapted: Conditioning | None = None
    adapted: Conditioning | None = None


class SampleCallback:
    """Samples before steps, where that is due or asked for. Without prompts, and where no folder is kept, it does nothing.

    `encode` is to be called once, while the text encoders are on the device, and `end` after the training.
    """

    def __init__(self, plan: RunPlan, leased: LeasedModel, model: FrozenModel, network: AdapterNetwork, *,
                 prompts: tuple[SamplePrompt, ...], config: StepConfig, dtype: torch.dtype, lora_folder: Path,
                 folder: Path | None, wanted: Callable[[], bool], report: Report, stop: Stop, pause: Pause) -> None:
        """`prompts` are the plan's in the process that samples, none in all others. `folder` is the run's,
        `lora_folder` that of the LoRAs in prompts. `wanted()` says, once, that somebody wants samples now; it is asked from the
        thread that trains."""
        self._plan, self._leased, self._model, self._network, self._dtype = plan, leased, model, network, dtype
        self._prompts, self._lora_folder, self._folder, self._wanted = prompts, lora_folder, folder, wanted
        self._report, self._stop, self._pause = report, stop, pause
        self._clip_skip = plan.settings.captions.clip_skip or leased.clip_skip
        self._one_by_one = config.offload  # a step of that kind takes less than two images at once do here
        self._every, self._last = interval(plan), plan.resume_point.step if plan.resume_point else -1
        self._told: set[str] = set()
        self._samples: list[_Sample] = []

    @torch.no_grad()
    def encode(self) -> None:
        """Find the LoRAs of the prompts, and encode the prompts unless the text encoders are trained. A prompt for which that
        is not possible is told, and left out."""
        architecture = self._model.architecture
        prompts, notes = fitted(self._prompts, multiple=architecture.vae.factor * 2 ** architecture.unet.halvings)
        if prompts and self._folder is None:
            prompts, notes = (), ["Nothing is sampled while it trains: without a record the run has no folder for pictures."]
        for note in notes:
            self._report(Warned(note))
        for index, prompt in enumerate(prompts):
            try:
                with translated("encoding a sample prompt"):
                    self._samples.append(self._encoded(index, prompt))
            except Exception as error:  # noqa: BLE001 - whatever it is, the training is worth more than a picture
                self._report(Warned(f"The sample prompt {plain_line(prompt.text)[:60]!r} is left out: {_problem(error)[1]}"))

    def _encoded(self, index: int, prompt: SamplePrompt) -> _Sample:
        # The LoRA in training is always there: its own name in a prompt must not bring an older file of it as well.
        loras = tuple(find_lora(tag, self._lora_folder) for tag in prompt.loras if tag.name != self._plan.target.stem)
        sample, stack = _Sample(index, prompt, loras), load_stack(self._model, loras)
        if self._plan.settings.encodes_text_in_steps:
            return sample
        unadapted = self._condition(prompt.request, stack)
        frozen = {component: layers for component, layers in self._network.adapters().items() if component != UNET_COMPONENT}
        adapted = self._condition(prompt.request, stacked([frozen, stack])) if frozen else unadapted
        return dataclasses.replace(sample, unadapted=unadapted, adapted=adapted)

    def _condition(self, request: SampleRequest, adapters: Stack) -> Conditioning:
        found = encode_prompts(self._model, [request], clip_skip=self._clip_skip, adapters=adapters)
        return Conditioning(found.context.cpu(), None if found.pooled is None else found.pooled.cpu())

    def before_step(self, progress: Progress) -> bool:
        """See `Callback`."""
        first, step = self._plan.settings.evaluation.sample_at_first, progress.step
        due = first if step == 0 else step % self._every == 0
        return self._sample(progress) if self._wanted() or due else True

    def after_step(self, progress: Progress) -> None:
        """Nothing: what is due after a step is saved before it is sampled."""

    def end(self, progress: Progress) -> None:
        """Sample what the training has come to, unless it was stopped or others have the model."""
        if progress.step and not self._model.unet.layers.released and not self._stop():
            self._sample(progress)

    def _sample(self, progress: Progress) -> bool:
        """All samples of this moment, unless they are there already; whether the training may go on."""
        if progress.step == self._last or not self._samples:
            return True
        self._last = progress.step
        progress.flush()  # so that what is told is told in order
        progress.release()
        for done, sample in enumerate(self._samples):
            if self._stop() or done and not self._pause(progress):
                return False
            self._report(Stage("Sampling pictures", done, len(self._samples)))
            file = self._kept(sample, progress)
            if file:
                self._report(Sampled(progress.step, self._plan.epoch_of(progress.step), sample.index, sample.prompt.text,
                                     sample.prompt.request.seed, file))
        self._report(Stage("Sampling pictures", len(self._samples), len(self._samples)))
        return not self._stop()

    def _kept(self, sample: _Sample, progress: Progress) -> str:
        """Make one and write it; its file's name in the run's folder, or "" where that was not possible, which is told, or
        where the run is to stop."""
        file, problem = f"{FOLDER}/step-{progress.step:08d}-{sample.index + 1}.png", ("", "")
        with reachable_decoder(self._plan.settings, self._model, self._leased, self._network) as bring_decoder:
            try:
                image = self._image(sample, progress, bring_decoder)
                (self._folder / FOLDER).mkdir(exist_ok=True)  # of a run's folder that was removed nothing comes back
                write_atomic(self._folder / file, png_of(image, self._described(sample, progress.step),
                                                         checkpoint=self._leased.checkpoint.name))
            except Interrupted:
                file = ""
            except Exception as error:  # noqa: BLE001 - whatever it is, the training is worth more than a picture
                file, problem = "", _problem(error)
        # Outside of the except clause, whose error holds what filled the memory.
        if not file:
            progress.release()
        if problem[0] and problem[0] not in self._told:
            self._told.add(problem[0])
            self._report(Warned(f"A sample after step {progress.step} is left out: {problem[1]}"))
        return file

    def _image(self, sample: _Sample, progress: Progress, bring_decoder: Callable[[Size], None]) -> Image.Image:
        request, adapted = sample.prompt.request, bool(progress.step)
        with progress.weights(), self._at_weight(float(adapted)):
            latents = sample_batch(
                self._model, [request], clip_skip=self._clip_skip, dtype=self._dtype, one_by_one=self._one_by_one,
                adapters=stacked([self._network.adapters(), load_stack(self._model, sample.loras)]),
                conditioning=sample.adapted if adapted else sample.unadapted, on_step=self._check_stop)
        if not bool(latents.isfinite().all()):
            raise TrainingError("its numbers are not finite", why="the model's activations overflow",
                                remedy=f"take no as {named('mixed_precision')}, or bf16")
        bring_decoder((request.width, request.height))
        return to_image(self._model, latents)

    @contextlib.contextmanager
    def _at_weight(self, multiplier: float) -> Iterator[None]:
        self._network.set_multiplier(multiplier)
        try:
            yield
        finally:
            self._network.set_multiplier(1.0)

    def _check_stop(self, step: int, steps: int) -> None:
        if self._stop():
            raise Interrupted("The run is stopped")

    def _described(self, sample: _Sample, step: int) -> SampleRequest:
        """What the WebUI would be asked for this image: the LoRA in training is one in the prompt there."""
        own = f" <lora:{self._plan.target.stem}:1>" if step else ""
        return dataclasses.replace(sample.prompt.request, prompt=sample.prompt.text + own)


def interval(plan: RunPlan) -> int:
    """Steps from one set of samples to the next: as chosen, or so many that all of them take a small share of the run."""
    chosen, optimizer, schedule, save = plan.settings.evaluation, plan.settings.optimizer, plan.schedule, plan.settings.save
    width, height = plan.resolution
    if chosen.sample_every_n_epochs or chosen.sample_every_n_steps or not plan.prompts:
        return chosen.sample_every_n_epochs * schedule.steps_per_epoch or chosen.sample_every_n_steps or schedule.steps
    images = schedule.steps * optimizer.train_batch_size * plan.processes * optimizer.gradient_accumulation_steps
    passes = sum(request.steps * (1 + (request.cfg_scale != 1)) * request.width * request.height / (width * height)
                 for request in (prompt.request for prompt in plan.prompts))
    sets = min(_MOST_SETS, int(_SHARE * _PASSES * images / passes)) - chosen.sample_at_first
    every = math.ceil(schedule.steps / max(1, sets))
    saves = save.save_every_n_epochs * schedule.steps_per_epoch or save.save_every_n_steps or 1
    return -(-every // saves) * saves if saves <= every else every  # so that the samples are those of saves


def _problem(error: Exception) -> tuple[str, str]:
    """(kind, what to tell of it), each kind once."""
    if is_out_of_memory(error) or is_out_of_memory(error.__cause__):
        return "memory", "the memory does not suffice. The training goes on; smaller pictures (--w, --h) need less."
    if isinstance(error, OSError):
        return "disk", f"it cannot be written ({error.strerror or error}). The training goes on."
    if isinstance(error, LoraTrainError):
        return error.what, f"{error} The training goes on."
    log.error("A sample failed", exc_info=error)
    return type(error).__name__, f"{type(error).__name__}: {error}. The training goes on; the log has the details."
