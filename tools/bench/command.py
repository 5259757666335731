"""The command line of `python tools/bench`. Modules that load torch are imported when a command starts."""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lib_lora_train.errors import LoraTrainError, SettingError, UserError
from lib_lora_train.settings import assignment
from tools.bench import options
from tools.bench.variants import variants_of

if TYPE_CHECKING:
    import torch

    from lib_lora_train.host.standalone import StandaloneHost


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0 done, 1 failed, 2 bad input (one sentence on stderr)."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # Windows consoles are not UTF-8 by default
    chosen = options.parser().parse_args(arguments)
    try:
        return _COMMANDS[chosen.name](chosen)
    except LoraTrainError as error:
        print(error, file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1


def run_quality(chosen: argparse.Namespace) -> int:
    """`bench quality`; returns the exit code."""
    import torch

    from lib_lora_train.demo.embedded import CHECKPOINT
    from lib_lora_train.host.standalone import StandaloneHost, describe_file
    from tools.bench import joint_scorer, quality, styled_images

    steps = chosen.steps if chosen.steps is not None else 60 if chosen.quick else quality.STEPS
    for name, number in (("steps", steps), ("runs", chosen.runs), ("seeds", chosen.seeds)):
        if number is not None and number < 1:
            raise SettingError(f"--{name} {number} is not possible", why="there must be at least one")
    if unknown := set(chosen.style) - set(styled_images.GRADED):
        raise SettingError(f"There is no graded style {min(unknown)}", remedy=f"choose of {', '.join(styled_images.GRADED)}")
    extent = joint_scorer.QUICK if chosen.quick else joint_scorer.THOROUGH
    checkpoint = chosen.checkpoint or CHECKPOINT
    describe_file(checkpoint)  # a wrong one is refused before anything is read
    # Sixteen images are sampled at once, which two threads share well; more would wait for each other.
    torch.set_num_threads(max(1, chosen.threads or min(2, torch.get_num_threads())))
    plan = quality.QualityPlan(
        output=chosen.out, steps=steps, subject_steps=max(1, min(steps // 2, quality.SUBJECT_STEPS)),
        packages=chosen.packages or chosen.out / "packages", styles=tuple(chosen.style) or styled_images.GRADED,
        extent=dataclasses.replace(
            extent, test=chosen.test, runs=chosen.runs or extent.runs, seeds=chosen.seeds or extent.seeds),
        control=checkpoint if chosen.control else None, subject=None if chosen.no_subject else quality.SUBJECT,
        changes=dict(assignment(text) for text in chosen.set), varied=_varied(chosen.vary))
    host = StandaloneHost(checkpoint, lora_folder=chosen.out / "loras", runs_folder=chosen.out / "runs")
    quality.run_quality(plan, host, say=_say)
    return _done((chosen.out / "quality.md").read_text(encoding="utf-8"), chosen)


def _varied(options: Sequence[str]) -> dict[str, dict[str, object]]:
    """{"NAME=VALUE": {NAME: VALUE}} for each value of each option."""
    return {f"{name}={value}": {name: value} for name, values in map(assignment, options) for value in values.split(",")}


def run_recommend(chosen: argparse.Namespace) -> int:
    """`bench recommend`; returns the exit code."""
    from tools.bench import recommend

    plan = recommend.RecommendPlan(
        chosen.out, cases=tuple(chosen.case) or tuple(recommend.DATA), seeds=_numbers("--seeds", chosen.seeds),
        steps=chosen.steps, every=chosen.every, changes=dict(assignment(text) for text in chosen.set))
    return _done(recommend.run_recommend(plan, _demo_host(chosen), say=_say), chosen)


def run_rates(chosen: argparse.Namespace) -> int:
    """`bench rates`, `bench suggestions` and `bench eight-bits`; returns the exit code."""
    from tools.bench import eight_bits, rates, suggestions

    make, run = {"rates": (rates.RatesPlan, rates.run_rates),
                 "suggestions": (suggestions.SuggestionsPlan, suggestions.run_suggestions),
                 "eight-bits": (eight_bits.EightBitsPlan, eight_bits.run_eight_bits)}[chosen.name]
    plan = make(chosen.out, cases=tuple(chosen.case) or ("style", "subject"), seeds=_numbers("--seeds", chosen.seeds),
                changes=dict(assignment(text) for text in chosen.set))
    return _done(run(plan, _demo_host(chosen), say=_say), chosen)


def _demo_host(chosen: argparse.Namespace) -> StandaloneHost:
    """The demo's model, with LoRAs and runs in the output folder."""
    import torch

    from lib_lora_train.demo.embedded import CHECKPOINT
    from lib_lora_train.host.standalone import StandaloneHost

    torch.set_num_threads(max(1, chosen.threads))
    return StandaloneHost(CHECKPOINT, lora_folder=chosen.out / "loras", runs_folder=chosen.out / "runs")


def run_background(chosen: argparse.Namespace) -> int:
    """`bench background`; returns the exit code."""
    import torch

    from lib_lora_train.demo.embedded import CHECKPOINT
    from lib_lora_train.host.standalone import StandaloneHost
    from tools.bench import background

    cases = tuple(chosen.case) or background.BackgroundPlan(chosen.out).cases
    if unknown := sorted(set(cases) - background.CASES.keys()):
        raise SettingError(f"There is no case called {unknown[0]}", remedy=f"choose of {'; '.join(background.CASES)}")
    torch.set_num_threads(max(1, chosen.threads))
    plan = background.BackgroundPlan(chosen.out, cases=cases, seeds=_numbers("--seeds", chosen.seeds), steps=chosen.steps,
                                     cfg_scale=chosen.cfg_scale)
    host = StandaloneHost(CHECKPOINT, lora_folder=chosen.out / "loras", runs_folder=chosen.out / "runs")
    return _done(background.run_background(plan, host, say=_say), chosen)


def run_speed(chosen: argparse.Namespace) -> int:
    """`bench speed`; returns the exit code."""
    from lib_lora_train.host.standalone import describe_file
    from tools.bench import against, speed

    for name in ("steps", "warm_up", "resolution", "batch", "repeats", "pairs", "rank"):
        if getattr(chosen, name) < (name in ("repeats", "pairs", "rank")):
            raise SettingError(f"--{name.replace('_', '-')} {getattr(chosen, name)} is not possible")
    _check_against(chosen)
    device = device_of(chosen)
    gpu = device.type == "cuda"
    family = describe_file(chosen.checkpoint).family if chosen.checkpoint else chosen.family
    cases = speed.PUBLISHED if gpu else speed.NARROW
    if family or chosen.resolution or chosen.batch:
        family = family or "sd1"
        usual = next((case for case in cases if case.family == family), speed.Case(family, 512, 1))
        side, batch = chosen.resolution or usual.resolution, chosen.batch or 1
        known = [case for case in cases if (case.family, case.resolution, case.batch) == (family, side, batch)]
        cases = tuple(known) or (speed.Case(family, side, batch),)
    plan = speed.SpeedPlan(
        output=chosen.out, device=device, cases=cases, steps=chosen.steps or (50 if gpu else 5),
        warm_up=chosen.warm_up or (10 if gpu else 1), repeats=chosen.repeats, rank=chosen.rank,
        precision=_precision(chosen, device), small=_is_small(chosen, device), checkpoint=chosen.checkpoint,
        changes=dict(assignment(text) for text in chosen.set),
        compared=variants_of(chosen.compare or (["eager", "graphs"] if gpu else ["defaults"])))
    if chosen.against:
        text = against.run_against(plan, chosen.against, pairs=chosen.pairs, by_cpu=chosen.cpu_time, say=_say)
    else:
        text = speed.run_speed(plan, say=_say)
    return _done(text, chosen)


def _check_against(chosen: argparse.Namespace) -> None:
    """Raises SettingError for what has no effect with, or without, --against."""
    if chosen.against and (chosen.compare or chosen.repeats != 1):
        raise SettingError(f"--{'compare' if chosen.compare else 'repeats'} has no effect with --against",
                           remedy="--set changes this trainer's settings, --pairs says how often both are run")
    if not chosen.against and (chosen.cpu_time or chosen.pairs != 3):
        raise SettingError(f"--{'cpu-time' if chosen.cpu_time else 'pairs'} has no effect without --against")


def run_check(chosen: argparse.Namespace) -> int:
    """`bench check`; returns the exit code."""
    from tools.bench import check
    device = device_of(chosen)
    plan = check.CheckPlan(chosen.out, device, small=_is_small(chosen, device), precision=_precision(chosen, device),
                           seconds=chosen.seconds, only=tuple(chosen.only), rank=chosen.rank)
    names = check.Checks(plan).by_name
    if unknown := sorted(set(chosen.only) - names.keys()):
        raise SettingError(f"There is no check called {unknown[0]}", remedy=f"choose of {'; '.join(names)}")
    if chosen.in_this_process:
        return check.check_here(plan, say=_say)
    own = (sys.executable, str(Path(__file__).parent), "check", "--out", str(chosen.out), "--device", device.type,
           "--size", "small" if plan.small else "true", "--precision", plan.precision, "--threads", str(chosen.threads),
           "--rank", str(chosen.rank))
    return _done(check.run_check(plan, command=own), chosen)


def run_memory(chosen: argparse.Namespace) -> int:
    """`bench memory`; returns the exit code."""
    from tools.bench import memory, speed

    device = device_of(chosen)
    plan = memory.MemoryPlanned(
        output=chosen.out, device=device, cases=speed.PUBLISHED if device.type == "cuda" else speed.NARROW, rank=chosen.rank,
        small=_is_small(chosen, device), precision=_precision(chosen, device), predict=not chosen.name_only)
    return _done(memory.run_memory(plan, say=_say), chosen)


def run_cache(chosen: argparse.Namespace) -> int:
    """`bench cache`; returns the exit code."""
    from tools.bench import cache

    return _done(cache.run_cache(images=chosen.images, size=chosen.size, output=chosen.out, say=_say,
                                 device=device_of(chosen)), chosen)


def run_startup(chosen: argparse.Namespace) -> int:
    """`bench startup`; returns the exit code."""
    from tools.bench import startup

    return _done(startup.run_startup(size=chosen.size, steps=chosen.steps, output=chosen.out, say=_say), chosen)


def run_model(chosen: argparse.Namespace) -> int:
    """`bench model`; returns the exit code."""
    from tools.bench.true_size import DTYPES, true_size_checkpoint

    print(true_size_checkpoint(chosen.family, chosen.out, dtype=DTYPES[chosen.dtype], small=chosen.size == "small"))
    return 0


def run_studio(chosen: argparse.Namespace) -> int:
    """`bench studio`; returns the exit code."""
    from tools.bench import studio

    sizes = _numbers("--pictures", chosen.images) if chosen.images else studio.SIZES
    return _done(studio.run_studio(sizes, output=chosen.out, say=_say), chosen)


def run_verdict(chosen: argparse.Namespace) -> int:
    """`bench verdict`; returns the exit code."""
    import torch

    from tools.bench import verdict
    from tools.bench.verdict_cases import CASES

    if unknown := sorted(set(chosen.case) - {case.name for case in CASES}):
        raise SettingError(f"There is no run called {unknown[0]}", remedy=f"choose of {', '.join(case.name for case in CASES)}")
    seeds = _numbers("--seeds", chosen.seeds)
    torch.set_num_threads(1)  # so small a model is quicker on one
    data = ("style", "subject") if chosen.data == "both" else tuple(filter(None, [chosen.data]))
    return _done(verdict.run_verdict(output=chosen.out, seeds=seeds, data=data, only=tuple(chosen.case), say=_say), chosen)


def _numbers(option: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(map(int, text.split(",")))
    except ValueError as error:
        raise SettingError(f"{option} {text} is no list of numbers", remedy=f"write {option} 1000,10000") from error


def device_of(chosen: argparse.Namespace) -> torch.device:
    """The GPU, where there is one and nothing else was chosen; sets the number of threads too."""
    import torch

    from lib_lora_train.host.placement import indexed

    if chosen.device == "cuda" and not torch.cuda.is_available():
        raise SettingError("There is no GPU to measure on", why="torch finds no CUDA device")
    if chosen.threads > 0:
        torch.set_num_threads(chosen.threads)
        os.environ["OMP_NUM_THREADS"] = str(chosen.threads)  # for the programs that are started
    return indexed(torch.device(chosen.device or ("cuda" if torch.cuda.is_available() else "cpu")))


def _precision(chosen: argparse.Namespace, device: torch.device) -> str:
    return chosen.precision or ("fp16" if device.type == "cuda" else "no")


def _is_small(chosen: argparse.Namespace, device: torch.device) -> bool:
    return chosen.size == "small" if chosen.size else device.type != "cuda"


def _done(text: str, chosen: argparse.Namespace) -> int:
    print(f"\n{text}\nFigures: {chosen.out}")
    return 0


def _say(text: str) -> None:
    print(text, flush=True)


_COMMANDS: Mapping[str, Callable[[argparse.Namespace], int]] = {
    "quality": run_quality, "recommend": run_recommend, "rates": run_rates, "suggestions": run_rates, "eight-bits": run_rates,
    "background": run_background, "check": run_check, "speed": run_speed, "memory": run_memory, "cache": run_cache,
    "startup": run_startup, "model": run_model, "studio": run_studio, "verdict": run_verdict}
