"""Several runs compared: in what they differ, what each is worth, and which is the best, as far as chance allows to say so.

Runs that differ in their seed alone are one row: mean and standard deviation over the seeds. Of each run the save counts that
is recommended of it, and a ruined run counts in no mean. A difference of two means that chance makes of the spread over seeds,
by Student's t at 95 %, is called none.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from lib_lora_train.errors import SettingError, counted
from lib_lora_train.evaluation.scores import NAMES
from lib_lora_train.events import Measured
from lib_lora_train.results.history import RunHistory, read_history
from lib_lora_train.results.improvement import improvement
from lib_lora_train.results.overview import image_of, plain
from lib_lora_train.results.recommend import leaves, recommend
from lib_lora_train.results.saves import saves_of
from lib_lora_train.results.scoring import read_scores
from lib_lora_train.run.image_record import read_images
from lib_lora_train.run.rate_finder import is_finder
from lib_lora_train.run.record import past_run, read_settings
from lib_lora_train.run.resume import FREE
from lib_lora_train.run.sweep import read_sweep
from lib_lora_train.settings import Settings, flat

GAIN, LOSS = "held_out_gain", "held_out_loss"
MEASURES = (*NAMES, GAIN, LOSS)
"""The scores of the recommended save's images, by how many per cent of the base model's its loss on held-out images is lower,
and that loss."""
MOST_RUNS = 200
_LENGTH_AND_DATA = frozenset({
    "train_data_dir", "reg_data_dir", "conditioning_data_dir", "max_train_steps", "max_train_epochs", "max_train_minutes",
    "num_repeats", "early_stopping"})
_NOT_COMPARED = FREE - _LENGTH_AND_DATA | {"seed"}
CHECKPOINT = "checkpoint"  # among the settings in which rows differ
# Student's t that 2.5 % are above, by degrees of freedom from 1 on:
# https://www.itl.nist.gov/div898/handbook/eda/section3/eda3672.htm
_STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120,
            2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042)
Difference = Literal["", "none", "clear", "not known"]


@dataclasses.dataclass(frozen=True)
class Measure:
    """Mean and standard deviation over the runs of a row, of which `count` have the number; None where there is none, or of
    one run."""

    mean: float | None = None
    deviation: float | None = None
    count: int = 0

    @classmethod
    def of(cls, values: Sequence[float | None]) -> Measure:
        """That of these numbers, without those that are missing."""
        known = [value for value in values if value is not None and math.isfinite(value)]
        if not known:
            return cls()
        return cls(statistics.fmean(known), statistics.stdev(known) if len(known) > 1 else None, len(known))


@dataclasses.dataclass(frozen=True)
class ComparedRun:
    """What is compared of one run. `save` and `weight` are what is recommended of it, `leaves` the bounds that leaves, and
    `values` the numbers of `MEASURES`; `images` as `read_images` has them. `usable` says whether another run may have its
    settings: not those of a rate finder."""

    run: str
    name: str
    seed: int
    outcome: str
    verdict: str
    finding: str
    settings: Mapping[str, Any]
    save: str = ""
    weight: float = 1.0
    leaves: tuple[str, ...] = ()
    values: Mapping[str, float | None] = dataclasses.field(default_factory=dict)
    images: Mapping[str, tuple[str, str]] | None = None
    held_out: tuple[str, ...] = ()
    usable: bool = True


@dataclasses.dataclass(frozen=True)
class ImageChanges:
    """What is other in a run's images than in those of the first one, by name."""

    added: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()
    captions: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Row:
    """The runs of one row, which differ in their seed alone. `settings` are those in which rows differ. `difference` to the
    best row: "none" is within `chance`, "not known" where there is no spread."""

    runs: tuple[ComparedRun, ...]
    settings: Mapping[str, Any]
    measures: Mapping[str, Measure]
    changes: ImageChanges | None
    difference: Difference = ""
    best: bool = False


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The rows, in the order of the runs; the measure that the best was chosen by; the reason; sentences on what to know."""

    rows: tuple[Row, ...]
    measure: str
    reason: str
    notes: tuple[str, ...]


def compare(folders: Sequence[Path]) -> Comparison:
    """Compare the runs in these folders. Raises SettingError for fewer than two, and too many."""
    folders = list(dict.fromkeys(folders))
    if not 2 <= len(folders) <= MOST_RUNS:
        raise SettingError(f"{counted(len(folders), 'run')} cannot be compared", why=f"2 to {MOST_RUNS} can")
    return compare_runs([compared_run(folder) for folder in folders])


def compare_runs(runs: Sequence[ComparedRun]) -> Comparison:
    """The comparison of runs that were read."""
    defaults = flat(Settings())  # of settings that came after a run was recorded
    runs = [dataclasses.replace(run, settings={**defaults, **run.settings}) if run.settings else run for run in runs]
    names = {name for one, other in itertools.pairwise(runs) for name in {**one.settings, **other.settings}
             if name not in _NOT_COMPARED and one.settings.get(name) != other.settings.get(name)}
    order = [name for name in dict.fromkeys(name for run in runs for name in run.settings) if name in names]
    groups: dict[object, list[ComparedRun]] = {}
    for run in runs:
        key = (*(repr(run.settings.get(name)) for name in order), repr(sorted((run.images or {}).items())), run.images is None)
        groups.setdefault(key, []).append(run)
    first = next((run.images for run in runs if run.images is not None), None)
    rows = [Row(tuple(group), {name: group[0].settings.get(name) for name in order},
                {name: Measure.of([run.values.get(name) for run in group if run.verdict != "ruined"]) for name in MEASURES},
                _changes(first, group[0].images)) for group in groups.values()]
    measure = _measure(rows)
    ordered = sorted((row for row in rows if _usable(row, measure)), key=lambda row: (
        any(run.leaves for run in row.runs), -(row.measures[measure].mean or 0)))
    if len(ordered) < 2:
        return Comparison(tuple(rows), "", "", _notes(runs, rows))
    best = ordered[0]
    rows = [dataclasses.replace(row, best=row is best, difference="" if row is best or not _usable(row, measure)
                                else difference(best.measures[measure], row.measures[measure])) for row in rows]
    return Comparison(tuple(rows), measure, _reason(ordered, measure), _notes(runs, rows))


def spread(one: Measure, other: Measure) -> float | None:
    """The standard deviation over the seeds of two rows together, pooled by their degrees of freedom; None for one run each."""
    known = [(measure.count - 1, measure.deviation) for measure in (one, other) if measure.deviation is not None]
    if not known:
        return None
    return math.sqrt(sum(freedom * deviation**2 for freedom, deviation in known) / sum(freedom for freedom, _ in known))


def student(freedom: int) -> float:
    """Student's t that 2.5 % are above, for so many degrees of freedom; above 30 by its series around the normal one."""
    if freedom <= len(_STUDENT):
        return _STUDENT[freedom - 1]
    z = statistics.NormalDist().inv_cdf(0.975)
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)


