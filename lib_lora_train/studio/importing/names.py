"""File names that every system accepts, made from what people, cameras and other systems call their images.

Letters of every script stay. What `output.checked_name` would refuse is replaced, so that a dataset can be moved to any
disk, packed, and opened by other tools.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable

from lib_lora_train.dataset.listing import file_key
from lib_lora_train.run.output import FORBIDDEN, RESERVED

_MODEL_ENDINGS = (".safetensors", ".pt", ".ckpt")
_LONGEST = 100
"""Bytes of UTF-8: leaves space for a number, an ending and the temporary name within what file systems take (255), and for
the folders before it within Windows' 260 letters."""


def safe_stem(text: str, *, otherwise: str = "picture") -> str:
    """`text` as a file's name without its ending; `otherwise` where nothing readable is left of it.

    Composed (NFC); path signs and letters that are not seen become "_"; no dot, space or dash at an end; not a name that
    Windows keeps for itself; at most 100 bytes.
    """
    kept = "".join(_allowed(letter) for letter in unicodedata.normalize("NFC", text))
    before = ""
    while kept != before:  # what one of these leaves may be something for another
        before, kept = kept, _shortened(kept.strip(" .").lstrip("-"))
        if kept.lower().endswith(_MODEL_ENDINGS):  # no program shall mistake an image's name for a model's
            kept = kept.rpartition(".")[0]
        if unicodedata.normalize("NFKC", kept.split(".")[0]).upper().strip() in RESERVED:
            kept = f"_{kept}"
    return kept if kept.strip("_- .") else otherwise


class FreeNames:
    """Gives each stem once; one that is used gets a number: a, a_2, a_3."""

    def __init__(self, taken: Iterable[str]) -> None:
        """`taken`: stems that are there already."""
        self._taken = {file_key(stem) for stem in taken}
        self._latest: dict[str, int] = {}

    def claim(self, stem: str) -> str:
        """`stem`, or the first numbered one that is free; it is used from now on. Thousands of one name stay fast."""
        key = file_key(stem)
        free, number = stem, self._latest.get(key, 1)
        while file_key(free) in self._taken:
            number += 1
            free = f"{stem}_{number}"
        self._latest[key] = number
        self._taken.add(file_key(free))
        return free


def _allowed(letter: str) -> str:
    # Cc controls, Cs halves of letters (Python's reading of bytes that are no text), Zl/Zp line ends; Cf turns text around or
    # is not seen, but for the two joiners that belong to scripts and emoji; Cn is not a letter.
    if letter in "\u200c\u200d":
        return letter
    if letter in FORBIDDEN or unicodedata.category(letter) in ("Cc", "Cs", "Cf", "Cn", "Zl", "Zp"):
        return "_"
    return " " if unicodedata.category(letter) == "Zs" else letter


def _shortened(text: str) -> str:
    return text.encode("utf-8")[:_LONGEST].decode("utf-8", "ignore")
