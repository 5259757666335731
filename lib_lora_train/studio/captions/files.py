"""Which images and captions a folder holds, as the caption store sees them, and what one caption file holds.

The folders are those that training would use (`dataset/folder.py`): kohya's N_name folders, or else the folder itself.
Unlike there, nothing is decoded, and a folder without an image is no error: images may still be brought in.
"""

from __future__ import annotations

import re
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from lib_lora_train.dataset.caption_files import find_captions
from lib_lora_train.dataset.captions import first_line_and_rest, normal_form
from lib_lora_train.dataset.listing import MayRead, is_subset_name, list_folder
from lib_lora_train.dataset.masks import Companions
from lib_lora_train.dataset.text_files import CAPTION_SUFFIXES, MOST_BYTES, read_text
from lib_lora_train.errors import DatasetError, printable

# Line ends of every kind, and what no text file should hold.
_NO_TEXT = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]+")


class OnDisk(NamedTuple):
    """What a caption file held when it was last looked at."""

    text: str | None  # all of it, stripped; None: there is no such file, or none that can be read
    problem: str = ""  # why it cannot be read, one sentence
    stamp: tuple[int, int] = (0, 0)  # (bytes, modification time) of a file that cannot be read
    encoding: str = ""  # where it is not UTF-8

    @property
    def caption(self) -> str | None:
        """The line that training uses; None where the file cannot be read."""
        if self.text is None:
            return None if self.problem else ""
        return first_line_and_rest(self.text)[0]

    @property
    def rest(self) -> str:
        """What follows that line. Training does not use it; it stays in the file."""
        return first_line_and_rest(self.text or "")[1]


NO_FILE = OnDisk(None)


@dataclass(frozen=True)
class Found:
    """An image, the file of its caption (which may not exist yet), and caption files of the same name that do not count."""

    image: Path
    caption: Path
    passed_over: tuple[Path, ...] = ()
    inherited: str = ""  # the caption that a JSON file gives, where that file of its own does not exist


def find_images(folder: Path, *, may_read: MayRead | None = None) -> list[Found]:
    """The images that training would use, by name. `may_read` is asked about folders and links, which may lead elsewhere.
    Raises DatasetError if the folder is missing or cannot be read."""
    listing = list_folder(folder, may_read=may_read)
    found = [entry for path in listing.folders if is_subset_name(path.name)
             for entry in _paired(list_folder(path, may_read=may_read).files, above=listing.files)]
    return found or _paired(listing.files)


def is_forbidden(path: Path, may_read: MayRead | None) -> bool:
    """Whether `path` is a link to where nothing may be read."""
    return may_read is not None and path.is_symlink() and not may_read(path)


def read_on_disk(path: Path, *, may_read: MayRead | None = None) -> OnDisk:
    """What a caption file holds now. Never raises: a file that cannot be read is a problem of this one caption."""
    if is_forbidden(path, may_read):
        return OnDisk(None, printable(f"The caption file {path.name} is a link to a folder that is not allowed."))
    try:
        facts = path.stat()
    except FileNotFoundError:
        return NO_FILE
    except OSError as error:
        return OnDisk(None, printable(f"The caption file {path.name} cannot be read: {error.strerror or error}."))
    stamp = (facts.st_size, facts.st_mtime_ns)
    if not stat.S_ISREG(facts.st_mode):  # a pipe would be waited for
        return OnDisk(None, printable(f"The caption file {path.name} cannot be read: it is no file."), stamp)
    if facts.st_size > MOST_BYTES:
        return OnDisk(None, printable(f"The file {path.name} is too large for a caption ({facts.st_size >> 20} MiB)."), stamp)
    try:
        text, encoding = read_text(path)
        return OnDisk(normal_form(text).strip(), encoding=encoding)
    except DatasetError as error:
        return OnDisk(None, str(error), stamp)


def one_line(text: str) -> str:
    """`text` as one line that UTF-8 can hold: line breaks and control characters become a space."""
    return _NO_TEXT.sub(" ", normal_form(printable(text))).strip()


def _paired(files: Sequence[Path], *, above: Sequence[Path] = ()) -> list[Found]:
    images = Companions().images(files)
    captions = find_captions(images, files, above=above)
    result = []
    for image in images:
        own = captions.files.get(image.name, ())
        texts = [file for file in own if file.suffix.lower() in CAPTION_SUFFIXES]
        found = captions.of(image) if image.name in captions.listed or len(own) > 1 or len(own) > len(texts) else None
        # Another program's JSON file is never written.
        file = found.file if found and found.file in texts else (*texts, image.with_suffix(CAPTION_SUFFIXES[0]))[0]
        result.append(Found(image, file, found.passed_over, found.line) if found else Found(image, file))
    return result
