"""`bench startup`: seconds from the click to the first step, and from the last step to a file that can be used, by stage.

The run is started as the page starts it, by the runner, on a host that lends a checkpoint's file: once with nothing read and
nothing cached, and then again, as in a WebUI that holds its model and has seen the images before (the shorter of two). The
checkpoint has random weights of the true size. The programs are imported and the file has just been written: the system may
hold it in memory. On a CPU the images are small, so that the step's own arithmetic does not hide all else; it stands
in a line of its own.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from unittest import mock

import torch

from lib_lora_train.errors import SettingError, TrainingError
from lib_lora_train.events import Event, Finished, Report, Saved, Step
from lib_lora_train.host.port import Host, never
from lib_lora_train.host.standalone import StandaloneHost
from lib_lora_train.run import runner
from lib_lora_train.run.planning import plan_job
from lib_lora_train.settings import Settings, parse
from tools.bench.host import make_images
from tools.bench.report import grid, machine_text, share, write_report
from tools.bench.stopwatch import Spent, Stopwatch, WatchedFunction
from tools.bench.training import Say, Stop
from tools.bench.true_size import true_size_checkpoint

IMAGES = 20
SIZES = {"small": ("sd1", True), "sd15": ("sd1", False), "sdxl": ("sdxl", False)}
SIDES = {"small": {"cpu": 128, "cuda": 512}, "sd15": {"cpu": 128, "cuda": 512}, "sdxl": {"cpu": 128, "cuda": 1024}}
ARITHMETIC = "the step itself"

WATCHED = tuple(WatchedFunction(stage, f"lib_lora_train.{target}") for stage, target in (
    ("making the run's folder", "run.record:RunRecord.__init__"),
    ("writing down what happens", "run.record:RunRecord.write"),
    ("reading the folder of pictures", "run.planning:plan_dataset"),
    ("reading the checkpoint", "host.standalone:describe_header"),
    ("reading the checkpoint", "host.standalone:_load"),
    ("reading the tokenizer", "model.frozen:clip_tokenizer"),
    ("the model on the leased tensors", "run.job:frozen_model"),
    ("which checkpoint and VAE it is", "run.resume:describe_checkpoint"),
    ("which checkpoint and VAE it is", "run.inputs:encoder_fingerprint"),
    ("the LoRA's layers", "run.job:build_network"),
    ("latents", "run.job:latents_of"),
    ("the memory plan", "run.job:memory_plan"),
    ("which pictures they are", "run.job:_checkpointer"),
    ("captions", "inputs.text:TextCache._encode"),
    (ARITHMETIC, "training.train_step:TrainStep.forward"),
    (ARITHMETIC, "training.train_step:TrainStep.backward"),
    (ARITHMETIC, "training.optimizers:RunOptimizer.step"), (ARITHMETIC, "training.precision:LossScaler.update"),
    ("the metadata", "run.provenance:Provenance.metadata"),
    ("the file", "adapters.file:save")))
STEP_END = WatchedFunction(ARITHMETIC, "lib_lora_train.training.precision:LossScaler.update")  # a step on trial has none
"""Its return ends a step's computation."""


@dataclasses.dataclass(frozen=True)
class Phases:
    """What each stage of one run took: up to the first step, the steps after it, and from the last one to the file."""

    start: Mapping[str, Spent]
    steps: Mapping[str, Spent]
    end: Mapping[str, Spent]


class _TimedHost(StandaloneHost):
    """A host that cuts the time where the first step ends, and where the run tells of its last and its file."""

    watch: Stopwatch

    def begin(self, watch: Stopwatch) -> None:
        """Watch one run."""
        self.watch, self.cuts = watch, []

    def step_done(self) -> None:
        """A step has been computed. On a GPU the run hears of its loss a step or two later, and waits for nothing."""
        if not self.cuts:
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)  # once a run, and only a measurement waits here
            self.cuts.append(self.watch.cut())

    def report(self, event: Event) -> None:
        """See `Host.report`."""
        last = isinstance(event, Step) and event.step == event.total
        if last or isinstance(event, Saved) and event.final:
            self.cuts.append(self.watch.cut())

    def phases(self) -> Phases:
        """Of a run that is over."""
        return Phases(*self.cuts)


