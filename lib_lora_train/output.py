"""The name and the folder of the result, checked before any long work; and the names of what is saved on the way."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from lib_lora_train.errors import OutputError

# https://learn.microsoft.com/windows/win32/fileio/naming-a-file: refused everywhere, so that a LoRA can be given away.
_RESERVED = {"CON", "PRN", "AUX", "NUL", *(f"COM{i}" for i in range(1, 10)), *(f"LPT{i}" for i in range(1, 10))}
_FORBIDDEN = '<>:"/\\|?*'
_LONGEST = 120


def checked_name(name: str) -> str:
    """`name` if it can be a file's name on every platform and stand in <lora:name:1>; raises OutputError."""
    remedy = "write a plain name such as my_character"
    if not name.strip():
        raise OutputError("The LoRA has no name", remedy=remedy)
    # Lone surrogates (0xD800 on) are what Python makes of bytes that are no text.
    found = sorted({c for c in name if c in _FORBIDDEN or ord(c) < 32 or ord(c) == 127 or 0xD800 <= ord(c) <= 0xDFFF})
    if found:
        raise OutputError(f"The name {name!r} cannot be used", why=f"it holds {' '.join(map(repr, found))}, which a file "
                          "name or <lora:…> cannot", remedy=remedy)
    if name.split(".")[0].upper().strip() in _RESERVED:
        raise OutputError(f"The name {name!r} cannot be used", why="Windows keeps it for itself", remedy=remedy)
    if name != name.strip() or name.startswith(".") or name.endswith("."):
        raise OutputError(f"The name {name!r} cannot be used", why="it starts or ends with a space or a dot", remedy=remedy)
    if len(name.encode("utf-8")) > _LONGEST:
        raise OutputError(f"The name {name[:20]!r}… cannot be used", why=f"it is longer than {_LONGEST} bytes",
                          remedy="shorten it")
    if name.lower().endswith((".safetensors", ".pt", ".ckpt")):
        raise OutputError(f"The name {name!r} cannot be used", why="the ending is added by itself",
                          remedy=f"write {Path(name).stem!r}")
    return name


def destination(folder: Path, *, name: str, overwrite: bool) -> Path:
    """The result's path, its folder made and known to be writable; raises OutputError.

    An existing file of the name is refused unless `overwrite`.
    """
    path = folder / f"{checked_name(name)}.safetensors"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Asking the file system is the only answer that counts: permission bits say little on Windows and network drives.
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OutputError(f"Nothing can be written to the output folder {folder}", why=error.strerror or str(error),
                          remedy="choose another folder") from error
    if path.is_dir():
        raise OutputError(f"{path} is a folder", remedy="choose another name")
    if os.path.lexists(path) and not overwrite:
        raise OutputError(f"There is a LoRA called {name!r} already", why=f"{path} exists",
                          remedy="choose another name, or set overwrite = true")
    return path


def epoch_path(final: Path, epoch: int) -> Path:
    """kohya's name of the save after an epoch: name-000010.safetensors."""
    return final.with_name(f"{final.stem}-{epoch:06d}{final.suffix}")


def step_path(final: Path, step: int) -> Path:
    """kohya's name of the save after a step: name-step00000500.safetensors."""
    return final.with_name(f"{final.stem}-step{step:08d}{final.suffix}")
