"""Kills real training processes at random moments and counts what is lost: nothing may be.

    python tools/kill_test.py --times 200 [--seed 0] [--folder DIR] [--steps 40]

A process trains on the tiny checkpoint and saves often; it is killed (SIGKILL, on Windows TerminateProcess) while it
starts, trains or writes; what it left behind is examined; another process resumes the run, and so on. A run that reaches its
end must have made the file that an uninterrupted run makes, byte for byte. Prints a table; exits with 1 if anything was lost.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
SAVE_EVERY = 2
NAME = "killed"


@dataclasses.dataclass
class Tally:
    """What is printed at the end."""

    kills: Counter[str] = dataclasses.field(default_factory=Counter)
    resumes: int = 0
    anew: int = 0
    complete: int = 0
    steps: int = 0
    steps_lost: int = 0
    worst: int = 0
    most_parts: int = 0
    files_examined: int = 0
    wrong: list[str] = dataclasses.field(default_factory=list)


class Trainer:
    """One training process and what it has told so far."""

    def __init__(self, arguments: list[str]) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "lib_lora_train", "train", *arguments, "--json"], cwd=ROOT, text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        self.resumed_at, self.step, self.saved, self.finished = 0, 0, 0, ""
        self.ended_by_itself, self.errors = False, ""
        self._heard = threading.Condition()
        self._over, self._said = False, ""
        self._threads = [threading.Thread(target=self._listen, daemon=True), threading.Thread(target=self._read_errors)]
        for thread in self._threads:
            thread.start()

    def _read_errors(self) -> None:
        self._said = self.process.stderr.read()

    def _listen(self) -> None:
        for line in self.process.stdout:
            try:
                event = json.loads(line)
            except ValueError:
                continue  # the line it was killed in
            with self._heard:
                if event["event"] == "planned":
                    self.resumed_at = self.step = event["resumed_at"]
                elif event["event"] == "step":
                    self.step = event["step"]
                elif event["event"] == "saved":
                    self.saved += 1
                elif event["event"] == "finished":
                    self.finished = event["outcome"]
                self._heard.notify_all()
        with self._heard:
            self._over = True
            self._heard.notify_all()

    def wait_for(self, what, *, seconds: float = 600) -> None:
        """Return once `what()` is true, or the process has ended."""
        with self._heard:
            if not self._heard.wait_for(lambda: self._over or what(), timeout=seconds):
                raise TimeoutError("the training process makes no progress")

    def kill(self) -> None:
        """End it as the system does, with no chance to tidy up; hear what it had already said."""
        self.ended_by_itself = self.process.poll() is not None
        self.process.kill()
        self.errors = self.end()

    def end(self) -> str:
        """Wait for its end; returns what it said on stderr."""
        for thread in self._threads:
            thread.join()
        self.process.wait()
        self.process.stdout.close()
        self.process.stderr.close()
        return self._said


class RunFolder:
    """The folder of one run: its output, its record, and how to start or resume it."""

    def __init__(self, folder: Path, *, checkpoint: Path, images: Path, steps: int) -> None:
        self.output = folder
        settings = {"resolution": 64, "min_bucket_reso": 64, "num_repeats": 1, "network_dim": 8, "max_train_steps": steps,
                    "save_every_n_steps": SAVE_EVERY, "shuffle_caption": True, "lr_warmup_steps": 5, "train_batch_size": 2,
                    "gradient_accumulation_steps": 2, "learning_rate": 1e-3, "save_precision": "float", "sample_images": False}
        self._common = ["--checkpoint", str(checkpoint), "--output-dir", str(folder)]
        self._first = ["--data", str(images), "--name", NAME]
        self._first += [part for name, value in settings.items() for part in ("--set", f"{name}={value}")]

    @property
    def result(self) -> Path:
        return self.output / f"{NAME}.safetensors"

    def newest(self):
        """The newest run's record, None before the first."""
        from lib_lora_train.run.record import past_runs
        found = past_runs(self.output / "runs", most=1)
        return found[0] if found else None

    def go_on(self, tally: Tally | None = None) -> Trainer:
        """A process that resumes the newest run, or begins anew where there is nothing to resume."""
        past = self.newest()
        if past is None or past.resume_step is None:
            if tally and past is not None:
                tally.anew += 1
            return Trainer([*self._common, *self._first])
        if tally:
            tally.resumes += 1
        return Trainer([*self._common, "--resume", past.id])


