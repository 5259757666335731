"""`python -m lib_lora_train prepare SOURCE… --to DIR`: images from anywhere into a dataset, cut to size."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from lib_lora_train.dataset.plan import plain_folder_repeats
from lib_lora_train.errors import DatasetError, counted, translated
from lib_lora_train.studio.commands.arguments import USUAL_EPOCHS
from lib_lora_train.studio.commands.progress import progress_bar
from lib_lora_train.studio.cropping.crop import Box, Shape, Shaped, apply_shape, done_to, plan_shape
from lib_lora_train.studio.importing.collect import Collected, collect
from lib_lora_train.studio.importing.owned import DEFAULT_REPEATS, FILE_NAME, OwnedDataset
from lib_lora_train.studio.requests import validated

SOME_LEFT_OUT = 3


def run(chosen: argparse.Namespace) -> int:
    """`prepare`; returns the exit code. Raises UserError for bad input."""
    shape = None
    if chosen.side:
        shape = validated(Shape, {"mode": "square" if chosen.square else "buckets", "side": chosen.side,
                                  "focus": chosen.focus, "enlarge": chosen.enlarge}, what="shape")
    try:
        return _dry_run(chosen, shape) if chosen.dry_run else _real_run(chosen, shape)
    except KeyboardInterrupt:
        print("Stopped. What was done until now stays.", file=sys.stderr)
        return 130


def _real_run(chosen: argparse.Namespace, shape: Shape | None) -> int:
    dataset, is_new = _dataset(chosen.to, concept=chosen.name, repeats=chosen.repeats)
    try:
        with progress_bar("Importing", shown=not chosen.json) as progress:
            found = collect(dataset, chosen.sources, transparent=chosen.transparent, on_progress=progress)
        _refuse_nothing(found, dataset)
    finally:
        if is_new and not dataset.images:
            _remove_empty(dataset)
    shaped = None
    if shape is not None:
        with progress_bar("Shaping", shown=not chosen.json) as progress:
            shaped = apply_shape(dataset, [path.name for path in found.added], shape, on_progress=progress)
    if is_new:
        _choose_repeats(dataset, found, chosen=chosen.repeats)
    return _report(chosen, dataset, found, _rows(dataset, found), shaped=shaped)


def _dry_run(chosen: argparse.Namespace, shape: Shape | None) -> int:
    """The same with nothing written but a folder that is gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="lora_train_") as folder:
        if not (is_new := not (chosen.to / FILE_NAME).is_file()):
            dataset = OwnedDataset.open(chosen.to)
        else:
            _refuse_foreign(chosen.to)
            dataset = OwnedDataset.create(Path(folder), chosen.to.resolve().name, concept=chosen.name)
        with progress_bar("Looking", shown=not chosen.json) as progress:
            found = collect(dataset, chosen.sources, transparent=chosen.transparent, dry_run=True, on_progress=progress)
        _refuse_nothing(found, dataset)
        if is_new:
            _choose_repeats(dataset, found, chosen=chosen.repeats)
        boxes = [plan_shape(size, shape) if shape else None for size in found.sizes]
        rows = [_row(path.name, size, box) for path, size, box in zip(found.added, found.sizes, boxes, strict=True)]
        return _report(chosen, dataset, found, rows, shaped=None)


# ---- the dataset

def _dataset(folder: Path, *, concept: str, repeats: int | None) -> tuple[OwnedDataset, bool]:
    """(the dataset in `folder`, whether it was made now)."""
    if (folder / FILE_NAME).is_file():
        dataset = OwnedDataset.open(folder)
        if concept:
            dataset.set_concept(concept)
        if repeats is not None:
            dataset.set_repeats(repeats)
        return dataset, False
    _refuse_foreign(folder)
    folder = folder.resolve()
    with translated("the dataset was made"):
        if folder.is_dir():
            folder.rmdir()  # empty, as was seen above
    return OwnedDataset.create(folder.parent, folder.name, concept=concept,
                               repeats=DEFAULT_REPEATS if repeats is None else repeats), True


def _refuse_foreign(folder: Path) -> None:
    with translated("the dataset's folder was looked at"):
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise DatasetError(f"{folder} is there already and no dataset of this program",
                               why="what is in it could be mixed up with the dataset",
                               remedy="choose a new folder with --to; this one can be a source")


def _choose_repeats(dataset: OwnedDataset, found: Collected, *, chosen: int | None) -> None:
    """Of a new dataset: as chosen, as the folders of all its images say, or by the rule of plain folders."""
    dataset.set_repeats(chosen or found.one_repeats() or plain_folder_repeats(len(found.added), max_train_epochs=USUAL_EPOCHS))


def _refuse_nothing(found: Collected, dataset: OwnedDataset) -> None:
    """An answer of nothing at all is an error: the sources were none."""
    if not found.added and not dataset.images:
        told = " | ".join(f"{name}: {why.rstrip('.')}" for name, why in found.skipped[:5])
        raise DatasetError("There is no picture to import", why=told + (" | …" if len(found.skipped) > 5 else ""))


def _remove_empty(dataset: OwnedDataset) -> None:
    """Remove a dataset that was made now and got no image."""
    with contextlib.suppress(OSError):
        dataset.images_folder.rmdir()
        (dataset.folder / FILE_NAME).unlink()
        dataset.folder.rmdir()


# ---- what is said

def _row(name: str, size: tuple[int, int], box: Box | None) -> dict[str, Any]:
    made = box.size if box else size
    return {"name": name, "width": made[0], "height": made[1], "from": list(size),
            "cut": round(box.lost(size), 4) if box else 0.0}


def _rows(dataset: OwnedDataset, found: Collected) -> list[dict[str, Any]]:
    notes, rows = dataset.notes(), []
    for path, size in zip(found.added, found.sizes, strict=True):
        done, now = done_to(notes.get(path.name, {})), dataset.images_folder / path.name
        box = Box(done.box, done.size) if done.box and done.size else None
        rows.append({**_row(path.name, size, box), "masked": dataset.mask_path(path.name).is_file(),
                     "captioned": now.with_suffix(".txt").is_file()})
    return rows


def _report(chosen: argparse.Namespace, dataset: OwnedDataset, found: Collected, rows: list[dict[str, Any]], *,
            shaped: Shaped | None) -> int:
    skipped = [*found.skipped, *(shaped.skipped if shaped else ())]
    notes = [*filter(None, [*found.notes, found.repeats_note(dataset.repeats)]), *(shaped.notes if shaped else ())]
    if chosen.json:
        # A dry run's dataset lay elsewhere.
        print(json.dumps({"folder": str(chosen.to if chosen.dry_run else dataset.folder), "concept": dataset.concept,
                          "repeats": dataset.repeats, "written": not chosen.dry_run, "pictures": rows,
                          "skipped": [{"name": name, "why": why} for name, why in skipped], "notes": notes,
                          "captions": found.captions}, indent=1))
        return SOME_LEFT_OUT if skipped else 0
    for row in rows:
        print(f"{row['name']}: {row['from'][0]}×{row['from'][1]}" + (
            f" -> {row['width']}×{row['height']}, {row['cut']:.0%} cut off" if row["from"] != [row["width"], row["height"]]
            else ""))
    for name, why in skipped:
        print(f"left out {name}: {why}")
    for note in notes:
        print(f"note: {note}")
    count = counted(len(rows), "picture")
    print(f"{count} would be added. Nothing was written." if chosen.dry_run else
          f"{count} added to {dataset.images_folder}. Train with --data \"{dataset.folder}\".")
    print(found.captions)
    return SOME_LEFT_OUT if skipped else 0
