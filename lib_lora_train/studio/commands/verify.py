"""`python -m lib_lora_train check-captions DIR` and `class-pictures`: how well captions fit by the model, and class images."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from lib_lora_train.dataset.captions import first_line
from lib_lora_train.errors import DatasetError, SettingError, translated
from lib_lora_train.evaluation.caption_check import Checked, check_captions
from lib_lora_train.evaluation.check_sheet import draw_checks
from lib_lora_train.evaluation.class_images import make_class_images
from lib_lora_train.host.standalone import StandaloneHost, describe_file
from lib_lora_train.model.family import training_sizes
from lib_lora_train.settings import parse, resolution_of
from lib_lora_train.storage.atomic import replacing
from lib_lora_train.studio.captions.store import CaptionStore
from lib_lora_train.studio.commands.progress import progress_bar

SOME_FAILED = 3


def run_check(chosen: argparse.Namespace) -> int:
    """`check-captions`; returns the exit code. Raises UserError for bad input."""
    _check_numbers(chosen)
    rows: list[Checked] = []
    interrupted = False
    try:
        for row in _checks(chosen):
            rows.append(row)
            tqdm.write(_as_json(row) if chosen.json else _as_text(row))
            sys.stdout.flush()
    except KeyboardInterrupt:
        interrupted = True
    if chosen.sheet and rows:
        with translated("the sheet was written"), replacing(chosen.sheet) as file:
            # An image can be seen anywhere; what was generated, only here.
            draw_checks([row for row in rows if row.images or row.problem] or rows).save(file, "PNG")
        print(f"The sheet: {chosen.sheet}", file=sys.stderr)
    if not chosen.json:
        print("Score: how far the caption pushes the model towards this picture, of 100; 0 has nothing to do with it.\n"
              "Compare the scores and look at the lowest: pictures unlike all that the model knows score low with any caption.")
    return 130 if interrupted else SOME_FAILED if any(row.problem for row in rows) else 0


def _checks(chosen: argparse.Namespace) -> Iterator[Checked]:
    """The rows: images whose captions cannot be read, then those that the model checked."""
    settings, host = parse({"resolution": chosen.resolution}), _host(chosen, chosen.folder)
    store = CaptionStore.open(chosen.folder)
    if not store.images:
        raise DatasetError(f"There is no picture in {chosen.folder}")
    unreadable = [index for index in range(len(store.images)) if store.problem(index)]
    yield from (Checked(store.images[index], "", problem=store.problem(index)) for index in unreadable)
    items = [(path, first_line(store.caption(index))) for index, path in enumerate(store.images) if index not in unreadable]
    seeds = chosen.seeds if chosen.seeds is not None else 2 if chosen.sheet else 0
    with progress_bar("Checking captions") as progress:
        yield from check_captions(host, items, settings=settings, seeds=seeds, steps=chosen.steps, cfg=chosen.cfg,
                                  worst=chosen.worst, on_progress=progress)


def run_class_images(chosen: argparse.Namespace) -> int:
    """`class-pictures`; returns the exit code. Raises UserError for bad input."""
    _check_numbers(chosen)
    host = _host(chosen, chosen.to)
    checkpoint = host.checkpoint()
    size = resolution_of(chosen.resolution, default=training_sizes(checkpoint.family if checkpoint else "").default)
    try:
        with progress_bar("Painting") as progress:
            done = make_class_images(
                host, prompts=chosen.prompt, count=chosen.count, folder=chosen.to, size=size, steps=chosen.steps,
                cfg=chosen.cfg, seed=chosen.seed, negative_prompt=chosen.negative, on_progress=progress)
    except KeyboardInterrupt:
        print("\nStopped; what was painted stays, and the same command goes on.", file=sys.stderr)
        return 130
    print(f"Painted {done.made}; {done.found} were there already. Use {done.folder} as reg_data_dir.")
    return 0


def _host(chosen: argparse.Namespace, folder: Path) -> StandaloneHost:
    describe_file(chosen.checkpoint)  # a wrong one is refused before anything is read
    return StandaloneHost(chosen.checkpoint, lora_folder=folder, runs_folder=folder / "runs")  # neither is used here


def _check_numbers(chosen: argparse.Namespace) -> None:
    for name, least in (("steps", 1), ("worst", 0), ("seeds", 0)):
        value = getattr(chosen, name, None)
        if value is not None and value < least:
            raise SettingError(f"--{name} {value} is not possible", why=f"it must be at least {least}")


def _as_json(row: Checked) -> str:
    return json.dumps({"picture": str(row.path), "caption": row.caption, "score": row.score, "gain": row.gain,
                       "similarity": row.similarity, "problem": row.problem})


def _as_text(row: Checked) -> str:
    if row.problem or row.score is None or row.gain is None:
        return f"  - {'':18} {row.path.name}: {row.problem}"
    near = "" if row.similarity is None else f"  similarity {row.similarity:.2f}"
    return f"{row.score:3.0f}  loss {-row.gain:+8.1%}{near}  {row.path.name}: {row.caption}"
