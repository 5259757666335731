"""The command line of `python tools/bench`. Modules that load torch are imported when a command starts."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lib_lora_train.errors import LoraTrainError, SettingError, UserError
from lib_lora_train.settings import assignment
from tools.bench.programs import PLACEHOLDERS
from tools.bench.variants import VARIANTS, variants_of

if TYPE_CHECKING:
    import torch

    from lib_lora_train.host.standalone import StandaloneHost


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0 done, 1 failed, 2 bad input (one sentence on stderr)."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # Windows consoles are not UTF-8 by default
    chosen = _parser().parse_args(arguments)
    try:
        return chosen.command(chosen)
    except LoraTrainError as error:
        print(error, file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1


def _parser() -> argparse.ArgumentParser:
    bench = argparse.ArgumentParser(prog="python tools/bench",
                                    description="Measure quality, speed and memory of the training.")
    commands = bench.add_subparsers(required=True, metavar="check | quality | recommend | rates | suggestions | eight-bits | "
                                    "background | speed | memory | cache | startup | model | studio | verdict")
    _add_quality(commands)
    _add_recommend(commands)
    _add_rates(commands)
    background = _add(commands, "background", run_background, "measure how much of its pictures' background a LoRA takes "
                      "along, with masked loss and with what preserves the model", out="table, figures, LoRAs and sheets")
    background.add_argument("--case", action="append", default=[], metavar="NAME", help="whole, masked (these by default), "
                            "'masked, 0.1 outside', 'masked, base outside', dop, blank or dco; may be repeated")
    background.add_argument("--seeds", default="42,43", metavar="N,N,…", help="a run for each (42,43)")
    background.add_argument("--steps", type=int, default=200, help="of each run (200)")
    background.add_argument("--cfg-scale", type=float, default=2.0, help="of the generated pictures (2)")
    background.add_argument("--threads", type=int, default=1, help="CPU threads (1)")
    check = _add(commands, "check", run_check, "check on a GPU what has to be seen there before it is on by default: in eight "
                 "minutes at most", out="check.jsonl, a line for each check, and check.md")
    _add_model_options(check)
    check.add_argument("--only", action="append", default=[], metavar="CHECK", help="one of the checks; may be repeated")
    check.add_argument("--seconds", type=float, default=480.0, help="after which no other check begins (480)")
    check.add_argument("--in-this-process", action="store_true", help=argparse.SUPPRESS)
    _add_speed(commands)
    memory = _add(commands, "memory", run_memory, "compare the memory plan's prediction with what is measured here; predict "
                  "for GPUs of several sizes", out="tables and figures")
    _add_model_options(memory)
    memory.add_argument("--measured-only", action="store_true", help="leave out the table of predictions for GPUs")
    cache = _add(commands, "cache", run_cache, "measure how fast pictures become latents, and a second start",
                 out="table and figures, and the pictures meanwhile")
    cache.add_argument("--pictures", dest="images", type=int, default=10_000, help="number of pictures (10000)")
    cache.add_argument("--size", default="512", metavar="N|WIDTHxHEIGHT", help="the resolution they are trained at (512)")
    cache.add_argument("--device", choices=("cuda", "cpu"), help="by default the GPU where there is one")
    cache.add_argument("--threads", type=int, default=0, help="CPU threads of torch")
    startup = _add(commands, "startup", run_startup, "measure the time from the click to the first step, and from the last "
                   "step to a usable file", out="table and figures, and the checkpoint meanwhile")
    startup.add_argument("--size", choices=("small", "sd15", "sdxl"), default="small", help="the checkpoint")
    startup.add_argument("--steps", type=int, default=3, help="steps of a run (3)")
    model = _add(commands, "model", run_model, "write a checkpoint of the true size with random weights", out="the file")
    model.add_argument("family", choices=("sd1", "sd2", "sdxl"))
    model.add_argument("--dtype", choices=("fp32", "fp16", "bf16"), default="fp16")
    model.add_argument("--size", choices=("true", "small"), default="true", help="small: the same structure, narrower")
    studio = _add(commands, "studio", run_studio, "measure the caption editor on many pictures",
                  out="table and figures, and the pictures meanwhile")
    studio.add_argument("--pictures", dest="images", default="", metavar="N,N,…",
                        help="numbers of pictures (1000,2000,5000,10000)")
    verdict = _add(commands, "verdict", run_verdict, "make runs go wrong on purpose and see whether the verdict says what did",
                   out="table and figures, the runs' events, and their files meanwhile")
    verdict.add_argument("--data", choices=("style", "subject", "both"), help="the demo's pictures; by default each run's own")
    verdict.add_argument("--seeds", default="42", metavar="N,N,…", help="seeds of the runs (42)")
    verdict.add_argument("--case", action="append", default=[], metavar="NAME", help="only this run; may be repeated")
    return bench


def _add(commands: argparse._SubParsersAction, name: str, command: Callable[[argparse.Namespace], int], text: str, *, out: str,
         more: str = "") -> argparse.ArgumentParser:
    """A command with its `--out`; `more` is its description where that is not its line in the list of commands."""
    parser = commands.add_parser(name, help=text, description=more or f"{text[0].upper()}{text[1:]}.")
    parser.add_argument("--out", type=Path, default=Path("bench-output"), help=f"folder for {out} (bench-output)")
    parser.set_defaults(command=command)
    return parser


def _add_model_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--size", choices=("true", "small"), help="the measured model's size; by default true with a GPU, "
                        "else small")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="by default the GPU where there is one")
    parser.add_argument("--precision", choices=("no", "fp16", "bf16"), help="by default fp16 with a GPU, else no (fp32)")
    parser.add_argument("--rank", type=int, default=16, help="the LoRA's rank (16)")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads")


def _add_quality(commands: argparse._SubParsersAction) -> None:
    quality = _add(commands, "quality", run_quality, "train on fixed pictures and measure what was learnt",
                   out="table, figures, LoRAs and sheets")
    quality.add_argument("--checkpoint", type=Path, help="the model, a .safetensors file; by default the demo's")
    quality.add_argument("--steps", type=int, help="steps of the style's training (default 400, quick 60)")
    quality.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a setting that differs from the "
                         "reference line (AdamW, 1e-4, rank 8, alpha 4, cosine); may be repeated")
    quality.add_argument("--packages", type=Path, help="folder for npm's packages, fetched once (OUT/packages)")
    quality.add_argument("--no-subject", action="store_true", help="the styles only")
    quality.add_argument("--control", action="store_true", help="also train each LoRA with diffusers and peft")
    quality.add_argument("--threads", type=int, default=0, help="CPU threads (by default two; the last digits of the figures "
                         "may depend on their number)")
    quality.add_argument("--quick", action="store_true", help="a check that it works; not to be quoted")


def _add_recommend(commands: argparse._SubParsersAction) -> None:
    recommend = _add(commands, "recommend", run_recommend, "measure how well the scores of a run's grid order its saves",
                     out="tables, figures, runs and LoRAs; what is there already is not made again")
    recommend.add_argument("--case", action="append", choices=("style", "subject"), default=[], help="by default both")
    recommend.add_argument("--seeds", default="42", metavar="N,N,…", help="a run for each (42)")
    recommend.add_argument("--steps", type=int, default=420, help="of each run (420)")
    recommend.add_argument("--every", type=int, default=30, help="steps between two saves (30)")
    recommend.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a setting that differs from the "
                           "demo's; may be repeated")
    recommend.add_argument("--threads", type=int, default=1, help="CPU threads (1)")


def _add_rates(commands: argparse._SubParsersAction) -> None:
    for name, about in (("rates", "compare the rate finder's proposal with a sweep over learning rates"),
                        ("suggestions", "compare the settings that are suggested with the default"),
                        ("eight-bits", "measure what a LoRA loses that is trained beside eight-bit weights")):
        parser = _add(commands, name, run_rates, about, out="table and figures; what is there already is not made again")
        parser.set_defaults(measured=name)
        parser.add_argument("--case", action="append", choices=("style", "subject"), default=[], help="by default both")
        parser.add_argument("--seeds", default="42,43,44", metavar="N,N,…", help="a run for each (42,43,44)")
        parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="one of all runs; may be repeated")
        parser.add_argument("--threads", type=int, default=1, help="CPU threads (1)")


def _add_speed(commands: argparse._SubParsersAction) -> None:
    speed = _add(commands, "speed", run_speed, "measure seconds a training step, beside the step's roofline and beside another "
                 "trainer", out="table and figures",
                 more="With a GPU: SD1.5 at 512² with batch 1 and 4 and SDXL at 1024², true size, eager and CUDA graphs. "
                 "Without: a narrow SD1 at 256². The weights are random and made on the spot.")
    speed.add_argument("--family", choices=("sd1", "sd2", "sdxl"), help="the model; with --resolution and --batch one case "
                       "instead of the usual ones")
    speed.add_argument("--resolution", type=int, default=0, help="side of the pictures in pixels")
    speed.add_argument("--batch", type=int, default=0, help="pictures a step")
    _add_model_options(speed)
    speed.add_argument("--checkpoint", type=Path, help="measure on this .safetensors file instead of random weights")
    speed.add_argument("--steps", type=int, default=0, help="measured steps (default 50 with a GPU, else 5)")
    speed.add_argument("--warm-up", type=int, default=0, help="steps before them (default 10 with a GPU, else 1); with "
                       "--against the first of the steps, in both programs")
    speed.add_argument("--repeats", type=int, default=1, help="how often each setting is measured, in turn")
    speed.add_argument("--compare", action="append", default=[], metavar="NAME", help="settings to measure beside each other: "
                       f"{', '.join(VARIANTS)}, or NAME:SETTING=VALUE,…; may be repeated")
    speed.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a setting of all of them")
    speed.add_argument("--against", default="", metavar="CMD", help="another trainer's command line, run in turn with this "
                       f"one; {' '.join('{' + name + '}' for name in PLACEHOLDERS)} are filled in (data is a folder that "
                       "holds 1_cat, as kohya's scripts want it)")
    speed.add_argument("--pairs", type=int, default=3, help="with --against: how often (3)")
    speed.add_argument("--cpu-time", action="store_true", help="with --against: compare CPU seconds, for a "
                       "machine that does other work")


def run_quality(chosen: argparse.Namespace) -> int:
    """`bench quality`; returns the exit code."""
    import torch

    from lib_lora_train.demo.embedded import CHECKPOINT
    from lib_lora_train.host.standalone import StandaloneHost, describe_file
    from tools.bench import joint_scorer, quality

    steps = chosen.steps if chosen.steps is not None else 60 if chosen.quick else quality.STEPS
    if steps < 1:
        raise SettingError(f"--steps {steps} is not possible", why="there must be at least one")
    checkpoint = chosen.checkpoint or CHECKPOINT
    describe_file(checkpoint)  # a wrong one is refused before anything is read
    # Sixteen images are sampled at once, which two threads share well; more would wait for each other.
    torch.set_num_threads(max(1, chosen.threads or min(2, torch.get_num_threads())))
    plan = quality.QualityPlan(
        output=chosen.out, steps=steps, subject_steps=max(1, min(steps // 2, quality.SUBJECT_STEPS)),
        packages=chosen.packages or chosen.out / "packages",
        extent=joint_scorer.QUICK if chosen.quick else joint_scorer.THOROUGH,
        control=checkpoint if chosen.control else None, subject=None if chosen.no_subject else quality.SUBJECT,
        changes=dict(assignment(text) for text in chosen.set))
    host = StandaloneHost(checkpoint, lora_folder=chosen.out / "loras", runs_folder=chosen.out / "runs")
    quality.run_quality(plan, host, say=_say)
    return _done((chosen.out / "quality.md").read_text(encoding="utf-8"), chosen)


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
                 "eight-bits": (eight_bits.EightBitsPlan, eight_bits.run_eight_bits)}[chosen.measured]
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
        small=_is_small(chosen, device), precision=_precision(chosen, device), predict=not chosen.measured_only)
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
