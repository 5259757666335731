"""The whole road from settings to a LoRA file, on one page.

`run_job` knows neither page nor WebUI: the host lends a model and says where the result goes, everything that happens
is reported as events, and whoever watches may ask it to stop.
"""

from __future__ import annotations

import contextlib
import dataclasses
import secrets
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from lib_lora_train.adapters import file
from lib_lora_train.adapters.network import LoRANetwork
from lib_lora_train.adapters.targets import find_targets
from lib_lora_train.distributed import SINGLE_PROCESS, ProcessGroup
from lib_lora_train.errors import Interrupted, SettingError, translated
from lib_lora_train.evaluation.lease import frozen_model
from lib_lora_train.events import Finished, Planned, Report, Warned
from lib_lora_train.host.port import Borrowed, Host
from lib_lora_train.inputs.batches import Batches
from lib_lora_train.inputs.overflow import DiskOverflow
from lib_lora_train.inputs.prefetcher import Prefetcher
from lib_lora_train.memory.dry_run import Base, Way
from lib_lora_train.memory.plan import MemoryPlan
from lib_lora_train.model.components import vae_tensors
from lib_lora_train.model.frozen import FrozenModel
from lib_lora_train.run import resume
from lib_lora_train.run.consistency import agree_on_data, agree_on_settings, require_equal
from lib_lora_train.run.inputs import Text, batches_of, latents_of, stage
from lib_lora_train.run.memory import memory_plan, room_for_encoding, settle
from lib_lora_train.run.output import checked_name, destination
from lib_lora_train.run.planning import Preparation, prepare
from lib_lora_train.run.provenance import Provenance
from lib_lora_train.run.saver import Checkpointer, Onlooker, Saver
from lib_lora_train.settings import Settings
from lib_lora_train.settings.allowed_paths import AllowedPaths, check_allowed
from lib_lora_train.training.checkpoint import TrainingState
from lib_lora_train.training.loop import LoopOptions, Pause, Stop, train
from lib_lora_train.training.precision import compute_dtype
from lib_lora_train.training.step import StepOptions


def run_job(settings: Settings, host: Host, *, report: Report, stop: Stop, folder: Path | None = None,
            group: ProcessGroup = SINGLE_PROCESS) -> Finished:
    """Train the LoRA that `settings` describe on the model that `host` holds.

    `stop` is asked between steps and pictures: "" to go on, "stop" to end, "save" to end and keep what was learnt.
    `folder` is the run's, where the state to resume from is kept; None keeps none.
    All processes of `group` call this, on the same files; process 0 alone saves, and the others' path is "".
    The last event, `Finished`, is returned and left to the caller to report, who knows how failures end too.
    Raises UserError, HostError, TrainingError, and Interrupted where a stop came before the first step.
    """
    check_allowed(settings, host.allowed)
    agree_on_settings(group, settings)
    point = resume.find(settings.save.resume, host.runs_folder) if settings.save.resume else None
    settings = _with_seed(settings, point, group)
    target = result_path(settings, host, point) if group.rank == 0 else Path(settings.save.output_name)
    weights = _weights(settings, point)
    checkpoint = host.checkpoint()
    preparation = _prepared(settings, checkpoint.family if checkpoint else "", host.allowed, group, report=report, stop=stop)

    with host.borrow() as borrowed:
        return _on_loan(settings, host, borrowed, preparation, weights, point, family=checkpoint.family if checkpoint else "",
                        target=target, report=report, stop=stop, folder=folder, group=group)


