"""The commands on what a run made: `samples`, `grid`, `scores`, `recommend`, `take`, `share`, `export` and `report`.

Nothing here imports torch or numpy before a command runs, so that every other command and `--help` start at once.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lib_lora_train import terminal
from lib_lora_train.errors import DatasetError, SettingError, translated
from lib_lora_train.run import RUNS_FOLDER
from lib_lora_train.settings import user_path

if TYPE_CHECKING:
    from lib_lora_train.host.standalone import StandaloneHost
    from lib_lora_train.results.scoring import Scores

_MOST_SEEDS = 100
Commands = Any  # what ArgumentParser.add_subparsers returns


def add_results(commands: Commands) -> None:
    """Add the commands. Exit codes: 0 done, 1 failed, 2 bad input, 130 interrupted."""
    samples = _add(commands, "samples", "list what a run painted on the way, by prompt and step")
    samples.add_argument("--sheet", type=user_path, metavar="F.png", help="all of it on one sheet")
    samples.set_defaults(command=translated("the samples were read")(_samples))

    grid = _add(commands, "grid", "paint a run's saves beside each other and score them; goes on where it was")
    grid.add_argument("--checkpoint", type=user_path, required=True, help="the model, a .safetensors file")
    grid.add_argument("--saves", type=names, default=(), metavar="A,B", help="by name; up to five over the run")
    grid.add_argument("--weights", type=numbers, default=(), metavar="W,W", help="how strongly a save is used (0.7,1)")
    grid.add_argument("--prompts", type=user_path, metavar="FILE",
                      help="one a line, without --w and the like (captions of held-out pictures)")
    grid.add_argument("--seeds", type=int, default=3, metavar="N", help="pictures for each prompt")
    grid.add_argument("--extra", action="append", default=[], choices=("average", "unet", "text"), help="another column: the "
                      "average of the last saves, or what the last one changes in one part alone; may be repeated")
    grid.add_argument("--steps", type=int, default=20, help="steps a picture is painted in")
    grid.add_argument("--cfg", type=float, default=7.0, help="how strongly the text is followed while painting")
    grid.set_defaults(command=translated("the grid was painted")(_grid))

    scores = _add(commands, "scores", "show what `grid` measured: four numbers for each save and weight")
    scores.set_defaults(command=translated("the scores were read")(_scores))

    advice = _add(commands, "recommend", "say which save to take, at which weight, and why")
    advice.set_defaults(command=translated("the saves were compared")(_recommend))

    take = _add(commands, "take", "make one of a run's saves the LoRA, with card and preview")
    take.add_argument("save", metavar="SAVE", help="its name, as `grid` and the report have it; NAME-average is the average")
    take.add_argument("--weight", type=float, default=1.0, help="how strongly it is to be used, for the card (1)")
    take.set_defaults(command=translated("a save was made the LoRA")(_promote))

    share = _add(commands, "share", "push one of a run's saves to the Hugging Face hub, with the login of huggingface-cli")
    _add_named_save(share)
    share.add_argument("--huggingface-repo-id", required=True, metavar="USER/NAME", help="the repository; a new one is made")
    share.add_argument("--huggingface-repo-visibility", choices=("private", "public"), default="private",
                       help="of a new repository (private)")
    share.add_argument("--license", default="", metavar="NAME", help="its short name on the hub, as cc-by-nc-4.0 (none)")
    share.add_argument("--overwrite", action="store_true", help="also into a repository that holds files")
    share.set_defaults(command=translated("the save was pushed")(_share))

    export = _add(commands, "export", "make a folder to upload to Civitai of one of a run's saves")
    _add_named_save(export)
    export.add_argument("--to", type=user_path, metavar="DIR", help="the folder goes in there (export in the run's folder)")
    export.set_defaults(command=translated("the folder was made")(_export))

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


def _add_named_save(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("save", metavar="SAVE", help="its name, as `grid` and the report have it; NAME-average is the average")
    parser.add_argument("--name", default="", help="what the LoRA is to be called (as the run's)")
    parser.add_argument("--weight", type=float, help="the recommended one (as `recommend` says, or 1)")


def folder_of_run(chosen: argparse.Namespace) -> Path:
    """The run's folder, named as for `--resume`. Raises SettingError where there is none."""
    path = user_path(chosen.run)
    folder = path if os.path.lexists(path) else user_path(chosen.output_dir) / RUNS_FOLDER / chosen.run
    if not (folder / "settings.toml").is_file() and not (folder / "events.jsonl").is_file():
        raise SettingError(f"There is no run {chosen.run}", why=f"{folder} holds no events.jsonl",
                           remedy="name a run's folder; `runs --output-dir` lists them")
    return folder


def names(text: str) -> tuple[str, ...]:
    """What stands between the commas."""
    return tuple(filter(None, (word.strip() for word in text.split(","))))


def numbers(text: str) -> tuple[float, ...]:
    """The numbers between the commas."""
    return tuple(map(float, names(text)))


def _host(folder: Path, checkpoint: Path | None = None) -> StandaloneHost:
    """The host that finds the run's LoRAs where they are."""
    from lib_lora_train.host.standalone import StandaloneHost, describe_file
    from lib_lora_train.results.saves import result_path

    if checkpoint is not None:
        describe_file(checkpoint)  # a wrong one is refused before anything is read
    result = result_path(folder)
    return StandaloneHost(checkpoint, lora_folder=result.parent if result else folder.parent.parent, runs_folder=folder.parent)


