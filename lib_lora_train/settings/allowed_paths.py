"""Which folders a run may touch on a host that other people reach.

On a machine of one's own every path is allowed. Where others reach the page, a path is compared with
the allowed folders only after links and `..` were followed, in the file system's own spelling.
"""

from __future__ import annotations

import dataclasses
import ntpath
import os
from collections.abc import Sequence
from pathlib import Path

from lib_lora_train.errors import SettingError
from lib_lora_train.settings import DECLARATIONS, Settings, flat

# Settings that name a place to write to; every other path is read.
WRITTEN = frozenset({"output_dir", "logging_dir"})


@dataclasses.dataclass(frozen=True)
class AllowedPaths:
    """`reading` holds datasets and LoRAs to continue from, `writing` results; `advice` says how to allow another folder."""

    reading: tuple[Path, ...]
    writing: tuple[Path, ...]
    advice: str

    def may_read(self, path: Path) -> bool:
        """Whether `path` lies in a folder that may be read from."""
        return inside(str(path), self.reading)


def check_allowed(settings: Settings, allowed: AllowedPaths | None) -> None:
    """Raise SettingError for the first path of `settings` that is not allowed; the same whether or not it exists."""
    if allowed is None:
        return
    for name, value in flat(settings).items():
        declaration = DECLARATIONS[name]
        if name == "resume" and is_run_name(str(value)):
            continue  # the name of a run, which lies where runs are kept
        folders = allowed.writing if name in WRITTEN else allowed.reading
        if declaration.holds_path(str(value)) and value and not inside(str(value), folders):
            raise SettingError(
                f"{declaration.named} = {value} cannot be used",
                why="others can reach this page, so it keeps to the folders it is allowed",
                remedy=f"choose a folder in {' or '.join(map(str, folders))}; {allowed.advice}")


def is_run_name(text: str) -> bool:
    """Whether `text` is the bare name of a run, not a path."""
    return text not in ("", ".", "..") and not set(text) & set("/\\:")


def inside(text: str, folders: Sequence[Path]) -> bool:
    """Whether the path `text` is one of `folders` or lies below one, wherever its links lead. What cannot be resolved lies
    outside."""
    if not text or "\0" in text or _leads_elsewhere(text, folders):
        return False
    try:
        path = _real(text)
        return any(folder == path or folder in path.parents for folder in map(_real, map(str, folders)))
    except (OSError, ValueError):
        return False


def _real(text: str) -> Path:
    return Path(os.path.normcase(os.path.realpath(text)))


def _leads_elsewhere(text: str, folders: Sequence[Path]) -> bool:
    r"""Windows' ways past the drives, told by their spelling alone, on every system.

    `\\?\C:\x` and `\\.\x` are devices, `C:x` is relative to a folder nobody sees. A share is not even asked for unless it
    is allowed: the question alone would send the user's credentials to that server.
    """
    backslashed = text.replace("/", "\\")
    if backslashed.startswith(("\\\\?\\", "\\\\.\\", "\\??\\")):
        return True
    if backslashed.startswith("\\\\"):
        path, allowed = _spelt(text), [_spelt(str(folder)).rstrip("\\") for folder in folders]
        return not any(path == folder or path.startswith(folder + "\\") for folder in allowed)
    drive, rest = ntpath.splitdrive(text)
    return bool(drive) and not rest.startswith(("\\", "/"))


def _spelt(text: str) -> str:
    return ntpath.normcase(ntpath.normpath(text))
