"""The routes under /lora-train/v1/results/: what came of a run, as JSON and pictures. Guarded as every route is (`gate.py`).

"run" is a run's id, as `runs` names it; left out, it is the newest. A save is called by its "id", which `results` gives.

    GET  results?run=        everything about a run (`results/overview.py`), and "task", the work under way or done last:
                             {"id", "run", "name", "done", "total", "seconds_left", "running", "stopping", "outcome", "message"}
    GET  results/task        {"task"} alone, for a look every second
    GET  results/file?run=&name=&small=   a PNG of that run, as `results` names it; "small" makes a JPEG of 256 pixels of it
    GET  results/report?run= all of it on one page that needs no other file
    POST results/grid        {"run", "saves"?, "weights"?, "prompts"?, "seeds"?, "extras"?: ["average", "unet", "text"],
                             "checkpoint"?, "steps"?, "cfg"?, "sampler"?} -> {"id"}: paint and score the saves, a task
    POST results/stop        {} -> {"stopping": whether something was running}; a grid goes on where it was
    POST results/take        {"run", "save", "weight"?} -> what `promote` returns and "message": make that save the run's LoRA
    POST results/delete      {"run", "saves": [...]} -> {"deleted": [names of files]}
    POST results/export      {"run", "save", "name"?} -> {"folder", "message"}: a folder to upload to Civitai, in the run's own
    POST results/push        {"run", "save", "huggingface_repo_id", "huggingface_repo_visibility"?: "private"|"public",
                             "name"?, "license"?, "overwrite"?} -> {"id"}: push it to the Hugging Face hub, a task; not where
                             others reach the page, as the login is its owner's
    POST results/sample      {}: paint now, between two steps of the run under way
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from fastapi.responses import Response
from pydantic import BaseModel, StrictBool, StrictStr, confloat, conint, constr

from lib_lora_train.api import service
from lib_lora_train.api.gate import Gate
from lib_lora_train.errors import DatasetError, HostError, LoraFileError, SettingError
from lib_lora_train.host.port import Host
from lib_lora_train.results.grid import SampleOptions, sample_grid
from lib_lora_train.results.hub import check_push, push
from lib_lora_train.results.overview import image_of, overview
from lib_lora_train.results.promote import delete, promote
from lib_lora_train.results.references import resolution_of
from lib_lora_train.results.report import report_html
from lib_lora_train.results.scoring import score_grid
from lib_lora_train.results.sharing import SharedLora, export_for_civitai
from lib_lora_train.run.record import newest_run, read_settings
from lib_lora_train.run.runner import Runner
from lib_lora_train.settings import Settings, named
from lib_lora_train.studio import thumbs
from lib_lora_train.studio.requests import some, validated
from lib_lora_train.studio.tasks import Task, Tasks

_Text = constr(strict=True, max_length=2000)


class ResultsRequest(BaseModel):
    """Every value that a request may hold; which route reads which is written above. Values that no route knows are passed
    over."""

    run: _Text = ""
    name: _Text = ""
    small: StrictStr = ""

    saves: list[_Text] = []
    weights: list[confloat(ge=-2, le=2, allow_inf_nan=False)] = []
    prompts: list[_Text] = []
    seeds: list[conint(strict=True, ge=0, le=2**32 - 1)] = []
    extras: list[Literal["average", "unet", "text"]] = []
    checkpoint: _Text = ""
    steps: conint(strict=True, ge=1, le=150) = SampleOptions.steps
    cfg: confloat(ge=1, le=30, allow_inf_nan=False) = SampleOptions.cfg_scale
    sampler: _Text = SampleOptions.sampler

    save: _Text = ""
    weight: confloat(ge=-2, le=2, allow_inf_nan=False) = 1.0

    huggingface_repo_id: _Text = ""
    huggingface_repo_visibility: Literal["private", "public"] = "private"
    license: _Text = ""
    overwrite: StrictBool = False


class Results:
    """What the routes share: the host, the runner, and the one background task on results."""

    def __init__(self, host: Host, runner: Runner) -> None:
        self.host, self.runner = host, runner
        self.tasks = Tasks("lora-train-results", owner="The results page")
        self._run = ""  # that the task is about
        runner.guard(self.refuse_training)
        runner.guard_model(self.refuse_other_model)

    def folder(self, run: str) -> Path | None:
        """The folder of that run, of the newest for ""; None where there is none yet. Raises LoraFileError."""
        return service.folder_of(run, self.host) if run else newest_run(str(self.host.runs_folder))

    def named_folder(self, run: str) -> Path:
        """The folder of that run. Raises LoraFileError, SettingError for ""."""
        if not run:
            raise SettingError('The request must name a "run"', remedy="see the list of runs")
        return service.folder_of(run, self.host)

    def task(self) -> dict[str, Any] | None:
        """The task under way or done last, as a page shows it; None before the first."""
        task = self.tasks.status()
        return None if task is None else {
            "id": task.id, "run": self._run, "name": task.name, "done": task.done, "total": task.total,
            "seconds_left": task.seconds_left, "running": task.running, "stopping": task.stopping, "outcome": task.outcome,
            "message": task.message}

    def show(self, request: ResultsRequest) -> dict[str, Any]:
        """All that the results page shows of a run."""
        folder = self.folder(request.run)
        if folder is None:
            raise LoraFileError("There is no run yet", remedy="train a LoRA first")
        return {**overview(folder), "dataset": self._dataset(folder), "size": list(resolution_of(folder)),
                "task": self.task()}

    def _dataset(self, folder: Path) -> str:
        """The dataset of the studio that the run was trained on, "" for a folder that is not the studio's."""
        path = Path(str(read_settings(folder).get("train_data_dir", "")))
        datasets = self.host.datasets_folder
        return path.relative_to(datasets).parts[0] if path != datasets and path.is_relative_to(datasets) else ""

    def make_result(self, request: ResultsRequest) -> dict[str, Any]:
        """Make a save the LoRA; what was written, with a sentence about it."""
        folder = self._folder_to_change(request.run)
        taken = promote(folder, request.save, weight=request.weight, host=self.host)
        name, written = Path(taken["path"]), [Path(taken[kind]).name for kind in ("card", "preview") if taken[kind]]
        said = [f"{name.name} is the LoRA, to be used at {request.weight:g}."]
        if request.save != name.stem:
            said.append(f"It holds the save {request.save}.")
        said.append(f"Written beside it: {' and '.join(written)}.")
        if taken["kept"]:
            said.append(f"What had its name is kept as {Path(taken['kept']).name}.")
        return {**taken, "message": " ".join(said)}

    def delete(self, request: ResultsRequest) -> dict[str, Any]:
        """Delete saves; the names of the files that were there."""
        return {"deleted": delete(self._folder_to_change(request.run), some(request.saves, "saves"), host=self.host)}

    def grid(self, request: ResultsRequest) -> int:
        """Begin to sample and score the grid; the task's number."""
        folder = self.named_folder(request.run)
        if not self.host.shares_model() and (self.runner.running() or not self.host.idle()):
            raise HostError("The grid cannot be painted now", why="the model is in use",
                            remedy="wait for the other work to end, or stop it first")
        options = SampleOptions(request.sampler, request.steps, request.cfg, checkpoint=request.checkpoint)

        def job(task: Task) -> str:
            sample_grid(self.host, folder, saves=request.saves, weights=request.weights, prompts=request.prompts,
                        seeds=request.seeds, extras=request.extras, options=options, on_progress=task.progress,
                        should_stop=task.should_stop)
            task.begin("Judging the pictures")
            score_grid(self.host, folder, on_progress=task.progress, should_stop=task.should_stop)
            return "The grid is painted and judged."

        number = self.runner.with_model(lambda: self.tasks.start(
            "Painting the grid", job, interrupted=self.host.interrupted, with_model=True))
        self._run = folder.name
        return number

    def export(self, request: ResultsRequest) -> dict[str, Any]:
        """A folder to upload to Civitai, and a sentence about it."""
        folder = self.named_folder(request.run)
        shared = SharedLora.of(folder, request.save, name=request.name)
        target = export_for_civitai(shared, folder / "export" / shared.name)
        return {"folder": str(target), "message": f"Ready to upload: {target}"}

    def push(self, request: ResultsRequest) -> int:
        """Begin to push a save to the Hugging Face hub; the task's number."""
        folder = self.named_folder(request.run)
        if self.host.allowed is not None:
            raise SettingError("Nothing is pushed from here",
                               why="others can reach this page, and the hub's login is its owner's",
                               remedy="push it on the machine itself: python -m lib_lora_train share")
        check_push(request.huggingface_repo_id, request.license)
        shared = SharedLora.of(folder, request.save, name=request.name)

        def job(task: Task) -> str:
            url = push(shared, request.huggingface_repo_id, private=request.huggingface_repo_visibility == "private",
                       license_name=request.license, overwrite=request.overwrite, scratch=folder)
            return f"{shared.name} is on the Hugging Face hub: {url}"

        number = self.tasks.start("Pushing to the Hugging Face hub", job)
        self._run = folder.name
        return number

    def sample(self) -> dict[str, Any]:
        """Have the run under way sample between two steps. Raises HostError where there is none that does."""
        if not self.runner.sample_now():
            raise HostError("Nothing can be painted now", why="no training is running that paints samples",
                            remedy=f"switch {named('sample_images')} on before the start")
        return {}

    def _folder_to_change(self, run: str) -> Path:
        """The folder of a run whose files are to change. Raises as `named_folder`, HostError while they are being used."""
        folder = self.named_folder(run)
        self.refuse_change(folder.name)
        return folder

    def refuse_change(self, run: str) -> None:
        """Raise HostError while a task is about the run of this id."""
        if self.tasks.running() and self._run == run:
            why = "their grid is being painted" if self.tasks.with_model() else "one is being pushed to the Hugging Face hub"
            raise HostError("The saves cannot be changed now", why=why,
                            remedy="wait for it or stop it first")

    def refuse_training(self, settings: Settings) -> None:
        """Raise HostError for a training that would find the model in use by a grid. A host that shares it lets the training
        wait its turn."""
        if not self.host.shares_model():
            self.refuse_other_model()

    def refuse_other_model(self) -> None:
        """Raise HostError while a grid is painted: all of it is painted on one model."""
        if self.tasks.with_model():
            raise HostError("The training cannot start now", why="the grid of a run is being painted",
                            remedy="wait for it or stop it first")


