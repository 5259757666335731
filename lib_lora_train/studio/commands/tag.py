"""`python -m lib_lora_train tag DIR --with …`: captions for a folder of images, all written at the end or none."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path

import torch
from tqdm import tqdm

from lib_lora_train.errors import DatasetError, SettingError
from lib_lora_train.settings import assignment
from lib_lora_train.studio.captions.store import CaptionStore
from lib_lora_train.studio.commands.progress import progress_bar
from lib_lora_train.tagging.captioner import CaptionerSource
from lib_lora_train.tagging.loop import Row, tag_images
from lib_lora_train.tagging.options import parse_options
from lib_lora_train.tagging.plain import PLAIN_SOURCES
from lib_lora_train.tagging.wd import PUBLISHED, WDSource

SOME_FAILED = 3


def run(chosen: argparse.Namespace) -> int:
    """`tag`; returns the exit code. Raises UserError for bad input."""
    options = parse_options(_values(chosen))
    source, device = _source(chosen), _device(chosen.device)
    store = CaptionStore.open(chosen.folder)
    for note in store.notes:
        print(note, file=sys.stderr)
    if not store.images:
        raise DatasetError(f"There is no picture in {chosen.folder}")
    index = {path: index for index, path in enumerate(store.images)}
    with progress_bar("Captioning", shown=not chosen.json) as progress:
        rows = tag_images(store.images, source, options=options, existing=lambda path: store.readable_caption(index[path]),
                          device=device, on_progress=progress)
        captions, problems, interrupted = _gathered(rows, as_json=chosen.json, quietly=not chosen.dry_run)
    if chosen.dry_run:
        if not chosen.json:
            print(f"{len(captions)} captions would be written, {problems} pictures have problems. Nothing was written.")
    else:
        _write(store, captions, label=source.label, as_json=chosen.json)
    return 130 if interrupted else SOME_FAILED if problems else 0


def _values(chosen: argparse.Namespace) -> dict[str, object]:
    values = dict(assignment(text) for text in chosen.set)
    named = {"general_threshold": chosen.threshold, "character_threshold": chosen.character_threshold, "mode": chosen.mode,
             "trigger_word": chosen.trigger, "template": chosen.template, "download": chosen.download or None}
    return values | {name: value for name, value in named.items() if value is not None}


def _source(chosen: argparse.Namespace) -> CaptionerSource:
    if chosen.source == "wd":
        # Below the current folder, as the page without a WebUI has it below its own.
        return WDSource(chosen.model or Path("taggers") / PUBLISHED[0])
    if chosen.model is not None:
        raise SettingError(f"--model has no effect with --with {chosen.source}", remedy="leave it out, or take --with wd")
    return next(source for source in PLAIN_SOURCES if source.name == chosen.source)


def _device(name: str) -> torch.device:
    try:
        return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise SettingError(f"--device {name} is not possible", why=str(error).splitlines()[0]) from error


def _gathered(rows: Iterable[Row], *, as_json: bool, quietly: bool) -> tuple[dict[Path, str], int, bool]:
    """The new captions, how many images had problems, and whether Ctrl+C ended it."""
    captions: dict[Path, str] = {}
    problems = 0
    try:
        for path, caption, problem in rows:
            if caption is not None:
                captions[path] = caption
            problems += bool(problem)
            if as_json:
                row = {"picture": str(path), "caption": caption, "problem": problem}
                print(json.dumps(row), flush=True)
            elif problem:
                tqdm.write(f"{path.name}: {problem}", file=sys.stderr)
            elif not quietly and caption is not None:
                tqdm.write(f"{path.name}: {caption}")
    except KeyboardInterrupt:
        print("Stopped; what was found until here is kept.", file=sys.stderr)
        return captions, problems, True
    return captions, problems, False


def _write(store: CaptionStore, captions: dict[Path, str], *, label: str, as_json: bool) -> None:
    store.set_captions({index: captions[path] for index, path in enumerate(store.images) if path in captions}, label)
    saved = store.save()
    for path in saved.conflicts:
        print(f"{path} was changed by another program meanwhile and is left as it is.", file=sys.stderr)
    if not as_json:
        kept = f" What was there before is in {saved.backup}." if saved.backup else ""
        print(f"{saved.written} captions written.{kept}")
