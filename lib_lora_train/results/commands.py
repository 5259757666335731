"""The commands that look at what a run made: `samples` and `report`.

Nothing here imports torch or numpy before a command runs, so that every other command and `--help` start at once.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from lib_lora_train.errors import SettingError, translated
from lib_lora_train.run import RUNS_FOLDER
from lib_lora_train.settings import user_path

Commands = Any  # what ArgumentParser.add_subparsers returns


def add_results(commands: Commands) -> None:
    """Add the commands. Exit codes: 0 done, 1 failed, 2 bad input, 130 interrupted."""
    samples = _add(commands, "samples", "list what a run painted on the way, by prompt and step")
    samples.add_argument("--sheet", type=user_path, metavar="F.png", help="all of it on one sheet")
    samples.set_defaults(command=translated("the samples were read")(_samples))

    report = _add(commands, "report", "write a run's report: one HTML file that needs nothing else", as_json=False)
    report.add_argument("--out", type=user_path, metavar="F.html", help="where it goes (report.html in the run's folder)")
    report.set_defaults(command=translated("the report was written")(_report))


def _add(commands: Commands, name: str, told: str, *, as_json: bool = True) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=told, description=f"{told[0].upper()}{told[1:]}.")
    parser.add_argument("run", metavar="RUN", help="a run's folder, or its name as `runs` lists it")
    parser.add_argument("--output-dir", default=".", help="where the LoRAs went, if RUN is a name")
    if as_json:
        parser.add_argument("--json", action="store_true", help="as JSON")
    return parser


def _folder(chosen: argparse.Namespace) -> Path:
    """The run's folder, named as for `--resume`. Raises SettingError where there is none."""
    path = user_path(chosen.run)
    folder = path if os.path.lexists(path) else user_path(chosen.output_dir) / RUNS_FOLDER / chosen.run
    if not (folder / "settings.toml").is_file() and not (folder / "events.jsonl").is_file():
        raise SettingError(f"There is no run {chosen.run}", why=f"{folder} holds no events.jsonl",
                           remedy="name a run's folder; `runs --output-dir` lists them")
    return folder


def _samples(chosen: argparse.Namespace) -> int:
    from lib_lora_train.results.overview import overview
    from lib_lora_train.results.sample_sheet import draw_samples
    from lib_lora_train.storage.atomic import replacing

    folder = _folder(chosen)
    samples = overview(folder)["samples"]
    if chosen.json:
        print(json.dumps(samples, indent=1))
    for prompt in samples if not chosen.json else ():
        print(f"{prompt['index'] + 1}: {prompt['prompt']}")
        for entry in prompt["pictures"]:
            print(f"  step {entry['step']:>7}  {folder / entry['file']}")
    if not samples:
        print(f"The run {folder.name} has no samples.", file=sys.stderr)
    elif chosen.sheet:
        with replacing(chosen.sheet) as file:
            draw_samples(folder, samples).save(file, "PNG")
        print(f"The sheet: {chosen.sheet}", file=sys.stderr)
    return 0


def _report(chosen: argparse.Namespace) -> int:
    from lib_lora_train.results.report import FILE, report_html
    from lib_lora_train.storage.atomic import write_atomic

    folder = _folder(chosen)
    out = chosen.out or folder / FILE
    write_atomic(out, report_html(folder).encode())
    print(out)
    return 0