def run_startup(*, size: str, steps: int, output: Path, say: Say) -> str:
    """Measure with a checkpoint of `size` ("small", "sd15", "sdxl"), `steps` steps a run (at least two). Writes startup.md and
    startup.json into `output`; returns the text.

    Raises SettingError for another size or less, and what a training raises.
    """
    if size not in SIZES:
        raise SettingError(f"There is no size '{size}'", remedy=f"write one of {', '.join(SIZES)}")
    if steps < 2:
        raise SettingError(f"{steps} steps are too few", why="the first and the last one are looked at")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    family, small = SIZES[size]
    scratch = output / "startup-scratch"
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        say("Making a checkpoint of random weights …")
        checkpoint = true_size_checkpoint(family, scratch, dtype=torch.float16, small=small)
        side = SIDES[size][device.type]
        host = _TimedHost(checkpoint, lora_folder=scratch / "loras", runs_folder=scratch / "runs", device=device)
        settings = _settings(make_images(scratch / "pictures", side=side, count=IMAGES), side=side, steps=steps)
        runs = []
        for number, name in enumerate(("Nothing read, nothing cached", "Again", "Once more")):
            say(f"{name} …")
            runs.append(_timed(host, settings, number))
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    first, repeated = runs[0], min(runs[1:], key=lambda run: _total(run.start).wall)
    about = f"{size}, {IMAGES} pictures of {side}×{side}, rank {settings.network.network_dim}; {machine_text(device)}"
    text = startup_text(first, repeated, about=about)
    return write_report(output, "startup", text, {
        "size": size, "side": side, "steps": steps, "machine": machine_text(device),
        "first": dataclasses.asdict(first), "again": dataclasses.asdict(repeated)})


def startup_text(first: Phases, repeated: Phases, *, about: str) -> str:
    """Both tables and what they come to."""
    started, saved = _total(repeated.start), _total(repeated.end)
    apart = started.wall - repeated.start.get(ARITHMETIC, Spent()).wall
    return "\n\n".join([
        f"{about}.", "### From the click to the first step", _stages(first.start, repeated.start),
        f"With the model held and the latents cached: {started.wall:.2f} s, of which {apart:.2f} s before and beside the "
        "step's own arithmetic.",
        "### From the last step to the file", _stages(first.end, repeated.end),
        f"The file can be used {saved.wall:.2f} s after the last step."]) + "\n"


def _stages(first: Mapping[str, Spent], repeated: Mapping[str, Spent]) -> str:
    one, two = _total(first).wall, _total(repeated).wall
    nothing = Spent()
    lines = [(stage, *(cell for spent, total in ((first.get(stage, nothing), one), (repeated.get(stage, nothing), two))
                       for cell in (f"{spent.wall:.3f}", f"{spent.cpu:.3f}", share(spent.wall / total if total else 0))))
             for stage in sorted({*first, *repeated}, key=lambda stage: -max(
                 spent.get(stage, nothing).wall for spent in (first, repeated)))]
    sums = ("all", f"{one:.3f}", f"{_total(first).cpu:.3f}", "", f"{two:.3f}", f"{_total(repeated).cpu:.3f}", "")
    return grid(("stage", "first run s", "CPU s", "share", "again s", "CPU s", "share"), [*lines, sums])


def _total(stages: Mapping[str, Spent]) -> Spent:
    return sum(stages.values(), Spent())


def _settings(images: Path, *, side: int, steps: int) -> Settings:
    return parse({"train_data_dir": str(images), "output_name": "startup", "overwrite": True, "resolution": str(side),
                  "min_bucket_reso": side, "max_train_steps": steps, "network_dim": 16, "cache_latents_to_disk": True,
                  "sample_images": False, "seed": 1})


def _timed(host: _TimedHost, settings: Settings, number: int) -> Phases:
    own, watch = runner.Runner(), Stopwatch()
    owner, name = STEP_END.find()
    finish, run_job = getattr(owner, name), runner.run_job

    def finished(*arguments: object) -> object:
        result = finish(*arguments)
        host.step_done()
        return result

    def followed(plan: object, host: Host, *, report: Report, stop: Stop, folder: Path | None = None,
                 sample_now: Callable[[], bool] = never, save_now: Callable[[], bool] = never,
                 paused: Callable[[], bool] = never) -> Finished:
        watch.follow()  # the runner's thread is the one to watch
        return run_job(plan, host, report=report, stop=stop, folder=folder, sample_now=sample_now, save_now=save_now,
                       paused=paused)

    with mock.patch.object(owner, name, finished), watch.watching(WATCHED), mock.patch.object(runner, "run_job", followed):
        host.begin(watch)
        own.start(plan_job(settings, host), host)
        own.wait()
    status = own.status()
    ended: Finished | None = status.finished if status else None
    if ended is None or ended.outcome != "done":
        raise TrainingError(f"Run {number + 1} did not end as it should", why=ended.message if ended else "")
    return host.phases()
