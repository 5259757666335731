"""A run from its plan to a LoRA file, on one page.

`run_job` knows neither page nor WebUI: the host leases a model and shows what happens, everything that happens is reported as
events, and whoever watches may ask it to stop.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from lib_lora_train.adapters.network import AdapterNetwork
from lib_lora_train.adapters.stack import WeightedLora, merge_into
from lib_lora_train.distributed import SINGLE_PROCESS, ProcessGroup
from lib_lora_train.errors import HostError, Interrupted, counted
from lib_lora_train.events import Finished, Planned, Report, Verdict, Warned, shielded
from lib_lora_train.host.lease import frozen_model
from lib_lora_train.host.port import Host, LeasedModel, never, same_title
from lib_lora_train.inputs.prefetcher import Prefetcher
from lib_lora_train.memory.device import matrix_rate, seconds_per_step
from lib_lora_train.memory.plan import MemoryPlan
from lib_lora_train.model.frozen import FrozenModel
from lib_lora_train.model.sd.components import vae_tensors
from lib_lora_train.run import resume
from lib_lora_train.run.callbacks import MeasuredMemory, Pause, Stop, StopCallback, TimeLimit
from lib_lora_train.run.consistency import agree_on_data, require_equal
from lib_lora_train.run.diagnosing import Diagnosing
from lib_lora_train.run.image_record import record_images
from lib_lora_train.run.inputs import batches_of, latents_of, preservation_of, stage
from lib_lora_train.run.measuring import MeasuredImages, Measuring
from lib_lora_train.run.memory import encoding_budget, memory_plan, place_model
from lib_lora_train.run.model_checks import check_loss, check_sizes, ignored_by
from lib_lora_train.run.network import InitialWeights, build_network
from lib_lora_train.run.on_top import loras_on_top
from lib_lora_train.run.optimizing import check_optimizer_device, embedding_steps, optimizer_config, schedule_config
from lib_lora_train.run.planning import RunPlan, plan_dataset
from lib_lora_train.run.provenance import Provenance
from lib_lora_train.run.sampling import SampleCallback
from lib_lora_train.run.saver import Checkpointer, NoSaver, Saver
from lib_lora_train.run.soundness import Probe, check_weights
from lib_lora_train.run.tracking import tracking
from lib_lora_train.settings import Settings, named
from lib_lora_train.training.loop import Progress, TrainConfig, train
from lib_lora_train.training.loss import LossConfig, loss_function
from lib_lora_train.training.noise import NoiseConfig
from lib_lora_train.training.precision import compute_dtype
from lib_lora_train.training.weight_norms import ScaleWeightNorms


def run_job(plan: RunPlan, host: Host, *, report: Report, stop: Stop, folder: Path | None = None,
            group: ProcessGroup = SINGLE_PROCESS, sample_now: Callable[[], bool] = never,
            save_now: Callable[[], bool] = never, paused: Callable[[], bool] = never) -> Finished:
    """Carry out a plan on the model that `host` holds.

    What `report` raises ends nothing (see `shielded`). `stop` is asked between steps and images: "" to go on, "stop" to end,
    "save" to end and keep what was learnt. `folder` is the run's, where samples and the state to resume from are kept; None
    keeps none. `sample_now` is asked between steps, and says once that somebody wants samples; `save_now` so of a save.
    While `paused` says so, the run stands still between two steps.
    All processes of a `group` call this, on the same files; rank 0 alone saves, and the others' path is "".
    The last event, `Finished`, is returned and left to the caller to report, who knows how failures end too.
    Raises UserError, HostError, TrainingError, and Interrupted where a stop came before the first step.
    """
    weights = InitialWeights.of(plan)
    with tracking(plan, folder=folder, report=shielded(report), first=not group.rank) as following, \
            host.lease(stop=lambda: bool(stop())) as leased:
        if plan.checkpoint and not same_title(plan.checkpoint, leased.checkpoint.title):
            raise HostError(f"The loaded model is not {plan.checkpoint}, for which the run was queued",
                            why="another one was chosen meanwhile", remedy="start the run anew")
        finished = _with_model(plan, host, leased, weights, report=following.report, stop=stop, folder=folder, group=group,
                               sample_now=sample_now, save_now=save_now, paused=paused)
        following.ending = finished.message
        return finished


def _with_model(plan: RunPlan, host: Host, leased: LeasedModel, weights: InitialWeights, *, report: Report, stop: Stop,
                folder: Path | None, group: ProcessGroup, sample_now: Callable[[], bool],
                save_now: Callable[[], bool], paused: Callable[[], bool]) -> Finished:
    """What needs the model. All that is made here is freed before the model goes back, so that it finds its memory free."""
    with contextlib.ExitStack() as at_end:
        model, on_top = _model_on_top(plan, host, leased)
        settings, limit = plan.settings, TimeLimit(plan.settings.optimizer.max_train_minutes)
        plan, identity, dtype = _checked(plan, host, leased, model, weights, report=report, stop=stop, group=group,
                                         identified=bool(plan.resume_point or folder or group.world_size > 1))
        network = build_network(settings, model, weights, report=report)
        pause = Pause(leased, model, network, enabled=settings.memory.yield_to_generations, report=report, paused=paused,
                      stop=stop)
        vae_budget = encoding_budget("vae", settings, model, leased, network)
        source = at_end.enter_context(contextlib.closing(latents_of(
            plan, model, vae_tensors(leased.tensors), group, folder, report=report, stop=stop, pause=pause, budget=vae_budget)))
        plan = plan.without_damaged(dataset=source.dataset, placements=source.placements)
        _warn(plan.warnings, report)
        record_images(folder, plan)
        batches = batches_of(plan, source, group, factor=model.architecture.vae.factor, report=report)
        measured = MeasuredImages.of(plan, batches, model, budget=vae_budget, group=group, report=report)
        report = diagnosing = Diagnosing(plan, batches, model, group=group, folder=folder, report=report)

        memory = memory_plan(plan, model, leased, network, dtype=dtype, on_top=on_top)
        _agree_on_dtype(group, memory)
        planned = _planned(plan, leased, memory, dtype=dtype)
        report(planned)
        _warn(filter(None, [memory.warning]), report)
        samples = SampleCallback(
            plan, leased, model, network, prompts=() if group.rank else plan.prompts, config=memory.config, dtype=dtype,
            lora_folder=host.lora_folder, folder=folder, wanted=sample_now, report=report, stop=stop, pause=pause)
        at_end.callback(model.unet.layers.end_swap)
        text = place_model(settings, model, leased, network, batches, memory.config, dtype=dtype, report=report,
                           stop=stop, pause=pause, encode_prompts=samples.encode,
                           extra_captions=(*measured.captions, *diagnosing.texts))

        config = _train_config(plan, model, memory, dtype=dtype)
        probe = Probe.of(batches, model=model, network=network, condition=text.condition, config=config.loss, seed=config.seed,
                         noise=config.noise, continued=weights.name)
        saver = _saver(plan, leased, model, network, identity=identity, folder=folder, dtype=dtype, memory=memory, group=group,
                       report=report, wanted=save_now)
        memory_meter = MeasuredMemory(
            model.device, lambda size: report(dataclasses.replace(planned, memory=memory.corrected(size).text)))
        measuring = Measuring(plan, measured, model=model, network=network, text=text, config=config, saver=saver,
                              report=report)
        diagnosing.ask(network, text, dtype=dtype)
        measuring.begin(continued=bool(weights.name))
        prefetcher = at_end.enter_context(Prefetcher(batches, last_epoch=plan.schedule.epochs))
        norms = ScaleWeightNorms(network, settings.network.scale_weight_norms)
        with saver.rescue():
            progress = train(model, network=network, epoch_batches=prefetcher.epoch, condition=text.condition, config=config,
                             report=report, resumed=weights.state, group=group,
                             callbacks=[StopCallback(stop), limit, pause, norms, samples, memory_meter, saver, measuring])
            verdict = probe.verdict(progress)
        norms.tell(report)
        finished = _finished(plan, saver, progress, verdict=verdict, stop=stop, group=group, measuring=measuring,
                             diagnosing=diagnosing, ended=measuring.stopped or limit.stopped)
        samples.end(progress)
        # While the model is still ours: a host that had merged an older file of this name must forget it.
        host.refresh_loras()
        return finished


def _model_on_top(plan: RunPlan, host: Host, leased: LeasedModel) -> tuple[FrozenModel, tuple[WeightedLora, ...]]:
    """The leased model with the LoRAs in it that are trained on top of, and those. Raises UserError where one does not fit."""
    model = frozen_model(leased, plan.settings)
    check_weights(model)
    on_top = loras_on_top(plan.settings, host, family=model.architecture.family.name)
    merge_into(model, on_top)
    return model, on_top


def _checked(plan: RunPlan, host: Host, leased: LeasedModel, model: FrozenModel, weights: InitialWeights, *, report: Report,
             stop: Stop, identified: bool, group: ProcessGroup) -> tuple[RunPlan, dict[str, str], torch.dtype]:
    """The plan for this model, what identifies its checkpoint if it is to be, and the dtype to compute in. Raises where
    model, settings, resume point and processes do not fit each other; what is only worth knowing is reported."""
    settings, point = plan.settings, plan.resume_point
    if model.architecture.family.name != plan.family:
        plan = _replanned(plan, host, family=model.architecture.family.name, report=report, stop=stop)
    identity = resume.describe_checkpoint(leased, model) if identified else {}
    if point:
        resume.compare_checkpoint(leased, identity, point)
    dtype = compute_dtype(settings.memory.mixed_precision, model.device, weights=model.dtype)
    check_optimizer_device(settings, model.device)
    check_sizes(plan, model)
    check_loss(settings, model)
    if group.world_size > 1:
        agree_on_data(group, dataset=resume.dataset_fingerprint(plan.dataset, plan.placements, plan.masks),
                      checkpoint=identity["weights"], step=point.step if point else 0, weights=weights.tensors or {},
                      dtype=dtype)
    changed = [] if point is None else resume.compare_settings(
        settings, point, steps=plan.schedule.steps, processes=group.world_size)
    _warn((*plan.warnings, *ignored_by(model, settings), *changed), report)
    return plan, identity, dtype


def _replanned(plan: RunPlan, host: Host, *, family: str, report: Report, stop: Stop) -> RunPlan:
    """The plan for another family: the host had no model yet, or another one, when the first was made."""
    other = plan_dataset(plan.settings, family=family, allowed=host.allowed, processes=plan.processes,
                         on_progress=stage("Reading pictures", report), should_stop=lambda: bool(stop()))
    return dataclasses.replace(other, target=plan.target, resume_point=plan.resume_point)


def _finished(plan: RunPlan, saver: Saver | NoSaver, progress: Progress, *, verdict: tuple[Verdict, str], stop: Stop,
              group: ProcessGroup, measuring: Measuring, diagnosing: Diagnosing, ended: str) -> Finished:
    """The end of a run, its result saved if it is complete, or was stopped to be saved, and measured. `verdict`: see
    `verdict_of`. `ended` says why it ended by itself, "" where it did not. Raises Interrupted where nothing was ever saved."""
    name, steps, total = plan.target.stem, progress.step, plan.schedule.steps
    complete, stopped = steps == total, f"Stopped after {steps} of {counted(total, 'step')}"
    if ended:
        stopped = f"Stopped after {steps} of {counted(total, 'step')}, because {ended}"
    if complete or (steps and group.any(bool(ended) or stop() == "save")):
        with saver.rescue():
            path = saver.save_result(progress, complete=complete)
        measuring.end(progress, path=path, stop=stop)
        name, (worth, why) = Path(path).stem or name, verdict
        told = f"{name} is ready: {path}" if worth == "healthy" else f"{name} is saved, and was not looked at: {path}"
        if diagnosed := diagnosing.end(verdict):
            saved = f"{name} is saved: {path}." if worth else f"{name} is saved, and was not looked at: {path}."
            told = " ".join([saved, diagnosed])
        elif worth == "ruined":
            told = f"{name} is saved, but ruined: {why}. Lower the learning rate and train it anew. The file: {path}"
        return Finished("done" if complete else "stopped", told if complete else "; ".join([stopped, told]), path, steps, worth)
    if group.any(bool(saver.saved)):
        return Finished("stopped", f"{stopped}.", saver.saved[-1] if saver.saved else "", steps)
    raise Interrupted(f"{stopped}; nothing was saved")


def _agree_on_dtype(group: ProcessGroup, memory: MemoryPlan) -> None:
    """GPUs of different sizes may choose differently how to compute, but not what. Raises SettingError."""
    require_equal(group, {f"the model's number format in memory, {named('base_weights')},": memory.config.base_dtype},
                  remedy=f"set it, or the same {named('memory_budget')}, in all of them")


def _saver(plan: RunPlan, leased: LeasedModel, model: FrozenModel, network: AdapterNetwork, *, identity: Mapping[str, str],
           folder: Path | None, dtype: torch.dtype, memory: MemoryPlan, group: ProcessGroup,
           report: Report, wanted: Callable[[], bool]) -> Saver | NoSaver:
    """What writes the run's files, in the process that does."""
    if group.rank or not plan.saves:
        return NoSaver()
    started_at = plan.resume_point.started_at if plan.resume_point else time.time()
    return Saver(plan, Provenance(plan, model, leased, network, started_at=started_at),
                 _checkpointer(plan, identity, started_at, folder, dtype=dtype, memory=memory, report=report),
                 report=report, spare=folder, wanted=wanted)


