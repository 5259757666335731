"""Captions onto the disk, all of them or none, whatever ends the process in between.

    1. a backup of the captions that will be replaced, as they are: .studio/backup/captions-….zip
    2. the journal, .studio/captions.journal: every new caption, and the checksum of what the file held before
    3. every new caption atomically, and flushed to the disk
    4. the journal is removed

A process killed before 2 has changed nothing. After it, `recover` (which opening the folder calls) does 3 and 4 from the
journal. At any moment each caption file is the old one or the new one. A caption that another program changed between the
kill and the recovery stays as it is, and the journal is moved to the backups.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import os
import re
import time
import zipfile
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from lib_lora_train.dataset.listing import MayRead
from lib_lora_train.dataset.text_files import CAPTION_SUFFIXES
from lib_lora_train.errors import OutputError, printable, translated
from lib_lora_train.storage.atomic import remove, remove_parts, replacing, sync_folder, write_atomic
from lib_lora_train.studio.captions.files import MOST_BYTES

STUDIO_FOLDER = ".studio"
BACKUPS_KEPT = 10
_JOURNAL = "captions.journal"
_VERSION = 1
_BACKUP = re.compile(r"captions-\d{8}-\d{6}-\d{3}\.zip")
_AT_ONCE = 8  # threads: a disk takes milliseconds to flush or replace a file, and does several at once


@dataclass(frozen=True)
class Rewrite:
    """One caption file: what it must hold afterwards, and what it holds now (None: there is no file)."""

    path: Path
    new: str
    old: bytes | None


@dataclass(frozen=True)
class Recovered:
    """What an interrupted save left to do: files that now hold the new caption, and those that another program had
    changed by then."""

    written: tuple[Path, ...] = ()
    conflicts: tuple[Path, ...] = ()


def studio_folder(folder: Path, may_read: MayRead | None) -> Path:
    """The dataset's own hidden folder; raises OutputError where it is a link that leads out of the allowed folders."""
    studio = folder / STUDIO_FOLDER
    if may_read and not may_read(studio):
        raise OutputError(f"The folder {studio} cannot be used", why="it leads to a folder that is not allowed",
                          remedy="remove that link")
    return studio


def write_captions(folder: Path, rewrites: list[Rewrite], *, may_read: MayRead | None = None) -> Path:
    """Write all of `rewrites` as above; returns the backup. The files lie in `folder` or in a folder of it.

    Raises OutputError if the disk refuses. Then either nothing is changed, or the journal stays and `recover` goes on.
    """
    studio = studio_folder(folder, may_read)
    with translated("the captions were backed up"):
        backup = _back_up(folder, rewrites, studio / "backup")
        journal = studio / _JOURNAL
        write_atomic(journal, _journal_text(folder, rewrites))
    with translated("the captions were written; the rest is written with the next save, or when the folder is opened again"):
        _put({rewrite.path: rewrite.new.encode("utf-8") for rewrite in rewrites})
        remove(journal)
    _forget_old_backups(backup)
    return backup


def recover(folder: Path, *, may_read: MayRead | None = None) -> Recovered:
    """Finish a save that was interrupted; does nothing where there is none to finish.

    Raises OutputError if the disk refuses; the journal then stays.
    """
    journal = folder / STUDIO_FOLDER / _JOURNAL
    if not os.path.lexists(journal):
        return Recovered()
    studio = studio_folder(folder, may_read)
    with translated("an interrupted save of captions was finished"):
        try:
            entries = _read_journal(folder, journal.read_bytes(), may_read)
        except (ValueError, TypeError, KeyError, AttributeError):
            _move_to_backups(journal, studio / "backup")  # not ours, or damaged: the captions are what they are
            return Recovered()
        todo, conflicts, done = {}, [], []
        for path, new, old in entries:
            present = content_of(path)
            if not path.parent.is_dir():
                conflicts.append(path)
            elif present == new:
                done.append(path)
            elif _digest(present) == old:
                todo[path] = new
            else:
                conflicts.append(path)
        for parent in {path.parent for path, _, _ in entries}:
            remove_parts(parent)
        _put(todo)
        if conflicts:
            _move_to_backups(journal, studio / "backup")
        else:
            remove(journal)
    return Recovered((*done, *todo), tuple(conflicts))


