"""The routes of the list of runs and of their comparison. Guarded as every route is (`gate.py`).

    GET  history?offset=&count=  {"total", "runs": [...]}: past runs, newest first, each with its scores, the picture that shows
                              it and the disk it takes (`results/run_list.py`); at most 200 at once
    GET  history/disk         {"runs", "size", "lora_size"}: bytes of all runs' folders, and of the LoRAs that they wrote
    GET  history/settings?run=  {"settings"} of a run by name, as `start` takes them, without those that name its LoRA
    POST history/deletion     {"runs": [ids], "loras": true|false} -> {"runs", "loras": [names], "freed": bytes}: what deleting
                              would take away; nothing is deleted
    POST history/delete       the same -> the same: they are deleted. Without "loras" no LoRA is touched
    POST compare              {"runs": [ids]} or {"sweep": id} -> these runs, or all of that sweep, compared
                              (`results/comparison.py`)
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, StrictBool, conint, constr

from lib_lora_train.api import service
from lib_lora_train.api.gate import Gate
from lib_lora_train.api.results import Results
from lib_lora_train.errors import SettingError
from lib_lora_train.results.comparison import comparison_data
from lib_lora_train.results.run_list import Deletion, delete_runs, deletion, disk_use, listed, run_folders
from lib_lora_train.run.record import read_settings
from lib_lora_train.run.sweep import read_sweep
from lib_lora_train.settings import DECLARATIONS
from lib_lora_train.studio.requests import some, validated

_Id = constr(strict=True, max_length=2000)
_OF_ONE_LORA = ("output_name", "output_dir", "resume", "overwrite")


class HistoryRequest(BaseModel):
    """What these routes are sent."""

    run: _Id = ""
    runs: list[_Id] = []
    sweep: _Id = ""
    loras: StrictBool = False
    offset: conint(ge=0, lt=10**6) = 0
    count: conint(ge=1, le=200) = 30


class History:
    """What the routes share."""

    def __init__(self, results: Results) -> None:
        self._results, self._host = results, results.host

    def settings(self, request: HistoryRequest) -> dict[str, Any]:
        """The settings of a run, for another one."""
        found = read_settings(self._results.named_folder(request.run))
        return {"settings": {name: value for name, value in found.items() if name in DECLARATIONS and name not in _OF_ONE_LORA}}

    def compare(self, request: HistoryRequest) -> dict[str, Any]:
        """The comparison of the runs, or of those of the sweep. Raises UserError."""
        return comparison_data(self._of_sweep(request.sweep) if request.sweep else
                               [service.folder_of(run, self._host) for run in some(request.runs, "runs")])

    def _of_sweep(self, sweep_id: str) -> Sequence[Path]:
        found = [folder for folder in reversed(run_folders(self._host.runs_folder))
                 if (sweep := read_sweep(folder)) and sweep.id == sweep_id]
        if not found:
            raise SettingError(f"There is no run of the sweep {sweep_id!r}", remedy="see the list of runs")
        return found

    def deletion(self, request: HistoryRequest) -> Deletion:
        """What deleting the runs would take away. Raises as `run_list.deletion`, HostError while a grid of one is painted."""
        for run in request.runs:
            self._results.refuse_change(run)
        return deletion(self._host.runs_folder, some(request.runs, "runs"), with_loras=request.loras,
                        allowed=self._host.allowed)

    def delete(self, request: HistoryRequest) -> Deletion:
        """Delete them."""
        found = self.deletion(request)
        delete_runs(found, self._host)
        return found


def add_routes(gate: Gate, results: Results) -> None:
    """Every route of the list of runs."""
    history = History(results)

    def request_of(query: Any, body: dict[str, Any]) -> HistoryRequest:
        return validated(HistoryRequest, body or query)

    runs = results.host.runs_folder
    gate.add("GET", "history", lambda query, body: listed(
        runs, offset=(asked := request_of(query, body)).offset, count=asked.count), "Past runs with what they are worth")
    gate.add("GET", "history/disk", lambda *_: disk_use(runs), "The disk that runs take")
    gate.add("GET", "history/settings", lambda *sent: history.settings(request_of(*sent)), "The settings of a run")
    gate.add("POST", "history/deletion", lambda *sent: _told(history.deletion(request_of(*sent))),
             "What deleting would take away")
    gate.add("POST", "history/delete", lambda *sent: _told(history.delete(request_of(*sent))), "Delete runs with their files")
    gate.add("POST", "compare", lambda *sent: history.compare(request_of(*sent)), "Runs beside each other")


def _told(found: Deletion) -> dict[str, Any]:
    return {"runs": [folder.name for folder in found.folders], "loras": [lora.name for lora in found.loras],
            "freed": found.freed}
