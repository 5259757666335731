"""The whole road from settings to a LoRA file, on one page.

`run_job` knows neither page nor WebUI: the host lends a model and says where the result goes, everything that happens
is reported as events, and whoever watches may ask it to stop.
"""

from __future__ import annotations

import contextlib
import dataclasses
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from lib_lora_train.cache.batches import Batch, Batches
from lib_lora_train.cache.disk import LatentDisk, tensor_fingerprint
from lib_lora_train.cache.latents import CachedLatents, FreshLatents, LatentSource
from lib_lora_train.cache.text import TextCache
from lib_lora_train.errors import Interrupted, LoraTrainError, OutputError, SettingError, translated
from lib_lora_train.events import Event, Finished, Planned, Report, Saved, Stage, Step, Warned
from lib_lora_train.host.port import Borrowed, Host
from lib_lora_train.model import frozen
from lib_lora_train.model.frozen import FrozenModel
from lib_lora_train.model.text import Conditioning, Tokens
from lib_lora_train.network import file
from lib_lora_train.network.network import LoRANetwork
from lib_lora_train.network.targets import find_targets
from lib_lora_train.output import destination, epoch_path, step_path
from lib_lora_train.preparation import Preparation, prepare
from lib_lora_train.provenance import Provenance
from lib_lora_train.settings import Settings
from lib_lora_train.training.loop import Condition, LoopOptions, Stop, train
from lib_lora_train.training.precision import compute_dtype
from lib_lora_train.training.step import StepOptions


def run_job(settings: Settings, host: Host, *, report: Report, stop: Stop) -> Finished:
    """Train the LoRA that `settings` describe on the model that `host` holds.

    `stop` is asked between steps and pictures: "" to go on, "stop" to end, "save" to end and keep what was learnt.
    The last event, `Finished`, is returned and left to the caller to report, who knows how failures end too.
    Raises UserError, HostError, TrainingError, and Interrupted where a stop came before the first step.
    """
    settings = _with_seed(settings)
    target = destination(Path(settings.save.output_dir) if settings.save.output_dir else host.lora_folder,
                         name=settings.save.output_name, overwrite=settings.save.overwrite)
    continued = file.load(Path(settings.network.network_weights)) if settings.network.network_weights else None
    checkpoint = host.checkpoint()
    preparation = _prepared(settings, checkpoint.family if checkpoint else "", report=report, stop=stop)

    with host.borrow() as borrowed:
        model = _model(settings, borrowed)
        if checkpoint is None or model.architecture.family != checkpoint.family:
            # The host had no model yet, or another one, when the folder was read.
            preparation = _prepared(settings, model.architecture.family, report=report, stop=stop)
        dtype = compute_dtype(settings.memory.mixed_precision, model.device, weights=model.dtype)
        _check_sizes(preparation, model)
        for warning in (*preparation.warnings, *_ignored_by(model, settings)):
            report(Warned(warning))
        with translated("making the LoRA's layers"):
            network = _network(settings, model, continued, report=report)
        source = _latents(settings, preparation, model, report=report, stop=stop)
        preparation = preparation.without_damaged(settings, dataset=source.dataset, placements=source.placements)
        for warning in preparation.warnings:
            report(Warned(warning))
        report(_planned(settings, preparation, borrowed))

        batches = _batches(settings, source)
        condition = _condition(settings, model, borrowed, network, batches, dtype=dtype, report=report, stop=stop)
        provenance = Provenance(settings, preparation, model, borrowed, network)
        saver = _Saver(target, settings, network, provenance, report)
        with saver.rescue():
            steps = _train(settings, preparation, model, network, batches, condition, dtype=dtype, saver=saver, stop=stop)
        complete = steps == preparation.plan.steps
        if not complete and (steps == 0 or stop() != "save"):
            if not saver.saved:
                raise Interrupted(f"Stopped after {steps} of {preparation.plan.steps} steps; nothing was saved")
            return Finished("stopped", f"Stopped after {steps} of {preparation.plan.steps} steps.", saver.saved[-1], steps)
        with saver.rescue():
            path = saver.save(target, step=steps, epoch=preparation.epoch_of(steps), final=True)
        # While the model is still ours: a host that had merged an older file of this name must forget it.
        host.refresh_loras()
    if complete:
        return Finished("done", f"{target.stem} is ready: {path}", path, steps)
    return Finished("stopped", f"Stopped after {steps} of {preparation.plan.steps} steps; saved {path}", path, steps)


