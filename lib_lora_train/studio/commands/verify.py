"""`python -m lib_lora_train check-captions DIR` and `class-pictures`: what the model itself says and paints."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lib_lora_train.evaluation.caption_check import Checked
    from lib_lora_train.host.standalone import StandaloneHost

# Only what costs nothing is imported here: these modules load torch when the command starts.

SOME_FAILED = 3


def add_verify(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `check-captions` and `class-pictures`. Exit codes: 0 done, 2 bad input, 3 checked but for pictures that were
    named, 130 interrupted (pictures painted until then stay)."""
    check = commands.add_parser("check-captions", help="ask the model whether captions describe their pictures; worst first")
    check.add_argument("folder", type=Path, metavar="DIR", help="the pictures, or a folder of folders named like 10_name")
    check.add_argument("--sheet", type=Path, metavar="FILE.png", help="paint from the captions too, and draw originals and "
                       "paintings side by side")
    check.add_argument("--seeds", type=int, help="pictures to paint for each caption (2 with --sheet, else 0)")
    check.add_argument("--worst", type=int, default=24, help="paint for so many of the worst captions only")
    check.add_argument("--json", action="store_true", help="one JSON object a picture instead of text")
    _add_generated(check)
    check.add_argument("--resolution", default="auto", help="the size to look at: auto, 512, or 768,512")
    check.set_defaults(command=run_check)

    images = commands.add_parser("class-pictures", help="paint preservation pictures (kohya's reg_data_dir) from prompts")
    images.add_argument("--prompt", action="append", required=True, metavar="TEXT", help="what the class is (a photo of a "
                          "girl); may be repeated, they are taken in turn")
    images.add_argument("--count", type=int, required=True, help="how many there are to be; those that are there count")
    images.add_argument("--to", type=Path, required=True, metavar="DIR", help="they go into DIR/1_class; DIR is reg_data_dir")
    images.add_argument("--resolution", default="auto", help="their size: auto, 512, or 768,512")
    images.add_argument("--negative", default="", metavar="TEXT", help="the negative prompt")
    images.add_argument("--seed", type=int, default=1, help="of the first picture; the others count on from it")
    _add_generated(images)
    images.set_defaults(command=run_class_images)


