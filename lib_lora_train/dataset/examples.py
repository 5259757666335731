"""Examples: usable images with their captions, how often they are seen, and the size each is trained at."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from lib_lora_train.dataset.buckets import Buckets, Placement, Size
from lib_lora_train.dataset.captions import split_tags
from lib_lora_train.dataset.plan import balanced_repeats, plain_folder_repeats
from lib_lora_train.errors import DatasetError, counted, printable, some_of
from lib_lora_train.settings import no_effect


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
    caption: str  # with the trigger word; before shuffling and dropout
    repeats: int  # visits in one epoch
    folder: str  # name of its folder, e.g. "10_sks dog"
    width: int  # upright
    height: int
    is_regularisation: bool = False


@dataclass(frozen=True)
class Dataset:
    """What a scan found."""

    folder: Path
    layout: Literal["kohya", "plain"]
    examples: tuple[Example, ...]
    problems: tuple[Problem, ...] = ()

    @property
    def images(self) -> int:
        """Images to learn from, without regularisation."""
        return sum(not example.is_regularisation for example in self.examples)

    def dataset_dirs(self, *, regularisation: bool = False) -> dict[str, dict[str, int]]:
        """kohya's `ss_dataset_dirs` / `ss_reg_dataset_dirs`: {folder: {n_repeats, img_count}}."""
        result: dict[str, dict[str, int]] = {}
        for example in self._of(regularisation):
            entry = result.setdefault(example.folder, {"n_repeats": example.repeats, "img_count": 0})
            entry["img_count"] += 1
        return result

    def tag_frequency(self) -> dict[str, dict[str, int]]:
        """kohya's `ss_tag_frequency`: {folder: {tag in lower case: images that carry it}}."""
        result: dict[str, dict[str, int]] = {}
        for example in self._of(False):
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
        repeats = plain_folder_repeats(len(examples), max_train_epochs=max_train_epochs, num_repeats=num_repeats)
        examples = [replace(example, repeats=repeats) for example in examples]
    elif num_repeats > 0:
        problems.append(Problem(no_effect("num_repeats", "the number in front of each folder's name counts")))
    balanced = _balance(regularisation, visits=sum(example.repeats for example in examples), problems=problems)
    return replace(dataset, examples=(*examples, *balanced), problems=tuple(problems))


def assign_buckets(dataset: Dataset, buckets: Buckets) -> tuple[Dataset, tuple[Placement, ...]]:
    """A training size for each example; `placements[i]` belongs to `dataset.examples[i]` of the result.

    Images that fit no bucket are dropped from the result and named. Raises DatasetError if none is left.
    """
    examples, placements, problems = [], [], list(dataset.problems)
    for example in dataset.examples:
        try:
            placements.append(buckets.assign(example.width, example.height))
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
