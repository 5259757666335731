"""The name and the folder of the result, checked before the run; the names of the files saved during it."""

from __future__ import annotations

import os
import tempfile
import unicodedata
from pathlib import Path

from lib_lora_train.errors import OutputError
from lib_lora_train.settings import named

# https://learn.microsoft.com/windows/win32/fileio/naming-a-file: refused everywhere, so that a LoRA can be given away.
RESERVED = {"CON", "PRN", "AUX", "NUL", "CONIN$", "CONOUT$", "CLOCK$",
            *(f"{port}{number}" for port in ("COM", "LPT") for number in range(10))}
FORBIDDEN = '<>:"/\\|?*'
# Invisible characters and those that reverse others: a name must look like what it is. Joiners belong to scripts.
_INVISIBLE = frozenset("\u00ad\u061c\u180e\u200b\u200e\u200f\u2028\u2029\u2060\ufeff\ufffe\uffff"
                    + "".join(map(chr, (*range(0x202A, 0x202F), *range(0x2066, 0x206A), *range(0xFFF9, 0xFFFC)))))
_LONGEST = 120


def checked_name(name: str, *, what: str = "LoRA") -> str:
    """`name`, composed to NFC, if it can be a file's name on every platform and stand in <lora:name:1>; raises OutputError.
    macOS takes the composed and the decomposed spelling of an accent for one file, others for two."""
    name = unicodedata.normalize("NFC", name)
    # Lone surrogates (Cs) are what Python makes of bytes that are not text.
    found = sorted({c for c in name if c in FORBIDDEN or c in _INVISIBLE or unicodedata.category(c) in ("Cc", "Cs")})
    plain, refused = "write a plain name such as my_character", f"The name {name[:_LONGEST]!r} cannot be used"
    if not name.strip():
        raise OutputError(f"The {what} has no name", remedy=plain)
    if found:
        why = f"it holds {' '.join(map(repr, found))}, which a file name or <lora:…> cannot"
    elif unicodedata.normalize("NFKC", name.split(".")[0]).upper().strip() in RESERVED:  # Windows takes COM¹ for COM1
        why = "Windows keeps it for itself"
    elif name != name.strip() or name.startswith(".") or name.endswith("."):
        why = "it starts or ends with a space or a dot"
    elif name.startswith("-"):
        why = "programs would take it for an option"
    elif len(name.encode("utf-8")) > _LONGEST:
        raise OutputError(refused, why=f"it is longer than {_LONGEST} bytes", remedy="shorten it")
    elif name.lower().endswith((".safetensors", ".pt", ".ckpt")):
        raise OutputError(refused, why="the ending is added by itself", remedy=f"write {Path(name).stem!r}")
    else:
        return name
    raise OutputError(refused, why=why, remedy=plain)


def destination(folder: Path, *, name: str, overwrite: bool) -> Path:
    """The result's path in an existing, writable folder; raises OutputError, also for an existing file unless `overwrite`."""
    path = folder / f"{checked_name(name)}.safetensors"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Permission bits say little on Windows and network drives: try it.
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OutputError(f"Nothing can be written to the output folder {folder}", why=error.strerror or str(error),
                          remedy="choose another folder") from error
    if os.path.isdir(path):
        raise OutputError(f"{path} is a folder", remedy="choose another name")
    if os.path.lexists(path) and not overwrite:
        raise OutputError(f"There is a LoRA called {name!r} already", why=f"{path} exists",
                          remedy=f"choose another name, or switch {named('overwrite')} on")
    return path


def epoch_path(final: Path, epoch: int) -> Path:
    """kohya's name of the save after an epoch: name-000010.safetensors."""
    return final.with_name(f"{final.stem}-{epoch:06d}{final.suffix}")


def step_path(final: Path, step: int) -> Path:
    """kohya's name of the save after a step: name-step00000500.safetensors."""
    return final.with_name(f"{final.stem}-step{step:08d}{final.suffix}")
