"""Which images of a dataset are held out: not trained on, so that they show whether a LoRA learns or copies.

Some are drawn by the run's seed, each by a hash of its own name, so that an image more or less moves few others. What the user
chose for an image, in the dataset folder's `held_out.json`, goes before the draw. An image's name there is its path in the
folder, with slashes; the number of repeats in front of a folder's name (10_cat) counts for nothing, because it changes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import unicodedata
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from lib_lora_train.dataset.caption_files import CHOICES
from lib_lora_train.dataset.examples import Dataset, Example, Problem
from lib_lora_train.dataset.listing import MayRead, repeats_and_name
from lib_lora_train.errors import DatasetError, counted, some_of, translated
from lib_lora_train.settings import named
from lib_lora_train.storage.atomic import remove, write_atomic

FEWEST = 12  # images of a dataset that some are held out of
_LEAST, TRAINED = 2, 10  # images that are held out, and that are left to train on
_CROPS, _SIDE = 4, 0.85  # images of a small set that are looked at, and the share of a side that is seen of them
_MOST_BYTES = 16 << 20  # of a file of choices
_REMEDY = "remove it, or choose anew on the dataset page"

Crop = tuple[float, float, float, float]


@dataclasses.dataclass(frozen=True)
class HeldOutImage:
    """An image to measure on. `crop` is (left, top, right, bottom) in shares of the upright image, None for all of it; it is
    mirrored after it is cut."""

    example: Example
    crop: Crop | None = None
    mirrored: bool = False

    @property
    def box(self) -> tuple[int, int, int, int]:
        """(left, top, right, bottom) of what is seen, in pixels of the upright image."""
        width, height = self.example.width, self.example.height
        left, top, right, bottom = self.crop or (0, 0, 1, 1)
        x, y = int(left * width), int(top * height)
        return x, y, max(x + 1, int(right * width)), max(y + 1, int(bottom * height))


@dataclasses.dataclass(frozen=True)
class Split:
    """A dataset in two. `derived`: too small to hold any out, so that `held_out` are mirrored crops of `training`'s images.
    `notes` say so in a sentence; what is wrong with the choices is among `training.problems`. Repeats are as they were."""

    training: Dataset
    held_out: tuple[HeldOutImage, ...]
    derived: bool
    notes: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Choices:
    """What the user chose for single images, by `name_of`: to hold them out, or to train on them instead."""

    held_out: frozenset[str] = frozenset()
    trained: frozenset[str] = frozenset()

    def having(self, names: Collection[str], held_out: bool | None) -> Choices:
        """These with another choice for `names`; None leaves them to the draw."""
        out, trained = self.held_out.difference(names), self.trained.difference(names)
        return Choices(out.union(names) if held_out else out, trained.union(names) if held_out is False else trained)


def name_of(path: Path, folder: Path) -> str:
    """What an image is called in choices and draws; of one elsewhere (see `dataset_config`) its folder's name counts."""
    within = path.relative_to(folder) if folder in path.parents else Path(path.parent.name, path.name)
    return _name(within.as_posix())


def read_choices(folder: Path, *, may_read: MayRead | None = None) -> Choices:
    """The choices in the dataset's folder; none where there is no file. Raises DatasetError for a damaged one."""
    path = folder / CHOICES
    if not os.path.isfile(path) or may_read is not None and not may_read(path):
        return Choices()
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise ValueError("it is too large")
        found = json.loads(path.read_bytes())
        held_out, trained = (_names(found, key) for key in ("held_out", "trained"))
    except (OSError, ValueError, RecursionError) as error:
        raise DatasetError(f"The file {path} cannot be read", why=str(error), remedy=_REMEDY) from error
    return Choices(held_out, trained - held_out)


def known_choices(folder: Path, *, may_read: MayRead | None = None) -> Choices:
    """The same; none where the file is damaged."""
    with contextlib.suppress(DatasetError):
        return read_choices(folder, may_read=may_read)
    return Choices()


def write_choices(folder: Path, choices: Choices) -> None:
    """Keep the choices in the dataset's folder; no file where there are none. Raises OutputError."""
    with translated("the choice of held-out pictures was written"):
        if choices == Choices():
            if (folder / CHOICES).exists():
                remove(folder / CHOICES)
            return
        lists = {"held_out": sorted(choices.held_out), "trained": sorted(choices.trained)}
        write_atomic(folder / CHOICES, json.dumps(lists, indent=1).encode())