def _on_loan(settings: Settings, host: Host, borrowed: Borrowed, preparation: Preparation, weights: _Weights,
             point: resume.ResumePoint | None, *, family: str, target: Path, report: Report, stop: Stop, folder: Path | None,
             group: ProcessGroup) -> Finished:
    """The part of the road that needs the model. Whatever it makes dies with its frame, so that the model finds the device's
    memory free when it goes back."""
    with contextlib.ExitStack() as leaving:
        model = frozen_model(borrowed, settings)
        if model.architecture.family != family:
            # The host had no model yet, or another one, when the folder was read.
            preparation = _prepared(settings, model.architecture.family, host.allowed, group, report=report, stop=stop)
        known = resume.describe_checkpoint(borrowed) if point or folder or group.world_size > 1 else {}
        if point:
            resume.compare_checkpoint(known, point)
        pause = _pause(settings, host, model, report=report, stop=stop)
        dtype = compute_dtype(settings.memory.mixed_precision, model.device, weights=model.dtype)
        _check_sizes(preparation, model)
        agree_on_data(group, preparation, known, step=weights.state.step if weights.state else 0, weights=weights.tensors or {},
                      dtype=dtype)
        changed = [] if point is None else resume.compare_settings(
            settings, point, steps=preparation.plan.steps, processes=group.world_size)
        for warning in (*preparation.warnings, *_ignored_by(model, settings), *changed):
            report(Warned(warning))
        with translated("making the LoRA's layers"):
            network = _network(settings, model, weights.tensors, name=weights.name, report=report)
        source = leaving.enter_context(contextlib.closing(latents_of(
            settings, preparation, model, vae_tensors(borrowed.tensors), group, folder, report=report, stop=stop, pause=pause,
            room=room_for_encoding(settings, model, host, network))))
        preparation = preparation.without_damaged(settings, dataset=source.dataset, placements=source.placements)
        for warning in preparation.warnings:
            report(Warned(warning))
        batches = batches_of(settings, source, group)
        memory = memory_plan(settings, preparation, model, borrowed, network, dtype=dtype,
                             remembered=resume.quantized_base(point, settings) if point else "",
                             should_stop=lambda: group.world_size == 1 and bool(stop()))
        # Cards of different sizes may choose differently how, but not what is computed.
        require_equal(group, {"the model's number format in memory (base_weights)": memory.way.base},
                      remedy="set base_weights, or the same memory_budget, in all of them")
        report(_planned(settings, preparation, borrowed, memory, done=point.step if point else 0))
        if memory.warning:
            report(Warned(memory.warning))

        overflow = leaving.enter_context(contextlib.closing(DiskOverflow(folder)))
        text = settle(settings, model, host, borrowed, network, batches, overflow, memory.way, dtype=dtype, report=report,
                      stop=stop, pause=pause)
        provenance = Provenance(settings, preparation, model, borrowed, network,
                                started_at=point.started_at if point else time.time())
        checkpointer = _checkpointer(settings, preparation, known, provenance.started_at, point, folder, dtype=dtype,
                         base=memory.way.base, report=report)
        saver = Onlooker(report) if group.rank else Saver(target, settings.save, network, provenance, checkpointer, report=report,
                                                          spare=folder)
        with saver.rescue():
            steps = _train(settings, preparation, model, network, batches, text, memory.way, dtype=dtype, saver=saver,
                           stop=stop, pause=pause, resumed=weights.state, group=group)
        finished = _finished(preparation, saver, steps, name=target.stem, stop=stop, group=group)
        # While the model is still ours: a host that had merged an older file of this name must forget it.
        host.refresh_loras()
        return finished


def _finished(preparation: Preparation, saver: Saver | Onlooker, steps: int, *, name: str, stop: Stop,
              group: ProcessGroup) -> Finished:
    """The end of a run after `steps` steps, its result saved if it is complete, or was stopped to be saved. Raises Interrupted
    where nothing was ever saved."""
    complete, stopped = steps == preparation.plan.steps, f"Stopped after {steps} of {preparation.plan.steps} steps"
    if complete or (steps and group.any(stop() == "save")):
        with saver.rescue():
            path = saver.save_result(step=steps, epoch=preparation.epoch_of(steps), complete=complete)
        if complete:
            return Finished("done", f"{name} is ready: {path}", path, steps)
        return Finished("stopped", f"{stopped}; saved {path}", path, steps)
    if group.any(bool(saver.saved)):
        return Finished("stopped", f"{stopped}.", saver.saved[-1] if saver.saved else "", steps)
    raise Interrupted(f"{stopped}; nothing was saved")