def _checkpointer(plan: RunPlan, identity: Mapping[str, str], started_at: float, folder: Path | None, *, dtype: torch.dtype,
                  memory: MemoryPlan, report: Report) -> Checkpointer:
    """Keeps the run's state. What it says of the data is compared with what was said when the run began."""
    chosen, point, metadata = plan.settings.save, plan.resume_point, dict[str, Any]()
    if point or (folder is not None and (chosen.save_state or chosen.save_state_on_train_end)):
        metadata = resume.describe(
            plan.settings, steps=plan.schedule.steps, processes=plan.processes, checkpoint=identity, started_at=started_at,
            dataset=resume.dataset_fingerprint(plan.dataset, plan.placements, plan.masks), dtype=dtype,
            base_dtype=memory.config.base_dtype)
    if point:
        _warn(resume.compare_data(metadata, point), report)
    return Checkpointer(folder, chosen, metadata, report)


def _planned(plan: RunPlan, leased: LeasedModel, memory: MemoryPlan, *, dtype: torch.dtype) -> Planned:
    schedule, (width, height) = plan.schedule, plan.resolution
    seconds = schedule.steps * seconds_per_step(
        memory.flops, blocks=len(memory.blocks), device_type=leased.device.type,
        passes=memory.passes * plan.settings.optimizer.gradient_accumulation_steps,
        rate=matrix_rate(leased.device, dtype, idle=lambda: True) or 1.0)  # nobody else computes while it is leased
    return Planned(
        pictures=plan.dataset.images, buckets=len(schedule.buckets), batches_per_epoch=schedule.batches_per_epoch,
        epochs=schedule.epochs, steps=schedule.steps, summary=plan.summary, resolution=f"{width}×{height}",
        checkpoint=leased.checkpoint.name, seed=plan.settings.optimizer.seed,
        resumed_at=plan.resume_point.step if plan.resume_point else 0, memory=memory.text, seconds=seconds)


