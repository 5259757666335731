"""The scores of a run's grid: each image's, kept in the run's folder, and each column's spread over the seeds."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lib_lora_train.adapters.stack import split_tags
from lib_lora_train.dataset.images import read_image
from lib_lora_train.dataset.masks import mask_of
from lib_lora_train.dataset.progress import Progress, ShouldStop
from lib_lora_train.errors import SettingError, translated
from lib_lora_train.evaluation.scores import NAMES, ImageScores, Scorer, Spread, spread_of, tag_recall
from lib_lora_train.host.lease import ModelLease, lease_for
from lib_lora_train.host.placement import CPU
from lib_lora_train.host.port import Host
from lib_lora_train.records import from_plain
from lib_lora_train.results.grid import FOLDER, NO_DRIFT, Cell, Column, Grid, read_grid
from lib_lora_train.results.references import References, references_of, settings_of, without_trigger
from lib_lora_train.settings import Settings
from lib_lora_train.storage.atomic import write_atomic
from lib_lora_train.tagging.captioner import Captioner
from lib_lora_train.tagging.options import TagOptions
from lib_lora_train.tagging.sources import wd_sources

SCORES = f"{FOLDER}/scores.json"
MOST_TRAINING = 200
"""Images that were trained, evenly over the dataset, that a generated one is compared with."""
_WRITE_EVERY = 20
_HELD_OUT = "held out"  # in place of a file's name
_FORMULA = 3  # another number makes scores that were kept count no more


@dataclasses.dataclass(frozen=True)
class ColumnScores:
    """What was measured on a column of the grid: spreads over seeds of the means over prompts."""

    column: Column
    likeness: Spread
    prompt_following: Spread
    tag_recall: Spread
    drift: Spread
    copy_risk: Spread


@dataclasses.dataclass(frozen=True)
class Scores:
    """The scores of a grid; the first column is the base model. `images` by the name of their file in the run's folder;
    `held_out_following` is the prompt following of the held-out images themselves; `notes` are sentences about what is not
    measured."""

    columns: tuple[ColumnScores, ...]
    images: dict[str, ImageScores]
    held_out_following: float | None
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """As plain data: {columns: [{save, weight, part, likeness: {mean, deviation}, …}], images: {file: {…}},
        held_out_following, notes}."""
        columns = [{"save": one.column.save, "weight": one.column.weight, "part": one.column.part,
                    **{name: dataclasses.asdict(getattr(one, name)) for name in NAMES}} for one in self.columns]
        return {"columns": columns, "images": {name: dataclasses.asdict(one) for name, one in self.images.items()},
                "held_out_following": self.held_out_following, "notes": list(self.notes)}


def read_scores(folder: Path) -> Scores | None:
    """The scores of the run's grid as far as they were measured; None where nothing was."""
    grid, kept = read_grid(folder), _read(folder)
    return _summed(grid, kept) if grid is not None and kept.images else None


def score_grid(host: Host, folder: Path, *, on_progress: Progress | None = None,
               should_stop: ShouldStop | None = None) -> Scores:
    """Score the images of the run's grid that are there; those that were scored before, with the same model and references,
    are not asked about again.

    Raises SettingError where the run has no grid, DatasetError, HostError, ModelError, OutputError, TrainingError where the
    memory ran out, and Interrupted; what was scored by then is kept.
    """
    grid = read_grid(folder)
    if grid is None:
        raise SettingError(f"The run {folder.name} has no grid", remedy="sample one first")
    settings = settings_of(folder)
    references = references_of(folder, settings, allowed=host.allowed, should_stop=should_stop)
    with contextlib.ExitStack() as stack:
        tagger = _tagger(host, stack)
        lease = stack.enter_context(lease_for(host, "Scoring pictures", settings=settings, should_stop=should_stop))
        stack.enter_context(translated("scoring the grid"))
        scored_by = _fingerprint(lease, references, tagged=tagger is not None)
        kept = _read(folder)
        images = dict(kept.images) if kept.scored_by == scored_by else {}
        kept = _Kept(scored_by, images, _notes(references, settings))
        new = [cell for cell in grid.cells if cell.done and cell.file not in images]
        stack.callback(lambda: _write(folder, kept))
        for number, (name, scores) in enumerate(_scored(lease, tagger, folder, grid, new, references=references,
                                                        trigger=settings.dataset.trigger_word, on_progress=on_progress)):
            images[name] = scores
            if number % _WRITE_EVERY == 0:
                _write(folder, kept)
    return _summed(grid, kept)


