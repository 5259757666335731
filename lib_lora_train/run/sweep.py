"""A sweep: the settings of one run with several values of some of them, as a list of ordinary runs.

Seeds are an axis like any other. A run of a sweep knows which one it belongs to by a file in its folder, `sweep.json`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import logging
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path, PurePath

from lib_lora_train.errors import LoraTrainError, OutputError, SettingError
from lib_lora_train.host.port import Host
from lib_lora_train.records import from_plain
from lib_lora_train.run.optimizing import check_optimizer
from lib_lora_train.run.output import checked_name
from lib_lora_train.run.planning import RunPlan, plan_job, result_path
from lib_lora_train.settings import DECLARATIONS, Settings, flat, named, parse, refuse_unknown
from lib_lora_train.settings.field import Value, read
from lib_lora_train.storage.atomic import write_atomic

log = logging.getLogger(__name__)
FILE_NAME = "sweep.json"
MOST_RUNS = 100
_OWN = ("output_name", "resume")
"""Settings that each run has of its own."""
_SAME_PLAN = frozenset({"output_name", "seed", "learning_rate", "unet_lr", "text_encoder_lr"})
"""Settings of which the dataset's part of a plan does not depend, but for which images are held out."""


@dataclasses.dataclass(frozen=True)
class Sweep:
    """The sweep that a run belongs to: its id, its name, and the settings that it gives this run, as text."""

    id: str
    name: str
    values: dict[str, str]


@dataclasses.dataclass(frozen=True)
class SweepRun:
    """One run of a sweep, with a name of its own, and what the sweep sets in it."""

    settings: Settings
    values: Mapping[str, Value]

    @property
    def name(self) -> str:
        """Its LoRA's name."""
        return self.settings.save.output_name

    def sweep(self, sweep_id: str, name: str) -> Sweep:
        """What its record says of the sweep of this id and name."""
        return Sweep(sweep_id, name, {key: _text(value) for key, value in self.values.items()})


def expand(values: Mapping[str, object], *, axes: Mapping[str, Sequence[object]],
           overrides: Sequence[Mapping[str, object]] = ()) -> tuple[SweepRun, ...]:
    """The runs of a sweep: `values` with each combination of the `axes` (setting -> its values), the last axis changing first;
    with `overrides`, a list of sets of settings, all of these combinations for each set.

    Raises SettingError for what is no setting or no value of one, for one that each run has of its own, a value that is there
    twice, and more than 100 runs; OutputError for a name that cannot be.
    """
    if values.get("resume"):
        raise SettingError("A run that goes on cannot be swept", why="it keeps its settings", remedy="start from settings")
    name = checked_name(str(values.get("output_name", "")))
    grid = {key: [_value(key, value) for value in found] for key, found in axes.items()}
    sets = [{key: _value(key, value) for key, value in one.items()} for one in overrides] or [{}]
    for key, found in grid.items():
        if not found:
            raise SettingError(f"The sweep has no values of {named(key)}", remedy="write some, or leave it out")
        if both := [one for one in sets if key in one]:
            raise SettingError(f"The sweep sets {named(key)} twice", why=f"it is in the list too, as {both[0][key]}")
    count = len(sets) * math.prod(map(len, grid.values()))
    if not grid and sets == [{}]:
        raise SettingError("The sweep has no values", remedy="name a setting and some values of it")
    if count > MOST_RUNS:
        raise SettingError(f"A sweep of {count:,} runs is too large", why=f"{MOST_RUNS} are possible",
                           remedy="take fewer values")
    chosen = [{**one, **dict(zip(grid, combination, strict=True))}
              for one in sets for combination in itertools.product(*grid.values())]
    for one in chosen:
        if chosen.count(one) > 1:
            raise SettingError("The sweep has a run twice", why=", ".join(f"{key} = {_text(v)}" for key, v in one.items()),
                               remedy="leave one of them out")
    runs = []
    for run_name, one in zip(_names(name, chosen), chosen, strict=True):
        with blamed(run_name):
            runs.append(SweepRun(parse({**values, **one, "output_name": run_name}), one))
    return tuple(runs)


@contextlib.contextmanager
def blamed(name: str) -> Iterator[None]:
    """A refusal within the block says that it refuses the sweep, and because of which run."""
    try:
        yield
    except LoraTrainError as error:
        raise type(error)(f"The sweep is refused because of {name}", why=str(error)) from error


def plan_all(runs: Sequence[SweepRun], host: Host) -> None:
    """See that each of the runs could begin now. The dataset is read once for all that it is the same for. Raises UserError,
    HostError, which names the run."""
    look = same_plans(lambda settings: plan_job(settings, host))
    for run in runs:
        with blamed(run.name):
            check_optimizer(run.settings, built=True)  # for each: it looks at the rates
            look(run.settings)
            result_path(run.settings, host, None)


def same_plans(plan: Callable[[Settings], RunPlan]) -> Callable[[Settings], RunPlan]:
    """`plan`, called once for all settings whose plans are the same but for the seed and the rates."""
    known: dict[tuple[Value, ...], RunPlan] = {}

    def planned(settings: Settings) -> RunPlan:
        key = tuple(value for name, value in flat(settings).items() if name not in _SAME_PLAN)
        if key not in known:
            known[key] = plan(settings)
        return known[key]
    return planned


def record_sweep(folder: Path, sweep: Sweep | None) -> None:
    """Write beside a run's record which sweep it belongs to. A disk that refuses is logged."""
    if sweep is None:
        return
    try:
        write_atomic(folder / FILE_NAME, json.dumps(dataclasses.asdict(sweep), ensure_ascii=False).encode("utf-8", "replace"))
    except OSError as error:
        log.warning("The run %s does not say which sweep it belongs to: %s", folder.name, error)


def read_sweep(folder: Path) -> Sweep | None:
    """The sweep that the run in `folder` belongs to; None for none."""
    try:
        return from_plain(Sweep, json.loads((folder / FILE_NAME).read_bytes()))
    except (OSError, ValueError, TypeError, RecursionError):
        return None


def _value(name: str, value: object) -> Value:
    refuse_unknown([name])
    if name in _OWN:
        raise SettingError(f"{named(name)} cannot be swept", why="each run has one of its own")
    return read(DECLARATIONS[name], value)


def _text(value: Value) -> str:
    return f"{value:.10g}" if isinstance(value, float) else str(value)


def _names(name: str, chosen: Sequence[Mapping[str, Value]]) -> list[str]:
    """A name for each run that says its values. Where they are too long or two are alike, the runs are numbered.

    There is no "=" in them: in <lora:…=…:1> the WebUI takes it for the name of an argument."""
    found = [f"{name}-{'-'.join(f'{key}_{_safe(value)}' for key, value in one.items())}" for one in chosen]
    with contextlib.suppress(OutputError):
        if len({checked_name(one).lower() for one in found}) == len(found):
            return found
    digits = len(str(len(chosen)))
    return [f"{name}-{number:0{digits}}" for number in range(1, len(chosen) + 1)]


def _safe(value: Value) -> str:
    text = _text(value)
    shown = PurePath(text.replace("\\", "/")).name if "/" in text or "\\" in text else text
    return re.sub(r"[^\w.+-]+", "_", shown).strip("._-") or "none"
