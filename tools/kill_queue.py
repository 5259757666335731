"""Kills a program that works on a queue of runs at random moments, and counts: no entry may be lost, no run made twice.

    python tools/kill_queue.py --times 20 [--seed 0] [--folder DIR]

A process opens the queue of a folder and trains what waits in it, a few steps each on the tiny checkpoint; it is killed
(SIGKILL, on Windows TerminateProcess), and the next one goes on. Prints what became of the entries; exits with 1 if
anything is wrong.
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from PIL import Image  # noqa: E402

from lib_lora_train.api.queue import queue_for  # noqa: E402
from lib_lora_train.events import Finished  # noqa: E402
from lib_lora_train.host.standalone import StandaloneHost  # noqa: E402
from lib_lora_train.run.queue import RunQueue  # noqa: E402
from lib_lora_train.run.record import past_run, read_events  # noqa: E402
from lib_lora_train.run.runner import Runner  # noqa: E402
from lib_lora_train.settings import parse  # noqa: E402
from tools import tiny_checkpoint  # noqa: E402


def queue_in(folder: Path) -> RunQueue:
    """The queue of a folder, on the tiny checkpoint in it."""
    host = StandaloneHost(folder / "model" / "tiny.safetensors", lora_folder=folder / "loras", runs_folder=folder / "runs")
    return queue_for(host, Runner())


def fill(folder: Path, runs: int) -> None:
    """The checkpoint, four images, and a queue of that many runs."""
    tiny_checkpoint.write(folder / "model", size=tiny_checkpoint.SHALLOW)
    (folder / "pictures").mkdir()
    for number in range(4):
        Image.new("RGB", (64, 64), (60 * number, 90, 120)).save(folder / "pictures" / f"{number}.png")
    queue = queue_in(folder)
    queue.hold(True)  # this process is not killed, and is to begin nothing
    for number in range(runs):
        queue.add(parse({"output_name": f"run-{number:02}", "train_data_dir": str(folder / "pictures"), "resolution": "64",
                         "min_bucket_reso": 64, "num_repeats": 1, "network_dim": 2, "max_train_steps": 8,
                         "sample_images": False, "save_every_n_steps": 2, "save_state": True}))
    queue.close()


def empty_queue(folder: Path) -> None:
    """Work on the queue until nothing waits."""
    queue = queue_in(folder)
    queue.open()
    queue.hold(False)
    print("working", flush=True)
    while any(entry.open for entry in queue.entries()):
        time.sleep(0.2)


def kill_often(folder: Path, *, times: int, draw: random.Random) -> None:
    """Have processes work on the queue, each killed within some seconds of its work, and the last one not."""
    for number in range(times + 1):
        with subprocess.Popen([sys.executable, __file__, "--work", "--folder", str(folder)], cwd=ROOT, stdout=subprocess.PIPE,
                              env={**os.environ, "OMP_NUM_THREADS": "1"}) as process:
            process.stdout.readline()
            try:
                process.wait(draw.uniform(1, 9) if number < times else None)
            except subprocess.TimeoutExpired:
                process.kill()


def wrong(folder: Path, runs: int) -> list[str]:
    """What is wrong with what became of the queue."""
    entries, found = queue_in(folder), []
    entries.open()
    states = Counter(entry.state for entry in entries.entries())
    print(f"{runs} queued: {dict(states)}")
    if [entry.name for entry in entries.entries()] != [f"run-{number:02}" for number in range(runs)]:
        found.append("entries are missing")
    begun = Counter(past_run(run).name for run in (folder / "runs").iterdir() if (run / "settings.toml").is_file())
    found += [f"{name} was begun {count} times" for name, count in begun.items() if count != 1]
    for entry in entries.entries():
        ends = [event for event in read_events(folder / "runs" / entry.run) if isinstance(event, Finished)]
        made = (folder / "loras" / f"{entry.name}.safetensors").is_file()
        if entry.state not in ("done", "interrupted") or entry.state == "done" and not made or len(ends) > 1:
            found.append(f"{entry.name} is {entry.state}: {entry.message}")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=None)
    parser.add_argument("--work", action="store_true", help="only work on the queue in the folder")
    chosen = parser.parse_args()
    folder = chosen.folder or Path(tempfile.mkdtemp(prefix="kill-queue-"))
    if chosen.work:
        empty_queue(folder)
        return 0
    runs = chosen.times + 4
    fill(folder, runs)
    kill_often(folder, times=chosen.times, draw=random.Random(chosen.seed))
    found = wrong(folder, runs)
    print("\n".join(found) or "No entry was lost and no run was made twice.")
    return bool(found)


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)  # the queue's thread waits for more