def _add_generated(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", type=Path, required=True, help="the model, a .safetensors file")
    parser.add_argument("--steps", type=int, default=20, help="steps a picture is painted in")
    parser.add_argument("--cfg", type=float, default=7.0, help="how strongly the text is followed while painting")


def run_check(chosen: argparse.Namespace) -> int:
    """`check-captions`; returns the exit code. Raises UserError for bad input."""
    from lib_lora_train.errors import translated
    from lib_lora_train.evaluation.check_sheet import draw_checks
    from lib_lora_train.storage.atomic import replacing

    _check_numbers(steps=(chosen.steps, 1), worst=(chosen.worst, 0), seeds=(chosen.seeds or 0, 0))
    rows: list[Checked] = []
    interrupted = False
    try:
        for row in _checks(chosen):
            rows.append(row)
            print(_as_json(row) if chosen.json else _as_text(row), flush=True)
    except KeyboardInterrupt:
        interrupted = True
    if chosen.sheet and rows:
        with translated("the sheet was written"), replacing(chosen.sheet) as file:
            # A picture can be seen anywhere; what was painted, only here.
            draw_checks([row for row in rows if row.images or row.problem] or rows).save(file, "PNG")
        print(f"The sheet: {chosen.sheet}", file=sys.stderr)
    if not chosen.json:
        print("Score: how far the caption pushes the model towards this picture, of 100; 0 has nothing to do with it.\n"
              "Compare the scores and look at the lowest: pictures unlike all that the model knows score low with any caption.")
    return 130 if interrupted else SOME_FAILED if any(row.problem for row in rows) else 0


def _checks(chosen: argparse.Namespace) -> Iterator[Checked]:
    """The rows: pictures whose captions cannot be read, then those that the model was asked about."""
    from lib_lora_train.dataset.captions import first_line
    from lib_lora_train.errors import DatasetError
    from lib_lora_train.evaluation.caption_check import Checked, check_captions
    from lib_lora_train.settings import parse
    from lib_lora_train.studio.captions.store import CaptionStore

    settings, host = parse({"resolution": chosen.resolution}), _host(chosen, chosen.folder)
    store = CaptionStore.open(chosen.folder)
    if not store.images:
        raise DatasetError(f"There is no picture in {chosen.folder}")
    unreadable = [index for index in range(len(store.images)) if store.problem(index)]
    yield from (Checked(store.images[index], "", problem=store.problem(index)) for index in unreadable)
    items = [(path, first_line(store.caption(index))) for index, path in enumerate(store.images) if index not in unreadable]
    seeds = chosen.seeds if chosen.seeds is not None else 2 if chosen.sheet else 0
    with _Counter("checked and painted") as counter:
        yield from check_captions(host, items, settings=settings, seeds=seeds, steps=chosen.steps, cfg=chosen.cfg,
                                  worst=chosen.worst, on_progress=counter)


def run_class_images(chosen: argparse.Namespace) -> int:
    """`class-pictures`; returns the exit code. Raises UserError for bad input."""
    from lib_lora_train.evaluation.class_images import make_class_images
    from lib_lora_train.model.family import training_sizes
    from lib_lora_train.settings import resolution_of

    _check_numbers(steps=(chosen.steps, 1))
    host = _host(chosen, chosen.to)
    checkpoint = host.checkpoint()
    size = resolution_of(chosen.resolution, default=training_sizes(checkpoint.family if checkpoint else "").default)
    try:
        with _Counter("painted") as counter:
            done = make_class_images(
                host, prompts=chosen.prompt, count=chosen.count, folder=chosen.to, size=size, steps=chosen.steps,
                cfg=chosen.cfg, seed=chosen.seed, negative_prompt=chosen.negative, on_progress=counter)
    except KeyboardInterrupt:
        print("\nStopped; what was painted stays, and the same command goes on.", file=sys.stderr)
        return 130
    print(f"Painted {done.made}; {done.found} were there already. Use {done.folder} as reg_data_dir.")
    return 0


def _host(chosen: argparse.Namespace, folder: Path) -> StandaloneHost:
    from lib_lora_train.host.standalone import StandaloneHost, describe_file

    describe_file(chosen.checkpoint)  # a wrong one is refused before anything is read
    return StandaloneHost(chosen.checkpoint, lora_folder=folder, runs_folder=folder / "runs")  # neither is used here


def _check_numbers(*, steps: tuple[int, int], worst: tuple[int, int] = (0, 0), seeds: tuple[int, int] = (0, 0)) -> None:
    from lib_lora_train.errors import SettingError

    for name, (value, least) in (("steps", steps), ("worst", worst), ("seeds", seeds)):
        if value < least:
            raise SettingError(f"--{name} {value} is not possible", why=f"it must be at least {least}")


def _as_json(row: Checked) -> str:
    return json.dumps({"picture": str(row.path), "caption": row.caption, "score": row.score, "gain": row.gain,
                       "similarity": row.similarity, "problem": row.problem}, ensure_ascii=False)


def _as_text(row: Checked) -> str:
    if row.problem or row.score is None or row.gain is None:
        return f"  - {'':18} {row.path.name}: {row.problem}"
    near = "" if row.similarity is None else f"  similarity {row.similarity:.2f}"
    return f"{row.score:3.0f}  loss {-row.gain:+8.1%}{near}  {row.path.name}: {row.caption}"


class _Counter:
    """Progress in place on a terminal's stderr; nothing where nobody looks."""

    def __init__(self, doing: str) -> None:
        self._doing, self._shown = doing, sys.stderr.isatty()

    def __enter__(self) -> _Counter:
        return self

    def __exit__(self, *_: object) -> None:
        self._write("")

    def __call__(self, done: int, total: int) -> None:
        self._write(f"{done} of {total} {self._doing}")

    def _write(self, text: str) -> None:
        if self._shown:
            print(f"\r{text:40}\r", end="", file=sys.stderr, flush=True)
