"""The commands on several runs: `sweep`, `runs` and `compare`, and the settings that `train` and `sweep` are given.

Nothing here imports torch or numpy before a command runs, so that every other command and `--help` start at once.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import secrets
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lib_lora_train import terminal
from lib_lora_train.errors import LoraTrainError, SettingError, counted, translated
from lib_lora_train.run import RUNS_FOLDER
from lib_lora_train.settings import assignment, flat, named, parse, user_path
from lib_lora_train.settings.importing import import_file
from lib_lora_train.studio.commands.results import folder_of_run
from lib_lora_train.studio.commands.settings import named_preset

Commands = Any  # what ArgumentParser.add_subparsers returns


def add_given(parser: argparse.ArgumentParser) -> None:
    """Add what settings are given by; see `given_values`."""
    parser.add_argument("--data", default="", help=named("train_data_dir"))
    parser.add_argument("--name", default="", help=named("output_name"))
    parser.add_argument("--output-dir", default="", help=named("output_dir"))
    parser.add_argument("--config", type=user_path, help="a file of settings, another program's too, or a LoRA")
    parser.add_argument("--preset", default="", help="settings for a purpose: the name of a preset, or its file")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="one setting; may be repeated")


def given_values(chosen: argparse.Namespace) -> tuple[dict[str, Any], list[str]]:
    """The settings that the command line gives, over those of the configuration file, over the preset's; and what became of
    the file's, in sentences. Raises SettingError."""
    imported = import_file(chosen.config) if chosen.config else None
    preset = named_preset(chosen.preset, chosen.output_dir) if chosen.preset else None
    values = {**(preset.values if preset else {}), **(imported.values if imported else {})}
    notes = imported.sentences() if imported else []
    values |= {name: value for name, value in (
        ("train_data_dir", chosen.data), ("output_name", chosen.name), ("output_dir", chosen.output_dir),
        ("resume", getattr(chosen, "resume", ""))) if value}
    values |= dict(assignment(text) for text in chosen.set)
    if preset:
        values["preset"] = preset.recorded(flat(parse({n: v for n, v in values.items() if n != "resume"})))
    return values, notes


def add_sweep(commands: Commands) -> None:
    """Add `sweep`. Exit codes: 0 done, 1 a run failed, 2 bad input, 130 interrupted."""
    sweep = commands.add_parser(
        "sweep", help="train with several values of some settings, one run after the other, and compare them",
        description="A run for each combination of the values; the checkpoint is read once. Nothing begins unless all can.")
    sweep.add_argument("--checkpoint", type=user_path, required=True, help="the model, a .safetensors file")
    add_given(sweep)
    sweep.add_argument("--vary", action="append", default=[], metavar="NAME=VALUE,VALUE", help="a setting and its values; may "
                       "be repeated: then each combination is trained. seed=1,2,3 shows what is chance")
    sweep.add_argument("--overrides", type=user_path, metavar="FILE.json", help="a list of objects of settings, trained each; "
                       "with --vary, with each combination")
    sweep.add_argument("--dry-run", action="store_true", help="list the runs and train none")
    sweep.add_argument("--json", action="store_true", help="one JSON event a line, and the comparison as the last")
    sweep.set_defaults(command=_sweep)


def add_runs(commands: Commands) -> None:
    """Add `runs`. Exit codes: 0 done, 1 failed, 2 bad input."""
    runs = commands.add_parser("runs", help="list past runs and how they ended, or delete some with their files")
    runs.add_argument("action", nargs="?", choices=("list", "delete"), default="list")
    runs.add_argument("runs", nargs="*", metavar="RUN", help="the names of the runs to delete, as the list has them")
    runs.add_argument("--output-dir", default=".", help="where the LoRAs went")
    runs.add_argument("--loras", action="store_true", help="with delete: the LoRAs that these runs wrote, too")
    runs.add_argument("--yes", action="store_true", help="with delete: do not ask")
    runs.add_argument("--json", action="store_true")
    runs.set_defaults(command=translated("past runs were read")(_runs))


def add_compare(commands: Commands) -> None:
    """Add `compare`. Exit codes: 0 done, 1 failed, 2 bad input."""
    compare = commands.add_parser(
        "compare", help="compare runs: what differs, what each is worth, which is the best beyond chance")
    compare.add_argument("runs", nargs="*", metavar="RUN", help="a run's folder, or its name as `runs` lists it")
    compare.add_argument("--sweep", default="", metavar="NAME", help="all runs of the newest sweep of this name, or of this id")
    compare.add_argument("--output-dir", default=".", help="where the LoRAs went, if RUN is a name")
    compare.add_argument("--json", action="store_true", help="all of it, as JSON")
    compare.set_defaults(command=translated("runs were compared")(_compare))


