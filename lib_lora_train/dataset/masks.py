"""Masks and conditioning images that lie with a dataset's images, ours and those of other trainers. They are never learnt from;
a mask says what of its image is (masked loss).

    masks/a.png, mask/a.png     in the image's folder or above it; the studio's, and kohya's conditioning_data_dir
    a-masklabel.png             OneTrainer's mask; white is learnt, as in ours
    a-condlabel.png             OneTrainer's conditioning image, of no use here
    a-mask.png, a_mask.png      only beside an image of the name a

Beside these a folder may be named that holds masks under their images' names, and an image's transparency may be its mask.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Literal

from PIL import Image, ImageStat

from lib_lora_train.dataset.examples import Dataset, Masked
from lib_lora_train.dataset.images import decode_image, is_image_name, may_be_transparent, read_image
from lib_lora_train.dataset.listing import MayRead, list_folder
from lib_lora_train.errors import DatasetError, counted, some_of
from lib_lora_train.settings import named

MASKS_FOLDER = "masks"  # where the studio keeps them
_FOLDERS = (MASKS_FOLDER, "mask")
_SUFFIXES: dict[str, Literal["mask", "conditioning"]] = {
    "-masklabel": "mask", "-condlabel": "conditioning", "-mask": "mask", "_mask": "mask"}
_LOOKED_AT = 8  # masks whose area is measured for a plan
USED = f"Masks count where {named('masked_loss')} is on: what is white in them is learnt."
CONDITIONING = "It is another trainer's conditioning picture, which is of no use here."


def is_masks_folder(name: str) -> bool:
    """Whether a folder of this name holds masks and no images to learn from."""
    return name.casefold() in _FOLDERS


def mask_of(image: Path, folder: Path) -> Path | None:
    """The mask of an image of the dataset in `folder`, None where it has none: in the folder `masks` beside it or above it, or
    beside it."""
    places = [parent / name / f"{image.stem}.png" for parent in (image.parent, folder) for name in _FOLDERS]
    beside = [image.with_name(f"{image.stem}{suffix}.png") for suffix, kind in _SUFFIXES.items() if kind == "mask"]
    return next((path for path in [*places, *beside] if path.is_file()), None)


def masks_of(dataset: Dataset, *, may_read: MayRead | None = None) -> dict[Masked, Path]:
    """{`Example.masked`: its mask} of the images to learn from that have one, by the settings of their folders: with
    masked_loss in conditioning_data_dir or with the images, with alpha_mask the image itself where it may be transparent. What
    may not be read is left out. Raises DatasetError where there is no such folder."""
    found, named_alike = dict[Masked, Path](), dict[str, dict[str, Path]]()
    for example in (example for example in dataset.examples if not example.is_regularisation):
        image, chosen, mask = example.path, example.subset.masks, None
        if chosen.masked_loss:
            if (folder := chosen.conditioning_data_dir) not in named_alike:
                named_alike[folder] = _by_stem(dataset.folder, folder, may_read) if folder else {}
            mask = named_alike[folder].get(image.stem) or mask_of(image, dataset.folder)
        if mask is None and chosen.alpha_mask and may_be_transparent(image):
            mask = image
        if mask is not None and (may_read is None or may_read(mask)):
            found[example.masked] = mask
    return found


def _by_stem(dataset: Path, folder: str, may_read: MayRead | None) -> dict[str, Path]:
    """The images of a folder, seen from that of the dataset where it is there, by their names."""
    path = dataset / folder if (dataset / folder).is_dir() else Path(folder)
    if may_read is not None and not may_read(path):
        raise DatasetError(f"The mask folder {path} cannot be used", why="others can reach this page, so it keeps to the "
                           "folders it is allowed", remedy=f"change {named('conditioning_data_dir')}")
    return {file.stem: file for file in list_folder(path, what="mask", may_read=may_read).files if is_image_name(file)}


def read_mask(image: Path, mask: Path) -> Image.Image:
    """The mask of an upright image, mode L, white where it is learnt: of an image that is its own mask, how much of each pixel
    is there. Raises DatasetError."""
    if mask != image:
        return read_image(mask).getchannel("R")  # as sd-scripts
    decoded = decode_image(image)
    return decoded.alpha or Image.new("L", decoded.image.size, 255)


def white_share(masks: Mapping[Masked, Path]) -> float:
    """The share of these images that their masks let be learnt, by at most eight of them."""
    items = sorted({(image, mask) for (image, _), mask in masks.items()})
    shares = []
    for image, mask in items[::max(1, -(-len(items) // _LOOKED_AT))]:
        with contextlib.suppress(DatasetError, OSError):  # told when it is read to be used
            shares.append(_white_share(image, mask, mask.stat().st_mtime_ns))
    return sum(shares) / len(shares) if shares else 1.0


@lru_cache(maxsize=256)  # the page asks at every change
def _white_share(image: Path, mask: Path, changed: int) -> float:
    return ImageStat.Stat(read_mask(image, mask)).mean[0] / 255


def companion(stem: str, stems: Collection[str]) -> tuple[Literal["mask", "conditioning"], str] | None:
    """What the image file called `stem` is, and of which image's stem; None for an image to learn from.

    `stems` are those of the image files in its folder, in lower case (`casefold`).
    """
    for suffix, kind in _SUFFIXES.items():
        of = stem[:-len(suffix)]
        # By itself an image may be called like `who-mask`.
        if stem.casefold().endswith(suffix) and of and (suffix.endswith("label") or of.casefold() in stems):
            return kind, of
    return None


class Companions:
    """Takes masks and conditioning images out of what a dataset's folders hold, and says so at the end."""

    def __init__(self) -> None:
        self._masks: list[str] = []
        self._conditioning: list[str] = []

    def images(self, files: Sequence[Path], folders: Sequence[Path] = ()) -> list[Path]:
        """The images to learn from among the `files` of one folder; `folders` are those in it."""
        found = [file for file in files if is_image_name(file)]
        stems = {file.stem.casefold() for file in found}
        kinds = [(companion(file.stem, stems) or ("",))[0] for file in found]
        self._masks += [file.name for file, kind in zip(found, kinds, strict=True) if kind == "mask"]
        self._conditioning += [file.name for file, kind in zip(found, kinds, strict=True) if kind == "conditioning"]
        self._masks += [f"{folder.name}/{name}" for folder in folders if is_masks_folder(folder.name)
                        for name in image_names(folder)]
        return [file for file, kind in zip(found, kinds, strict=True) if not kind]

    def sentences(self) -> list[str]:
        """What was taken out, one sentence a kind."""
        return [f"{counted(len(names), what)} ({some_of(names)}) "
                f"{'is not taken as a picture' if len(names) == 1 else 'are not taken as pictures'}. {why}"
                for names, what, why in (
                    (self._masks, "mask", USED), (self._conditioning, "conditioning picture", "Nothing uses it here."))
                if names]


def image_names(folder: Path) -> list[str]:
    """Names of the image files in a folder; [] where it cannot be read."""
    try:
        return sorted(path.name for path in folder.iterdir() if is_image_name(path))
    except OSError:
        return []  # only asked to word a message about what is not used
