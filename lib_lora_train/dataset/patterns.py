"""Regular expressions that a user typed, kept from running forever.

Python's own `re` can neither be interrupted nor told a time limit: (a+)+b on a long caption would hold the whole WebUI.
The `regex` package, which open_clip and transformers need anyway, takes the same patterns, gives up when told to, and lets
other threads work meanwhile. What only it understands is refused: patterns that call themselves fill the memory first.
"""

from __future__ import annotations

import re
import time
from typing import Any

from lib_lora_train.errors import SettingError

MOST_SECONDS = 1.0  # for one filter or one replacement over all captions; it may notice two or three times as late
MOST_CHARACTERS = 1000  # of a pattern


class Pattern:
    """One pattern for one pass over the captions; upper and lower case are the same.

    Raises SettingError at once for a pattern that is none, and from `found_in` and `replaced` when the pass takes longer
    than `seconds` in all.
    """

    def __init__(self, pattern: str, *, seconds: float = MOST_SECONDS) -> None:
        if len(pattern) > MOST_CHARACTERS:
            raise SettingError(f"The regular expression is longer than {MOST_CHARACTERS} characters", remedy="shorten it")
        self._pattern, self._ends = pattern, time.monotonic() + seconds
        self._compiled = _compiled(pattern)

    def found_in(self, text: str) -> bool:
        """Whether the pattern matches anywhere in `text`."""
        try:
            return self._compiled.search(text, timeout=self._left()) is not None
        except (TimeoutError, MemoryError) as error:
            raise self._too_slow() from error

    def replaced(self, text: str, new: str) -> str:
        r"""`text` with every match replaced; `new` may name groups (\1, \g<name>)."""
        try:
            return self._compiled.sub(new, text, timeout=self._left())
        except (TimeoutError, MemoryError) as error:
            raise self._too_slow() from error
        except (_pattern_error(), IndexError) as error:
            raise SettingError(f"The replacement {new} cannot be used", why=str(error),
                               remedy=r"write \1 only for a group that the expression has, and \\ for a backslash") from error

    def _left(self) -> float:
        left = self._ends - time.monotonic()
        if left <= 0:
            raise TimeoutError
        return left

    def _too_slow(self) -> SettingError:
        return SettingError(f"The regular expression {self._pattern} takes too long on these captions",
                            remedy="write it more simply: no repetition inside a repetition")


def _compiled(pattern: str) -> Any:
    import regex  # late: only those who type patterns need it

    try:
        re.compile(pattern)  # Python's own decides what a pattern is
        return regex.compile(pattern, regex.IGNORECASE)
    except (re.error, regex.error, RecursionError, OverflowError, MemoryError, ValueError) as error:
        raise SettingError(f"The regular expression {pattern} cannot be read", why=str(error),
                           remedy=r"write \( for a bracket and \. for a dot that mean themselves") from error


def _pattern_error() -> type[Exception]:
    import regex

    return regex.error