def _sweep(chosen: argparse.Namespace) -> int:
    from lib_lora_train.distributed import LaunchEnvironment
    from lib_lora_train.host.standalone import describe_file
    from lib_lora_train.results.comparison import comparison_data
    from lib_lora_train.run.sweep import expand, plan_all
    from lib_lora_train.studio.commands.progress import RunBar, show_json

    if LaunchEnvironment.read(os.environ) is not None:
        raise SettingError("A sweep is trained by one process", remedy="start it without torchrun or accelerate")
    values, notes = given_values(chosen)
    runs = expand(values, axes=dict(map(_axis, chosen.vary)), overrides=_overrides(chosen.overrides))
    describe_file(chosen.checkpoint)  # a wrong one is refused before anything is read
    host = _shown_host(chosen.checkpoint, Path(runs[0].settings.save.output_dir or "."))
    plan_all(runs, host)
    for text in (*notes, *(run.name for run in runs)):
        print(text, file=sys.stderr)
    if chosen.dry_run:
        return 0
    folders, failed, stopped = _train_all(runs, host, show_json if chosen.json else RunBar, name=str(values["output_name"]))
    if len(folders) > 1:
        data = comparison_data(folders)
        print(json.dumps(data)) if chosen.json else _print_comparison(data)
    return terminal.INTERRUPTED if stopped else int(failed > 0)


def _train_all(runs: Sequence[Any], host: Any, show: Any, *, name: str) -> tuple[list[Path], int, bool]:
    """Train one run after the other; the folders of those that began, how many failed, whether Ctrl+C ended it."""
    from lib_lora_train.results.start import start
    from lib_lora_train.run.runner import Runner
    from lib_lora_train.run.sweep import record_sweep
    from lib_lora_train.run.webhook import webhook_of

    runner, folders, failed, sweep_id = Runner(), list[Path](), 0, secrets.token_hex(4)
    with terminal.StopRequest(launched=False, tells=True) as request:
        for number, run in enumerate(runs, 1):
            if request.wanted:
                break
            print(f"{number} of {len(runs)}: {run.name}", file=sys.stderr)
            host.show = show() if isinstance(show, type) else show
            try:
                folder = host.runs_folder / start(flat(run.settings), runner=runner, host=host)
            except LoraTrainError as error:
                print(error, file=sys.stderr)
                failed += 1
                continue
            folders.append(folder)
            record_sweep(folder, run.sweep(sweep_id, name))
            while not runner.wait(0.2):
                if request.wanted:
                    runner.stop(save=True)
            status = runner.status()
            if status is not None and status.finished is not None and status.finished.outcome == "failed":
                print(status.finished.message, file=sys.stderr)
                failed += 1
        webhook_of(host.runs_folder).wait()
        return folders, failed, request.wanted


def _shown_host(checkpoint: Path, output: Path) -> Any:
    """A host whose runs' events are seen by its `show`."""
    from lib_lora_train.events import Event
    from lib_lora_train.host.standalone import StandaloneHost

    class ShownHost(StandaloneHost):
        def show(self, event: Event) -> None:
            pass

        def report(self, event: Event) -> None:
            self.show(event)

    return ShownHost(checkpoint, lora_folder=output, runs_folder=output / RUNS_FOLDER)


def _axis(text: str) -> tuple[str, list[str]]:
    name, equals, values = text.partition("=")
    if not equals:
        raise SettingError(f"--vary {text} names no values", remedy="write --vary name=value,value")
    return name.strip(), [value.strip() for value in values.split(",") if value.strip()]


def _overrides(path: Path | None) -> Sequence[Mapping[str, Any]]:
    if path is None:
        return ()
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SettingError(f"{path} cannot be read", why=str(error)) from error
    if not (isinstance(found, list) and found and all(isinstance(one, dict) for one in found)):
        raise SettingError(f"{path} holds no list of objects", remedy='write [{"seed": 1}, {"seed": 2}]')
    return found


