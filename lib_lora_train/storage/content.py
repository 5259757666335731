"""The header of a `.safetensors` file; and what a file is that was taken for one and is none: told from its first bytes."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, BinaryIO

from lib_lora_train.errors import LoraTrainError, counted

_DOWNLOAD = "download it again"
_PICKLED = ("it is a pickled file, which can run any program when it is opened",
            "convert it; a new name does not change what it is")
# The first bytes -> why such a file is none, and what to do.
_BEGINNINGS = (
    ((b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"), *_PICKLED),
    ((b"version https://git-lfs",), "it is a Git LFS pointer, a note of where the file itself is",
     "fetch it with git lfs pull"),
    ((b"GGUF",), "it is a GGUF file, which holds quantised weights", "choose a .safetensors file"),
    ((b"PK",), "it is a zip archive, as pickled files are too", "unpack it, and choose a .safetensors file"),
    ((b"7z\xbc\xaf", b"Rar!", b"\x1f\x8b"), "it is a packed archive", "unpack it"),
    ((b"<",), "it is a web page, as servers send it in place of a file that they refuse", _DOWNLOAD),
    ((b"{", b"["), "it is a JSON text, as servers send it in place of a file that they refuse", _DOWNLOAD),
)
_UNREADABLE = "its header cannot be read"
LONGEST_HEADER = 100_000_000  # the longest that safetensors reads


def header_of(file: BinaryIO) -> dict[str, Any]:
    """The header of a safetensors file that is read from its beginning, with its metadata; the tensors' bytes come next. Raises
    OSError, and ValueError where there is none."""
    start = file.read(9)
    length = int.from_bytes(start[:8], "little")
    if start[8:] != b"{" or length > LONGEST_HEADER:
        raise ValueError(_UNREADABLE)
    try:
        return json.loads(start[8:] + file.read(length - 1))
    except RecursionError as error:
        raise ValueError(_UNREADABLE) from error


def read_header(path: Path) -> dict[str, dict[str, Any]]:
    """What the header of a safetensors file that opens says of each tensor, by name: its dtype, shape and data_offsets.
    `safe_open.get_slice` takes longer for a checkpoint's hundreds of tensors. Raises OSError and ValueError."""
    with path.open("rb") as file:
        entries = header_of(file)
    entries.pop("__metadata__", None)
    return entries


def refuse_wrong_content(path: Path, error: type[LoraTrainError]) -> None:
    """Raise `error`, which says what the file at `path` is, where it does not begin as a safetensors file does or is shorter
    than it says. Nothing is raised for one that cannot be read."""
    try:
        with path.open("rb") as file:
            start, size = file.read(512), os.fstat(file.fileno()).st_size
            length = 8 + int.from_bytes(start[:8], "little")
            file.seek(8)
            header = file.read(length - 8) if start[8:9] == b"{" and length <= min(size, LONGEST_HEADER) else b""
    except (OSError, ValueError):
        return
    if start[8:9] == b"{":
        if why := _damage(header, missing=length - size):
            raise error(f"{path.name} is damaged", why=why, remedy=_DOWNLOAD)
        return
    if start[:2] == b"PK" and b"/data.pkl" in start:  # torch.save's archive
        why, remedy = _PICKLED
    else:
        text = start.removeprefix(b"\xef\xbb\xbf").lstrip()
        known = ((why, remedy) for beginnings, why, remedy in _BEGINNINGS if text.startswith(beginnings))
        why, remedy = next(known, ("", "")) if size else ("it is empty", _DOWNLOAD)
        if not why:
            raise error(f"{path.name} is not a safetensors file", remedy="choose another file")
    raise error(f"{path.name} is not a safetensors file", why=why, remedy=remedy)


def _damage(header: bytes, *, missing: int) -> str:
    """What is wrong with a safetensors file of this header, "" where nothing is; the header with its length is as many bytes
    longer than the file as are `missing`."""
    if missing <= 0:
        try:
            entries = [entry for name, entry in json.loads(header).items() if name != "__metadata__"]
            missing += max((entry["data_offsets"][1] for entry in entries), default=0)
        except (ValueError, RecursionError, KeyError, IndexError, TypeError, AttributeError):
            return _UNREADABLE
    return "its end is missing" if missing > 0 else f"it has {counted(-missing, 'byte')} too many" if missing < 0 else ""
