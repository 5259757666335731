"""How long the dataset studio takes for a large dataset: reading the captions, filtering, editing and saving them.

The dataset is made here: images of a few pixels (nothing decodes them), captions of twenty tags out of a vocabulary of
2000 whose frequencies fall like those of words (Zipf's law). Each figure is the shortest of several; the files have just been
written, so the system still holds them in memory. Not covered: thumbnails, which are made when they are looked at.
"""

from __future__ import annotations

import io
import itertools
import os
import platform
import random
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from PIL import Image

from lib_lora_train.errors import SettingError
from lib_lora_train.studio.captions.edits import AddTags, Edit, ReplaceRegex, ReplaceTag, ReplaceText, SetCaption, SortTags
from lib_lora_train.studio.captions.filter import Filter
from lib_lora_train.studio.captions.store import CaptionStore
from tools.bench.report import grid, write_report
from tools.bench.stopwatch import shortest

SIZES = (1000, 2000, 5000, 10_000)
MOST_SECONDS = 2.0  # promised for 10,000 images of everything but saving
TIMES = 5
TAGS_EACH, VOCABULARY = 20, 2000
SAVING = ("save one caption", "save all captions")


@dataclass(frozen=True)
class Row:
    """One operation; seconds for each number of images."""

    name: str
    seconds: tuple[float, ...]

    def growth(self, sizes: Sequence[int]) -> float:
        """Time per image with the most images, relative to that with the fewest: 1 is linear, less is better."""
        return (self.seconds[-1] / sizes[-1]) / (self.seconds[0] / sizes[0])


def run_studio(sizes: Sequence[int], *, output: Path, times: int = TIMES, say: Callable[[str], None]) -> str:
    """Measure, write `studio.md` and `studio.json` into `output`, and return the table. The datasets are removed again."""
    if not sizes or min(sizes) < 1 or list(sizes) != sorted(set(sizes)):
        raise SettingError("The numbers of pictures must be positive and grow", remedy="write --pictures 1000,10000")
    columns = []
    for size in sizes:
        say(f"{size} pictures …")
        folder = make_dataset(output / f"studio-{os.getpid()}-{size}", images=size)
        try:
            columns.append(measure(folder, times=times))
        finally:
            shutil.rmtree(folder)
    rows = [Row(name, tuple(column[name] for column in columns)) for name in columns[0]]
    text = table(rows, sizes)
    figures = {"pictures": list(sizes), "rows": [asdict(row) for row in rows], "python": platform.python_version(),
             "system": platform.platform(), "cpus": os.cpu_count()}
    return write_report(output, "studio", text, figures)


def make_dataset(folder: Path, *, images: int, seed: int = 0) -> Path:
    """A dataset in kohya's layout; the same for the same seed."""
    rng = random.Random(seed)
    tags = [f"tag {number}" for number in range(VOCABULARY)]
    weights = list(itertools.accumulate(1 / (rank + 1) for rank in range(VOCABULARY)))
    inside = folder / "10_bench"
    inside.mkdir(parents=True)
    file = io.BytesIO()
    Image.new("RGB", (16, 16), "orange").save(file, "PNG")
    for number in range(images):
        (inside / f"{number:06}.png").write_bytes(file.getvalue())
        chosen = dict.fromkeys(rng.choices(tags, cum_weights=weights, k=2 * TAGS_EACH))
        (inside / f"{number:06}.txt").write_text(", ".join(list(chosen)[:TAGS_EACH]), encoding="utf-8")
    return folder


def measure(folder: Path, *, times: int) -> dict[str, float]:
    """Seconds of each operation, the shortest of `times`."""
    result = {"load the index": shortest(lambda: CaptionStore.open(folder), times)}
    store = CaptionStore.open(folder)
    everything = range(len(store))
    for name, wanted in (("filter by tags", Filter(all_of=("tag 1",), any_of=("tag 2", "tag 3"), none_of=("tag 0",))),
                         ("filter by prefix and suffix", Filter(prefix="tag 1", suffix="9")),
                         ("filter by text", Filter(text="tag 17")),
                         ("filter by a regular expression", Filter(regex=r"tag 1\d\b.*tag 4"))):
        result[name] = shortest(lambda wanted=wanted: store.select(wanted), times)
    result["tags by frequency"] = shortest(store.tags, times)
    edits: tuple[tuple[str, Edit], ...] = (
        ("replace a tag", ReplaceTag("tag 0", "first")), ("replace a text", ReplaceText("tag ", "word ")),
        ("replace by a regular expression", ReplaceRegex(r"tag (\d+)", r"\1 times")), ("add a tag", AddTags(("zzk",), "start")),
        ("sort by frequency", SortTags("frequency")))
    for name, edit in edits:
        result[name] = shortest(lambda edit=edit: store.apply(edit, everything), times, after=store.undo)
    store.apply(edits[1][1], everything)
    result["undo and redo"] = shortest(lambda: (store.undo(), store.redo()), times)
    store.undo()
    numbers = itertools.count()
    # A save writes only what changed, so each one is given new captions first.
    for name, indices in zip(SAVING, (range(1), everything), strict=True):
        result[name] = shortest(store.save, min(times, 3),
                                before=lambda indices=indices: store.apply(SetCaption(f"caption {next(numbers)}"), indices))
    return result


def table(rows: Sequence[Row], sizes: Sequence[int]) -> str:
    """Markdown whose columns also line up in a terminal; says which operation breaks the promise."""
    head = ["seconds for … pictures", *(f"{size:,}" for size in sizes), "growth"]
    lines = [[row.name, *(f"{seconds:.3f}" for seconds in row.seconds), f"{row.growth(sizes):.2f}"] for row in rows]
    slow = [row.name for row in rows if row.name not in SAVING and row.seconds[-1] >= MOST_SECONDS]
    verdict = f"**Slower than {MOST_SECONDS:.0f} s: {', '.join(slow)}.**" if slow else \
        f"Everything but saving takes less than {MOST_SECONDS:.0f} s with {sizes[-1]:,} pictures."
    return "\n".join([grid(head, lines), "", verdict,
                      "Growth: time per picture with the most pictures relative to that with the fewest; 1 is linear.", ""])
