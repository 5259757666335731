"""`python -m lib_lora_train bench …`: its arguments, and what they start."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

# Only what costs nothing is imported here: these modules load torch when a command starts.


def add_bench(commands: argparse._SubParsersAction[argparse.ArgumentParser], *,
              assignment: Callable[[str], tuple[str, str]]) -> None:
    """Add `bench` with its own commands. `assignment` reads NAME=VALUE, as for `train`."""
    bench = commands.add_parser("bench", help="measure how good, fast and frugal this is")
    kinds = bench.add_subparsers(required=True, metavar="quality | studio")
    quality = kinds.add_parser("quality", help="train on fixed pictures and measure what was learnt")
    quality.add_argument("--checkpoint", type=Path, help="the model, a .safetensors file; by default the one that comes along")
    quality.add_argument("--out", type=Path, default=Path("bench-output"), help="where table, figures, LoRAs and sheets go")
    quality.add_argument("--steps", type=int, help="steps of the style's training (default 400, quick 60)")
    quality.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a setting that differs from the "
                         "reference line (AdamW, 1e-4, rank 8, alpha 4, cosine); may be repeated")
    quality.add_argument("--no-subject", action="store_true", help="measure the style only")
    quality.add_argument("--threads", type=int, default=0, help="processor threads (by default two; the last digits of the "
                         "figures may follow their number)")
    quality.add_argument("--quick", action="store_true", help="to see whether it works, in two minutes; not to be quoted")
    quality.set_defaults(command=lambda chosen: run(chosen, assignment=assignment))
    studio = kinds.add_parser("studio", help="measure the caption editor on many pictures")
    studio.add_argument("--pictures", default="", metavar="N,N,…", help="how many (1000,2000,5000,10000)")
    studio.add_argument("--out", type=Path, default=Path("bench-output"), help="where table and figures go, and the pictures "
                        "meanwhile")
    studio.set_defaults(command=run_studio)


def run(chosen: argparse.Namespace, *, assignment: Callable[[str], tuple[str, str]]) -> int:
    """`bench quality`; returns the exit code."""
    import torch

    from lib_lora_train.bench import quality
    from lib_lora_train.bench.yardstick import QUICK, THOROUGH
    from lib_lora_train.demo.embedded import CHECKPOINT
    from lib_lora_train.errors import SettingError
    from lib_lora_train.host.standalone import StandaloneHost, describe_file

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
    quality.run_quality(plan, host, say=lambda text: print(text, flush=True))
    print(f"\n{(chosen.out / 'quality.md').read_text(encoding='utf-8')}\nFigures: {chosen.out / 'quality.json'}")
    return 0


def run_studio(chosen: argparse.Namespace) -> int:
    """`bench studio`; returns the exit code."""
    from lib_lora_train.bench import studio
    from lib_lora_train.errors import SettingError

    try:
        sizes = tuple(map(int, chosen.pictures.split(","))) if chosen.pictures else studio.SIZES
    except ValueError as error:
        raise SettingError(f"--pictures {chosen.pictures} is no list of numbers",
                           remedy="write --pictures 1000,10000") from error
    text = studio.run_studio(sizes, output=chosen.out, say=lambda line: print(line, flush=True))
    print(f"\n{text}\nFigures: {chosen.out / 'studio.json'}")
    return 0
