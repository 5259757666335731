"""Trains for many steps on a model of a few megabytes and measures what must not grow.

    python tools/long_run.py --steps 10000

Every 500 steps a line: the process's memory, the objects that Python's collector knows, the tensors among them, the bytes of
the run's event log and the points of the curve that watchers are sent. At the end what grew in a thousand steps, by least
squares over the second half. The run goes through `Runner`, as in the WebUI, and is asked for its status at each line, as a
page that was left open asks.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lib_lora_train.api import service
from lib_lora_train.events import Event, Step
from lib_lora_train.host.standalone import StandaloneHost
from lib_lora_train.run.runner import Runner
from tools import tiny_checkpoint
from tools.bench.cache import resident_bytes

PICTURES = 5


@dataclass(frozen=True)
class Sample:
    """What there is after `step` steps. memory in MiB, log in KiB, status in KiB of JSON."""

    step: int
    epoch: int
    memory: float
    objects: int
    tensors: int
    log: float
    points: int
    status: float


class WatchedHost(StandaloneHost):
    """Takes a sample every n steps, in the training's own thread, so that nothing moves meanwhile."""

    def watch(self, runner: Runner, every: int) -> None:
        """Begin."""
        self._runner, self._every = runner, every
        self.samples: list[Sample] = []

    def report(self, event: Event) -> None:
        """See `Host.report`."""
        if isinstance(event, Step) and event.step % self._every == 0:
            self.samples.append(self._sample(event))
            print(line(self.samples[-1]), flush=True)

    def _sample(self, event: Step) -> Sample:
        gc.collect()
        known = gc.get_objects()
        status = service.status(runner=self._runner, host=self)
        return Sample(
            event.step, event.epoch, (resident_bytes() or 0) / 2**20, len(known),
            sum(type(thing) is torch.Tensor for thing in known),
            (self.runs_folder / status["run"] / "events.jsonl").stat().st_size / 2**10, len(status["points"]),
            len(json.dumps(status)) / 2**10)


def line(sample: Sample) -> str:
    """One row of the table."""
    return (f"| {sample.step:6} | {sample.epoch:5} | {sample.memory:8.1f} | {sample.objects:8} | {sample.tensors:6} | "
            f"{sample.log:7.1f} | {sample.points:5} | {sample.status:6.1f} |")


def slope(samples: Sequence[Sample], name: str) -> float:
    """Growth of a column in a thousand steps, least squares."""
    steps, values = [s.step / 1000 for s in samples], [float(getattr(s, name)) for s in samples]
    mean, middle = sum(steps) / len(steps), sum(values) / len(values)
    spread = sum((step - mean) ** 2 for step in steps)
    return sum((s - mean) * (v - middle) for s, v in zip(steps, values, strict=True)) / spread if spread else 0.0


def run(folder: Path, *, steps: int, every: int) -> list[Sample]:
    """Train in `folder`; the samples."""
    images = folder / "pictures"
    images.mkdir(parents=True)
    for number in range(PICTURES):
        Image.new("RGB", (64, 64), (50 * number, 80, 120)).save(images / f"{number}.png")
        (images / f"{number}.txt").write_text(f"a photo, red cat, {number}", encoding="utf-8")
    checkpoint = tiny_checkpoint.write(folder / "model", size=tiny_checkpoint.SMALLEST)
    host = WatchedHost(checkpoint, lora_folder=folder / "loras", runs_folder=folder / "runs", device=torch.device("cpu"))
    runner = Runner()
    host.watch(runner, every)
    # Captions that change at each step fill the cache of what the text encoder says, which has a bound of its own.
    service.start({"train_data_dir": str(images), "output_name": "long", "resolution": "64", "min_bucket_reso": 64,
                   "num_repeats": 1, "max_train_steps": steps, "network_dim": 1, "shuffle_caption": True,
                   "sample_images": False, "save_every_n_steps": max(1, steps // 10), "save_state_every_n_minutes": 1},
                  runner=runner, host=host)
    runner.wait()
    finished = service.status(runner=runner, host=host)["finished"]
    print(finished["message"])
    return host.samples


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--every", type=int, default=500)
    chosen = parser.parse_args()
    print("|   step | epoch |  MiB     |  objects | tensors|  log KiB| points| status KiB |\n|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        samples = run(Path(folder), steps=chosen.steps, every=chosen.every)
    late = samples[len(samples) // 2:]
    print("growth in 1000 steps, second half:",
          ", ".join(f"{name} {slope(late, name):+.3f}" for name in asdict(samples[0]) if name not in ("step", "epoch")))


if __name__ == "__main__":
    main()