def _with_seed(settings: Settings) -> Settings:
    if settings.optimizer.seed >= 0:
        return settings
    return dataclasses.replace(settings, optimizer=dataclasses.replace(settings.optimizer, seed=secrets.randbelow(2**32)))


def _prepared(settings: Settings, family: str, *, report: Report, stop: Stop) -> Preparation:
    return prepare(settings, family=family, on_progress=_stage("Reading pictures", report), should_stop=lambda: bool(stop()))


def _stage(name: str, report: Report) -> Callable[[int, int], None]:
    return lambda done, total: report(Stage(name, done, total))


def _model(settings: Settings, borrowed: Borrowed) -> FrozenModel:
    """The borrowed model, with what the user says about it above what the host says."""
    said = {"auto": None, "on": True, "off": False}
    v_prediction, zero_terminal_snr = said[settings.loss.v_parameterization], said[settings.loss.zero_terminal_snr]
    hints = borrowed.hints
    if v_prediction is not None:
        hints = dataclasses.replace(hints, prediction_type="v_prediction" if v_prediction else "epsilon")
    if zero_terminal_snr is not None:
        hints = dataclasses.replace(hints, zero_terminal_snr=zero_terminal_snr)
    return frozen.build(borrowed.tensors, hints=hints, tokenizers=borrowed.tokenizers,
                        comma_padding_backtrack=borrowed.comma_padding_backtrack)


def _check_sizes(preparation: Preparation, model: FrozenModel) -> None:
    multiple = model.architecture.vae.factor * 2 ** model.architecture.unet.halvings
    for (width, height), _ in preparation.plan.buckets:
        if width % multiple or height % multiple:
            raise SettingError(f"Pictures of {width}×{height} pixels do not fit this model",
                               why=f"its sizes are multiples of {multiple}",
                               remedy=f"use a resolution and bucket_reso_steps that are multiples of {multiple}")


def _ignored_by(model: FrozenModel, settings: Settings) -> list[str]:
    """Settings that have no effect on this kind of model."""
    notes = []
    if settings.captions.clip_skip and not model.text.uses_clip_skip:
        notes.append("clip_skip has no effect: only SD1 models read captions from a layer of choice.")
    if model.architecture.zero_terminal_snr and model.schedule.prediction_type == "epsilon":
        notes.append("Zero terminal SNR suits models that predict v; one that predicts noise learns nothing from pure noise.")
    return notes


def _network(settings: Settings, model: FrozenModel, continued: file.LoraFile | None, *, report: Report) -> LoRANetwork:
    """A new network, or the one of the file to continue from; parts that are not to be trained are frozen."""
    chosen, seed, family = settings.network, settings.optimizer.seed, model.architecture.family
    train_text = not chosen.network_train_unet_only
    if continued is None:
        targets = find_targets(model.components, family=family, text_encoder=train_text)
        network = LoRANetwork.build(targets, rank=chosen.network_dim, alpha=chosen.network_alpha, seed=seed)
    else:
        has_text = any(key.startswith("lora_te") for key in continued.tensors)
        targets = find_targets(model.components, family=family, text_encoder=train_text or has_text)
        network = LoRANetwork.continued(targets, continued.tensors, seed=seed)
        if network.fresh:
            report(Warned(f"{len(network.fresh)} layers are not in {continued.path.name} and start anew."))
    if not train_text:
        network.freeze({component for component in model.components if component != "unet"})
    rates = _rates(settings)
    if not any(rates):
        raise SettingError("Nothing would be trained", why="all learning rates are 0", remedy="raise learning_rate")
    if not rates[0]:
        network.freeze({"unet"})
    return network.to(model.device)