def chance(one: Measure, other: Measure) -> float | None:
    """How far apart two means are by chance, 95 times in 100 at most, where only the seeds differ; None where no spread is
    known."""
    found = spread(one, other)
    if found is None:
        return None
    return student(one.count + other.count - 2) * found * math.sqrt(1 / one.count + 1 / other.count)


def difference(best: Measure, other: Measure) -> Difference:
    """Whether two means differ by more than `chance`."""
    if best.mean is None or other.mean is None or (found := chance(best, other)) is None:
        return "not known"
    return "none" if abs(best.mean - other.mean) <= found else "clear"


def _measure(rows: Sequence[Row]) -> str:
    """What rows are ordered by: likeness where at least two have it and none has only the other, else the held-out gain."""
    alike, gained = ([row for row in rows if row.measures[name].mean is not None] for name in ("likeness", GAIN))
    return "likeness" if len(alike) > 1 and len(alike) >= len(gained) else GAIN


def _usable(row: Row, measure: str) -> bool:
    return row.measures[measure].mean is not None


def _leaves(row: Row) -> list[str]:
    """The bounds that runs of a row leave."""
    return sorted({text for run in row.runs for text in run.leaves})


def _reason(ordered: Sequence[Row], measure: str) -> str:
    """Why the first row is the best, against the next one of those that stay within all bounds as it does, or do not either."""
    count, left = len(ordered), _leaves(ordered[0])
    alike = [row for row in ordered if bool(_leaves(row)) == bool(left)]
    if len(alike) == 1:
        return f"Of {counted(count, 'setting')} it is the only one that stays within all bounds."
    one, other = (row.measures[measure] for row in alike[:2])
    found = chance(one, other)
    if measure == GAIN and len(alike) < count:
        said = [f"Of {counted(count, 'setting')} its loss on held-out pictures is the furthest below the base model's among "
                f"those that stay within all bounds: by {one.mean:.1f} %, the next by {other.mean:.1f} %."]
    elif measure == GAIN:
        said = [f"Of {counted(count, 'setting')} its loss on held-out pictures is the furthest below the base model's: by "
                f"{one.mean:.1f} %, the next by {other.mean:.1f} %."]
    elif len(alike) < count:
        said = [f"Of {counted(count, 'setting')} it is the most like the held-out pictures among those that stay within all "
                f"bounds: {one.mean:.3f}, the next {other.mean:.3f}."]
    else:
        said = [f"Of {counted(count, 'setting')} it is the most like the held-out pictures: {one.mean:.3f}, the next "
                f"{other.mean:.3f}."]
    shown = "" if found is None else f"{found:.1f} %" if measure == GAIN else f"{found:.3f}"
    if found is None:
        said.append("With one seed no spread is known: the difference may be chance. Three seeds each would show it.")
    elif difference(one, other) == "none":
        said.append(f"There is no difference beyond the spread of seeds, {shown}.")
    else:
        said.append(f"The difference is larger than the spread of seeds, {shown}.")
    if left:
        said.append(f"But none stays within all bounds: {' and '.join(left)}.")
    return " ".join(said)


