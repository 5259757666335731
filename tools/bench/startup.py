"""`bench startup`: seconds from the click to the first step, and from the last step to a file that can be used, by stage.

The run is started as the page starts it, by the runner, on a host that lends a checkpoint's file: once with nothing read and
nothing cached, and then again, as in a WebUI that holds its model and has seen the pictures before (the shorter of two). The
checkpoint has random weights of the true size. The programs are imported and the file has just been written: the system may
hold it in memory. On a processor the pictures are small, so that the step's own arithmetic does not hide all else; it stands
in a line of its own.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch

from lib_lora_train.errors import SettingError, TrainingError
from lib_lora_train.events import Event, Finished, Saved, Step
from lib_lora_train.host.standalone import StandaloneHost
from lib_lora_train.run import runner
from lib_lora_train.settings import Settings, parse
from lib_lora_train.storage.atomic import write_atomic
from lib_lora_train.training.cuda_graph import Execution
from tools.bench.grid import grid, share
from tools.bench.host import make_pictures
from tools.bench.machine import machine_text
from tools.bench.stopwatch import Place, Spent, Stopwatch
from tools.bench.training import Say
from tools.bench.true_size import true_size_checkpoint

PICTURES = 20
SIZES = {"small": ("sd1", True), "sd15": ("sd1", False), "sdxl": ("sdxl", False)}
SIDES = {"small": {"cpu": 128, "cuda": 512}, "sd15": {"cpu": 128, "cuda": 512}, "sdxl": {"cpu": 128, "cuda": 1024}}
ARITHMETIC = "the step itself"

_P = "lib_lora_train"
PLACES = (
    Place("making the run's folder", f"{_P}.run_record:RunRecord.__init__"),
    Place("writing down what happens", f"{_P}.run_record:RunRecord.write"),
    Place("reading the folder of pictures", f"{_P}.job:_prepared"),
    Place("reading the checkpoint", f"{_P}.host.standalone:_describe"),
    Place("reading the checkpoint", f"{_P}.host.standalone:_load"),
    Place("reading the tokenizer", f"{_P}.model.frozen:clip_tokenizer"),
    Place("the model over the lent tensors", f"{_P}.job:lent_model"),
    Place("which checkpoint and VAE it is", f"{_P}.resume:describe_checkpoint"),
    Place("which checkpoint and VAE it is", f"{_P}.feeding:encoder_fingerprint"),
    Place("the LoRA's layers", f"{_P}.job:_network"),
    Place("latents", f"{_P}.job:latents_of"),
    Place("the memory plan", f"{_P}.job:memory_plan"),
    Place("which pictures they are", f"{_P}.job:_keeper"),
    Place("captions", f"{_P}.cache.text:TextCache._encode"),
    Place(ARITHMETIC, f"{_P}.training.graph:Execution.gradients"),
    Place(ARITHMETIC, f"{_P}.training.graph:Execution.finish"),
    Place("the metadata", f"{_P}.provenance:Provenance.metadata"),
    Place("the file", f"{_P}.network.file:save"),
)


@dataclasses.dataclass(frozen=True)
class Phases:
    """What each stage of one run took: up to the first step, the steps after it, and from the last one to the file."""

    start: Mapping[str, Spent]
    steps: Mapping[str, Spent]
    end: Mapping[str, Spent]


class _Watched(StandaloneHost):
    """A host that cuts the time where the first step ends, and where the run tells of its last and its file."""

    watch: Stopwatch

    def begin(self, watch: Stopwatch) -> None:
        """Watch one run."""
        self.watch, self.cuts = watch, []

    def step_done(self) -> None:
        """A step has been computed. On a card the run hears of its loss a step or two later, and waits for nothing."""
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
    work = output / "startup-work"
    shutil.rmtree(work, ignore_errors=True)
    try:
        say("Making a checkpoint of random weights …")
        checkpoint = true_size_checkpoint(family, work, dtype=torch.float16, small=small)
        side = SIDES[size][device.type]
        host = _Watched(checkpoint, lora_folder=work / "loras", runs_folder=work / "runs", device=device)
        settings = _settings(make_pictures(work / "pictures", side=side, count=PICTURES), side=side, steps=steps)
        runs = []
        for number, name in enumerate(("Nothing read, nothing cached", "Again", "Once more")):
            say(f"{name} …")
            runs.append(_timed(host, settings, number))
    finally:
        shutil.rmtree(work, ignore_errors=True)
    first, again = runs[0], min(runs[1:], key=lambda run: _total(run.start).wall)
    about = f"{size}, {PICTURES} pictures of {side}×{side}, rank {settings.network.network_dim}; {machine_text(device)}"
    text = startup_text(first, again, about=about)
    write_atomic(output / "startup.md", text.encode("utf-8"))
    figures = {"size": size, "side": side, "steps": steps, "machine": machine_text(device),
               "first": dataclasses.asdict(first), "again": dataclasses.asdict(again)}
    write_atomic(output / "startup.json", json.dumps(figures, indent=1).encode("utf-8"))
    return text


def startup_text(first: Phases, again: Phases, *, about: str) -> str:
    """Both tables and what they come to."""
    started, saved = _total(again.start), _total(again.end)
    apart = started.wall - again.start.get(ARITHMETIC, Spent()).wall
    return "\n\n".join([
        f"{about}.", "### From the click to the first step", _stages(first.start, again.start),
        f"With the model held and the latents cached: {started.wall:.2f} s, of which {apart:.2f} s before and beside the "
        "step's own arithmetic.",
        "### From the last step to the file", _stages(first.end, again.end),
        f"The file can be used {saved.wall:.2f} s after the last step."]) + "\n"


def _stages(first: Mapping[str, Spent], again: Mapping[str, Spent]) -> str:
    one, two = _total(first).wall, _total(again).wall
    nothing = Spent()
    lines = [(stage, *(cell for spent, total in ((first.get(stage, nothing), one), (again.get(stage, nothing), two))
                       for cell in (f"{spent.wall:.3f}", f"{spent.processor:.3f}", share(spent.wall / total if total else 0))))
             for stage in sorted({*first, *again}, key=lambda s: -max(again.get(s, nothing).wall, first.get(s, nothing).wall))]
    sums = ("all", f"{one:.3f}", f"{_total(first).processor:.3f}", "", f"{two:.3f}", f"{_total(again).processor:.3f}", "")
    return grid(("stage", "first run s", "processor s", "share", "again s", "processor s", "share"), [*lines, sums])


def _total(stages: Mapping[str, Spent]) -> Spent:
    return sum(stages.values(), Spent())


def _settings(images: Path, *, side: int, steps: int) -> Settings:
    return parse({"train_data_dir": str(images), "output_name": "startup", "overwrite": True, "resolution": str(side),
                  "min_bucket_reso": side, "max_train_steps": steps, "network_dim": 16, "cache_latents_to_disk": True,
                  "seed": 1})


def _timed(host: _Watched, settings: Settings, number: int) -> Phases:
    own = runner.Runner()
    watch = Stopwatch()
    with _ending_steps(host.step_done), watch.watching(PLACES), _followed(watch):
        host.begin(watch)
        own.start(settings, host)
        own.wait()
    status = own.status()
    ended: Finished | None = status.finished if status else None
    if ended is None or ended.outcome != "done":
        raise TrainingError(f"Run {number + 1} did not end as it should", why=ended.message if ended else "")
    return host.phases()


@contextlib.contextmanager
def _ending_steps(done: Callable[[], None]) -> Iterator[None]:
    """`done` is called within each step's last function."""
    original = Execution.finish

    def finish(self: Execution) -> torch.Tensor:
        result = original(self)
        done()
        return result
    Execution.finish = finish
    try:
        yield
    finally:
        Execution.finish = original


@contextlib.contextmanager
def _followed(watch: Stopwatch) -> Iterator[None]:
    """The runner's thread is the one that is watched, once it runs."""
    @contextlib.contextmanager
    def following() -> Iterator[None]:
        watch.follow()
        yield
    original = runner.run_job
    runner.run_job = following()(original)
    try:
        yield
    finally:
        runner.run_job = original
