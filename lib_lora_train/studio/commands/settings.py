"""The command on files of settings: `settings`, and what `train --preset` names."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from lib_lora_train.errors import translated
from lib_lora_train.run import PRESETS_FOLDER
from lib_lora_train.settings import user_path
from lib_lora_train.settings.importing import import_file
from lib_lora_train.settings.presets import Preset, read_preset
from lib_lora_train.settings.toml import write_toml
from lib_lora_train.storage.atomic import write_atomic
from lib_lora_train.studio.commands.results import folder_of_run


def add_settings(commands: Any) -> None:
    """Add the command. Exit codes: 0 done, 1 failed, 2 bad input."""
    parser = commands.add_parser(
        "settings", help="show settings as TOML: a past run's, another program's, or those a LoRA was trained with")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("file", nargs="?", type=user_path, help="a file of settings of ours or another program's, or a LoRA")
    source.add_argument("--run", metavar="RUN", help="a run's folder, or its name as `runs` lists it")
    parser.add_argument("--output-dir", default=".", help="where the LoRAs went, if RUN is a name")
    parser.add_argument("--out", type=user_path, metavar="F.toml", help="write them there, for `train --config`")
    parser.add_argument("--json", action="store_true", help="what became of each name, as JSON")
    parser.set_defaults(command=translated("the settings were read")(_settings))


def named_preset(text: str, output_dir: str) -> Preset:
    """The preset of that name, built-in or kept beside the results, or in a file. Raises SettingError."""
    from lib_lora_train.run.presets import find_preset

    path = user_path(text)
    return read_preset(path) if path.suffix == ".toml" else find_preset(text, user_path(output_dir or ".") / PRESETS_FOLDER)


def _settings(chosen: argparse.Namespace) -> int:
    if chosen.run:
        chosen.file = folder_of_run(chosen) / "settings.toml"
    imported = import_file(chosen.file)
    for sentence in () if chosen.json else imported.sentences():
        print(sentence, file=sys.stderr)
    text = json.dumps(imported.to_json(), indent=1) if chosen.json else write_toml(imported.values).rstrip()
    if chosen.out:
        write_atomic(chosen.out, f"{text}\n".encode("utf-8", "replace"))
    else:
        print(text)
    return 0