def _notes(runs: Sequence[ComparedRun], rows: Sequence[Row]) -> tuple[str, ...]:
    notes = []
    if len({run.held_out for run in runs if run.held_out}) > 1:
        notes.append("The runs did not hold out the same pictures, since their seeds or pictures differ: a part of the spread "
                     "is that of the pictures.")
    if silent := [run for run in runs if run.images is None]:
        notes.append(f"It is not recorded which pictures {counted(len(silent), 'run')} had.")
    scored = [row.measures["likeness"].mean is not None for row in rows]
    if any(scored) and not all(scored):
        notes.append("Not all runs have a grid with scores; paint it for those that have none.")
    if any(run.verdict == "ruined" for run in runs):
        notes.append("Ruined runs count in no mean, and are never the best.")
    return tuple(notes)


def _changes(first: Mapping[str, tuple[str, str]] | None, images: Mapping[str, tuple[str, str]] | None) -> ImageChanges | None:
    if first is None or images is None:
        return None
    both = [name for name in first if name in images]
    return ImageChanges(
        tuple(name for name in images if name not in first), tuple(name for name in first if name not in images),
        tuple(name for name in both if first[name][0] != images[name][0]),
        tuple(name for name in both if first[name][1] != images[name][1]))


def compared_run(folder: Path) -> ComparedRun:
    """What is compared of the run in `folder`."""
    settings, history, past = read_settings(folder), read_history(folder), past_run(folder)
    known = {**settings, CHECKPOINT: history.planned.checkpoint} if history.planned else settings
    seed = settings.get("seed", -1)
    run = ComparedRun(folder.name, past.name, seed if isinstance(seed, int) else -1, past.outcome, past.verdict,
                      history.diagnosed.finding if history.diagnosed else "", known, images=read_images(folder),
                      usable=not is_finder(settings),
                      held_out=history.held_out.pictures if history.held_out and not history.held_out.derived else ())
    best, scores = recommend(folder), read_scores(folder)
    step = next((save.step for save in saves_of(folder) if best and save.id == best.save), None)
    event = next((event for event in reversed(history.measured) if step in (None, event.step)), None)
    values: dict[str, float | None] = _losses(event)
    if best is None:
        return dataclasses.replace(run, values=values)
    column = next((one for one in scores.columns if (one.column.save, one.column.weight, one.column.part) ==
                   (best.save, best.weight, "")), None) if scores else None
    if scores and column:
        values |= {name: getattr(column, name).mean for name in NAMES}
    bounds = tuple(leaves(column, scores.columns[0], scores.held_out_following)) if scores and column else ()
    return dataclasses.replace(run, save=best.save, weight=best.weight, leaves=bounds, values=values)


