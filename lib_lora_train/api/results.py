"""The routes under /lora-train/v1/results/: what came of a run, as JSON and pictures. Guarded as every route is (`gate.py`).

"run" is a run's id, as `runs` names it; left out, it is the newest. A save is called by its "id", which `results` gives.

    GET  results?run=        everything about a run's saves (`results/overview.py`), and "task": the work under way or done last,
                             {"id", "run", "name", "done", "total", "seconds_left", "running", "stopping", "outcome", "message"}
    GET  results/task        {"task"} alone, for a look every second
    GET  results/file?run=&name=&small=   a PNG of that run, as `results` names it; "small" makes a JPEG of 256 pixels of it
    GET  results/report?run= all of it on one page that needs no other file
    POST results/grid        {"run", "saves"?, "weights"?, "prompts"?, "seeds"?, "extras"?: ["average", "unet", "text"],
                             "checkpoint"?} -> {"id"}: paint and score the saves, a task
    POST results/stop        {} -> {"stopping": whether something was running}; a grid goes on where it was
    POST results/take        {"run", "save", "weight"?}: make that save the run's LoRA, with card and preview
    POST results/delete      {"run", "saves": [...]} -> {"deleted": n}
    POST results/sample      {} -> {"sampling": whether a run heard it}: paint now, between two steps of the run under way
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from fastapi.responses import Response
from pydantic import BaseModel, StrictBool, StrictStr, confloat, conint, conlist, constr

from lib_lora_train.api import service
from lib_lora_train.api.gate import Gate
from lib_lora_train.errors import DatasetError, HostError, LoraFileError, SettingError
from lib_lora_train.host.port import Host
from lib_lora_train.run.record import newest_run
from lib_lora_train.run.runner import Runner
from lib_lora_train.settings import Settings
from lib_lora_train.studio import thumbs
from lib_lora_train.studio.requests import some, validated
from lib_lora_train.studio.tasks import Task, Tasks

_FILE = re.compile(r"(samples|grid)/[^/\\:\0]{1,240}\.png")
_PNG = b"\x89PNG\r\n\x1a\n"
_Text = constr(strict=True, max_length=2000)