def output_folder(settings: Settings, host: Host) -> Path:
    """Where the result goes: the folder the user named, else the host's."""
    return Path(settings.save.output_dir) if settings.save.output_dir else host.lora_folder


def result_path(settings: Settings, host: Host, point: resume.ResumePoint | None) -> Path:
    """Where the result goes, the folder made and the name known to be free; raises OutputError.

    A run that goes on may replace what it has saved itself.
    """
    folder, name = output_folder(settings, host), checked_name(settings.save.output_name)
    own = point is not None and point.wrote(folder / f"{name}.safetensors")
    return destination(folder, name=name, overwrite=settings.save.overwrite or own)


def _with_seed(settings: Settings, point: resume.ResumePoint | None, group: ProcessGroup) -> Settings:
    """A seed is drawn where none was given, and only once in a run, for all of its processes."""
    if settings.optimizer.seed >= 0:
        return settings
    seed = int(point.metadata["settings"].get("seed", -1)) if point else -1
    seed = group.all_gather(seed if seed >= 0 else secrets.randbelow(2**32))[0]
    return dataclasses.replace(settings, optimizer=dataclasses.replace(settings.optimizer, seed=seed))


@dataclasses.dataclass(frozen=True)
class _Weights:
    """The LoRA's weights before the first step: those of a state, of a file to continue from, or (None) new ones."""

    tensors: Mapping[str, torch.Tensor] | None = None
    name: str = ""
    state: TrainingState | None = None


def _weights(settings: Settings, point: resume.ResumePoint | None) -> _Weights:
    if point is not None:
        state = point.load()
        return _Weights(state.lora, point.path.name, state)
    if settings.network.network_weights:
        continued = file.load(Path(settings.network.network_weights))
        return _Weights(continued.tensors, continued.path.name)
    return _Weights()


def _checkpointer(settings: Settings, preparation: Preparation, checkpoint: Mapping[str, str], started_at: float,
            point: resume.ResumePoint | None, folder: Path | None, *, dtype: torch.dtype, base: Base, report: Report) -> Checkpointer:
    """Keeps the run's state. What it says of the data is compared with what was said when the run began."""
    wanted = folder is not None and (settings.save.save_state or settings.save.save_state_on_train_end)
    facts: dict[str, Any] = {}
    if wanted or point:
        facts = resume.describe(settings, preparation, checkpoint, started_at=started_at, dtype=dtype, base=base)
    if point:
        for warning in resume.compare_data(facts, point):
            report(Warned(warning))
    return Checkpointer(folder, settings.save, facts, report)


def _prepared(settings: Settings, family: str, allowed: AllowedPaths | None, group: ProcessGroup, *, report: Report,
              stop: Stop) -> Preparation:
    return prepare(settings, family=family, allowed=allowed, processes=group.world_size,
                   on_progress=stage("Reading pictures", report), should_stop=lambda: bool(stop()))


def _pause(settings: Settings, host: Host, model: FrozenModel, *, report: Report, stop: Stop) -> Pause:
    """What is called between two pieces of work: those who wait for the model get it. Whether to go on afterwards."""
    def pause(release: Callable[[], None]) -> bool:
        if not settings.memory.yield_to_generations or not host.wanted():
            return True
        release()
        model.release()
        tensors = host.yield_model(report=report, stop=lambda: bool(stop()))
        if tensors is not None:
            model.take(tensors)
        return tensors is not None
    return pause


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
    if settings.memory.cpu_offload_checkpointing and model.device.type != "cuda":
        notes.append("cpu_offload_checkpointing has no effect: there is no card, and activations are in ordinary memory.")
    if settings.memory.base_weights != "as they are" and model.device.type != "cuda":
        notes.append("base_weights saves no memory without a card: its copies lie beside the model that is lent.")
    if model.architecture.zero_terminal_snr and model.schedule.prediction_type == "epsilon":
        notes.append("Zero terminal SNR suits models that predict v; one that predicts noise learns nothing from pure noise.")
    return notes