def _rates(settings: Settings) -> tuple[float, float]:
    """(UNet's, text encoder's) learning rate; 0 is not trained."""
    optimizer = settings.optimizer
    text = 0.0 if settings.network.network_train_unet_only else optimizer.text_encoder_lr
    return optimizer.unet_lr or optimizer.learning_rate, text


def _latents(settings: Settings, preparation: Preparation, model: FrozenModel, *, report: Report,
             stop: Stop) -> LatentSource:
    """Encoded pictures: once and kept, or anew at each step where augmentations change the pixels."""
    chosen = settings.dataset
    shared = {"flip_aug": chosen.flip_aug, "vae_batch_size": settings.memory.vae_batch_size, "device": model.device,
              "on_progress": _stage("Encoding pictures", report), "should_stop": lambda: bool(stop())}
    with translated("encoding the pictures"):
        if chosen.color_aug or chosen.random_crop:
            return FreshLatents.build(model.vae, preparation.dataset, preparation.placements, color_aug=chosen.color_aug,
                                      random_crop=chosen.random_crop, **shared)
        disk = LatentDisk(vae_fingerprint=tensor_fingerprint(model.vae.tensors)) if chosen.cache_latents_to_disk else None
        return CachedLatents.build(model.vae, preparation.dataset, preparation.placements, disk=disk, **shared)


def _planned(settings: Settings, preparation: Preparation, borrowed: Borrowed) -> Planned:
    plan, (width, height) = preparation.plan, preparation.resolution
    return Planned(
        pictures=preparation.dataset.pictures, buckets=len(plan.buckets), batches_per_epoch=plan.batches_per_epoch,
        epochs=plan.epochs, steps=plan.steps, summary=preparation.summary, resolution=f"{width}×{height}",
        checkpoint=borrowed.checkpoint.name, seed=settings.optimizer.seed)


def _batches(settings: Settings, source: LatentSource) -> Batches:
    captions = settings.captions
    return Batches(
        source, train_batch_size=settings.optimizer.train_batch_size, seed=settings.optimizer.seed,
        prior_loss_weight=settings.dataset.prior_loss_weight, trigger_word=settings.dataset.trigger_word,
        shuffle_caption=captions.shuffle_caption, keep_tokens=captions.keep_tokens,
        caption_dropout_rate=captions.caption_dropout_rate, caption_tag_dropout_rate=captions.caption_tag_dropout_rate)


def _condition(settings: Settings, model: FrozenModel, borrowed: Borrowed, network: LoRANetwork, batches: Batches, *,
               dtype: torch.dtype, report: Report, stop: Stop) -> Condition:
    """How a batch's captions become the UNet's condition: looked up while the text encoders are frozen, else computed."""
    clip_skip = settings.captions.clip_skip or borrowed.clip_skip
    adapters = {component: layers for component, layers in network.adapters().items() if component != "unet"}
    if _rates(settings)[1]:
        def encode(batch: Batch) -> Conditioning:
            return model.text.encode(
                [model.text.tokenize(caption) for caption in batch.captions], clip_skip=clip_skip, adapters=adapters,
                checkpointing=settings.memory.gradient_checkpointing, dtype=dtype)
        return encode

    class Adapted:
        """The text encoders with the frozen layers of a LoRA that is continued."""

        tokenize = staticmethod(model.text.tokenize)

        @staticmethod
        def encode(batch: list[Tokens], *, clip_skip: int, dtype: torch.dtype) -> Conditioning:
            return model.text.encode(batch, clip_skip=clip_skip, dtype=dtype, adapters=adapters)

    cache = TextCache(Adapted, clip_skip=clip_skip)
    captions = batches.fixed_captions()
    if captions is not None:
        with translated("encoding the captions"):
            cache.fill(captions, on_progress=_stage("Encoding captions", report), should_stop=lambda: bool(stop()))
    return lambda batch: cache.get(batch.captions)


