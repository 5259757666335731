"""The arguments of the commands `check`, `prepare`, `tag`, `check-captions` and `class-pictures`.

Nothing here imports torch or numpy, so that every other command and `--help` start at once; a command's own module is
imported when it runs.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable
from typing import Any

from lib_lora_train import terminal
from lib_lora_train.errors import translated
from lib_lora_train.settings import DECLARATIONS, user_path
from lib_lora_train.tagging.options import MODES, OPTIONS

USUAL_EPOCHS = DECLARATIONS["max_train_epochs"].default  # for which repeats are proposed
Commands = Any  # what ArgumentParser.add_subparsers returns
_FAMILIES = ("sd1", "sd2", "sdxl")
_TAG_SOURCES = ("wd", "infotext", "filename", "template")


def _run(module: str, function: str = "run") -> Callable[[argparse.Namespace], int]:
    """The command in `module`, imported when it is called. From there on Ctrl+C lets it keep what it has."""
    def run(chosen: argparse.Namespace) -> int:
        command = getattr(importlib.import_module(f"lib_lora_train.studio.commands.{module}"), function)
        terminal.raise_on_interrupt()
        return command(chosen)
    return run


def add_check(commands: Commands) -> None:
    """Add `check`. Exit codes: 0 nothing to fix, 2 cannot be trained on as it is, 3 something to look at, 130 interrupted."""
    check = commands.add_parser(
        "check", help="say what is in a folder of pictures and what to fix first",
        description="Nothing is changed. Exit code: 0 nothing to fix, 3 something to look at, 2 cannot be trained on.")
    check.add_argument("folder", type=user_path, metavar="DIR", help="the pictures, or a folder of folders named like 10_name")
    check.add_argument("--json", action="store_true", help="everything that was found, as JSON")
    check.add_argument("--sheet", type=user_path, metavar="FILE", help="a picture of what the crops lose, as PNG, JPEG or WebP")
    check.add_argument("--family", choices=_FAMILIES, default="", help="the kind of model that will be trained, sd1, sd2 or "
                       "sdxl: 512, 768 or 1024 pixels; sd1 unless told otherwise")
    check.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a setting of the training, such as "
                       "resolution=768; may be repeated")
    check.set_defaults(command=_run("check"))


def add_prepare(commands: Commands) -> None:
    """Add `prepare`. Exit codes: 0 done, 2 bad input, 3 done but for what was named, 130 interrupted (what was done until
    then stays)."""
    prepare = commands.add_parser("prepare", help="bring pictures into a dataset and cut them to size")
    prepare.add_argument("sources", nargs="+", type=user_path, metavar="SOURCE", help="pictures, folders of pictures (with the "
                         "folders in them) and zip files; they are only read. Captions beside the pictures come along")
    prepare.add_argument("--to", type=user_path, required=True, metavar="DIR", help="the dataset's folder; a new one is made, "
                         "and pictures are added to one that `prepare` or the page made")
    prepare.add_argument("--name", default="", metavar="CONCEPT", help="what the pictures show, as in 10_name")
    prepare.add_argument("--repeats", type=int, help="how often an epoch shows each picture (by default as the N_name folder "
                         f"of all says, or else 100 times a picture and 1500 times in all over {USUAL_EPOCHS} epochs)")
    prepare.add_argument("--side", type=int, default=512, help="size to cut to, in pixels: 512 for SD1, 768 for SD2, 1024 for "
                         "SDXL; 0 leaves the pictures as they are")
    prepare.add_argument("--square", action="store_true", help="cut to squares; otherwise each picture keeps about its own "
                         "proportions")
    prepare.add_argument("--focus", choices=("centre", "subject"), default="centre", help="what a cut keeps in its middle; "
                         "subject looks for a face, or for what stands out")
    prepare.add_argument("--enlarge", action="store_true", help="enlarge pictures that are smaller; otherwise "
                         "they are only cut")
    prepare.add_argument("--transparent", choices=("mask", "white"), default="mask", help="transparent parts become white, and "
                         "with mask a mask that marks them is kept, for trainers with masked loss")
    prepare.add_argument("--dry-run", action="store_true", help="show what would come of it and write nothing")
    prepare.add_argument("--json", action="store_true", help="the result as JSON")
    prepare.set_defaults(command=translated("the dataset was prepared")(_run("prepare")))


def add_tag(commands: Commands) -> None:
    """Add `tag`. Exit codes: 0 done, 2 bad input, 3 done but for images that were named, 130 interrupted (what was found
    until then is written)."""
    names = "\n".join(f"  {option.name} = {option.default!r}\n      {option.help}" for option in OPTIONS.values())
    tag = commands.add_parser("tag", help="caption a folder of pictures",
                              epilog=f"options for --set and their defaults:\n{names}",
                              formatter_class=argparse.RawDescriptionHelpFormatter)
    tag.add_argument("folder", type=user_path, metavar="DIR", help="the pictures, or a folder of folders named like 10_name")
    tag.add_argument("--with", dest="source", required=True, choices=_TAG_SOURCES, help="wd: a WD v3 tagger; infotext: the "
                     "prompt inside the pictures; filename: their names; template: the same text for all")
    tag.add_argument("--model", type=user_path, metavar="DIR", help="the WD tagger's folder: model.safetensors, config.json, "
                     "selected_tags.csv; or the name of a published one (wd-vit-tagger-v3)")
    tag.add_argument("--download", action="store_true", help="fetch the published tagger where it is not there")
    tag.add_argument("--threshold", metavar="N", help="general_threshold")
    tag.add_argument("--character-threshold", metavar="N", help="character_threshold")
    tag.add_argument("--mode", choices=MODES, help="what becomes of captions that are there")
    tag.add_argument("--trigger", metavar="WORD", help="trigger_word")
    tag.add_argument("--template", metavar="TEXT", help="template")
    tag.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="any option; may be repeated")
    tag.add_argument("--device", default="", help="where to compute (cuda, cpu); by default a GPU if there is one")
    tag.add_argument("--dry-run", action="store_true", help="show the captions and write nothing")
    tag.add_argument("--json", action="store_true", help="one JSON object a picture instead of text")
    tag.set_defaults(command=_run("tag"))


def add_verify(commands: Commands) -> None:
    """Add `check-captions` and `class-pictures`. Exit codes: 0 done, 2 bad input, 3 checked but for images that were
    named, 130 interrupted (images generated until then stay)."""
    check = commands.add_parser("check-captions", help="ask the model whether captions describe their pictures; worst first")
    check.add_argument("folder", type=user_path, metavar="DIR", help="the pictures, or a folder of folders named like 10_name")
    check.add_argument("--sheet", type=user_path, metavar="FILE.png", help="paint from the captions too; draws originals and "
                       "paintings side by side")
    check.add_argument("--seeds", type=int, help="pictures to paint for each caption (2 with --sheet, else 0)")
    check.add_argument("--worst", type=int, default=24, help="paint for so many of the worst captions only")
    check.add_argument("--json", action="store_true", help="one JSON object a picture instead of text")
    _add_generated(check)
    check.add_argument("--resolution", default="auto", help="the size to look at: auto, 512, or 768,512")
    check.set_defaults(command=_run("verify", "run_check"))

    images = commands.add_parser("class-pictures", help="paint preservation pictures (kohya's reg_data_dir) from prompts")
    images.add_argument("--prompt", action="append", required=True, metavar="TEXT", help="what the class is (a photo of a "
                        "girl); may be repeated, they are taken in turn")
    images.add_argument("--count", type=int, required=True, help="how many there are to be; those that are there count")
    images.add_argument("--to", type=user_path, required=True, metavar="DIR", help="reg_data_dir; they go to DIR/1_class")
    images.add_argument("--resolution", default="auto", help="their size: auto, 512, or 768,512")
    images.add_argument("--negative", default="", metavar="TEXT", help="the negative prompt")
    images.add_argument("--seed", type=int, default=1, help="of the first picture; the others count on from it")
    _add_generated(images)
    images.set_defaults(command=_run("verify", "run_class_images"))


def _add_generated(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", type=user_path, required=True, help="the model, a .safetensors file")
    parser.add_argument("--steps", type=int, default=20, help="steps a picture is painted in")
    parser.add_argument("--cfg", type=float, default=7.0, help="how strongly the text is followed while painting")