def _lines(path: Path) -> list[str]:
    from lib_lora_train.dataset.text_files import read_text

    try:
        return read_text(path).text.splitlines()
    except DatasetError as error:
        raise SettingError(f"The prompts in {path} cannot be read", why=error.reason) from error


def _grid(chosen: argparse.Namespace) -> int:
    from lib_lora_train.results.grid import SEEDS, SampleOptions, sample_grid
    from lib_lora_train.results.scoring import score_grid
    from lib_lora_train.studio.commands.progress import progress_bar

    folder = folder_of_run(chosen)
    if not 1 <= chosen.seeds <= _MOST_SEEDS or chosen.steps < 1:
        raise SettingError(f"--seeds {chosen.seeds} --steps {chosen.steps} is not possible",
                           why=f"there must be 1 to {_MOST_SEEDS} seeds and at least a step")
    host = _host(folder, chosen.checkpoint)
    terminal.raise_on_interrupt()
    with progress_bar("Painting") as progress:
        grid = sample_grid(
            host, folder, saves=chosen.saves, weights=chosen.weights,
            prompts=_lines(chosen.prompts) if chosen.prompts else (), seeds=range(SEEDS[0], SEEDS[0] + chosen.seeds),
            extras=chosen.extra, options=SampleOptions(steps=chosen.steps, cfg_scale=chosen.cfg), on_progress=progress)
    with progress_bar("Looking at pictures") as progress:
        scores = score_grid(host, folder, on_progress=progress)
    if chosen.json:
        print(json.dumps({**grid.to_dict(), "scores": scores.to_dict()}, indent=1))
        return 0
    _print_notes([note for note in grid.notes if note not in scores.notes])
    _print_scores(scores)
    return 0


def _scores(chosen: argparse.Namespace) -> int:
    from lib_lora_train.results.scoring import read_scores

    folder = folder_of_run(chosen)
    scores = read_scores(folder)
    if scores is None:
        raise SettingError(f"The run {folder.name} has no grid with scores", remedy="make one: `grid`")
    if chosen.json:
        print(json.dumps(scores.to_dict(), indent=1))
    else:
        _print_scores(scores)
    return 0


def _print_scores(scores: Scores) -> None:
    from lib_lora_train.evaluation.scores import NAMES

    print(f"{'save':40} {'weight':6}" + "".join(f" {name.replace('_', ' '):>16}" for name in NAMES))
    for one in scores.columns:
        print(f"{one.column.save or 'base model':40} {one.column.weight:<6g}" + "".join(
            f" {'-' if s.mean is None else f'{s.mean:.3f}' + ('' if s.deviation is None else f' ± {s.deviation:.3f}'):>16}"
            for s in (getattr(one, name) for name in NAMES)) + f"  {one.column.problem or one.column.part}".rstrip())
    _print_notes(scores.notes)


def _print_notes(notes: Sequence[str]) -> None:
    for note in notes:
        print(f"note: {note}", file=sys.stderr)


def _recommend(chosen: argparse.Namespace) -> int:
    from lib_lora_train.results.recommend import recommend

    folder = folder_of_run(chosen)
    found = recommend(folder)
    if found is None:
        raise SettingError(f"Nothing can be recommended of {folder.name}", why="none of its saves was measured",
                           remedy="paint and score them: `grid`")
    print(json.dumps(found.to_dict(), indent=1) if chosen.json else f"{found.save} at {found.weight:g}: {found.reason}")
    return 0


def _samples(chosen: argparse.Namespace) -> int:
    from lib_lora_train.results.overview import overview
    from lib_lora_train.results.sample_sheet import draw_samples
    from lib_lora_train.storage.atomic import replacing

    folder = folder_of_run(chosen)
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


def _promote(chosen: argparse.Namespace) -> int:
    from lib_lora_train.results.promote import promote

    folder = folder_of_run(chosen)
    done = promote(folder, chosen.save, weight=chosen.weight, host=_host(folder))
    print(json.dumps(done, indent=1) if chosen.json else f"{done['path']} is {chosen.save} now: {done['prompt']}")
    return 0


def _share(chosen: argparse.Namespace) -> int:
    from lib_lora_train.results.hub import push
    from lib_lora_train.results.sharing import SharedLora

    folder = folder_of_run(chosen)
    shared = SharedLora.of(folder, chosen.save, name=chosen.name, weight=chosen.weight)
    url = push(shared, chosen.huggingface_repo_id, private=chosen.huggingface_repo_visibility == "private",
               license_name=chosen.license, overwrite=chosen.overwrite, scratch=folder)
    print(json.dumps({"url": url}) if chosen.json else url)
    return 0


def _export(chosen: argparse.Namespace) -> int:
    from lib_lora_train.results.sharing import SharedLora, export_for_civitai

    folder = folder_of_run(chosen)
    shared = SharedLora.of(folder, chosen.save, name=chosen.name, weight=chosen.weight)
    made = export_for_civitai(shared, (chosen.to or folder / "export") / shared.name)
    print(json.dumps({"folder": str(made)}) if chosen.json else made)
    return 0


def _report(chosen: argparse.Namespace) -> int:
    from lib_lora_train.results.report import FILE, report_html
    from lib_lora_train.storage.atomic import write_atomic

    folder = folder_of_run(chosen)
    out = chosen.out or folder / FILE
    write_atomic(out, report_html(folder).encode())
    print(out)
    return 0