def examine(run: RunFolder, trainer: Trainer, tally: Tally) -> None:
    """What lies there after a kill: every file whole, the record true, little lost."""
    from lib_lora_train.adapters.file import inspect
    from lib_lora_train.errors import LoraTrainError
    from lib_lora_train.training import checkpoint as checkpoint_module

    parts = [path for path in run.output.rglob("*.part")]
    tally.most_parts = max(tally.most_parts, len(parts))
    if len({(path.parent, path.name.rsplit(".", 2)[0]) for path in parts}) < len(parts):
        tally.wrong.append(f"several leftovers of one file: {sorted(path.name for path in parts)}")
    for path in run.output.glob("*.safetensors"):
        tally.files_examined += 1
        try:
            if inspect(path).hash_ok is not True:
                tally.wrong.append(f"{path.name}: its hash is not that of its metadata")
        except LoraTrainError as error:
            tally.wrong.append(str(error))
    past = run.newest()
    if past is None:
        return  # killed before there was a record
    if past.outcome != "interrupted":
        tally.wrong.append(f"the record says {past.outcome!r} of a killed run")
    file = run.output / "runs" / past.id / checkpoint_module.FILE_NAME
    kept = 0
    if file.exists():
        try:
            kept = checkpoint_module.read(file)[0].step
        except LoraTrainError as error:
            tally.wrong.append(str(error))
    if past.resume_step != (kept or None):
        tally.wrong.append(f"the record offers step {past.resume_step}, the state is at {kept}")
    lost = trainer.step - kept
    tally.steps_lost += max(0, lost)
    tally.worst = max(tally.worst, lost)
    # The save of a step comes before the next step, so no more than what lies between two saves is made again.
    if lost > SAVE_EVERY:
        tally.wrong.append(f"{lost} steps lost at step {trainer.step}: the state is at {kept}")


def kill_once(run: RunFolder, rng: random.Random, tally: Tally) -> bool:
    """Start or resume, kill, examine. Returns whether the run came to its end before it could be killed."""
    trainer = run.go_on(tally)
    aim = rng.random()
    if aim < 0.1:
        time.sleep(rng.uniform(0, 5))  # while it starts
    elif aim < 0.55:
        saves = rng.randint(1, 4)  # while it writes what follows a save: the state, the next step
        trainer.wait_for(lambda: trainer.saved >= saves)
        time.sleep(rng.uniform(0, 0.04))
    else:
        steps = rng.randint(1, 8)
        trainer.wait_for(lambda: trainer.step - trainer.resumed_at >= steps)
        time.sleep(rng.uniform(0, 0.2))
    trainer.kill()
    past = run.newest()
    if trainer.finished not in ("", "done"):
        tally.wrong.append(f"a process ended by itself: {trainer.finished}")
    if trainer.finished or (past is not None and past.outcome == "done"):
        return True
    if trainer.ended_by_itself:
        tally.wrong.append(f"a process refused: {trainer.errors}")
    tally.steps += trainer.step - trainer.resumed_at
    writing = any(run.output.rglob("*.part"))
    tally.kills["writing" if writing else "training" if trainer.step > trainer.resumed_at else "starting"] += 1
    examine(run, trainer, tally)
    return False


def tensors_of(path: Path) -> bytes:
    """All bytes behind the header."""
    data = path.read_bytes()
    return data[8 + int.from_bytes(data[:8], "little"):]


