"""`bench verdict`: short runs that are made to go wrong, and whether the verdict in words says what went wrong."""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from lib_lora_train import events
from lib_lora_train.dataset.held_out import FEWEST
from lib_lora_train.demo.embedded import CHECKPOINT
from lib_lora_train.errors import LoraTrainError, translated
from lib_lora_train.host.standalone import StandaloneHost
from lib_lora_train.run.job import run_job
from lib_lora_train.run.planning import plan_job
from lib_lora_train.settings import parse
from lib_lora_train.settings.field import Value
from tools.bench.report import grid, machine_text, write_report
from tools.bench.training import Say
from tools.bench.verdict_cases import CASES, DATA, GOOD, Case, DataSet, damaged_checkpoint

_KEPT = (events.Planned, events.HeldOut, events.Measured, events.Saved, events.Diagnosed, events.Finished)


@dataclasses.dataclass(frozen=True)
class Row:
    """What was said of a run at its end, and `said` before, each with its step."""

    case: str
    data: str
    seed: int
    expected: tuple[str, ...]
    setting: str
    finding: str
    message: str
    named: str
    value: str
    right: bool
    seconds: float
    said: tuple[str, ...] = ()


def run_verdict(*, output: Path, seeds: Sequence[int], data: Sequence[str], only: Sequence[str], say: Say) -> str:
    """Make the runs with each seed, tell each, and write verdict.md and verdict.json; returns the table.

    `data` names datasets to make all of them with, () each with its own; `only` names runs, () for all.
    """
    begin, rows = time.monotonic(), list[Row]()
    with translated("making the folder of the results"):
        output.mkdir(parents=True, exist_ok=True)
    for seed in seeds:
        for case in (case for case in CASES if not only or case.name in only):
            for chosen in (one for one in DATA if one.name in (data or (case.data,))):
                row = diagnosed(case, chosen, seed=seed, output=output)
                rows.append(row)
                say(f"{chosen.name}, seed {seed}, {case.name}: {'right' if row.right else 'WRONG'} "
                    f"({row.finding}, {row.seconds:.0f} s). {row.message}")
    text = verdict_text(rows, seconds=time.monotonic() - begin)
    return write_report(output, "verdict", text, {"rows": [dataclasses.asdict(row) for row in rows]})


def diagnosed(case: Case, data: DataSet, *, seed: int, output: Path) -> Row:
    """Make one run, with its events in OUTPUT/events."""
    folder = output / "data"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    case.write(data.entries(), folder)
    host = StandaloneHost(damaged_checkpoint(output) if case.damaged else CHECKPOINT, lora_folder=output / "loras",
                          runs_folder=output / "runs")
    settings: dict[str, Value] = {
        **GOOD, "trigger_word": data.trigger_word, **case.changes, "seed": seed, "max_train_epochs": _epochs(case, folder),
        "train_data_dir": str(folder), "output_name": "verdict", "overwrite": True}
    seen: list[events.Event] = []
    start = time.monotonic()
    try:
        ending = run_job(plan_job(parse(settings), host), host, report=seen.append, stop=lambda: "")
        seen.append(ending)
        said = [event for event in seen if isinstance(event, events.Diagnosed)]
        finding, message = (said[-1].finding, said[-1].message) if said else ("", ending.message)
        named, value = (said[-1].setting, said[-1].value) if said else ("", "")
    except LoraTrainError as error:
        said, finding, message, named, value = [], "refused", str(error), "", ""
    _keep(output / "events" / f"{data.name}-{seed}-{case.name.replace(' ', '-')}.jsonl", settings, seen)
    right = finding in case.expected and named == case.setting and case.about in message
    return Row(case.name, data.name, seed, case.expected, case.setting, finding, message, named, value, right,
                  time.monotonic() - start, tuple(f"{event.step}: {event.finding}" for event in said))


def _epochs(case: Case, folder: Path) -> int:
    """About as many as the case has steps; of a larger folder two images are held out."""
    images = len(list(folder.glob("*.png")))
    return round(case.steps / (images - 2 if images >= FEWEST else images))


def verdict_text(rows: Sequence[Row], *, seconds: float) -> str:
    """The table, a line for each run, the sentences, and how many were right."""
    lines = [[row.case, f"{row.data} {row.seed}", _with_setting(" / ".join(row.expected), row.setting),
              _with_setting(row.finding or "nothing", " = ".join(filter(None, (row.named, row.value)))),
              "yes" if row.right else "NO"] for row in rows]
    right = sum(row.right for row in rows)
    return "\n".join([
        "# The verdict on runs made to go wrong", "",
        grid(("run", "data, seed", "expected", "said", "right"), lines), "",
        *(f"- {row.case} ({row.data} {row.seed}): {row.message}" for row in rows), "",
        f"{right} of {len(rows)} right, in {seconds / 60:.0f} minutes. {machine_text(torch.device('cpu'))}", ""])


def _with_setting(finding: str, setting: str) -> str:
    return f"{finding}; {setting}" if setting else finding


def _keep(path: Path, settings: dict[str, Value], seen: Sequence[events.Event]) -> None:
    """The run's settings and events as lines of JSON, of the steps every tenth."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = [event for event in seen if isinstance(event, _KEPT) or isinstance(event, events.Step) and event.step % 10 == 0]
    path.write_text("\n".join(json.dumps(line) for line in [settings, *map(events.to_dict, kept)]) + "\n", encoding="utf-8")
