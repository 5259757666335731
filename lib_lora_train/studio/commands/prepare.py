"""`python -m lib_lora_train prepare SOURCE… --to DIR`: pictures from anywhere into a dataset, cut to size."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lib_lora_train.studio.cropping.crop import Box, Shape, Shaped
    from lib_lora_train.studio.importing.collect import Collected
    from lib_lora_train.studio.importing.owned import OwnedDataset

# Only what costs nothing is imported here.

SOME_LEFT_OUT = 3
_EPOCHS = 10  # the default of max_train_epochs, for which repeats are proposed


def add_prepare(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `prepare`. Exit codes: 0 done, 2 bad input, 3 done but for what was named, 130 interrupted (what was done until
    then stays)."""
    prepare = commands.add_parser("prepare", help="bring pictures into a dataset and cut them to size")
    prepare.add_argument("sources", nargs="+", type=Path, metavar="SOURCE", help="pictures, folders of pictures (with the "
                         "folders in them) and zip files; they are only read. Captions beside the pictures come along")
    prepare.add_argument("--to", type=Path, required=True, metavar="DIR", help="the dataset's folder; a new one is made, "
                         "and pictures are added to one that `prepare` or the page made")
    prepare.add_argument("--name", default="", metavar="CONCEPT", help="what the pictures show, as in 10_name")
    prepare.add_argument("--repeats", type=int, help="how often an epoch shows each picture (by default 100 times a picture "
                         f"and 1500 times in all over {_EPOCHS} epochs)")
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
    prepare.set_defaults(command=run)


def run(chosen: argparse.Namespace) -> int:
    """`prepare`; returns the exit code. Raises UserError for bad input."""
    from lib_lora_train.studio.cropping.crop import Shape

    shape = None
    if chosen.side:
        shape = Shape("square" if chosen.square else "buckets", side=chosen.side, focus=chosen.focus, enlarge=chosen.enlarge)
    try:
        return _dry_run(chosen, shape) if chosen.dry_run else _real_run(chosen, shape)
    except KeyboardInterrupt:
        print("Stopped. What was done until now stays.", file=sys.stderr)
        return 130


def _real_run(chosen: argparse.Namespace, shape: Shape | None) -> int:
    from lib_lora_train.dataset.plan import plain_folder_repeats
    from lib_lora_train.studio.cropping.crop import apply_shape
    from lib_lora_train.studio.importing.collect import collect

    dataset, is_new = _dataset(chosen.to, concept=chosen.name, repeats=chosen.repeats)
    try:
        with _progress("Importing", shown=not chosen.json) as progress:
            found = collect(dataset, chosen.sources, transparent=chosen.transparent, on_progress=progress)
        _refuse_nothing(found, dataset)
    finally:
        if is_new and not dataset.images:
            _take_back(dataset)
    shaped = None
    if shape is not None:
        with _progress("Shaping", shown=not chosen.json) as progress:
            shaped = apply_shape(dataset, [path.name for path in found.added], shape, on_progress=progress)
    if is_new and chosen.repeats is None:
        dataset.set_repeats(plain_folder_repeats(len(dataset.images), max_train_epochs=_EPOCHS))
    return _say(chosen, dataset, found, _rows(dataset, found), shaped=shaped)


def _dry_run(chosen: argparse.Namespace, shape: Shape | None) -> int:
    """The same with nothing written but a folder that is gone afterwards."""
    from lib_lora_train.studio.cropping.crop import plan_shape
    from lib_lora_train.studio.importing.collect import collect
    from lib_lora_train.studio.importing.owned import FILE_NAME, OwnedDataset

    with tempfile.TemporaryDirectory(prefix="lora_train_") as folder:
        if (chosen.to / FILE_NAME).is_file():
            dataset = OwnedDataset.open(chosen.to)
        else:
            _refuse_foreign(chosen.to)
            dataset = OwnedDataset.create(Path(folder), chosen.to.resolve().name, concept=chosen.name)
        with _progress("Looking", shown=not chosen.json) as progress:
            found = collect(dataset, chosen.sources, transparent=chosen.transparent, dry_run=True, on_progress=progress)
        _refuse_nothing(found, dataset)
        boxes = [plan_shape(size, shape) if shape else None for size in found.sizes]
        return _say(chosen, dataset, found, [_row(path.name, size, box) for path, size, box in
                                             zip(found.added, found.sizes, boxes, strict=True)], shaped=None)


