"""What an examination of a dataset found: values that a page, a terminal or a program can show. Made by `report.examine`.

Problems are codes, so that each reader can show them in its own way:

    broken              cannot be used as an image; nothing is known of it but why
    unreadable_caption  its caption file is no text in a known encoding, or no JSON; a training would refuse to start
    small               has to be enlarged to the training size
    narrow              so long and thin that no training size fits
    blurry              soft, by itself or beside the others
    duplicate           nearly the same as a better image of the folder, cut or mirrored too (all but the best are marked)
    no_caption          has no caption file
    empty_caption       has one without text
    long_caption        longer than other trainers read
    deep_crop           loses much of its area to the crop
"""

from __future__ import annotations

import dataclasses
import textwrap
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lib_lora_train.dataset.buckets import Size
from lib_lora_train.errors import counted, printable, some_of

NARROW = 3.0  # longer side / shorter side; beyond it models generate things twice
DEEP_CROP = 0.15  # of the area
LONG_CAPTION = 225  # tokens: the most that kohya's trainer can read

_WIDTH = 110


@dataclasses.dataclass(frozen=True)
class Examined:
    """One image. A broken one has the size (0, 0); one that fits no training size has the bucket (0, 0)."""

    path: Path
    width: int  # upright
    height: int
    bucket: Size  # (width, height) in training
    crop_loss: float  # 0…1, of its area
    sharpness: float  # see `likeness.sharpness`
    tokens: int | None  # of its caption as it is trained; None where no tokenizer was given
    problems: tuple[str, ...]
    kept: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)  # (left, top, right, bottom) in its own pixels
    why: str = ""  # a broken one cannot be used, and what to do, as a sentence goes on after a colon
    several: bool = False  # frames or pages: the first is used
    unread: str = ""  # why its caption cannot be read, likewise

    @property
    def usable(self) -> bool:
        """Whether training uses it."""
        return self.bucket != (0, 0)


@dataclasses.dataclass(frozen=True)
class Proposal:
    """How long to train: at least 100 times an image and 1500 times in all. `pictures` are those not held out."""

    pictures: int
    repeats: int
    epochs: int
    steps: int
    batch: int


@dataclasses.dataclass(frozen=True)
class DatasetReport:
    """What an examination found in a folder."""

    folder: Path
    images: tuple[Examined, ...]
    duplicates: tuple[tuple[Path, ...], ...]  # groups, in each the best image first
    sizes: tuple[tuple[Size, int], ...]  # ((width, height), images), most frequent first
    buckets: tuple[tuple[Size, int], ...]  # likewise, of the images that training uses
    tags: dict[str, int]  # in how many captions; most frequent first
    once: tuple[str, ...]  # tags of a single caption
    proposal: Proposal
    advice: tuple[str, ...]  # what to fix, worst first
    resolution: Size
    captions: str  # how many there are, and which text files are nobody's: one sentence

    @property
    def counts(self) -> dict[str, int]:
        """Images with each problem, by code."""
        return dict(Counter(code for image in self.images for code in image.problems))

    @property
    def usable(self) -> int:
        """Images that training uses."""
        return sum(image.usable for image in self.images)

    @property
    def trainable(self) -> bool:
        """Whether a training on this folder would start."""
        return self.usable > 0 and "unreadable_caption" not in self.counts

    @property
    def mean_crop_loss(self) -> float:
        """Share of the area that crops lose, 0…1, over the images that training uses."""
        return sum(image.crop_loss for image in self.images if image.usable) / max(1, self.usable)

    @property
    def summary(self) -> str:
        """One line: images, how many to look at, buckets, crops."""
        look = sum(bool(image.problems) for image in self.images)
        return (f"{counted(len(self.images), 'picture')}, {f'{look:,}' if look else 'none'} to look at · "
                f"{counted(len(self.buckets), 'bucket')} at {_size(self.resolution)}, crops lose "
                f"{_percent(self.mean_crop_loss)} on average")

    def to_dict(self) -> dict[str, Any]:
        """All of it for JSON: paths as text, relative to the folder where they are in it."""
        def name(path: Path) -> str:
            return printable((path.relative_to(self.folder) if path.is_relative_to(self.folder) else path).as_posix())
        return {
            "folder": printable(str(self.folder)), "summary": self.summary, "trainable": self.trainable,
            "advice": list(self.advice), "captions": self.captions, "counts": self.counts, "resolution": list(self.resolution),
            "mean_crop_loss": round(self.mean_crop_loss, 4),
            "pictures": [{
                "path": name(image.path), "width": image.width, "height": image.height,
                "bucket": list(image.bucket), "crop_loss": round(image.crop_loss, 4),
                "kept": [round(number, 1) for number in image.kept], "sharpness": round(image.sharpness, 3),
                "tokens": image.tokens, "problems": list(image.problems), "why": image.why} for image in self.images],
            "duplicates": [[name(path) for path in group] for group in self.duplicates],
            "sizes": [[*size, count] for size, count in self.sizes],
            "buckets": [[*size, count] for size, count in self.buckets],
            "tags": self.tags, "once": list(self.once), "proposal": dataclasses.asdict(self.proposal)}

    def text(self) -> str:
        """For a terminal: what to fix first, then the figures."""
        if self.advice:
            lines = ["What to fix, worst first:"]
            for number, sentence in enumerate(self.advice, start=1):
                lines += textwrap.wrap(f"{number}. {sentence}", _WIDTH, initial_indent="  ", subsequent_indent="     ",
                                       break_long_words=False, break_on_hyphens=False)
        else:
            lines = ["Nothing to fix."]
        rows = [("sizes", _counted(self.sizes)), ("buckets", _counted(self.buckets)), ("crops", self._crops()),
                ("captions", self.captions), ("tokens", self._tokens()),
                ("duplicates", "; ".join(" = ".join(path.name for path in group) for group in self.duplicates[:10])),
                ("tags", some_of([f"{tag} {count}" for tag, count in self.tags.items()], 15)),
                ("used once", f"{len(self.once)}: {some_of(self.once, 15)}" if self.once else ""),
                ("proposal", self._proposal() if self.usable else "")]
        figures = [line for label, value in rows if value for line in textwrap.wrap(
            value, _WIDTH, initial_indent=f"{label:12}", subsequent_indent=" " * 12, break_long_words=False)]
        return printable("\n".join([f"{self.folder}: {self.summary}", "", *lines, "", *figures]))

    def _proposal(self) -> str:
        proposal = self.proposal
        kept = "" if proposal.pictures == self.usable else f"; {self.usable - proposal.pictures} more to measure on"
        return (f"{counted(proposal.pictures, 'picture')} × {counted(proposal.repeats, 'repeat')} × "
                f"{counted(proposal.epochs, 'epoch')}, batch {proposal.batch} = {counted(proposal.steps, 'step')}{kept}")

    def _crops(self) -> str:
        losing = sorted((p for p in self.images if p.usable and p.crop_loss >= 0.005), key=lambda p: -p.crop_loss)
        return some_of([f"{image.path.name} loses {_percent(image.crop_loss)}" for image in losing])

    def _tokens(self) -> str:
        tokens = sorted(image.tokens for image in self.images if image.tokens is not None)
        return f"{tokens[0]} to {tokens[-1]} a caption, half of them up to {tokens[len(tokens) // 2]}" if tokens else ""


def _counted(sizes: Iterable[tuple[Size, int]]) -> str:
    return some_of([f"{count} × {_size(size)}" for size, count in sizes], 12)


def _size(size: Size) -> str:
    return f"{size[0]}×{size[1]}"


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"