@functools.lru_cache(maxsize=1)
def results_for(host: Host, runner: Runner) -> Results:
    """The process's one, however often the page is rebuilt."""
    return Results(host, runner)


def add_routes(gate: Gate, results: Results) -> None:
    """Every route of the results page."""
    def add(method: str, name: str, answer: Callable[[ResultsRequest], object], about: str) -> None:
        gate.add(method, name, lambda query, body: answer(validated(ResultsRequest, body or query)), about)

    add("GET", "results", results.show, "What came of a run")
    add("GET", "results/task", lambda _: {"task": results.task()}, "The work under way")
    add("GET", "results/file", lambda r: _image(results.named_folder(r.run), r.name, small=bool(r.small)), "A picture of a run")
    add("GET", "results/report", lambda r: _report(results.named_folder(r.run), results.host), "A run on one page")
    add("POST", "results/take", results.make_result, "Make a save the LoRA")
    add("POST", "results/delete", results.delete, "Delete saves")
    add("POST", "results/grid", lambda r: {"id": results.grid(r)}, "Paint and score a run's saves")
    add("POST", "results/export", results.export, "Make a folder to upload to Civitai")
    add("POST", "results/push", lambda r: {"id": results.push(r)}, "Push a save to the Hugging Face hub")
    add("POST", "results/sample", lambda _: results.sample(), "Paint what the run under way has learnt so far")
    add("POST", "results/stop", lambda _: {"stopping": results.tasks.stop()}, "Stop the work under way")


def _report(folder: Path, host: Host) -> Response:
    return Response(report_html(folder, host), media_type="text/html; charset=utf-8", headers={
        "Cache-Control": "no-store", "X-Content-Type-Options": "nosniff",
        "Content-Security-Policy": "default-src 'none'; img-src data:; style-src 'unsafe-inline'; sandbox"})


def _image(folder: Path, name: str, *, small: bool) -> Response:
    """A run's picture. Its name is never used for another one, so a browser may keep it."""
    path = image_of(folder, name)
    if path is None:
        raise DatasetError("The run has no such picture", remedy="look at its results again")
    data = thumbs.small(path) if small else path.read_bytes()
    return Response(data, media_type=thumbs.MEDIA_TYPE if small else "image/png", headers={
        "X-Content-Type-Options": "nosniff", "Content-Security-Policy": "default-src 'none'; sandbox",
        "Cache-Control": "private, max-age=31536000, immutable"})
