"""Examples: usable images with their captions, how often they are seen, and the size each is trained at."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from lib_lora_train.dataset.buckets import Buckets, Placement, Size
from lib_lora_train.dataset.captions import split_tags
from lib_lora_train.dataset.plan import balanced_repeats, plain_folder_repeats
from lib_lora_train.errors import DatasetError, counted, printable, some_of
from lib_lora_train.settings import DatasetSettings, no_effect
from lib_lora_train.settings.dataset_config import SubsetSettings, each_resolution
from lib_lora_train.settings.loss import MaskSettings

Masked = tuple[Path, MaskSettings]
"""An image and its settings of masks: a folder may be named twice, with other masks."""


@dataclass(frozen=True)
class Problem:
    """Something the user should know about the dataset; the run goes on without it."""

    text: str  # a sentence
    path: Path | None = None  # the one file it is about, if it is one
    skipped: bool = False  # True: this image is not trained

    def __post_init__(self) -> None:
        object.__setattr__(self, "text", printable(self.text))


@dataclass(frozen=True)
class Example:
    """One usable image and how it is trained."""

    path: Path
    caption: str  # with the trigger word; where nothing of it varies
    repeats: int  # visits in one epoch
    folder: str  # name of its folder, e.g. "10_sks dog"
    width: int  # upright
    height: int
    is_regularisation: bool = False
    captions: tuple[str, ...] = ()  # of which one is drawn at each step, with their wildcards and separators; () for `caption`
    subset: SubsetSettings = SubsetSettings()

    @property
    def lines(self) -> tuple[str, ...]:
        """The captions of which one is drawn at each step."""
        return self.captions or (self.caption,)

    @property
    def trigger_word(self) -> str:
        """That of its folder; regularisation images never have one."""
        return "" if self.is_regularisation else self.subset.dataset.trigger_word

    @property
    def masked(self) -> Masked:
        """What its mask is known by."""
        return self.path, self.subset.masks


@dataclass(frozen=True)
class Dataset:
    """What `read_folder` found."""

    folder: Path
    layout: Literal["kohya", "plain", "config"]
    examples: tuple[Example, ...]
    problems: tuple[Problem, ...] = ()

    @property
    def images(self) -> int:
        """Images to learn from, without regularisation; one that is trained at several sizes counts once."""
        return len({example.path for example in self._of(False)})

    def dataset_dirs(self, *, regularisation: bool = False) -> dict[str, dict[str, int]]:
        """kohya's `ss_dataset_dirs` / `ss_reg_dataset_dirs`: {folder: {n_repeats, img_count}}. A folder that is trained in
        several manners is there several times, as "folder (2)"."""
        names: dict[tuple[str, SubsetSettings], str] = {}
        result: dict[str, dict[str, int]] = {}
        for example in self._of(regularisation):
            if (key := (example.folder, example.subset)) not in names:
                before = sum(folder == example.folder for folder, _ in names)
                names[key] = f"{example.folder} ({before + 1})" if before else example.folder
            entry = result.setdefault(names[key], {"n_repeats": example.repeats, "img_count": 0})
            entry["img_count"] += 1
        return result

    def tag_frequency(self) -> dict[str, dict[str, int]]:
        """kohya's `ss_tag_frequency`: {folder: {tag in lower case: images that carry it}}."""
        result: dict[str, dict[str, int]] = {}
        for example in {example.path: example for example in self._of(False)}.values():
            tags = result.setdefault(example.folder, {})
            for tag in split_tags(example.caption):
                tags[tag.lower()] = tags.get(tag.lower(), 0) + 1
        return result

    def _of(self, regularisation: bool) -> Iterable[Example]:
        return (example for example in self.examples if example.is_regularisation == regularisation)


def with_repeats(dataset: Dataset, *, max_train_epochs: int, num_repeats: int = 0) -> Dataset:
    """The dataset that `read_folder` found with the repeats it is trained with. `max_train_epochs` and `num_repeats` (0 =
    choose) set those of a plain folder; regularisation images are visited as often as the others together."""
    examples = [example for example in dataset.examples if not example.is_regularisation]
    regularisation = [example for example in dataset.examples if example.is_regularisation]
    problems = list(dataset.problems)
    if dataset.layout == "plain":
        repeats = plain_folder_repeats(dataset.images, max_train_epochs=max_train_epochs, num_repeats=num_repeats)
        if num_repeats == 0:  # each of its sizes is a visit
            repeats = -(-repeats * dataset.images // max(1, len(examples)))
        examples = [replace(example, repeats=repeats) for example in examples]
    elif num_repeats > 0 and dataset.layout == "kohya":
        problems.append(Problem(no_effect("num_repeats", "the number in front of each folder's name counts")))
    balanced = _balance(regularisation, visits=sum(example.repeats for example in examples), problems=problems)
    return replace(dataset, examples=(*examples, *balanced), problems=tuple(problems))


def at_each_resolution(dataset: Dataset) -> Dataset:
    """The dataset with an example for each of the sizes that an image is to be trained at."""
    return replace(dataset, examples=tuple(replace(example, subset=subset) for example in dataset.examples
                                           for subset in each_resolution(example.subset)))


def assign_buckets(dataset: Dataset, buckets: Callable[[DatasetSettings], Buckets]) -> tuple[Dataset, tuple[Placement, ...]]:
    """A training size for each example; `placements[i]` belongs to `dataset.examples[i]` of the result. `buckets` are those
    of a folder's settings.

    Images that fit no bucket are dropped from the result and named. Raises DatasetError if none is left.
    """
    examples, placements, problems = [], [], list(dataset.problems)
    for example in dataset.examples:
        try:
            placements.append(buckets(example.subset.dataset).assign(example.width, example.height))
            examples.append(example)
        except DatasetError as error:
            problems.append(Problem(f"Skipped {example.path}: {error}", example.path, skipped=True))
    if all(example.is_regularisation for example in examples):
        raise nothing_left(dataset.folder, problems)
    return replace(dataset, examples=tuple(examples), problems=tuple(problems)), tuple(placements)


def visits_by_bucket(examples: Sequence[Example], placements: Sequence[Placement]) -> dict[Size, int]:
    """Image-visits in one epoch for each bucket: what `plan.plan_run` counts with."""
    visits: dict[Size, int] = {}
    for example, placement in zip(examples, placements, strict=True):
        visits[placement.bucket] = visits.get(placement.bucket, 0) + example.repeats
    return visits


def _balance(examples: list[Example], *, visits: int, problems: list[Problem]) -> list[Example]:
    """The regularisation examples with repeats that add up to `visits`; those that get none are named."""
    repeats = balanced_repeats([example.repeats for example in examples], visits=visits)
    unused = [example.path.name for example, n in zip(examples, repeats, strict=True) if n == 0]
    if unused:
        problems.append(Problem(
            f"{counted(len(unused), 'regularisation picture is', 'regularisation pictures are')} not used, because there are "
            f"more of them than visits to the pictures: {some_of(unused)}."))
    return [replace(example, repeats=n) for example, n in zip(examples, repeats, strict=True) if n > 0]


def nothing_left(folder: Path, problems: Sequence[Problem]) -> DatasetError:
    """The refusal of a folder without a usable image, whose `problems` say why."""
    skipped = [problem.text.removeprefix("Skipped: ").rstrip(".") for problem in problems if problem.skipped]
    return DatasetError(
        f"No picture in {folder} can be used", why=" | ".join(skipped[:3]) + (" | …" if len(skipped) > 3 else ""),
        remedy="replace or remove the damaged pictures")