def select(names: Sequence[str], *, share: float, seed: int, choices: Choices = Choices()) -> frozenset[str]:
    """The names (see `name_of`) that are held out of a dataset of these.

    Below 12 names and at a share of 0 there are none. Else round(share × names) are drawn, at least two, never more than half
    of a folder; then the choices are followed. At least ten are left to train on.
    """
    if len(names) < FEWEST or not share:
        return frozenset()
    order = sorted(names, key=lambda name: (_hash(name, seed), name))
    spare = len(names) - TRAINED
    left = Counter({folder: count // 2 for folder, count in Counter(map(_folder, names)).items()})
    drawn: list[str] = []
    for name in order:
        if len(drawn) < min(spare, max(_LEAST, math.floor(share * len(names) + 0.5))) and left[_folder(name)]:
            left[_folder(name)] -= 1
            drawn.append(name)
    chosen = [name for name in order if name in choices.held_out]
    return frozenset([*chosen, *(name for name in drawn if name not in choices.held_out | choices.trained)][:spare])


def held_out_of(images: Sequence[Path], folder: Path, *, share: float, seed: int, choices: Choices) -> frozenset[Path]:
    """Those of a dataset's usable images that `split` would hold out."""
    names = {name_of(path, folder): path for path in images}
    return frozenset(names[name] for name in select(list(names), share=share, seed=seed, choices=choices))


def split(dataset: Dataset, *, share: float, seed: int, may_read: MayRead | None = None) -> Split:
    """The dataset in two, as `select` has it with the choices in its folder. Regularisation images are never held out.

    Of fewer than twelve images mirrored crops of up to four are looked at instead, and all are trained; at a share of 0
    nothing is. `may_read` is asked for the file of choices, which may be a link.
    """
    images = {name_of(example.path, dataset.folder): example
              for example in dataset.examples if not example.is_regularisation}
    choices, problems = Choices(), []
    try:
        choices = read_choices(dataset.folder, may_read=may_read)
    except DatasetError as error:
        problems = [f"{str(error)[:-1]}. Until then pictures are held out by the draw alone."]
    selected = select(list(images), share=share, seed=seed, choices=choices)
    problems += _not_followed(choices=choices, images=images, selected=selected, share=share)
    dataset = dataclasses.replace(dataset, problems=(*dataset.problems, *map(Problem, problems)))
    if selected:
        held_out = tuple(HeldOutImage(example) for name, example in images.items() if name in selected)
        gone = {image.example.path for image in held_out}  # at every size
        training = dataclasses.replace(dataset, examples=tuple(
            e for e in dataset.examples if e.is_regularisation or e.path not in gone))
        verb = "is" if len(selected) == 1 else "are"
        return Split(training, held_out, False, (
            f"{len(selected)} of {counted(len(images), 'picture')} {verb} kept back to measure on.",))
    if not share or len(images) >= FEWEST and choices.trained:
        return Split(dataset, (), False, ())
    first = sorted(images, key=lambda name: (_hash(name, seed), name))[:_CROPS]
    why = f"fewer than {FEWEST} pictures" if len(images) < FEWEST else "one picture in each folder"
    return Split(dataset, tuple(_crop(images[name], _hash(name, seed)) for name in first), True, (
        f"With {why} none is kept back: mirrored crops of {len(first)} of them are measured on.",))


def _not_followed(*, choices: Choices, images: Mapping[str, Example], selected: frozenset[str], share: float) -> list[str]:
    """A sentence for each kind of choice that is not followed. Of images that are gone, or skipped, nothing is said."""
    problems, few = [], len(images) < FEWEST
    if ignored := sorted((choices.held_out & images.keys()) - selected):
        why = (f"{named('validation_split')} is 0" if not share else f"none is held out of fewer than {FEWEST}" if few else
               f"at least {TRAINED} pictures are trained on")
        problems.append(f"{counted(len(ignored), 'picture')} to be held out {'is' if len(ignored) == 1 else 'are'} trained on "
                        f"all the same, because {why}: {some_of(ignored)}.")
    if share and not selected and not few and choices.trained:
        problems.append("No picture is held out, because those that were drawn are chosen to be trained on: the curve shows "
                        "training pictures only.")
    return problems


def _names(found: object, key: str) -> frozenset[str]:
    """One of the lists in a file of choices; raises ValueError."""
    names = found.get(key, []) if isinstance(found, dict) else None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError("it does not hold two lists of names, held_out and trained")
    return frozenset(map(_name, names))


def _name(path: str) -> str:
    """`name_of` a path in the dataset's folder; accents are written in one way."""
    above, slash, name = unicodedata.normalize("NFC", path).rpartition("/")
    found = repeats_and_name(above)
    return f"{found[1] if found else above}{slash}{name}"


def _crop(example: Example, value: int) -> HeldOutImage:
    """A mirrored crop whose place the hash says."""
    left, top = ((1 - _SIDE) * (value >> shift & 0xFFFF) / 0xFFFF for shift in (0, 16))
    return HeldOutImage(example, (left, top, left + _SIDE, top + _SIDE), mirrored=True)


def _hash(name: str, seed: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}\0{name}".encode("utf-8", "surrogatepass")).digest()[:8], "big")


def _folder(name: str) -> str:
    return name.rpartition("/")[0]