def content_of(path: Path) -> bytes | None:
    """The bytes of a caption file; None where there is none. Raises OSError."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None


def _back_up(folder: Path, rewrites: list[Rewrite], backups: Path) -> Path:
    """The files as they are, under their names within the dataset; one that does not exist yet as an empty one."""
    backups.mkdir(parents=True, exist_ok=True)
    remove_parts(backups)
    backup = _unused(backups, "captions", ".zip")
    with replacing(backup) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for rewrite in rewrites:
            archive.writestr(printable(rewrite.path.relative_to(folder).as_posix()), rewrite.old or b"")
    return backup


def _forget_old_backups(newest: Path) -> None:
    ours = sorted(path for path in newest.parent.iterdir() if _BACKUP.fullmatch(path.name))
    for path in ours[:-BACKUPS_KEPT]:
        if path != newest:  # a clock that was set back makes the newest look old
            with contextlib.suppress(OSError):  # one that is open elsewhere goes next time
                path.unlink()


def _unused(folder: Path, kind: str, suffix: str) -> Path:
    """A name made of the time; sorted by name, they are sorted by age, also those of one second whose first are gone."""
    stamp = time.strftime(f"{kind}-%Y%m%d-%H%M%S")
    taken = [int(path.stem[-3:]) for path in folder.glob(f"{stamp}-[0-9][0-9][0-9]{suffix}")]
    return folder / f"{stamp}-{max(taken, default=0) + 1:03}{suffix}"


def _journal_text(folder: Path, rewrites: Iterable[Rewrite]) -> bytes:
    # Names are bytes on Linux: base64 keeps those that are no text.
    entries = [{"file": base64.b64encode(os.fsencode(rewrite.path.relative_to(folder).as_posix())).decode("ascii"),
                "new": rewrite.new, "old": _digest(rewrite.old)} for rewrite in rewrites]
    return json.dumps({"version": _VERSION, "captions": entries}, ensure_ascii=False).encode("utf-8")


def _read_journal(folder: Path, data: bytes, may_read: MayRead | None) -> list[tuple[Path, bytes, str | None]]:
    """(file, new content, digest of the old content). Raises ValueError and its like for what we did not write.

    A dataset may come from anywhere, with a journal made to write elsewhere: only caption files of this folder and of
    the folders in it are accepted.
    """
    content = json.loads(data)
    if content["version"] != _VERSION:
        raise ValueError("another version")
    result = []
    for entry in content["captions"]:
        name = os.fsdecode(base64.b64decode(entry["file"], validate=True))
        parts = name.split("/")
        if len(parts) > 2 or not all(map(_is_plain_name, parts)) or Path(name).suffix.lower() not in CAPTION_SUFFIXES:
            raise ValueError("not a caption of this folder")
        path = folder.joinpath(*parts)
        if may_read and not may_read(path):
            raise ValueError("outside the allowed folders")
        if not isinstance(entry["new"], str) or len(entry["new"]) > MOST_BYTES:
            raise ValueError("not a caption")
        result.append((path, entry["new"].encode("utf-8"), entry["old"]))
    return result


def _is_plain_name(part: str) -> bool:
    return bool(part) and not part.startswith(".") and not set(part) & set('\\:\0')


def _put(contents: Mapping[Path, bytes]) -> None:
    """Write each file atomically; all are on the disk when this returns."""
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        # A list: it raises what a thread raised.
        list(pool.map(lambda path: write_atomic(path, contents[path], one_of_many=True), contents))
    for folder in {path.parent for path in contents}:
        sync_folder(folder)


def _move_to_backups(journal: Path, backups: Path) -> None:
    backups.mkdir(parents=True, exist_ok=True)
    os.replace(journal, _unused(backups, "interrupted", ".json"))


def _digest(data: bytes | None) -> str | None:
    return None if data is None else hashlib.sha256(data).hexdigest()

