"""Zip files from any source: what is in them, one entry at a time, in bounded time, memory and disk.

No name inside an archive is ever used as a path. Limits are on what really comes out, because what the archive says of
itself may be a lie. Not covered: other kinds of archives, archives inside archives, passwords.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import stat
import struct
import unicodedata
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from lib_lora_train.dataset.images import MAX_BYTES
from lib_lora_train.dataset.listing import is_of_the_system
from lib_lora_train.errors import DatasetError, plain_line

# What zipfile and its decompressors were seen to raise on damaged input.
_ZIP_ERRORS = (zipfile.BadZipFile, zipfile.LargeZipFile, zlib.error, OSError, EOFError, ValueError, RuntimeError, LookupError,
               struct.error, TypeError, OverflowError, NotImplementedError)
# LZMA is left out: a few bytes make it take gigabytes of memory for its dictionary.
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2)
_ENCRYPTED = 0x1
_UTF8 = 0x800
_CHUNK = 1 << 20
_MOST_DIRECTORY = 16 << 20
"""Bytes that zipfile may read at once: the archive's list of contents, which it reads before any limit can be checked."""

# What one archive may hold.
MOST_ENTRIES = 20_000
MOST_ENTRY_BYTES = MAX_BYTES
MOST_BYTES = 32 << 30  # of all entries unpacked, one after the other
MOST_EXPANSION = 100  # how many times the archive's own size; images hardly pack
ALWAYS_BYTES = 2 << 30  # so much may come out of a small one too


@dataclasses.dataclass(frozen=True)
class Entry:
    """One file in an archive. `folder` and `name` are only words: they were never a path."""

    folder: tuple[str, ...]
    name: str
    bytes: int  # as the archive says
    info: zipfile.ZipInfo = dataclasses.field(repr=False)

    @property
    def label(self) -> str:
        """How to name it to the user."""
        return plain_line("/".join([*self.folder, self.name]))


class Archive:
    """An opened zip file; `with open_archive(path) as archive`."""

    def __init__(self, packed: zipfile.ZipFile, path: Path) -> None:
        self._packed, self._path = packed, path
        self._total = self._left = min(MOST_BYTES, max(ALWAYS_BYTES, MOST_EXPANSION * path.stat().st_size))

    @property
    def exhausted(self) -> bool:
        """Whether more came out than may; nothing more will."""
        return self._left < 0

    def entries(self) -> tuple[Entry, ...]:
        """Everything that is a file, in the archive's order, without hidden ones. Raises DatasetError for too many."""
        infos = self._packed.infolist()
        if len(infos) > MOST_ENTRIES:
            raise DatasetError(f"The archive {self._path.name} is refused", why=f"it holds {len(infos)} files, more than "
                               f"{MOST_ENTRIES}", remedy="unpack it and choose the folder")
        return tuple(entry for info in infos if (entry := _entry(info)) is not None)

    def refusal(self, entry: Entry) -> str:
        """Why an entry will not be unpacked; "" if it will."""
        if stat.S_ISLNK(entry.info.external_attr >> 16):
            return "it is a link to another file"
        if entry.info.flag_bits & _ENCRYPTED:
            return "it is locked with a password; unpack the archive and choose the folder"
        if entry.info.compress_type not in _METHODS:
            return "it is packed in a way that is not read here; unpack the archive and choose the folder"
        if entry.bytes > MOST_ENTRY_BYTES:
            return f"it is enormous ({entry.bytes >> 20} MiB unpacked, the limit is {MOST_ENTRY_BYTES >> 20})"
        return ""

    def copy(self, entry: Entry, file: IO[bytes]) -> None:
        """Write the entry's contents to `file`. Raises DatasetError for `refusal`, damage, and more than may come out."""
        what = f"{entry.label} in {self._path.name} cannot be used"
        if why := self.refusal(entry):
            raise DatasetError(what, why=why)
        left = min(MOST_ENTRY_BYTES, self._left)
        with _damage(what), self._packed.open(entry.info) as packed:
            while chunk := packed.read(_CHUNK):
                left -= len(chunk)
                self._left -= len(chunk)
                if left < 0:
                    raise DatasetError(what, why=f"it unpacks to more than {MOST_ENTRY_BYTES >> 20} MiB"
                                       if self._left >= 0 else "the archive unpacks to more than "
                                       f"{self._total >> 20} MiB in all")
                file.write(chunk)


@contextlib.contextmanager
def open_archive(path: Path) -> Iterator[Archive]:
    """The zip file at `path`, open inside the block. Raises DatasetError if it is none, or damaged."""
    what = f"The archive {path.name} cannot be used"
    with contextlib.ExitStack() as stack:
        with _damage(what):
            packed = stack.enter_context(zipfile.ZipFile(stack.enter_context(_Bounded(path))))
            archive = Archive(packed, path)
        yield archive


class _Bounded(io.FileIO):
    """A file that refuses to read very much at once."""

    def read(self, size: int = -1) -> bytes:
        if size > _MOST_DIRECTORY:
            raise zipfile.BadZipFile("its list of contents is enormous")
        return super().read(size if size >= 0 else _MOST_DIRECTORY)


@contextlib.contextmanager
def _damage(what: str) -> Iterator[None]:
    try:
        yield
    except DatasetError:
        raise
    except (MemoryError, *_ZIP_ERRORS) as error:
        why, remedy = _reason(error)
        raise DatasetError(what, why=why, remedy=remedy) from error


def _reason(error: BaseException) -> tuple[str, str]:
    """(why an archive cannot be used, what to do)."""
    if isinstance(error, FileNotFoundError):
        return "the file is gone", ""
    if isinstance(error, PermissionError):
        return "access was denied", ""
    if isinstance(error, MemoryError):
        return "there is not enough memory to unpack it", ""
    if isinstance(error, UnicodeDecodeError):
        return "a name in it is not the text that it says it is", "unpack it and choose the folder"
    return f"it is damaged or no zip file ({error})", ""


def _entry(info: zipfile.ZipInfo) -> Entry | None:
    """The entry with its name in words; None for a folder, and for what is hidden, as the shadows macOS packs beside files."""
    # Not info.filename: it has lost what stood behind a NUL already.
    name = _decoded(info).replace("\\", "/")
    parts = [part for part in name.split("/") if part not in ("", ".", "..")]
    if not parts or name.endswith("/") or any(map(is_of_the_system, parts)):
        return None
    return Entry(tuple(parts[:-1]), parts[-1], info.file_size, info)


def _decoded(info: zipfile.ZipInfo) -> str:
    """The name as its author saw it. Without the flag for UTF-8 the format leaves open what the bytes mean.

    zipfile reads those as DOS did (cp437). Many are UTF-8 all the same; Japanese Windows writes its own code (cp932).
    """
    name = info.orig_filename
    if info.flag_bits & _UTF8:
        return name
    try:
        raw = name.encode("cp437")
    except UnicodeEncodeError:
        return name
    for encoding in ("utf-8", "cp932"):
        with contextlib.suppress(UnicodeDecodeError):
            text = raw.decode(encoding)
            if encoding == "utf-8" or _is_japanese(text):
                return text
    return name


def _is_japanese(text: str) -> bool:
    """Whether what is not ASCII is kana and kanji throughout: accented letters read as cp932 give other signs too."""
    foreign = [letter for letter in text if letter > "\x7f"]
    return len(foreign) > 1 and all(
        unicodedata.name(letter, "").startswith(("HIRAGANA", "KATAKANA", "CJK", "IDEOGRAPHIC", "HALFWIDTH KATAKANA"))
        for letter in foreign)
