"""Masks and conditioning images that lie with a dataset's images, ours and those of other trainers. They are never learnt from.

    masks/a.png, mask/a.png     in the image's folder or above it; the studio's, and kohya's conditioning_data_dir
    a-masklabel.png             OneTrainer's mask; white is learnt, as in ours
    a-condlabel.png             OneTrainer's conditioning image, of no use here
    a-mask.png, a_mask.png      only beside an image of the name a
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Literal

from lib_lora_train.dataset.images import is_image_name
from lib_lora_train.errors import counted, some_of

MASKS_FOLDER = "masks"  # where the studio keeps them
_FOLDERS = (MASKS_FOLDER, "mask")
_SUFFIXES: dict[str, Literal["mask", "conditioning"]] = {
    "-masklabel": "mask", "-condlabel": "conditioning", "-mask": "mask", "_mask": "mask"}
UNUSED = "Training does not use masks yet: all of a picture is learnt."
CONDITIONING = "It is another trainer's conditioning picture, which is of no use here."


def is_masks_folder(name: str) -> bool:
    """Whether a folder of this name holds masks and no images to learn from."""
    return name.casefold() in _FOLDERS


def mask_of(image: Path, folder: Path) -> Path | None:
    """The mask of an image of the dataset in `folder`, None where it has none: in the folder `masks` beside it or above it, or
    OneTrainer's beside it."""
    places = [parent / name / f"{image.stem}.png" for parent in (image.parent, folder) for name in _FOLDERS]
    return next((path for path in [*places, image.with_name(f"{image.stem}-masklabel.png")] if path.is_file()), None)


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
        return [f"{counted(len(names), what)} ({some_of(names)}) {'is' if len(names) == 1 else 'are'} not taken as "
                f"{'a picture' if len(names) == 1 else 'pictures'}. {why}" for names, what, why in (
                    (self._masks, "mask", UNUSED), (self._conditioning, "conditioning picture", "Nothing uses it here."))
                if names]


def image_names(folder: Path) -> list[str]:
    """Names of the image files in a folder; [] where it cannot be read."""
    try:
        return sorted(path.name for path in folder.iterdir() if is_image_name(path))
    except OSError:
        return []  # only asked to word a message about what is not used