def _network(settings: Settings, model: FrozenModel, tensors: Mapping[str, torch.Tensor] | None, *, name: str,
             report: Report) -> LoRANetwork:
    """A new network, or the one that `tensors` of the file `name` hold; parts that are not to be trained are frozen."""
    chosen, seed, family = settings.network, settings.optimizer.seed, model.architecture.family
    train_text = not chosen.network_train_unet_only
    if tensors is None:
        targets = find_targets(model.components, family=family, text_encoder=train_text)
        network = LoRANetwork.build(targets, rank=chosen.network_dim, alpha=chosen.network_alpha, seed=seed)
    else:
        has_text = any(key.startswith("lora_te") for key in tensors)
        targets = find_targets(model.components, family=family, text_encoder=train_text or has_text)
        network = LoRANetwork.continued(targets, tensors, seed=seed)
        if network.fresh:
            report(Warned(f"{len(network.fresh)} layers are not in {name} and start anew."))
    if not train_text:
        network.freeze({component for component in model.components if component != "unet"})
    rates = settings.rates
    if not any(rates):
        raise SettingError("Nothing would be trained", why="all learning rates are 0", remedy="raise learning_rate")
    if not rates[0]:
        network.freeze({"unet"})
    return network.to(model.device)


def _planned(settings: Settings, preparation: Preparation, borrowed: Borrowed, memory: MemoryPlan, *, done: int) -> Planned:
    plan, (width, height) = preparation.plan, preparation.resolution
    return Planned(
        pictures=preparation.dataset.images, buckets=len(plan.buckets), batches_per_epoch=plan.batches_per_epoch,
        epochs=plan.epochs, steps=plan.steps, summary=preparation.summary, resolution=f"{width}×{height}",
        checkpoint=borrowed.checkpoint.name, seed=settings.optimizer.seed, resumed_at=done, memory=memory.text)


def _train(settings: Settings, preparation: Preparation, model: FrozenModel, network: LoRANetwork, batches: Batches,
           text: Text, way: Way, *, dtype: torch.dtype, saver: Saver | Onlooker, stop: Stop, pause: Pause,
           resumed: TrainingState | None, group: ProcessGroup) -> int:
    optimizer, loss, memory = settings.optimizer, settings.loss, settings.memory
    unet_lr, text_encoder_lr = settings.rates
    options = LoopOptions(
        steps=preparation.plan.steps, epochs=preparation.plan.epochs, steps_per_epoch=preparation.plan.steps_per_epoch,
        accumulation=optimizer.gradient_accumulation_steps, schedule=optimizer.lr_scheduler,
        warmup=optimizer.lr_warmup_steps, cycles=optimizer.lr_scheduler_num_cycles, weight_decay=optimizer.weight_decay,
        max_grad_norm=optimizer.max_grad_norm, noise_offset=loss.noise_offset, unet_lr=unet_lr,
        text_encoder_lr=text_encoder_lr, seed=optimizer.seed, save_every_n_epochs=settings.save.save_every_n_epochs,
        save_every_n_steps=settings.save.save_every_n_steps,
        # A recording keeps its memory between two steps, where the VAE would need it.
        cuda_graphs=memory.cuda_graphs == "auto" and not settings.encodes_in_steps,
        compiled=memory.torch_compile, rows_at_once=way.batch,
        step=StepOptions(dtype=dtype, min_snr_gamma=loss.min_snr_gamma, recompute=way.recompute, offload=way.offload))
    soon = text.encode_upcoming if group.world_size == 1 else None
    with Prefetcher(batches, last_epoch=options.epochs, encode_upcoming=soon) as feeder:
        return train(model, network=network, epoch_batches=feeder.epoch, condition=text.condition, options=options,
                     save=saver.save_on_the_way, keep=saver.keep, report=saver.report, stop=stop, pause=pause, resumed=resumed,
                     group=group)
