"""`python tools/bench …`: its arguments, and what they start."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lib_lora_train.errors import LoraTrainError, SettingError, UserError
from lib_lora_train.settings import assignment
from tools.bench.against import PLACEHOLDERS
from tools.bench.compared import COMPARED, compared_settings

if TYPE_CHECKING:
    import torch

# Only what costs nothing is imported here: these modules load torch when a command starts.

Assignment = Callable[[str], tuple[str, str]]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0 done, 1 failed, 2 bad input (one sentence on stderr)."""
    chosen = _parser().parse_args(arguments)
    try:
        return chosen.command(chosen)
    except LoraTrainError as error:
        print(error, file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1


def _parser() -> argparse.ArgumentParser:
    bench = argparse.ArgumentParser(prog="python tools/bench", description="Measure how good, fast and frugal this is.")
    kinds = bench.add_subparsers(required=True, metavar="quality | speed | memory | cache | startup | model | studio")
    _add_quality(kinds, assignment)
    _add_speed(kinds, assignment)
    _add_memory(kinds)
    cache = kinds.add_parser("cache", help="measure how fast pictures become latents, and a second start")
    cache.add_argument("--pictures", type=int, default=10_000, help="how many (10000)")
    cache.add_argument("--size", default="512", metavar="N|WIDTHxHEIGHT", help="what they are trained at (512)")
    cache.add_argument("--device", choices=("cuda", "cpu"), help="by default the card where there is one")
    cache.add_argument("--threads", type=int, default=0, help="processor threads of torch")
    _add_out(cache, "table and figures go, and the pictures meanwhile")
    cache.set_defaults(command=run_cache)
    startup = kinds.add_parser("startup", help="measure the time from the click to the first step, and to a usable file")
    startup.add_argument("--size", choices=("small", "sd15", "sdxl"), default="small", help="the checkpoint")
    startup.add_argument("--steps", type=int, default=3, help="steps of a run (3)")
    _add_out(startup, "table and figures go, and the checkpoint meanwhile")
    startup.set_defaults(command=run_startup)
    _add_model(kinds)
    studio = kinds.add_parser("studio", help="measure the caption editor on many pictures")
    studio.add_argument("--pictures", default="", metavar="N,N,…", help="how many (1000,2000,5000,10000)")
    _add_out(studio, "table and figures go, and the pictures meanwhile")
    studio.set_defaults(command=run_studio)
    return bench


def _add_out(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument("--out", type=Path, default=Path("bench-output"), help=f"where {what}")


def _add_quality(kinds: argparse._SubParsersAction[argparse.ArgumentParser], assignment: Assignment) -> None:
    quality = kinds.add_parser("quality", help="train on fixed pictures and measure what was learnt")
    quality.add_argument("--checkpoint", type=Path, help="the model, a .safetensors file; by default the one that comes along")
    _add_out(quality, "table, figures, LoRAs and sheets go")
    quality.add_argument("--steps", type=int, help="steps of the style's training (default 400, quick 60)")
    quality.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a setting that differs from the "
                         "reference line (AdamW, 1e-4, rank 8, alpha 4, cosine); may be repeated")
    quality.add_argument("--no-subject", action="store_true", help="measure the style only")
    quality.add_argument("--threads", type=int, default=0, help="processor threads (by default two; the last digits of the "
                         "figures may follow their number)")
    quality.add_argument("--quick", action="store_true", help="to see whether it works, in two minutes; not to be quoted")
    quality.set_defaults(command=lambda chosen: run(chosen, assignment=assignment))


def _add_speed(kinds: argparse._SubParsersAction[argparse.ArgumentParser], assignment: Assignment) -> None:
    speed = kinds.add_parser(
        "speed", help="seconds a training step, beside the step's physical floor and beside another trainer",
        description="With a card: SD1.5 at 512² with batch 1 and 4 and SDXL at 1024², true size, eager and graphs. Without: a "
        "narrow SD1 at 256². Weights are random and made on the spot.")
    speed.add_argument("--family", choices=("sd1", "sd2", "sdxl"), help="the model; with --resolution and --batch one case "
                       "instead of the usual ones")
    speed.add_argument("--resolution", type=int, default=0, help="the pictures' side in pixels")
    speed.add_argument("--batch", type=int, default=0, help="pictures a step")
    speed.add_argument("--size", choices=("true", "small"), help="the model's size; by default true with a card")
    speed.add_argument("--checkpoint", type=Path, help="measure on this .safetensors file instead of random weights")
    speed.add_argument("--device", choices=("cuda", "cpu"), help="by default the card where there is one")
    speed.add_argument("--precision", choices=("no", "fp16", "bf16"), help="by default fp16 with a card, else no (fp32)")
    speed.add_argument("--steps", type=int, default=0, help="measured steps (default 50 with a card, else 5)")
    speed.add_argument("--warm-up", type=int, default=0, help="steps before them (default 10 with a card, else 1); with "
                       "--against the first of the steps, in both programs")
    speed.add_argument("--repeats", type=int, default=1, help="how often each setting is measured, in turn")
    speed.add_argument("--rank", type=int, default=16, help="the LoRA's rank")
    speed.add_argument("--threads", type=int, default=0, help="processor threads")
    speed.add_argument("--compare", action="append", default=[], metavar="NAME", help="settings to measure beside each other: "
                       f"{', '.join(COMPARED)}, or NAME:SETTING=VALUE,…; may be repeated")
    speed.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a setting of all of them")
    speed.add_argument("--against", default="", metavar="CMD", help="another trainer's command line, run in turn with this "
                       f"one; {' '.join('{' + name + '}' for name in PLACEHOLDERS)} are filled in (data is a folder that "
                       "holds 1_cat, as kohya's scripts want it)")
    speed.add_argument("--pairs", type=int, default=3, help="with --against: how often (3)")
    speed.add_argument("--processor-time", action="store_true", help="with --against: judge by processor seconds, on a "
                       "machine that does other work")
    _add_out(speed, "table and figures go")
    speed.set_defaults(command=lambda chosen: run_speed(chosen, assignment=assignment))


def _add_memory(kinds: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    memory = kinds.add_parser("memory", help="what the memory plan predicts for cards of several sizes, and beside what is "
                              "measured here")
    memory.add_argument("--size", choices=("true", "small"), help="the measured model's size; by default true with a card")
    memory.add_argument("--device", choices=("cuda", "cpu"), help="by default the card where there is one")
    memory.add_argument("--precision", choices=("no", "fp16", "bf16"), help="by default fp16 with a card, else no (fp32)")
    memory.add_argument("--rank", type=int, default=16, help="the LoRA's rank")
    memory.add_argument("--threads", type=int, default=0, help="processor threads")
    memory.add_argument("--measured-only", action="store_true", help="leave out the table of predictions for cards")
    _add_out(memory, "tables and figures go")
    memory.set_defaults(command=run_memory)


def _add_model(kinds: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    model = kinds.add_parser("model", help="write a checkpoint of the true size with random weights")
    model.add_argument("family", choices=("sd1", "sd2", "sdxl"))
    model.add_argument("--dtype", choices=("fp32", "fp16", "bf16"), default="fp16")
    model.add_argument("--size", choices=("true", "small"), default="true", help="small: the same structure, narrower")
    _add_out(model, "the file goes")
    model.set_defaults(command=run_model)


def run(chosen: argparse.Namespace, *, assignment: Assignment) -> int:
    """`bench quality`; returns the exit code."""
    import torch

    from lib_lora_train.demo.embedded import CHECKPOINT
    from lib_lora_train.host.standalone import StandaloneHost, describe_file
    from tools.bench import quality
    from tools.bench.yardstick import QUICK, THOROUGH

    steps = chosen.steps if chosen.steps is not None else 60 if chosen.quick else quality.STEPS
    if steps < 1:
        raise SettingError(f"--steps {steps} is not possible", why="there must be at least one")
    checkpoint = chosen.checkpoint or CHECKPOINT
    describe_file(checkpoint)  # a wrong one is refused before anything is read
    # Pictures are painted sixteen at once, which two threads share well; more would wait for each other.
    torch.set_num_threads(max(1, chosen.threads or min(2, torch.get_num_threads())))
    plan = quality.QualityPlan(
        output=chosen.out, steps=steps, subject_steps=max(1, min(steps // 2, quality.SUBJECT_STEPS)),
        effort=QUICK if chosen.quick else THOROUGH,
        subject=None if chosen.no_subject else quality.SUBJECT, changes=dict(assignment(text) for text in chosen.set))
    host = StandaloneHost(checkpoint, lora_folder=chosen.out / "loras", runs_folder=chosen.out / "runs")
    quality.run_quality(plan, host, say=_say)
    print(f"\n{(chosen.out / 'quality.md').read_text(encoding='utf-8')}\nFigures: {chosen.out / 'quality.json'}")
    return 0


def run_speed(chosen: argparse.Namespace, *, assignment: Assignment) -> int:
    """`bench speed`; returns the exit code."""
    from lib_lora_train.host.standalone import describe_file
    from tools.bench import pairing, speed

    for name in ("steps", "warm_up", "resolution", "batch", "repeats", "pairs", "rank"):
        if getattr(chosen, name) < (name in ("repeats", "pairs", "rank")):
            raise SettingError(f"--{name.replace('_', '-')} {getattr(chosen, name)} is not possible")
    _check_against(chosen)
    device = _device(chosen)
    card = device.type == "cuda"
    family = describe_file(chosen.checkpoint).family if chosen.checkpoint else chosen.family
    cases = speed.PUBLISHED if card else speed.NARROW
    if family or chosen.resolution or chosen.batch:
        family = family or "sd1"
        usual = next((case for case in cases if case.family == family), speed.Case(family, 512, 1))
        side, batch = chosen.resolution or usual.resolution, chosen.batch or 1
        known = [case for case in cases if (case.family, case.resolution, case.batch) == (family, side, batch)]
        cases = tuple(known) or (speed.Case(family, side, batch),)
    plan = speed.SpeedPlan(
        output=chosen.out, device=device, cases=cases, steps=chosen.steps or (50 if card else 5),
        warm_up=chosen.warm_up or (10 if card else 1), repeats=chosen.repeats, rank=chosen.rank,
        precision=chosen.precision or ("fp16" if card else "no"), small=chosen.size == "small" or not (card or chosen.size),
        checkpoint=chosen.checkpoint, changes=dict(assignment(text) for text in chosen.set),
        compared=compared_settings(chosen.compare or (["eager", "graphs"] if card else ["defaults"])))
    if chosen.against:
        text = pairing.run_against(plan, chosen.against, pairs=chosen.pairs, by_processor=chosen.processor_time, say=_say)
    else:
        text = speed.run_speed(plan, say=_say)
    print(f"\n{text}\nFigures: {chosen.out}")
    return 0


def _check_against(chosen: argparse.Namespace) -> None:
    """Raises SettingError for what has no effect with, or without, --against."""
    if chosen.against and (chosen.compare or chosen.repeats != 1):
        raise SettingError(f"--{'compare' if chosen.compare else 'repeats'} has no effect with --against",
                           remedy="--set changes this trainer's settings, --pairs says how often both are run")
    if not chosen.against and (chosen.processor_time or chosen.pairs != 3):
        raise SettingError(f"--{'processor-time' if chosen.processor_time else 'pairs'} has no effect without --against")


def run_memory(chosen: argparse.Namespace) -> int:
    """`bench memory`; returns the exit code."""
    from tools.bench import memory, speed

    device = _device(chosen)
    card = device.type == "cuda"
    plan = memory.MemoryPlanned(
        output=chosen.out, device=device, cases=speed.PUBLISHED if card else speed.NARROW, rank=chosen.rank,
        small=chosen.size == "small" or not (card or chosen.size), precision=chosen.precision or ("fp16" if card else "no"),
        predict=not chosen.measured_only)
    print(f"\n{memory.run_memory(plan, say=_say)}\nFigures: {chosen.out}")
    return 0


def run_cache(chosen: argparse.Namespace) -> int:
    """`bench cache`; returns the exit code."""
    from tools.bench import cache

    text = cache.run_cache(images=chosen.images, size=chosen.size, output=chosen.out, say=_say, device=_device(chosen))
    print(f"\n{text}\nFigures: {chosen.out}")
    return 0


def run_startup(chosen: argparse.Namespace) -> int:
    """`bench startup`; returns the exit code."""
    from tools.bench import startup

    print(f"\n{startup.run_startup(size=chosen.size, steps=chosen.steps, output=chosen.out, say=_say)}\nFigures: {chosen.out}")
    return 0


def run_model(chosen: argparse.Namespace) -> int:
    """`bench model`; returns the exit code."""
    from tools.bench.true_size import DTYPES, true_size_checkpoint

    print(true_size_checkpoint(chosen.family, chosen.out, dtype=DTYPES[chosen.dtype], small=chosen.size == "small"))
    return 0


def run_studio(chosen: argparse.Namespace) -> int:
    """`bench studio`; returns the exit code."""
    from tools.bench import studio

    try:
        sizes = tuple(map(int, chosen.images.split(","))) if chosen.images else studio.SIZES
    except ValueError as error:
        raise SettingError(f"--pictures {chosen.images} is no list of numbers",
                           remedy="write --pictures 1000,10000") from error
    text = studio.run_studio(sizes, output=chosen.out, say=_say)
    print(f"\n{text}\nFigures: {chosen.out / 'studio.json'}")
    return 0


def _device(chosen: argparse.Namespace) -> torch.device:
    """The card, where there is one and nothing else was said; sets the number of threads too."""
    import torch

    from lib_lora_train.host.placement import indexed

    if chosen.device == "cuda" and not torch.cuda.is_available():
        raise SettingError("There is no card to measure on", why="torch finds no CUDA device")
    if chosen.threads > 0:
        torch.set_num_threads(chosen.threads)
        os.environ["OMP_NUM_THREADS"] = str(chosen.threads)  # for the programs that are started
    return indexed(torch.device(chosen.device or ("cuda" if torch.cuda.is_available() else "cpu")))


def _say(text: str) -> None:
    print(text, flush=True)
