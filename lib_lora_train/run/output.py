"""The name and the folder of the result, checked before any long work; and the names of what is saved on the way."""

from __future__ import annotations

import os
import tempfile
import unicodedata
from pathlib import Path

from lib_lora_train.errors import OutputError

# https://learn.microsoft.com/windows/win32/fileio/naming-a-file: refused everywhere, so that a LoRA can be given away.
_RESERVED = {"CON", "PRN", "AUX", "NUL", "CONIN$", "CONOUT$", "CLOCK$",
             *(f"{port}{number}" for port in ("COM", "LPT") for number in range(10))}
_FORBIDDEN = '<>:"/\\|?*'
# Letters that show as nothing or turn the others around: a name must look like what it is. Joiners belong to scripts.
_UNSEEN = frozenset("\u00ad\u061c\u180e\u200b\u200e\u200f\u2028\u2029\u2060\ufeff\ufffe\uffff"
                    + "".join(map(chr, (*range(0x202A, 0x202F), *range(0x2066, 0x206A), *range(0xFFF9, 0xFFFC)))))
_LONGEST = 120


def checked_name(name: str) -> str:
    """`name` if it can be a file's name on every platform and stand in <lora:name:1>; raises OutputError.

    Accents come back composed (NFC), as keyboards make them: macOS takes both spellings for one file, others for two.
    """
    remedy = "write a plain name such as my_character"
    name = unicodedata.normalize("NFC", name)
    if not name.strip():
        raise OutputError("The LoRA has no name", remedy=remedy)
    # Lone surrogates (Cs) are what Python makes of bytes that are no text.
    found = sorted({c for c in name if c in _FORBIDDEN or c in _UNSEEN or unicodedata.category(c) in ("Cc", "Cs")})
    if found:
        raise OutputError(f"The name {name!r} cannot be used", why=f"it holds {' '.join(map(repr, found))}, which a file "
                          "name or <lora:…> cannot", remedy=remedy)
    # NFKC: Windows takes COM¹ for COM1.
    if unicodedata.normalize("NFKC", name.split(".")[0]).upper().strip() in _RESERVED:
        raise OutputError(f"The name {name!r} cannot be used", why="Windows keeps it for itself", remedy=remedy)
    if name != name.strip() or name.startswith(".") or name.endswith("."):
        raise OutputError(f"The name {name!r} cannot be used", why="it starts or ends with a space or a dot", remedy=remedy)
    if name.startswith("-"):
        raise OutputError(f"The name {name!r} cannot be used", why="programs would take it for an option", remedy=remedy)
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
