"""The open dataset: what is on the disk, the captions as they are edited, and what was found out about both.

Not safe for two threads at once: the session holds its lock around every use.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lib_lora_train.dataset.held_out import FEWEST, TRAINED, Choices, held_out_of, known_choices, name_of, write_choices
from lib_lora_train.dataset.images import read_size
from lib_lora_train.errors import DatasetError, SettingError, counted
from lib_lora_train.settings import Settings, named
from lib_lora_train.settings.allowed_paths import AllowedPaths
from lib_lora_train.studio import thumbs
from lib_lora_train.studio.captions.filter import Filter
from lib_lora_train.studio.captions.store import CaptionStore
from lib_lora_train.studio.importing.owned import OwnedDataset
from lib_lora_train.studio.requests import Selection, validated
from lib_lora_train.studio.uploads import Uploads

if TYPE_CHECKING:
    from lib_lora_train.dataset.findings import DatasetReport, Examined

LIVE_CODES = frozenset({"no_caption", "empty_caption", "unreadable_caption"})
"""What the captions as edited say better than a report of the files."""


@dataclasses.dataclass(frozen=True)
class Score:
    """How well a caption fits its image, 0 to 100; for that very text. `generated` is how many images were generated,
    `likeness` how near they come to it, 0 to 100, None where none was."""

    caption: str
    value: float
    generated: int
    likeness: float | None = None


class DatasetSession:
    """One dataset with its captions. Images are called by their file's name, which is unique in it.

    `content` grows with every change of captions and images, so that what was found out about older ones can be recognised.
    """

    def __init__(self, dataset: OwnedDataset, *, allowed: AllowedPaths | None) -> None:
        self.dataset, self._allowed = dataset, allowed
        self._may_read = allowed.may_read if allowed else None
        self.report: DatasetReport | None = None
        self._report_content = -1
        self.scores: dict[str, Score] = {}
        self._findings: dict[str, Examined] = {}
        self._sizes: dict[tuple[str, str], tuple[int, int]] = {}
        self._counted: tuple[object, Counter[str], int, int] | None = None
        self.content = 0
        self.settings = Settings()  # those of the training, as far as a check was told them
        self._held_out: tuple[object, frozenset[Path]] | None = None
        self.uploads = Uploads(dataset.studio_folder / "uploads")
        self.store = CaptionStore.open(dataset.folder, may_read=self._may_read)

    def renew(self, names: Iterable[str] = ()) -> None:
        """To be called whenever captions changed, or images came, went or changed.

        What was found out about images called `names` no longer holds: they look different now.
        """
        self.content += 1
        for name in names:
            self._findings.pop(name, None)
            self.scores.pop(name, None)

    def name(self, path: Path) -> str:
        """What an image is called; one in another folder of the dataset has that folder's name before it."""
        return path.name if path.parent == self.dataset.images_folder else f"{path.parent.name}/{path.name}"

    @property
    def names(self) -> tuple[str, ...]:
        """The images by name, in the store's order."""
        return tuple(map(self.name, self.store.images))

    def find(self, name: str) -> int | None:
        """The image's index in the store; None if there is none of that name."""
        return self.store.index((self.dataset.folder if "/" in name else self.dataset.images_folder) / name)

    def index(self, name: str) -> int:
        """The image's index in the store; raises DatasetError if there is none of that name."""
        index = self.find(name)
        if index is None:
            raise DatasetError(f"There is no picture {name!r} in {self.dataset.name}", remedy="reload the page")
        return index

    def path(self, name: str) -> Path:
        """The image's file; raises DatasetError."""
        path = self.store.images[self.index(name)]
        if self._allowed is not None and not self._allowed.may_read(path):
            raise DatasetError(f"The picture {name} cannot be used", why="it is a link to a folder that is not allowed")
        return path

    def chosen(self, selection: Selection) -> list[int]:
        """The store's indices of what was selected; raises DatasetError where a name is none of them."""
        if selection.names is not None:
            return [self.index(name) for name in selection.names]
        wanted = validated(Filter, selection.filter, what="filter")
        found = self.store.select(wanted)
        if wanted.problem:  # what was found out about images is known here, not to the store
            found = [i for i in found if wanted.problem in self.problems(i) or (wanted.problem == "any" and self.problems(i))]
        return found

    def chosen_names(self, selection: Selection) -> list[str]:
        """The same as names; raises DatasetError where that is nothing."""
        names = [self.name(self.store.images[index]) for index in self.chosen(selection)]
        if not names:
            raise DatasetError("No picture is selected", remedy="select some or change the filter")
        return names

    def problems(self, index: int) -> list[str]:
        """Codes of what is wrong with an image: of the last report, and of its caption as it is now."""
        examined = self._findings.get(self.name(self.store.images[index]))
        found = examined.problems if examined else ()
        codes = [code for code in found if code not in LIVE_CODES]
        if self.store.problem(index):
            codes.append("unreadable_caption")
        elif not self.store.caption(index).strip():
            codes.append("empty_caption" if "empty_caption" in found else "no_caption")
        return codes

    @property
    def held_out(self) -> frozenset[Path]:
        """The images that are held out of training, by the choices and the draw. Found anew only after a change."""
        key = (self.content, self._report_content, self.dataset.images_folder, self.settings)
        if self._held_out is None or self._held_out[0] != key:
            choices = known_choices(self.dataset.folder, may_read=self._may_read)
            self._held_out = key, self._held_out_with(choices)
        return self._held_out[1]

    def _held_out_with(self, choices: Choices) -> frozenset[Path]:
        broken = {name for name, examined in self._findings.items() if not examined.usable}
        return held_out_of([path for path in self.store.images if self.name(path) not in broken], self.dataset.folder,
                           share=self.settings.evaluation.validation_split, seed=self.settings.optimizer.seed, choices=choices)

    @property
    def trained(self) -> int:
        """How many images are trained."""
        return len(self.store.images) - len(self.held_out)

    def hold_out(self, names: Sequence[str], held_out: bool | None) -> None:
        """Hold these images out, train on them, or leave them to the draw (None); it is written at once. Raises DatasetError
        where they cannot be held out, OutputError."""
        paths = {self.store.images[self.index(name)] for name in names}
        choices = known_choices(self.dataset.folder, may_read=self._may_read).having(
            {name_of(path, self.dataset.folder) for path in paths}, held_out)
        if held_out and not paths <= self._held_out_with(choices):
            why = f"at least {TRAINED} are trained on, and none is held out of fewer than {FEWEST}"
            share = self.settings.evaluation.validation_split
            raise DatasetError(f"{counted(len(paths), 'picture')} cannot be held out",
                               why=why if share else f"{named('validation_split')} is 0")
        write_choices(self.dataset.folder, choices)
        self.renew()

    def set_report(self, report: DatasetReport, *, content: int) -> None:
        """Remember what was found in the dataset as it was when `content` was read."""
        self.report, self._report_content = report, content
        self._findings = {self.name(examined.path): examined for examined in report.images}
        self._counted = None

    @property
    def fresh(self) -> bool:
        """Whether there is a report, and of the captions and images as they are."""
        return self.report is not None and self._report_content == self.content

    def set_repeats(self, repeats: int) -> None:
        """Show each image that often an epoch; the images' folder is renamed."""
        before = self.dataset.images_folder
        self.dataset.set_repeats(repeats)
        self.store.moved(before, self.dataset.images_folder)

    def counts(self) -> tuple[Counter[str], int, int]:
        """(how many images have each problem, how many have one that is not the caption's or the crop's, how many were
        shaped). Counted anew only after a change."""
        key = (self.content, self.dataset.images_folder)
        if self._counted is None or self._counted[0] != key:
            problems = [set(self.problems(index)) for index in range(len(self.store.images))]
            codes = Counter(code for found in problems for code in found)
            look = sum(bool(found - LIVE_CODES - {"deep_crop"}) for found in problems)
            try:
                shaped = {path.name for path in self.dataset.unshaped_folder.iterdir()}
            except OSError:
                shaped = set()  # not made yet
            self._counted = (key, codes, look, sum(name in shaped for name in self.names))
        return self._counted[1:]

    def entry(self, index: int) -> dict[str, Any]:
        """What the gallery shows of one image. A file that cannot be read shows as such and has no size.

        "why" is why it cannot be used, "caption_problem" why its caption cannot be read, or what is odd about its file.
        """
        path = self.store.images[index]
        name, problems = self.name(path), self.problems(index)
        why = self._findings[name].why if name in self._findings else ""
        try:
            stamp = thumbs.stamp(path)
            width, height = self._size(path, stamp)
        except DatasetError as error:
            stamp, width, height, why = "", 0, 0, error.reason
            problems = list(dict.fromkeys(["broken", *problems]))
        return {"id": name, "name": path.name, "caption": self.store.caption(index), "width": width, "height": height,
                "changed": self.store.is_changed(index), "problems": problems, "why": why, "score": self.score(index),
                "caption_problem": self.store.problem(index) or self.store.hint(index),
                "held_out": path in self.held_out, "masked": self.dataset.mask_path(name).is_file(),
                "shaped": self.dataset.unshaped_path(name).is_file(), "stamp": stamp,
                "painted": self.scores[name].generated if name in self.scores else 0,
                "likeness": self.scores[name].likeness if name in self.scores else None}

    def score(self, index: int) -> float | None:
        """The caption's score, None where it was not scored or changed since."""
        score = self.scores.get(self.name(self.store.images[index]))
        return score.value if score is not None and score.caption == self.store.caption(index) else None

    def sorted(self, indices: Sequence[int], by: str) -> list[int]:
        """By name as the store has it, those with most problems first, or the worst scores first."""
        if by == "name":
            return list(indices)
        if by == "problems":
            return sorted(indices, key=lambda index: -len(self.problems(index)))
        if by == "score":
            return sorted(indices, key=lambda index: (self.score(index) is None, self.score(index) or 0.0))
        raise SettingError(f"There is no order called {by!r}", remedy="choose name, problems or score")

    def _size(self, path: Path, stamp: str) -> tuple[int, int]:
        key = (self.name(path), stamp)
        if key not in self._sizes:
            self._sizes[key] = read_size(path)
        return self._sizes[key]
