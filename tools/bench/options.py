"""The options of `python tools/bench`, command by command."""

from __future__ import annotations

import argparse
from pathlib import Path

from tools.bench.programs import PLACEHOLDERS
from tools.bench.variants import VARIANTS


def parser() -> argparse.ArgumentParser:
    """Of `python tools/bench`: what is given has `name`, the command's, and its options."""
    bench = argparse.ArgumentParser(prog="python tools/bench",
                                    description="Measure quality, speed and memory of the training.")
    commands = bench.add_subparsers(required=True, metavar="check | quality | recommend | rates | suggestions | eight-bits | "
                                    "background | speed | memory | cache | startup | model | studio | verdict")
    _add_quality(commands)
    _add_recommend(commands)
    _add_rates(commands)
    background = _add(commands, "background", "measure how much of its pictures' background a LoRA takes "
                      "along, with masked loss and with what preserves the model", out="table, figures, LoRAs and sheets")
    background.add_argument("--case", action="append", default=[], metavar="NAME", help="whole, masked (these by default), "
                            "'masked, 0.1 outside', 'masked, base outside', dop, blank or dco; may be repeated")
    background.add_argument("--seeds", default="42,43", metavar="N,N,…", help="a run for each (42,43)")
    background.add_argument("--steps", type=int, default=200, help="of each run (200)")
    background.add_argument("--cfg-scale", type=float, default=2.0, help="of the generated pictures (2)")
    background.add_argument("--threads", type=int, default=1, help="CPU threads (1)")
    check = _add(commands, "check", "check on a GPU what has to be seen there before it is on by default: in eight "
                 "minutes at most", out="check.jsonl, a line for each check, and check.md")
    _add_model_options(check)
    check.add_argument("--only", action="append", default=[], metavar="CHECK", help="one of the checks; may be repeated")
    check.add_argument("--seconds", type=float, default=480.0, help="after which no other check begins (480)")
    check.add_argument("--in-this-process", action="store_true", help=argparse.SUPPRESS)
    _add_speed(commands)
    memory = _add(commands, "memory", "compare the memory plan's prediction with what is measured here; predict "
                  "for GPUs of several sizes", out="tables and figures")
    _add_model_options(memory)
    memory.add_argument("--measured-only", action="store_true", help="leave out the table of predictions for GPUs")
    cache = _add(commands, "cache", "measure how fast pictures become latents, and a second start",
                 out="table and figures, and the pictures meanwhile")
    cache.add_argument("--pictures", dest="images", type=int, default=10_000, help="number of pictures (10000)")
    cache.add_argument("--size", default="512", metavar="N|WIDTHxHEIGHT", help="the resolution they are trained at (512)")
    cache.add_argument("--device", choices=("cuda", "cpu"), help="by default the GPU where there is one")
    cache.add_argument("--threads", type=int, default=0, help="CPU threads of torch")
    startup = _add(commands, "startup", "measure the time from the click to the first step, and from the last "
                   "step to a usable file", out="table and figures, and the checkpoint meanwhile")
    startup.add_argument("--size", choices=("small", "sd15", "sdxl"), default="small", help="the checkpoint")
    startup.add_argument("--steps", type=int, default=3, help="steps of a run (3)")
    model = _add(commands, "model", "write a checkpoint of the true size with random weights", out="the file")
    model.add_argument("family", choices=("sd1", "sd2", "sdxl"))
    model.add_argument("--dtype", choices=("fp32", "fp16", "bf16"), default="fp16")
    model.add_argument("--size", choices=("true", "small"), default="true", help="small: the same structure, narrower")
    studio = _add(commands, "studio", "measure the caption editor on many pictures",
                  out="table and figures, and the pictures meanwhile")
    studio.add_argument("--pictures", dest="images", default="", metavar="N,N,…",
                        help="numbers of pictures (1000,2000,5000,10000)")
    verdict = _add(commands, "verdict", "make runs go wrong on purpose and see whether the verdict says what did",
                   out="table and figures, the runs' events, and their files meanwhile")
    verdict.add_argument("--data", choices=("style", "subject", "both"), help="the demo's pictures; by default each run's own")
    verdict.add_argument("--seeds", default="42", metavar="N,N,…", help="seeds of the runs (42)")
    verdict.add_argument("--case", action="append", default=[], metavar="NAME", help="only this run; may be repeated")
    return bench


def _add(commands: argparse._SubParsersAction, name: str, text: str, *, out: str, more: str = "") -> argparse.ArgumentParser:
    """A command with its `--out`; `more` is its description where that is not its line in the list of commands."""
    parser = commands.add_parser(name, help=text, description=more or f"{text[0].upper()}{text[1:]}.")
    parser.add_argument("--out", type=Path, default=Path("bench-output"), help=f"folder for {out} (bench-output)")
    parser.set_defaults(name=name)
    return parser


def _add_model_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--size", choices=("true", "small"), help="the measured model's size; by default true with a GPU, "
                        "else small")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="by default the GPU where there is one")
    parser.add_argument("--precision", choices=("no", "fp16", "bf16"), help="by default fp16 with a GPU, else no (fp32)")
    parser.add_argument("--rank", type=int, default=16, help="the LoRA's rank (16)")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads")


def _add_quality(commands: argparse._SubParsersAction) -> None:
    quality = _add(commands, "quality", "train on fixed pictures and measure what was learnt",
                   out="table, figures, LoRAs and sheets")
    quality.add_argument("--checkpoint", type=Path, help="the model, a .safetensors file; by default the demo's")
    quality.add_argument("--steps", type=int, help="steps of the style's training (default 400, quick 60)")
    quality.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a setting that differs from the "
                         "reference line (AdamW, 1e-4, rank 8, alpha 4, cosine); may be repeated")
    quality.add_argument("--vary", action="append", default=[], metavar="NAME=VALUE,VALUE,…", help="other values of a setting, "
                         "each with a line of its own in the headline; may be repeated")
    quality.add_argument("--style", action="append", default=[], metavar="NAME", help="one of the graded styles alone; may "
                         "be repeated")
    quality.add_argument("--runs", type=int, help="trainings of each, which differ in their seed (3, quick 1)")
    quality.add_argument("--seeds", type=int, help="images of each word (4, quick 1)")
    quality.add_argument("--packages", type=Path, help="folder for npm's packages, fetched once (OUT/packages)")
    quality.add_argument("--no-subject", action="store_true", help="the styles only")
    quality.add_argument("--test", action="store_true", help="ask for the words of the test: to tell at the end whether a "
                         "choice holds, not to make one")
    quality.add_argument("--control", action="store_true", help="also train each style with diffusers: a LoRA by peft, and "
                         "the whole UNet")
    quality.add_argument("--threads", type=int, default=0, help="CPU threads (by default two; the last digits of the figures "
                         "may depend on their number)")
    quality.add_argument("--quick", action="store_true", help="a check that it works; not to be quoted")


def _add_recommend(commands: argparse._SubParsersAction) -> None:
    recommend = _add(commands, "recommend", "measure how well the scores of a run's grid order its saves",
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
        parser = _add(commands, name, about, out="table and figures; what is there already is not made again")
        parser.add_argument("--case", action="append", choices=("style", "subject"), default=[], help="by default both")
        parser.add_argument("--seeds", default="42,43,44", metavar="N,N,…", help="a run for each (42,43,44)")
        parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="one of all runs; may be repeated")
        parser.add_argument("--threads", type=int, default=1, help="CPU threads (1)")


def _add_speed(commands: argparse._SubParsersAction) -> None:
    speed = _add(commands, "speed", "measure seconds a training step, beside the step's roofline and beside another "
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