# ---- the dataset

def _dataset(folder: Path, *, concept: str, repeats: int | None) -> tuple[OwnedDataset, bool]:
    """(the dataset in `folder`, whether it was made now)."""
    from lib_lora_train.errors import translated
    from lib_lora_train.studio.importing.owned import DEFAULT_REPEATS, FILE_NAME, OwnedDataset

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
    from lib_lora_train.errors import DatasetError, translated

    with translated("the dataset's folder was looked at"):
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise DatasetError(f"{folder} is there already and no dataset of this program",
                               why="what is in it could be mixed up with the dataset",
                               remedy="choose a new folder with --to; this one can be a source")


def _refuse_nothing(found: Collected, dataset: OwnedDataset) -> None:
    """An answer of nothing at all is an error: the sources were none."""
    from lib_lora_train.errors import DatasetError

    if not found.added and not dataset.images:
        told = " | ".join(f"{name}: {why.rstrip('.')}" for name, why in found.skipped[:5])
        raise DatasetError("There is no picture to import", why=told + (" | …" if len(found.skipped) > 5 else ""))


def _take_back(dataset: OwnedDataset) -> None:
    """A dataset that was made for nothing."""
    from lib_lora_train.studio.importing.owned import FILE_NAME

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
    from lib_lora_train.studio.cropping.crop import Box, done_to

    notes, rows = dataset.notes(), []
    for path, size in zip(found.added, found.sizes, strict=True):
        done, now = done_to(notes.get(path.name, {})), dataset.images_folder / path.name
        box = Box(*done.box, done.size) if done.box and done.size else None
        rows.append({**_row(path.name, size, box), "masked": dataset.mask_path(path.name).is_file(),
                     "captioned": now.with_suffix(".txt").is_file()})
    return rows


def _say(chosen: argparse.Namespace, dataset: OwnedDataset, found: Collected, rows: list[dict[str, Any]], *,
         shaped: Shaped | None) -> int:
    skipped = [*found.skipped, *(shaped.skipped if shaped else ())]
    notes = [*found.notes, *(shaped.notes if shaped else ())]
    if chosen.json:
        # A dry run's dataset lay elsewhere.
        print(json.dumps({"folder": str(chosen.to if chosen.dry_run else dataset.folder), "concept": dataset.concept,
                          "repeats": dataset.repeats, "written": not chosen.dry_run, "pictures": rows,
                          "skipped": [{"name": name, "why": why} for name, why in skipped], "notes": notes},
                         ensure_ascii=False, indent=1))
        return SOME_LEFT_OUT if skipped else 0
    for row in rows:
        print(f"{row['name']}: {row['from'][0]}×{row['from'][1]}" + (
            f" -> {row['width']}×{row['height']}, {row['cut']:.0%} cut off" if row["from"] != [row["width"], row["height"]]
            else ""))
    for name, why in skipped:
        print(f"left out {name}: {why}")
    for note in notes:
        print(f"note: {note}")
    count = f"{len(rows)} picture{'' if len(rows) == 1 else 's'}"
    print(f"{count} would be added. Nothing was written." if chosen.dry_run else
          f"{count} added to {dataset.images_folder}. Train with --data \"{dataset.folder}\".")
    return SOME_LEFT_OUT if skipped else 0


@contextlib.contextmanager
def _progress(doing: str, *, shown: bool) -> Iterator[Callable[[int, int], None] | None]:
    """A bar on the terminal; nothing where nobody looks."""
    if not shown or not sys.stderr.isatty():
        yield None
        return
    from tqdm import tqdm

    with tqdm(desc=doing, dynamic_ncols=True) as bar:
        def advance(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)
        yield advance
