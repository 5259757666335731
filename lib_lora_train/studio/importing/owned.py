"""A dataset folder that this program owns, in kohya's layout.

    <name>/dataset.json                     concept, and where each image came from and how it was shaped
           10_<concept>/a.png  a.txt        images as they will be trained, and their captions
           masks/a.png                      what of an image is learnt (white), where not all of it is
           .studio/unshaped/a.png           the image as it was imported, once it was shaped; its mask in masks/
           .studio/removed/a.png  a.txt     what was removed and can be restored

The images and captions are the truth: dataset.json only adds to them, and a dataset without it, or with a damaged one,
loses nothing but those notes. Its users are one at a time: two that write at once are not kept apart.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lib_lora_train.dataset.images import is_image_name
from lib_lora_train.dataset.listing import MOST_REPEATS, by_name, is_subset_name, repeats_and_name
from lib_lora_train.dataset.masks import MASKS_FOLDER
from lib_lora_train.dataset.text_files import CAPTION_SUFFIXES
from lib_lora_train.errors import DatasetError, counted, plain_line, translated
from lib_lora_train.storage.atomic import remove_parts, write_atomic
from lib_lora_train.studio.captions.save import STUDIO_FOLDER
from lib_lora_train.studio.importing.names import file_key, safe_stem

VERSION = 1
FILE_NAME = "dataset.json"
DEFAULT_REPEATS = 10
_MOST_BYTES = 256 << 20  # of dataset.json; one image takes about 200

Note = dict[str, Any]  # what dataset.json says of one image


class OwnedDataset:
    """One dataset folder. Made by `create` or `open`; paths it gives are made from `folder` as it was given."""

    def __init__(self, folder: Path, *, concept: str, numbered: str) -> None:
        self.folder, self.concept, self._numbered = folder, concept, numbered

    @classmethod
    def create(cls, datasets_folder: Path, name: str, *, concept: str = "", repeats: int = DEFAULT_REPEATS) -> OwnedDataset:
        """A new, empty dataset below `datasets_folder`, which is made where it is missing.

        `name` is made safe; `concept`, one line, is what the images show (by default the name). Raises DatasetError if
        there is something of that name, compared without regard to case, or if the disk refuses.
        """
        stem, concept = safe_stem(name, otherwise=""), plain_line(concept)
        if not stem:
            raise DatasetError("The dataset has no name", remedy="write a plain name such as my_character")
        _check_repeats(repeats)
        concept = concept or stem
        with translated(f"the dataset {stem} was made"):
            datasets_folder.mkdir(parents=True, exist_ok=True)
            if any(file_key(entry.name) == file_key(stem) for entry in datasets_folder.iterdir()):
                raise DatasetError(f"There is a dataset called {stem!r} already", why=f"{datasets_folder / stem} exists",
                                   remedy="choose another name or open it")
            numbered = f"{repeats}_{_folder_text(concept)}"
            (datasets_folder / stem / numbered).mkdir(parents=True)
            dataset = cls(datasets_folder / stem, concept=concept, numbered=numbered)
            dataset._write({"version": VERSION, "concept": concept, "pictures": {}})
        return dataset

    @classmethod
    def open(cls, folder: Path) -> OwnedDataset:
        """The dataset in `folder`. Raises DatasetError if it holds none, or one of a newer version."""
        if not (folder / FILE_NAME).is_file():
            raise DatasetError(f"{folder} is not a dataset of the studio", why=f"there is no {FILE_NAME} in it",
                               remedy="make a new dataset and import its pictures")
        with translated(f"the dataset {folder.name} was opened"):
            kept = _read(folder / FILE_NAME)
            concept, numbered = kept.get("concept"), _numbered_folders(folder)
            wanted = _folder_text(concept) if isinstance(concept, str) else None
            fitting = [name for name in numbered if repeats_and_name(name)[1] == wanted] or numbered
            if not fitting:
                fitting = [f"{DEFAULT_REPEATS}_{wanted or _folder_text(folder.name)}"]
                (folder / fitting[0]).mkdir()
            if not isinstance(concept, str):  # a damaged file: the folder's name says it too
                concept = repeats_and_name(fitting[0])[1]
            return cls(folder, concept=plain_line(concept), numbered=fitting[0])

    # ---- where things are

    @property
    def name(self) -> str:
        """The dataset's name: that of its folder."""
        return self.folder.name

    @property
    def repeats(self) -> int:
        """How often each image is shown in an epoch: the number in front of the folder's name."""
        return repeats_and_name(self._numbered)[0]

    @property
    def images_folder(self) -> Path:
        """The N_concept folder. It gets another name with `set_repeats`."""
        return self.folder / self._numbered

    @property
    def masks_folder(self) -> Path:
        """Where masks are; there only once one was written. kohya's trainer takes it as conditioning_data_dir."""
        return self.folder / MASKS_FOLDER

    @property
    def studio_folder(self) -> Path:
        """What only this program needs; other tools pass over it."""
        return self.folder / STUDIO_FOLDER

    @property
    def unshaped_folder(self) -> Path:
        """Images as they were imported, once they were shaped; their masks in `masks` below it."""
        return self.studio_folder / "unshaped"

    @property
    def images(self) -> tuple[Path, ...]:
        """The images by name; read from the disk at each call."""
        with translated(f"the pictures of {self.name} were listed"):
            found = [path for path in self.images_folder.iterdir() if is_image_name(path) and path.is_file()]
        return tuple(sorted(found, key=by_name))

    def image(self, name: str) -> Path:
        """The image called `name` ("a.png"). Raises DatasetError if there is none; a path is not accepted as a name."""
        path = self.images_folder / name
        if name != path.name or not is_image_name(path) or not path.is_file():
            raise DatasetError(f"There is no picture {name!r} in {self.name}")
        return path

    def mask_path(self, name: str) -> Path:
        """Where the mask of the image `name` is, if it has one."""
        return self.masks_folder / f"{Path(name).stem}.png"

    def unshaped_path(self, name: str) -> Path:
        """Where the image is kept as it was imported, once it was shaped."""
        return self.unshaped_folder / name

    def unshaped_mask_path(self, name: str) -> Path:
        """Where its mask is kept as it was then."""
        return self.unshaped_folder / MASKS_FOLDER / f"{Path(name).stem}.png"

    def taken_stems(self) -> set[str]:
        """Stems that a new image must not get: of images, of what was removed and could come back, and of captions and
        masks without an image, which it would otherwise inherit."""
        folders = (self.images_folder, self.masks_folder, self.unshaped_folder, self.studio_folder / "removed")
        return {path.stem for folder in folders for path in _entries(folder)}

    def remove_parts(self) -> None:
        """Clear away what a killed process left half-written, before many files are written."""
        for folder in (self.images_folder, self.masks_folder, self.unshaped_folder, self.unshaped_folder / MASKS_FOLDER):
            remove_parts(folder)

    # ---- notes

    def notes(self) -> dict[str, Note]:
        """What dataset.json says of each image: {"a.png": {"source": …, "sha256": …, "shaped": …}}; {} if damaged."""
        with translated(f"the notes of {self.name} were read"):
            return _notes(_read(self.folder / FILE_NAME))

    def write_notes(self, changes: Mapping[str, Note | None]) -> None:
        """Replace the notes of these images (None: forget them) in one step; the others stay."""
        with translated(f"the notes of {self.name} were written"):
            kept = _read(self.folder / FILE_NAME)
            notes = _notes(kept)
            for name, note in changes.items():
                if note is None:
                    notes.pop(name, None)
                else:
                    notes[name] = note
            self._write({**kept, "version": VERSION, "concept": self.concept, "pictures": notes})

    def _write(self, data: Mapping[str, Any]) -> None:
        write_atomic(self.folder / FILE_NAME, json.dumps(data, ensure_ascii=False, indent=1).encode("utf-8", "replace"))

    # ---- changes

    def set_repeats(self, repeats: int) -> None:
        """Show each image `repeats` times an epoch: the folder gets its new name in one step.

        Paths of images change with it. Raises DatasetError if the number is none of 1 to the most there may be, or if a
        program keeps the folder open (Windows).
        """
        _check_repeats(repeats)
        self._rename(f"{repeats}_{_folder_text(self.concept)}", concept=self.concept)

    def set_concept(self, concept: str) -> None:
        """Say anew what the images show: the folder is renamed. Raises DatasetError as `set_repeats`."""
        concept = plain_line(concept) or self.name
        self._rename(f"{self.repeats}_{_folder_text(concept)}", concept=concept)

    def _rename(self, numbered: str, *, concept: str) -> None:
        with translated(f"the pictures' folder of {self.name} was renamed"):
            if numbered != self._numbered:
                target = self.folder / numbered
                if target.is_dir() and not target.samefile(self.images_folder):  # the same: another case of one name
                    if any(target.iterdir()):
                        raise DatasetError(f"The folder {target} is there already", remedy="move its pictures elsewhere")
                    target.rmdir()
                self.images_folder.rename(target)
                self._numbered = numbered
            if concept != self.concept:
                self.concept = concept
                self.write_notes({})

    def remove(self, names: Sequence[str]) -> tuple[str, ...]:
        """Take images out, with captions and masks, so that `restore` can bring them back; the names that were there.

        The image goes first: killed in between, its caption stays beside where it was, and `restore` brings both back.
        Raises DatasetError if the disk refuses; what was moved before that stays moved.
        """
        return self._move(names, back=False)

    def restore(self, names: Sequence[str]) -> tuple[str, ...]:
        """Bring removed images back, with captions and masks; the names that came back. Errors as `remove`."""
        return self._move(names, back=True)

    def _places(self, name: str) -> list[tuple[Path, Path]]:
        """(where it is, where it goes when removed) of everything that belongs to an image, the image first."""
        stem, away = Path(name).stem, self.studio_folder / "removed"
        return [(self.images_folder / name, away / name),
                *((self.images_folder / f"{stem}{suffix}", away / f"{stem}{suffix}") for suffix in CAPTION_SUFFIXES),
                (self.mask_path(name), away / MASKS_FOLDER / f"{stem}.png"),
                (self.unshaped_path(name), away / "unshaped" / name),
                (self.unshaped_mask_path(name), away / "unshaped" / MASKS_FOLDER / f"{stem}.png")]

    def _move(self, names: Sequence[str], *, back: bool) -> tuple[str, ...]:
        moved = []
        with translated(f"pictures of {self.name} were moved"):
            for name in names:
                if name != Path(name).name or not is_image_name(Path(name)):
                    raise DatasetError(f"There is no picture {name!r} in {self.name}")
                places = self._places(name)
                # Back, the image comes last, so that it is never there without its caption.
                moves = [(there, here) for here, there in reversed(places)] if back else places
                old, new = moves[-1 if back else 0]
                if not old.is_file():
                    continue
                if new.exists():
                    raise DatasetError(f"The picture {name} cannot be moved", why=f"{new} is there already",
                                       remedy="rename one of the two")
                for old, new in moves:
                    if old.is_file():
                        new.parent.mkdir(parents=True, exist_ok=True)
                        os.replace(old, new)
                moved.append(name)
        return tuple(moved)


