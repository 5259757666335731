"""A short run with Prodigy that finds a learning rate for the pictures and settings of a run, and saves nothing.

Prodigy (Mishchenko & Defazio 2023, arXiv 2306.06101) raises its estimate of the learning rate while the gradients agree on a
direction, and leaves it where they do not. AdamW takes that rate as it is; Lion, whose steps are longer, a third of it.
docs/rate-finder.md compares it with sweeps.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from lib_lora_train.errors import SettingError, counted
from lib_lora_train.events import Diagnosed, Event, Finished, Report, Step
from lib_lora_train.host.port import Host, never
from lib_lora_train.run.callbacks import Stop
from lib_lora_train.run.job import run_job
from lib_lora_train.run.optimizing import traits_of
from lib_lora_train.run.planning import RunPlan, plan_job
from lib_lora_train.settings import Settings, flat, named, parse
from lib_lora_train.settings.network import BLOCK_RATES, LORA_PLUS
from lib_lora_train.settings.presets import NO_PRESET

STEPS = 100
LION_SHARE = 1 / 3
SUFFIX = "-learning-rate"
"""Behind the name of the run that it belongs to."""
_START = 1e-6
"""Prodigy's first estimate, its `d0`."""
_STILL_RISING = 1.1  # times as high as at three quarters of the steps
_OTHER: Mapping[str, object] = {
    "optimizer_type": "Prodigy", "optimizer_args": "", "learning_rate": 1.0, "unet_lr": 0.0,
    "lr_scheduler": "constant", "lr_warmup_steps": 0, "ema_decay": 0.0, "scale_weight_norms": 0.0,
    "max_train_minutes": 0.0, "validation": False, "sample_images": False, "save_every_n_epochs": 0, "save_every_n_steps": 0,
    "save_state": False, "save_state_on_train_end": False, "overwrite": True, "resume": "", "preset": NO_PRESET,
    **dict.fromkeys(BLOCK_RATES, ""), **dict.fromkeys(LORA_PLUS, 0.0)}


def plan_finder(settings: Settings, host: Host, *, steps: int = STEPS) -> RunPlan:
    """The plan of the short run: what decides how a step learns is that of `settings`, but for the optimizer and its rates.
    Raises UserError, also where the optimizer of `settings` needs no rate or another kind of rate."""
    share_for(settings)
    return dataclasses.replace(plan_job(finder_settings(settings, steps=steps), host), saves=False)


def finder_settings(settings: Settings, *, steps: int = STEPS) -> Settings:
    """Those of the short run, which belong to no other."""
    network = settings.network  # all that is trained has one rate; what has no effect stays as it is
    rates = {"text_encoder_lr": not network.network_train_unet_only, "embedding_lr": network.train_trigger_embedding}
    return parse({**flat(settings), **_OTHER, **{rate: 1.0 for rate, trained in rates.items() if trained},
                  "max_train_steps": steps, "output_name": f"{settings.save.output_name or 'lora'}{SUFFIX}"})


def is_finder(values: Mapping[str, object]) -> bool:
    """Whether a run that was recorded with these settings was such a short one, however it ended."""
    return str(values.get("output_name", "")).endswith(SUFFIX) and all(
        values.get(name) == value for name, value in _OTHER.items())


def share_for(settings: Settings) -> float:
    """The share of Prodigy's rate that the optimizer of these settings takes. Raises SettingError."""
    name, traits = settings.optimizer.optimizer_type, traits_of(settings)
    if traits.adapts_rate or traits.own_rate:
        raise SettingError(f"{named('optimizer_type')} = {name} finds its learning rate itself", remedy="train, or choose "
                           "AdamW or Lion first")
    family = name.rpartition(".")[2].lower()
    if "lion" in family:
        return LION_SHARE
    if "adam" in family:
        return 1.0
    raise SettingError(f"The learning rate that suits {name} cannot be found", why="it is known for AdamW and Lion",
                       remedy=f"choose one of these as {named('optimizer_type')}")


def find_rate(plan: RunPlan, host: Host, *, requested: Settings, report: Report, stop: Stop, folder: Path | None = None,
              sample_now: Callable[[], bool] = never, save_now: Callable[[], bool] = never,
              paused: Callable[[], bool] = never) -> Finished:
    """Carry out the plan of `plan_finder`, and report the rate for the settings that were `requested` as a `Diagnosed`. The
    other arguments, the result and what is raised are those of `run_job`."""
    rates: list[float] = []

    def watch(event: Event) -> None:
        if isinstance(event, Step):
            rates.append(event.learning_rate)
        report(event)

    finished = run_job(plan, host, report=watch, stop=stop, folder=folder, sample_now=sample_now, save_now=save_now,
                       paused=paused)
    if finished.outcome != "done":
        return dataclasses.replace(finished, message=f"Stopped after {counted(finished.steps, 'step')}, before a learning rate "
                                   "was found.")
    found = proposal(rates, requested)
    report(found)
    return dataclasses.replace(finished, message=found.message, verdict="")


def proposal(rates: Sequence[float], settings: Settings) -> Diagnosed:
    """What the rates of each step say: a rate for the optimizer of `settings`, with a sentence."""
    steps, rate = len(rates), rates[-1]
    if not rate > 2 * _START or math.isinf(rate):
        return Diagnosed(
            steps, "no effect", f"No learning rate was found: in {steps} steps the pictures agreed on no direction. Look at "
            f"the captions and the trigger word, or raise {named('train_batch_size')}.")
    value, adamw, lion = (float(f"{share * rate:.1e}") for share in (share_for(settings), 1.0, LION_SHARE))
    more = " It was still rising, so the best may be higher." if rate > _STILL_RISING * rates[3 * (steps - 1) // 4] else ""
    network = settings.network
    if any(getattr(network, name) not in (0.0, 1.0) for name in LORA_PLUS) or any(
            getattr(network, name) for name in BLOCK_RATES):
        more += " It was found without LoRA+ and the rates of single blocks, which multiply it: take less."
    return Diagnosed(
        steps, "rate", f"A learning rate of {value:g} suits these pictures and settings (AdamW {adamw:g}, Lion {lion:g})."
        f"{more}", "unet_lr" if settings.optimizer.unet_lr else "learning_rate", f"{value:g}")
