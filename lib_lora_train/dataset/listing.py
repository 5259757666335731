"""The files and folders in a folder and below it, by name, and kohya's N_name folders among them."""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from lib_lora_train.errors import DatasetError
from lib_lora_train.settings import DECLARATIONS

MayRead = Callable[[Path], bool]
MOST_REPEATS = int(DECLARATIONS["num_repeats"].maximum)
MOST_DEPTH, MOST_FOLDERS = 16, 5_000  # of a tree; beyond, somebody has chosen a whole disk
_REPEATS_AND_NAME = re.compile(r"(\d+)_(.*)")
# What Windows, macOS and network drives (Synology, QNAP) keep beside files: bins, snapshots, thumbnails.
_OF_THE_SYSTEM = frozenset((
    "__macosx", "$recycle.bin", "recycler", "system volume information", "lost+found", "#recycle", "#snapshot", "@eadir",
    "@tmp", "@recycle", "@recently-snapshot", "@__thumb"))


class Listing(NamedTuple):
    """What a folder holds, by name: `refused` are folders and links that may not be read, `dead` are links to nothing.
    Hidden folders and those of the system are left out."""

    files: list[Path]
    folders: list[Path]
    refused: list[Path]
    dead: list[Path]


def list_folder(folder: Path, *, what: str = "dataset", may_read: MayRead | None = None) -> Listing:
    """List `folder`. `may_read` is asked about folders and links, which may lead elsewhere; `what` completes "The … folder".

    Raises DatasetError if the folder is missing, a file, or cannot be read.
    """
    found = Listing([], [], [], [])
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                path = folder / entry.name
                try:
                    is_folder, is_file = entry.is_dir(), entry.is_file()
                except OSError:  # links in a circle
                    is_folder = is_file = False
                dead = entry.is_symlink() and not os.path.exists(path)
                if not (is_folder or is_file or dead) or is_folder and is_of_the_system(entry.name):
                    continue
                refused = may_read is not None and (is_folder or entry.is_symlink()) and not may_read(path)
                (found.refused if refused else found.dead if dead else found.folders if is_folder else found.files).append(path)
    except NotADirectoryError as error:
        raise DatasetError(f"{folder} is a file", remedy=f"choose the {what} folder that holds the pictures") from error
    except (FileNotFoundError, ValueError) as error:  # ValueError: a name that no file can have
        raise DatasetError(f"The {what} folder {folder} does not exist", remedy="check the path") from error
    except OSError as error:
        raise DatasetError(f"The {what} folder {folder} cannot be read", why=error.strerror or str(error),
                           remedy="check that you may read it") from error
    return Listing(*(sorted(paths, key=by_name) for paths in found))


def list_tree(folder: Path, *, may_read: MayRead | None = None) -> list[tuple[tuple[str, ...], Listing]]:
    """(names on the way to it, what it holds) of `folder` and all folders below it, each before those in it.

    None comes twice, by whatever links it is reached; one that cannot be read, or lies too deep, is `refused` where it lies.
    Arguments and errors as for `list_folder`.
    """
    found, seen, waiting = [], set(), [((), folder, [])]
    while waiting:
        parts, path, refused = waiting.pop()
        try:
            if len(parts) > MOST_DEPTH or len(found) == MOST_FOLDERS:
                raise DatasetError(f"{path} lies too deep")
            listing = list_folder(path, may_read=may_read)
        except DatasetError:
            if not parts:
                raise
            refused.append(path)
            continue
        if (real := os.path.realpath(path)) not in seen:
            seen.add(real)
            found.append((parts, listing))
            waiting += [((*parts, below.name), below, listing.refused) for below in reversed(listing.folders)]
    return found


def is_of_the_system(folder_name: str) -> bool:
    """Whether a folder of this name holds nothing of the user's: hidden ones, bins, thumbnails that a drive makes."""
    return folder_name.startswith(".") or folder_name.casefold() in _OF_THE_SYSTEM


def file_key(stem: str) -> str:
    """What two names share that some system treats as one: regardless of case and of how accents are written."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", stem).casefold())


def by_name(path: Path) -> tuple[str, str]:
    """The order of images: by name without regard to case, the same on every system."""
    return path.name.casefold(), path.name


def repeats_and_name(folder_name: str) -> tuple[int, str] | None:
    """(10, "name") of a folder called "10_name"; None for other names."""
    match = _REPEATS_AND_NAME.fullmatch(folder_name)
    return (int(match[1]), match[2]) if match else None


def is_subset_name(folder_name: str) -> bool:
    """Whether training reads images from a folder of this name; a date such as 20240101_holiday is no number of repeats."""
    found = repeats_and_name(folder_name)
    return found is not None and 1 <= found[0] <= MOST_REPEATS