def _runs(chosen: argparse.Namespace) -> int:
    from lib_lora_train.run.record import past_runs

    folder = user_path(chosen.output_dir) / RUNS_FOLDER
    if chosen.action == "delete":
        return _delete(folder, chosen)
    if chosen.runs or chosen.loras or chosen.yes:
        raise SettingError("Runs are named, and --loras and --yes are given, to `runs delete` only")
    found = past_runs(folder)
    if not found:
        print(f"No runs were found in {folder}; --output-dir names where the LoRAs went.", file=sys.stderr)
    if chosen.json:
        print(json.dumps([dataclasses.asdict(run) for run in found], indent=1))
    for run in found if not chosen.json else ():
        resumable = "" if run.resume_step is None or run.outcome == "running" else f"--resume {run.id}"
        ended = "ruined" if run.verdict == "ruined" else run.outcome
        print(f"{run.id:40} {ended:12} {run.steps:>6}/{run.total:<6} {resumable}".rstrip())
    return 0


def _delete(folder: Path, chosen: argparse.Namespace) -> int:
    from lib_lora_train.host.standalone import StandaloneHost
    from lib_lora_train.results.run_list import delete_runs, deletion

    found = deletion(folder, chosen.runs, with_loras=chosen.loras)
    told = {"runs": [run.name for run in found.folders], "loras": [str(lora) for lora in found.loras], "freed": found.freed}
    for line in () if chosen.json else (*told["runs"], *told["loras"]):
        print(line)
    if not chosen.yes:
        if not sys.stdin.isatty():
            raise SettingError("Nothing was deleted", why="nobody can be asked here", remedy="say --yes")
        if input(f"Delete these, {found.freed / 1e6:,.1f} MB? [y/N] ").strip().lower() not in ("y", "yes"):
            print("Nothing was deleted.", file=sys.stderr)
            return 0
    delete_runs(found, StandaloneHost(None, lora_folder=folder.parent, runs_folder=folder))
    print(json.dumps(told, indent=1) if chosen.json else f"{found.freed / 1e6:,.1f} MB are free again.")
    return 0


def _compare(chosen: argparse.Namespace) -> int:
    from lib_lora_train.results.comparison import comparison_data
    from lib_lora_train.results.run_list import run_folders
    from lib_lora_train.run.sweep import read_sweep

    folders = [folder_of_run(argparse.Namespace(run=run, output_dir=chosen.output_dir)) for run in chosen.runs]
    if chosen.sweep:
        known = [(folder, sweep) for folder in run_folders(user_path(chosen.output_dir) / RUNS_FOLDER)
                 if (sweep := read_sweep(folder)) and chosen.sweep in (sweep.id, sweep.name)]
        if not known:
            raise SettingError(f"There is no sweep {chosen.sweep!r}", remedy="--output-dir names where the LoRAs went")
        folders += [folder for folder, sweep in reversed(known) if sweep.id == known[0][1].id]
    data = comparison_data(folders)
    print(json.dumps(data, indent=1)) if chosen.json else _print_comparison(data)
    return 0


def _print_comparison(data: Mapping[str, Any]) -> None:
    """The table, a line a row, with what is said of it."""
    head = ["", *data["settings"], "verdict", "n", *(name.replace("_", " ") for name in data["measures"]), "run"]
    lines = [head]
    for row in data["rows"]:
        first, count = row["runs"][0], len(row["runs"])
        verdicts = dict.fromkeys("ruined" if run["verdict"] == "ruined" else run["finding"] or run["outcome"]
                                 for run in row["runs"])
        lines.append(["*" if row["best"] else "=" if row["difference"] == "none" else "",
                      *(str(row["settings"][name]) for name in data["settings"]), ", ".join(verdicts), str(count),
                      *(_number(row["measures"][name], name) for name in data["measures"]),
                      first["run"] + (f" and {counted(count - 1, 'other')}" if count > 1 else "")])
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    for row in data["rows"]:
        for kind, names in (row["changes"] or {}).items():
            if names:
                print(f"{row['runs'][0]['run']}: {kind} {len(names)}: {', '.join(names[:8])}{' …' if len(names) > 8 else ''}")
    if data["reason"]:
        print(f"* {data['reason']}")
    if any(row["difference"] == "none" for row in data["rows"]):
        print("= no difference to * beyond the spread of seeds")
    for note in data["notes"]:
        print(f"note: {note}", file=sys.stderr)


def _number(measure: Mapping[str, Any], name: str) -> str:
    if measure["mean"] is None:
        return "-"
    digits, sign = (1, " %") if name == "held_out_gain" else (3, "")
    spread = "" if measure["deviation"] is None else f" ± {measure['deviation']:.{digits}f}"
    return f"{measure['mean']:.{digits}f}{spread}{sign}"