def _losses(event: Measured | None) -> dict[str, float | None]:
    if event is None or not event.held_out:
        return {}
    loss = sum(event.held_out) / len(event.held_out)
    return {GAIN: improvement(event.held_out, event.unadapted_held_out), LOSS: loss if math.isfinite(loss) else None}


def comparison_data(folders: Sequence[Path]) -> dict[str, Any]:
    """The comparison as plain data, with what is drawn beside it.

        settings, measures   the names of the columns: settings that differ, and numbers that some run has
        rows       [{runs: [{run, name, seed, outcome, verdict, finding, usable, save, weight, leaves}], settings,
                   measures: {name: {mean, deviation, count}}, changes: {added, removed, changed, captions} or None,
                   difference, best}]
        measure, reason, notes
        curves     [{run, row, points: [[step, per cent better than the base model]], held_out}]
        samples    [{prompt, seed, pictures: [{run, row, file, step}]}] of the end of each run, where two have them
        sweep      {id, name} where all runs are of one, or None
    """
    found, by_name = compare(folders), {folder.name: folder for folder in folders}
    histories = {run.run: read_history(by_name[run.run]) for row in found.rows for run in row.runs}
    row_of = {run.run: number for number, row in enumerate(found.rows) for run in row.runs}
    sweeps = {(sweep.id, sweep.name) if (sweep := read_sweep(folder)) else None for folder in folders}
    only = next(iter(sweeps)) if len(sweeps) == 1 else None
    shown = ("run", "name", "seed", "outcome", "verdict", "finding", "usable", "save", "weight", "leaves")
    rows = [{**{name: getattr(row, name) for name in ("settings", "difference", "best")},
             "runs": [{name: getattr(run, name) for name in shown} for run in row.runs],
             "measures": {name: dataclasses.asdict(measure) for name, measure in row.measures.items()},
             "changes": dataclasses.asdict(row.changes) if row.changes else None} for row in found.rows]
    return plain({
        "settings": list(found.rows[0].settings),
        "measures": [name for name in MEASURES if any(row.measures[name].count for row in found.rows)], "rows": rows,
        "measure": found.measure, "reason": found.reason, "notes": found.notes,
        "curves": [{"run": run, "row": row_of[run], **_curve(history)} for run, history in histories.items()],
        "samples": _samples(histories, by_name, row_of),
        "sweep": {"id": only[0], "name": only[1]} if only else None})


def _curve(history: RunHistory) -> dict[str, Any]:
    held_out = any(event.held_out for event in history.measured)
    points = [[event.step, improvement(event.held_out, event.unadapted_held_out) if held_out
               else improvement(event.training, event.unadapted_training)] for event in history.measured]
    return {"points": [point for point in points if point[1] is not None], "held_out": held_out}


def _samples(histories: Mapping[str, RunHistory], folders: Mapping[str, Path], row_of: Mapping[str, int]
             ) -> list[dict[str, Any]]:
    """By prompt and seed, the last sample of each run that is there."""
    found: dict[tuple[str, int], dict[str, dict[str, Any]]] = {}
    for run, history in histories.items():
        for event in history.sampled:
            if event.step and image_of(folders[run], event.file):
                found.setdefault((event.prompt, event.seed), {})[run] = {
                    "run": run, "row": row_of[run], "file": event.file, "step": event.step}
    return [{"prompt": prompt, "seed": seed, "pictures": list(runs.values())}
            for (prompt, seed), runs in found.items() if len(runs) > 1]
