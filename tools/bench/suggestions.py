"""`bench suggestions`: what the settings that the page suggests are worth beside the default, on the demo's style and subject.

For each seed a run with the settings of a page that nobody has touched but for folder, word and size, and one with those that
are suggested after the rate finder has looked; each judged by the loss on held-out pictures, as a share of the base model's,
and by the yardstick's points (`recommend.py`). What was measured is kept in the output folder.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
from collections.abc import Mapping
from pathlib import Path

from lib_lora_train.errors import translated
from lib_lora_train.host.port import Host
from lib_lora_train.run.rate_finder import find_rate, plan_finder
from lib_lora_train.run.record import RunRecord, new_folder
from lib_lora_train.run.suggestions import suggestions_for
from lib_lora_train.settings import parse
from tools.bench.rates import Figures, held_out_share, spread
from tools.bench.recommend import DATA, TRIGGERS, RecommendPlan, Yardstick
from tools.bench.report import grid as table
from tools.bench.report import write_report
from tools.bench.training import Say

PURPOSES = {"style": "style", "subject": "character"}
KINDS = ("default", "suggested")
_QUIET = {"sample_images": False, "save_state": False, "save_every_n_epochs": 0, "overwrite": True}


@dataclasses.dataclass(frozen=True)
class SuggestionsPlan:
    """What to measure. `changes` are settings of both ways, such as a limit of the steps."""

    output: Path
    cases: tuple[str, ...] = ("style", "subject")
    seeds: tuple[int, ...] = (42, 43, 44)
    changes: Mapping[str, object] = dataclasses.field(default_factory=dict)


def run_suggestions(plan: SuggestionsPlan, host: Host, *, say: Say) -> str:
    """Measure and return the report, which also lies in `plan.output`/suggestions.md and .json."""
    with translated("making the folder of the results"):
        plan.output.mkdir(parents=True, exist_ok=True)
    figures, yardstick = Figures(plan.output / "figures.json"), Yardstick(host, RecommendPlan(plan.output), say)
    for seed in plan.seeds:
        for case in plan.cases:
            for kind in KINDS:
                name = f"{case} {seed} {kind}"
                figures.ensure(f"{name} loss", functools.partial(_loss, plan, host, case, seed, kind), say)
                figures.ensure(f"{name} points", functools.partial(yardstick.of, case, _file(host, case, seed, kind)), say)
    text = "\n\n".join(_case_text(plan, figures, case, yardstick.of(case, None)) for case in plan.cases) + "\n"
    return write_report(plan.output, "suggestions", text, figures.values)


def _file(host: Host, case: str, seed: int, kind: str) -> Path:
    return host.lora_folder / f"{case}-{seed}-{kind}.safetensors"


def _loss(plan: SuggestionsPlan, host: Host, case: str, seed: int, kind: str) -> float:
    """The loss on held-out pictures after the run, as a share of the base model's."""
    untouched = {"train_data_dir": str(DATA[case]), "trigger_word": TRIGGERS[case], "resolution": "128", **plan.changes}
    chosen: dict[str, object] = dict(untouched)
    if kind == "suggested":
        chosen |= _suggested(untouched, host, case)  # with the rank and so on that are suggested, the rate is looked for anew
        _look_for_rate({**chosen, "seed": seed, "output_name": f"{case}-{seed}"}, host)
        chosen |= _suggested(untouched, host, case)
    chosen |= {**_QUIET, "seed": seed, "output_name": _file(host, case, seed, kind).stem, **plan.changes}
    return held_out_share(parse(chosen), host)


def _suggested(values: Mapping[str, object], host: Host, case: str) -> dict[str, object]:
    found = suggestions_for(values, PURPOSES[case], host=host)
    return {one["setting"]: one["value"] for one in found["suggestions"]}


def _look_for_rate(values: Mapping[str, object], host: Host) -> None:
    """A run of the rate finder, recorded as the page's are."""
    settings = parse(values)
    finder = plan_finder(settings, host)
    record = RunRecord(new_folder(host.runs_folder, finder.settings.save.output_name), finder.settings)
    try:
        record.write(find_rate(finder, host, requested=settings, report=record.write, stop=lambda: ""))
    finally:
        record.close()


def _case_text(plan: SuggestionsPlan, figures: Figures, case: str, unadapted: float) -> str:
    rows = []
    for kind in KINDS:
        cells = [kind]
        for measure, shown in (("loss", "{:.3f}"), ("points", "{:.1f}")):
            values = [figures.values[f"{case} {seed} {kind} {measure}"] for seed in plan.seeds]
            cells += [*map(shown.format, values), f"{shown.format(statistics.mean(values))} ± {shown.format(spread(values))}"]
        rows.append(tuple(cells))
    heads = [f"{measure}, seed {seed}" if seed else measure for measure in ("loss", "points") for seed in (*plan.seeds, 0)]
    return f"### {case} (base model: {unadapted:.1f} points)\n\n{table(('settings', *heads), rows)}"