def list_datasets(datasets_folder: Path) -> list[tuple[str, int]]:
    """(name, images) of each dataset below `datasets_folder`, by name; [] where the folder is not there."""
    return [(entry.name, sum(is_image_name(path) for name in _numbered_folders(entry) for path in _entries(entry / name)))
            for entry in sorted(_entries(datasets_folder), key=by_name)
            if (entry / FILE_NAME).is_file()]


def _folder_text(concept: str) -> str:
    return safe_stem(concept, otherwise="pictures")


def _numbered_folders(folder: Path) -> list[str]:
    """Those that training reads; a date such as 20240101_holiday is none."""
    return sorted(path.name for path in _entries(folder) if is_subset_name(path.name) and path.is_dir())


def _entries(folder: Path) -> Iterable[Path]:
    try:
        return list(folder.iterdir())
    except OSError:
        return []  # not there, or not for us: then there is nothing in it that counts


def _notes(kept: Mapping[str, Any]) -> dict[str, Note]:
    images = kept.get("pictures")
    return {name: note for name, note in images.items() if isinstance(note, dict)} if isinstance(images, dict) else {}


def _read(path: Path) -> dict[str, Any]:
    """What the file says; {} if it is damaged, because the images are worth more than the notes on them."""
    try:
        if path.stat().st_size > _MOST_BYTES:
            return {}
        kept = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError, RecursionError):
        return {}
    if not isinstance(kept, dict):
        return {}
    version = kept.get("version", VERSION)
    if isinstance(version, int) and version > VERSION:
        raise DatasetError(f"The dataset {path.parent} was made by a newer version of this program",
                           remedy="update the extension")
    return kept


def _check_repeats(repeats: int) -> None:
    if not 1 <= repeats <= MOST_REPEATS:
        raise DatasetError(f"{counted(repeats, 'repeat is', 'repeats are')} not possible", remedy=f"choose 1 to {MOST_REPEATS}")
