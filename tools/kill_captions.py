"""Kills processes that save captions at random moments and counts what is lost: nothing may be.

    python tools/kill_captions.py --times 200 [--seed 0] [--pictures 60] [--folder DIR]

A process changes all captions of a dataset from "generation n" to "generation n + 1" and saves, again and again; it is killed
(SIGKILL, on Windows TerminateProcess) somewhere; what it left is examined before and after the folder is opened again; the
next process goes on. Prints a table; exits with 1 if a caption was lost, torn, or of another generation than the others.
"""

from __future__ import annotations

import argparse
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
JOURNAL = Path(".studio", "captions.journal")

CHILD = """
import sys
from lib_lora_train.studio.captions.store import CaptionStore
store = CaptionStore.open(sys.argv[1])
generation = int(store.caption(0).rsplit(" ", 1)[1])
while True:
    generation += 1
    store.set_captions({index: f"picture {index}, generation {generation}" for index in range(len(store))}, "next")
    print("saving", generation, flush=True)
    store.save()
    print("saved", generation, flush=True)
"""


def prepare(folder: Path, images: int) -> None:
    """A dataset whose captions are of generation 0."""
    (folder / "10_x").mkdir(parents=True)
    for number in range(images):
        (folder / "10_x" / f"{number:04}.png").write_bytes(b"")
        (folder / "10_x" / f"{number:04}.txt").write_text(f"picture {number}, generation 0", encoding="utf-8")


def kill_once(folder: Path, rng: random.Random) -> tuple[int, int]:
    """(the last generation said to be saved or 0, the last one begun or 0) of a process killed in the middle."""
    with subprocess.Popen([sys.executable, "-c", CHILD, str(folder)], cwd=ROOT, text=True, stdout=subprocess.PIPE) as process:
        for _ in range(rng.randint(1, 4)):
            line = process.stdout.readline()
        time.sleep(rng.uniform(0, 0.12))
        process.kill()
        said = [line, *process.stdout.read().splitlines()]
    numbers = {word: int(number) for word, number in (text.split() for text in said if len(text.split()) == 2)}
    return numbers.get("saved", 0), numbers.get("saving", 0)


def generations(folder: Path) -> list[int]:
    """The generation of each caption; -1 where it is not what was written."""
    found = []
    for number, path in enumerate(sorted((folder / "10_x").glob("*.txt"))):
        begin, _, generation = path.read_text(encoding="utf-8").partition(", generation ")
        found.append(int(generation) if begin == f"picture {number}" and generation.isdigit() else -1)
    return found


def examine(folder: Path, *, images: int, saved: int, begun: int, tally: Counter[str]) -> list[str]:
    """What is wrong after one kill; counts in `tally` where the process was."""
    from lib_lora_train.studio.captions.store import CaptionStore

    before = generations(folder)
    mixed = len(set(before)) > 1
    tally["  between two captions" if mixed else "  with all captions written or none"] += 1
    tally["a journal lay there"] += (folder / JOURNAL).exists()
    tally["temporary files lay there"] += any(folder.rglob("*.part"))
    CaptionStore.open(folder)
    after = generations(folder)
    wrong = [] if len(before) == len(after) == images and -1 not in before + after else ["a caption is gone or torn"]
    if len(set(after)) != 1:
        wrong.append(f"generations {sorted(set(after))} after opening")
    if saved and not saved <= after[0] <= begun:
        wrong.append(f"generation {after[0]} although {saved} was saved and {begun} begun")
    if mixed and after[0] != max(before):
        wrong.append(f"generation {after[0]} although {max(before)} was on its way")
    if (folder / JOURNAL).exists():
        wrong.append("the journal is still there")
    return wrong


def main(arguments: list[str] | None = None) -> int:
    """Run the test; 0 if nothing was lost."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--times", type=int, default=200, help="how many kills")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pictures", dest="images", type=int, default=60)
    parser.add_argument("--folder", type=Path, help="where to work; a temporary folder unless named")
    chosen = parser.parse_args(arguments)
    folder = Path(tempfile.mkdtemp(prefix="kill-captions-", dir=chosen.folder))
    prepare(folder, chosen.images)
    rng, tally, wrong = random.Random(chosen.seed), Counter[str](), []
    for _ in range(chosen.times):
        saved, begun = kill_once(folder, rng)
        wrong += examine(folder, images=chosen.images, saved=saved, begun=begun, tally=tally)
    rows = [("kills", chosen.times), *sorted(tally.items()), ("generations saved", max(generations(folder))),
            ("wrong", len(wrong))]
    for name, value in rows:
        print(f"{name:38} {value:>6}")
    for sentence in wrong:
        print(f"WRONG: {sentence}")
    if not wrong:
        shutil.rmtree(folder, ignore_errors=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
