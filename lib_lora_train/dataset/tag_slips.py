"""Tags that were probably meant to be the same: one spelling beside another, and slips of the keyboard.

Only what is hardly ever meant: `pink shirt` and `pink skirt` differ in one letter and are two things, so an exchanged
letter is no slip here; a doubled, missing or swapped one is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

_SHORTEST = 6  # letters; shorter words have too many neighbours that are words
_USUAL = 5  # captions: so often a tag must occur for a rare one to be measured by it


def respelt(tags: Mapping[str, int]) -> list[tuple[str, str]]:
    """(rarer, usual) spellings that differ in underscores, hyphens, spaces and escaping only; `tags` are frequencies."""
    usual: dict[str, str] = {}
    found = []
    for tag in sorted(tags, key=lambda tag: (-tags[tag], tag)):
        plain = " ".join(tag.casefold().replace("\\", "").replace("_", " ").replace("-", " ").split())
        if plain not in usual:
            usual[plain] = tag
        elif plain:
            found.append((tag, usual[plain]))
    return found


def typing_errors(tags: Mapping[str, int]) -> list[tuple[str, str]]:
    """(tag of one caption, frequent tag) where a letter more, a letter less or two swapped letters make one the other."""
    frequent = {tag.casefold(): tag for tag, count in tags.items() if count >= _USUAL and len(tag) >= _SHORTEST}
    with_one_less = {shorter: tag for key, tag in frequent.items() for shorter in _one_less(key)}
    found = []
    for tag, count in tags.items():
        key = tag.casefold()
        if count != 1 or len(key) < _SHORTEST:
            continue
        meant = with_one_less.get(key) or next(
            (frequent[other] for other in (*_one_less(key), *_swapped(key)) if other in frequent), None)
        if meant is not None and not _is_plural(key, meant.casefold()):
            found.append((tag, meant))
    return found


def _one_less(word: str) -> Iterator[str]:
    """`word` without one of its letters; digits stay, for 1girl and 11girls are no slip of each other."""
    return (word[:i] + word[i + 1:] for i, letter in enumerate(word) if letter.isalpha())


def _swapped(word: str) -> Iterator[str]:
    return (word[:i] + word[i + 1] + word[i] + word[i + 2:] for i in range(len(word) - 1)
            if word[i].isalpha() and word[i + 1].isalpha() and word[i] != word[i + 1])


def _is_plural(one: str, other: str) -> bool:
    return one + "s" == other or other + "s" == one