def prepare(folder: Path) -> tuple[Path, Path]:
    """(a small checkpoint, a folder of images)."""
    from PIL import Image

    from tools import tiny_checkpoint
    images = folder / "pictures"
    images.mkdir(parents=True, exist_ok=True)
    for number, color in enumerate(("red", "blue", "orange", "green", "black")):
        Image.new("RGB", (64 if number else 128, 64), color).save(images / f"{number}.png")
        (images / f"{number}.txt").write_text(f"a photo, {color} cat, zzk", encoding="utf-8")
    return tiny_checkpoint.write(folder / "model"), images


def main(arguments: list[str] | None = None) -> int:
    """Run the test; 0 if nothing was lost."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--times", type=int, default=200, help="how many kills")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=40, help="of each run")
    parser.add_argument("--folder", type=Path, help="where to work; a temporary folder unless named")
    chosen = parser.parse_args(arguments)
    folder = chosen.folder or Path(tempfile.mkdtemp(prefix="kill-test-"))
    checkpoint, images = prepare(folder)
    begun = time.monotonic()

    def new_run(name: str) -> RunFolder:
        return RunFolder(folder / name, checkpoint=checkpoint, images=images, steps=chosen.steps)

    straight = new_run("straight")
    trainer = straight.go_on()
    errors = trainer.end()
    if trainer.finished != "done":
        print(f"The uninterrupted run did not finish: {errors}", file=sys.stderr)
        return 1
    expected = tensors_of(straight.result)

    rng, tally, run = random.Random(chosen.seed), Tally(), new_run("run-1")
    try:
        while sum(tally.kills.values()) < chosen.times and len(tally.wrong) < 20:
            if kill_once(run, rng, tally):
                run = finish(run, expected, tally, new_run)
            kills = sum(tally.kills.values())
            if kills % 20 == 0:
                print(f"{kills} kills, {tally.complete} runs complete, {len(tally.wrong)} wrong, worst loss {tally.worst}",
                      flush=True)
        last = run.go_on(tally)  # the last run too must come to its end
        errors = last.end()
        if last.finished != "done":
            tally.wrong.append(f"the last run did not finish: {errors}")
        finish(run, expected, tally, new_run)
    except KeyboardInterrupt:
        print("Ended early; the last run was not finished.")
    show(tally, seconds=time.monotonic() - begun)
    if not chosen.folder and not tally.wrong:
        shutil.rmtree(folder, ignore_errors=True)
    return 1 if tally.wrong else 0


def finish(run: RunFolder, expected: bytes, tally: Tally, new_run: Callable[[str], RunFolder]) -> RunFolder:
    """A run came to its end: compare it, tidy up, and give the folder of the next."""
    tally.complete += 1
    if not run.result.is_file() or tensors_of(run.result) != expected:
        tally.wrong.append(f"{run.output.name} is not what an uninterrupted run makes")
    parts = [path.name for path in run.output.rglob("*.part")]
    if parts:
        tally.wrong.append(f"left behind: {parts}")
    if run.newest().outcome != "done":
        tally.wrong.append(f"the record of a complete run says {run.newest().outcome!r}")
    shutil.rmtree(run.output, ignore_errors=True)
    return new_run(f"run-{tally.complete + 1}")


def show(tally: Tally, *, seconds: float) -> None:
    """The table."""
    kills = sum(tally.kills.values())
    rows = [("kills", kills), *((f"  while {name}", count) for name, count in sorted(tally.kills.items())),
            ("files examined, whole", f"{tally.files_examined}"), ("resumed", tally.resumes),
            ("begun anew (no state yet)", tally.anew), ("runs complete and equal", tally.complete),
            ("steps made", tally.steps), ("steps made again", tally.steps_lost),
            (f"worst loss (save every {SAVE_EVERY} steps)", tally.worst), ("most leftovers at once", tally.most_parts),
            ("wrong", len(tally.wrong)), ("minutes", f"{seconds / 60:.1f}")]
    for name, value in rows:
        print(f"{name:36} {value:>8}")
    for sentence in tally.wrong:
        print(f"WRONG: {sentence}")


if __name__ == "__main__":
    sys.exit(main())