def _scored(lease: ModelLease, tagger: Captioner | None, folder: Path, grid: Grid, new: Sequence[Cell], *,
            references: References, trigger: str, on_progress: Progress | None) -> Iterator[tuple[str, ImageScores]]:
    """(file, scores) of each of the cells `new`. Progress counts the references too."""
    assert grid.options.size is not None
    if not new:
        return
    every = -(-len(references.training) // MOST_TRAINING)
    training = references.training[::every] if every else ()
    total, done = len(references.held_out) + len(training) + len(new), 0

    def advance() -> None:
        nonlocal done
        lease.before_item(done, total)
        if on_progress:
            on_progress(done, total)
        done += 1

    scorer = Scorer(lease, size=grid.options.size)
    following = []
    for held_out in references.held_out:
        advance()
        example = held_out.example
        following.append(scorer.add_held_out(held_out, caption=without_trigger(example.caption, trigger),
                                             mask=mask_of(example.path, references.folder)))
    if known := [value for value in following if value is not None]:
        yield _HELD_OUT, ImageScores(prompt_following=sum(known) / len(known))
    for example in training:
        advance()
        scorer.add_training(example.path)
    unadapted = {(cell.prompt, cell.seed): cell for cell in grid.cells if cell.column == 0 and cell.done}
    for cell in new:
        advance()
        prompt = grid.prompts[cell.prompt]
        caption, image = without_trigger(split_tags(prompt.text)[0], trigger), read_image(folder / cell.file)
        without = unadapted.get((cell.prompt, cell.seed))
        if prompt.triggered:
            scores = scorer.score(image, caption=caption)
            if tagger is not None:
                scores = dataclasses.replace(scores, tag_recall=tag_recall(tagger, image, caption))
            yield cell.file, scores
        elif without is not None:
            yield cell.file, ImageScores(drift=scorer.distance(image, read_image(folder / without.file)))
    if on_progress:
        on_progress(total, total)


def _tagger(host: Host, stack: contextlib.ExitStack) -> Captioner | None:
    """A WD tagger where one is installed. It runs on the CPU: the GPU's memory is the model's."""
    source = wd_sources(host.taggers_folder)[0]
    return None if source.missing() else stack.enter_context(source.open(TagOptions(), CPU))


def _notes(references: References, settings: Settings) -> tuple[str, ...]:
    notes = []
    if not references.held_out:
        notes.append("Likeness and copy risk are not measured, because no picture was held out of this run.")
    elif references.derived:
        notes.append("The held-out pictures are mirrored crops of pictures that were trained, so likeness rewards copies too.")
    if not settings.dataset.trigger_word:
        notes.append(NO_DRIFT)
    return tuple(notes)


def _fingerprint(lease: ModelLease, references: References, *, tagged: bool) -> str:
    """What tells the scores of one model and one set of references from others."""
    held_out = [(image.example.path.name, image.crop) for image in references.held_out]
    training = [example.path.name for example in references.training]
    told = [_FORMULA, lease.checkpoint, str(lease.dtype), held_out, training, tagged]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16]


def _summed(grid: Grid, kept: _Kept) -> Scores:
    columns = []
    for number, column in enumerate(grid.columns):
        by_seed = {seed: [kept.images[cell.file] for cell in grid.cells if (cell.column, cell.seed) == (number, seed)
                          and cell.file in kept.images] for seed in grid.seeds}
        columns.append(ColumnScores(column, *(spread_of([
            [value for one in images if (value := getattr(one, name)) is not None] for images in by_seed.values()])
            for name in NAMES)))
    shown = {cell.file for cell in grid.cells}
    return Scores(tuple(columns), {name: one for name, one in kept.images.items() if name in shown},
                  kept.images.get(_HELD_OUT, ImageScores()).prompt_following, kept.notes)


@dataclasses.dataclass(frozen=True)
class _Kept:
    """What is on the disk."""

    scored_by: str
    images: dict[str, ImageScores]
    notes: tuple[str, ...]


def _read(folder: Path) -> _Kept:
    try:
        return from_plain(_Kept, json.loads((folder / SCORES).read_bytes()))
    except (OSError, ValueError, TypeError, RecursionError):
        return _Kept("", {}, ())


def _write(folder: Path, kept: _Kept) -> None:
    with translated("writing the scores"):
        write_atomic(folder / SCORES, json.dumps(dataclasses.asdict(kept), indent=1).encode())