def _train(settings: Settings, preparation: Preparation, model: FrozenModel, network: LoRANetwork, batches: Batches,
           condition: Condition, *, dtype: torch.dtype, saver: _Saver, stop: Stop) -> int:
    optimizer, loss, memory = settings.optimizer, settings.loss, settings.memory
    unet_lr, text_encoder_lr = _rates(settings)
    options = LoopOptions(
        steps=preparation.plan.steps, epochs=preparation.plan.epochs, steps_per_epoch=preparation.plan.steps_per_epoch,
        accumulation=optimizer.gradient_accumulation_steps, schedule=optimizer.lr_scheduler,
        warmup=optimizer.lr_warmup_steps, cycles=optimizer.lr_scheduler_num_cycles, weight_decay=optimizer.weight_decay,
        max_grad_norm=optimizer.max_grad_norm, noise_offset=loss.noise_offset, unet_lr=unet_lr,
        text_encoder_lr=text_encoder_lr, seed=optimizer.seed, save_every_n_epochs=settings.save.save_every_n_epochs,
        save_every_n_steps=settings.save.save_every_n_steps,
        step=StepOptions(dtype=dtype, min_snr_gamma=loss.min_snr_gamma,
                         gradient_checkpointing=memory.gradient_checkpointing))
    return train(model, network=network, epoch_batches=batches.epoch, condition=condition, options=options,
                 save=saver.save_on_the_way, report=saver.report, stop=stop)


class _Saver:
    """Writes the LoRA files of a run and reports each; passes the loop's events on and remembers the last step."""

    def __init__(self, target: Path, settings: Settings, network: LoRANetwork, provenance: Provenance,
                 report: Report) -> None:
        self._target, self._settings, self._network = target, settings, network
        self._provenance, self._report = provenance, report
        self._last: Step | None = None
        self.saved: list[str] = []

    def report(self, event: Event) -> None:
        """The loop's `report`."""
        if isinstance(event, Step):
            self._last = event
        self._report(event)

    def save_on_the_way(self, step: int, epoch: int) -> None:
        """The loop's `save`: under the epoch's name where an epoch's save is due, else under the step's."""
        chosen = self._settings.save
        by_epoch = chosen.save_every_n_epochs and self._provenance.ends_epoch(step) and (
            epoch % chosen.save_every_n_epochs == 0)
        path = epoch_path(self._target, epoch) if by_epoch else step_path(self._target, step)
        try:
            self.save(path, step=step, epoch=epoch, final=False)
        except OutputError as error:
            # A full disk or a locked file may be free again when the result is due; the hours until then are not lost.
            self._report(Warned(f"{path.name} was not kept. {error}"))

    def save(self, path: Path, *, step: int, epoch: int, final: bool) -> str:
        """Write one file, whole or not at all."""
        with translated(f"saving {path.name}"):
            file.save(path, self._network.state_dict(), self._provenance.metadata(path.stem, step=step, epoch=epoch),
                      dtype=file.SAVE_PRECISIONS[self._settings.save.save_precision])
        self.saved.append(str(path))
        self._report(Saved(str(path), step, epoch, final))
        return str(path)

    @contextlib.contextmanager
    def rescue(self) -> Iterator[None]:
        """Whatever fails inside, what was learnt until then is kept under a step's name, which the error tells.

        Steps that overflowed were never applied, so the weights are good.
        """
        try:
            yield
        except LoraTrainError as error:
            kept = self._kept()
            if not kept:
                raise
            remedy = f"{error.remedy}; " if error.remedy else ""
            raise type(error)(
                error.what, why=error.why, remedy=f"{remedy}what was learnt until then is in {kept}") from error

    def _kept(self) -> str:
        if self._last is None:
            return ""
        try:
            return self.save(step_path(self._target, self._last.step), step=self._last.step, epoch=self._last.epoch,
                             final=False)
        except LoraTrainError:
            return ""  # the first failure says more than this one
