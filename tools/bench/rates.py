"""`bench rates`: how near the rate finder comes to the best learning rate of a sweep.

For the demo's style and subject and each seed: a run of AdamW at each rate of the sweep, the loss on held-out pictures at its
end, and the rate finder's proposal. All runs are kept in the output folder, so that the command goes on where it was stopped.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from lib_lora_train import events
from lib_lora_train.errors import translated
from lib_lora_train.host.port import Host
from lib_lora_train.run.job import run_job
from lib_lora_train.run.planning import plan_job
from lib_lora_train.run.rate_finder import find_rate, plan_finder
from lib_lora_train.settings import Settings, parse
from lib_lora_train.storage.atomic import write_atomic
from tools.bench.recommend import DATA, SETTINGS, TRIGGERS
from tools.bench.report import grid as table
from tools.bench.report import write_report
from tools.bench.training import Say

RATES = (1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2)
WITHIN = 3.0


@dataclasses.dataclass(frozen=True)
class RatesPlan:
    """What to measure. `steps` are those of a run of the sweep, `finder_steps` of the rate finder's."""

    output: Path
    cases: tuple[str, ...] = ("style", "subject")
    seeds: tuple[int, ...] = (42, 43, 44)
    rates: tuple[float, ...] = RATES
    steps: int = 120
    finder_steps: int = 100
    changes: Mapping[str, object] = dataclasses.field(default_factory=dict)


def run_rates(plan: RatesPlan, host: Host, *, say: Say) -> str:
    """Measure and return the report, which also lies in `plan.output`/rates.md and .json."""
    with translated("making the folder of the results"):
        plan.output.mkdir(parents=True, exist_ok=True)
    figures = Figures(plan.output / "figures.json")
    for seed in plan.seeds:
        for case in plan.cases:
            figures.ensure(f"{case} {seed} found", functools.partial(_found, plan, host, case, seed), say)
            for rate in plan.rates:
                figures.ensure(f"{case} {seed} {rate:g} {plan.steps}",
                               functools.partial(_loss, plan, host, case, seed, rate), say)
    text = "\n\n".join(_case_text(plan, figures, case) for case in plan.cases) + "\n"
    return write_report(plan.output, "rates", text, figures.values)


class Figures:
    """Numbers by name, kept in a file as they are measured."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self.values: dict[str, float] = json.loads(file.read_text()) if file.is_file() else {}

    def ensure(self, name: str, measure: Callable[[], float], say: Say) -> None:
        """Measure what is not there yet."""
        if name not in self.values:
            self.values[name] = measure()
            say(f"{name}: {self.values[name]:.4g}")
            write_atomic(self._file, json.dumps(self.values, indent=1).encode())


def _settings(plan: RatesPlan, case: str, seed: int, changes: Mapping[str, object]) -> Settings:
    return parse({**SETTINGS, **plan.changes, "seed": seed, "trigger_word": TRIGGERS[case], "train_data_dir": str(DATA[case]),
                  "save_every_n_epochs": 0, "output_name": f"rates-{case}", **changes})


def _loss(plan: RatesPlan, host: Host, case: str, seed: int, rate: float) -> float:
    """The loss on held-out pictures after the run, as a share of the base model's."""
    return held_out_share(_settings(plan, case, seed, {"learning_rate": rate, "max_train_steps": plan.steps,
                                                       "validate_every_n_steps": plan.steps}), host)


def held_out_share(settings: Settings, host: Host) -> float:
    """The loss on held-out pictures at the end of a run with these settings, as a share of the base model's."""
    measured: list[events.Measured] = []

    def report(event: events.Event) -> None:
        if isinstance(event, events.Measured):
            measured.append(event)

    run_job(plan_job(settings, host), host, report=report, stop=lambda: "")
    return sum(measured[-1].held_out) / sum(measured[-1].unadapted_held_out)


def _found(plan: RatesPlan, host: Host, case: str, seed: int) -> float:
    settings = _settings(plan, case, seed, {"max_train_steps": plan.steps})
    found: list[events.Diagnosed] = []

    def report(event: events.Event) -> None:
        if isinstance(event, events.Diagnosed):
            found.append(event)

    find_rate(plan_finder(settings, host, steps=plan.finder_steps), host, requested=settings, report=report, stop=lambda: "")
    return float(found[-1].value)


def _case_text(plan: RatesPlan, figures: Figures, case: str) -> str:
    """A row for each rate, with the mean over the seeds and its spread; what was found, and whether it is near the best."""
    rows, means = [], {}
    for rate in plan.rates:
        losses = [figures.values[f"{case} {seed} {rate:g} {plan.steps}"] for seed in plan.seeds]
        means[rate] = statistics.mean(losses)
        rows.append((f"{rate:g}", *(f"{loss:.3f}" for loss in losses), f"{means[rate]:.3f}", f"{spread(losses):.3f}"))
    best = min(means, key=means.__getitem__)
    found = [figures.values[f"{case} {seed} found"] for seed in plan.seeds]
    factors = [max(one / best, best / one) for one in found]
    return "\n\n".join([
        f"### {case}, {plan.steps} steps",
        table(("rate", *(f"seed {seed}" for seed in plan.seeds), "mean", "spread"), rows),
        f"Best: {best:g}. Found by the rate finder in {plan.finder_steps} steps: {', '.join(f'{one:g}' for one in found)}; "
        f"away from the best by factors of {', '.join(f'{one:.1f}' for one in factors)} "
        f"({'all' if max(factors) <= WITHIN else 'not all'} within {WITHIN:g})."])


def spread(values: Sequence[float]) -> float:
    """The standard deviation of a sample; not a number where there is one value."""
    return statistics.stdev(values) if len(values) > 1 else math.nan
