"""Regular expressions that a user typed, kept from running forever.

Python's own `re` can neither be interrupted nor given a time limit: (a+)+b on a long caption would hold the whole WebUI.
The `regex` package, which open_clip and transformers need anyway, accepts the same patterns, has a timeout, and lets
other threads run meanwhile. What only it understands is refused: recursive patterns fill the memory first.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from typing import Any

from lib_lora_train.errors import SettingError

MOST_SECONDS = 1.0  # beyond what is free, for one pass over all captions; `regex` may notice two or three times as late
_FREE = 200e-6  # seconds a caption: ten times what an ordinary pattern needs, so that many captions do not exceed it
MOST_CHARACTERS = 1000  # of a pattern


class Pattern:
    """One pattern for one pass over the captions; upper and lower case are the same.

    Raises SettingError at once for a pattern that is none, and from `found_in` and `replaced` when the pass has used up its
    `seconds`. They are counted on this thread's own clock: a busy machine makes no pattern a bad one.
    """

    def __init__(self, pattern: str, *, seconds: float = MOST_SECONDS) -> None:
        if len(pattern) > MOST_CHARACTERS:
            raise SettingError(f"The regular expression is longer than {MOST_CHARACTERS} characters", remedy="shorten it")
        self._pattern, self._left = pattern, seconds
        self._compiled = _compiled(pattern)

    def found_in(self, text: str) -> bool:
        """Whether the pattern matches anywhere in `text`."""
        return self._timed(lambda: self._compiled.search(text, timeout=self._left)) is not None

    def replaced(self, text: str, new: str) -> str:
        r"""`text` with every match replaced; `new` may name groups (\1, \g<name>)."""
        import regex

        try:
            return self._timed(lambda: self._compiled.sub(new, text, timeout=self._left))
        except (regex.error, IndexError) as error:
            raise SettingError(f"The replacement {new} cannot be used", why=str(error),
                               remedy=r"write \1 only for a group that the expression has, and \\ for a backslash") from error

    def _timed(self, search: Callable[[], Any]) -> Any:
        if self._left <= 0:
            raise self._too_slow()
        began = time.thread_time()
        try:
            return search()
        except (TimeoutError, MemoryError) as error:
            raise self._too_slow() from error
        finally:
            self._left -= max(0.0, time.thread_time() - began - _FREE)

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