def _train_config(plan: RunPlan, model: FrozenModel, memory: MemoryPlan, *, dtype: torch.dtype) -> TrainConfig:
    settings, schedule = plan.settings, plan.schedule
    optimizer, loss, kept = settings.optimizer, settings.loss, settings.preservation
    unet_lr, text_encoder_lr = settings.rates
    return TrainConfig(
        steps=schedule.steps, epochs=schedule.epochs, steps_per_epoch=schedule.steps_per_epoch,
        accumulation=optimizer.gradient_accumulation_steps, optimizer=optimizer_config(settings),
        schedule=schedule_config(settings, steps=schedule.steps),
        unet_lr=unet_lr, text_encoder_lr=text_encoder_lr, embedding_lr=settings.embedding_rate,
        embedding_steps=embedding_steps(settings, schedule.steps), seed=optimizer.seed,
        noise=NoiseConfig(**dataclasses.asdict(settings.noise)), loss=LossConfig(
            dtype=dtype, function=loss_function(loss, model.schedule), min_snr_gamma=loss.min_snr_gamma,
            debiased_estimation_loss=loss.debiased_estimation_loss, v_pred_like_loss=loss.v_pred_like_loss,
            scale_v_pred_loss_like_noise_pred=loss.scale_v_pred_loss_like_noise_pred,
            dco_beta=kept.dco_beta if kept.preservation == "dco" else 0.0), step=memory.config,
        preservation=preservation_of(settings),
        cuda_graphs=_cuda_graphs(settings), compiled=settings.memory.torch_compile and not memory.config.swapped)


def _cuda_graphs(settings: Settings) -> bool:
    """Whether steps are captured. Graphs keep their memory between two steps, where the VAE would need it."""
    return settings.memory.cuda_graphs == "on" and not settings.encodes_in_steps


def _warn(messages: Any, report: Report) -> None:
    for message in messages:
        report(Warned(message))
