"""The commands before a training: `suggest`, settings for a folder of pictures, and `find-rate`, a learning rate for them."""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lib_lora_train import events
from lib_lora_train.errors import translated
from lib_lora_train.run import RUNS_FOLDER
from lib_lora_train.settings import Settings, flat, parse, user_path
from lib_lora_train.settings.presets import PURPOSES
from lib_lora_train.settings.toml import write_toml
from lib_lora_train.storage.atomic import write_atomic
from lib_lora_train.studio.commands.sweep import add_given, given_values

if TYPE_CHECKING:
    from lib_lora_train.host.standalone import StandaloneHost


def add_suggest(commands: Any) -> None:
    """Add `suggest`. Exit codes: 0 done, 1 failed, 2 bad input."""
    parser = commands.add_parser("suggest", help="propose settings for a folder of pictures, each with its reason")
    _add_dataset(parser)
    parser.add_argument("--purpose", choices=PURPOSES, default=PURPOSES[0], help="what it is to be (character)")
    parser.add_argument("--out", type=user_path, metavar="F.toml", help="write the settings there, for `train --config`")
    parser.add_argument("--json", action="store_true", help="as JSON")
    parser.set_defaults(command=translated("settings were proposed")(_suggest))


def add_find_rate(commands: Any) -> None:
    """Add `find-rate`. Exit codes as those of `train`."""
    parser = commands.add_parser("find-rate", help="find a learning rate for a folder of pictures, in 100 steps with Prodigy")
    _add_dataset(parser)
    parser.set_defaults(command=_find_rate)


def _add_dataset(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", type=user_path, required=True, help="the model, a .safetensors file")
    add_given(parser)


def _host(chosen: argparse.Namespace) -> StandaloneHost:
    from lib_lora_train.host.standalone import StandaloneHost

    output = user_path(chosen.output_dir or ".")
    return StandaloneHost(chosen.checkpoint, lora_folder=output, runs_folder=output / RUNS_FOLDER)


def _suggest(chosen: argparse.Namespace) -> int:
    from lib_lora_train.run.suggestions import suggestions_for

    values, notes = given_values(chosen)
    found = suggestions_for(values, chosen.purpose, host=_host(chosen))
    if chosen.out:
        settings = {**values, **{one["setting"]: one["value"] for one in found["suggestions"]}}
        write_atomic(chosen.out, write_toml(_changed(settings)).encode("utf-8", "replace"))
    if chosen.json:
        print(json.dumps(found, indent=1))
        return 0
    for one in found["suggestions"]:
        print(f"{one['setting']:26} {one['value']!s:10} {one['reason']}")
    print(found["formula"])
    for warning in (*notes, *found["warnings"]):
        print(f"note: {warning}")
    return 0


def _changed(values: Mapping[str, Any]) -> dict[str, Any]:
    """Those that are not as at the start."""
    first = flat(Settings())
    return {name: value for name, value in flat(parse(values)).items() if value != first[name]}


def _find_rate(chosen: argparse.Namespace) -> int:
    from lib_lora_train.run.rate_finder import find_rate, plan_finder
    from lib_lora_train.run.record import RunRecord, new_folder
    from lib_lora_train.studio.commands.progress import RunBar

    values, notes = given_values(chosen)
    settings, host, show = parse(values), _host(chosen), RunBar()
    plan = plan_finder(settings, host)
    # Recorded as a run of the page is, for `suggest` to know.
    with contextlib.closing(RunRecord(new_folder(host.runs_folder, plan.settings.save.output_name), plan.settings)) as record:
        def report(event: events.Event) -> None:
            record.write(event)
            show(event)

        for note in notes:
            report(events.Warned(note))
        report(find_rate(plan, host, requested=settings, report=report, stop=lambda: ""))
    return 0
