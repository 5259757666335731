"""Captions: their tags, their normal form, and the trigger word."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from typing import Protocol

# The commas of Chinese and Japanese; what is not seen: zero-width space, marks of direction, word joiner, byte order mark.
_READ_ALIKE = str.maketrans("\uff0c\u3001\uff64", ",,,", "\u200b\u200e\u200f\u2060\ufeff")
# Joiners belong between letters of some scripts and between emoji; elsewhere they are remnants.
_LONE_JOINERS = re.compile(r"(?<![^\x00-\x7f])[\u200c\u200d]+|[\u200c\u200d]+(?![^\x00-\x7f])")

SEPARATOR = "|||"  # kohya's usual keep_tokens_separator
_SEPARATORS = re.compile(rf"({re.escape(SEPARATOR)})")
_COMMAS = re.compile(r",(?![^{}]*\})")  # not those within wildcards


class Tokenizer(Protocol):
    """What counts a caption's tokens; `model.sd.tokens.clip_tokenizer()` is one."""

    def encode(self, text: str) -> Sequence[int]:
        """The tokens of `text`."""
        ...


def normal_form(text: str) -> str:
    """`text` as training takes it: letters composed (NFC), without what is not seen, full-width commas as commas."""
    if text.isascii():
        return text
    return _LONE_JOINERS.sub("", unicodedata.normalize("NFC", text).translate(_READ_ALIKE))


def first_line(text: str) -> str:
    """The first line with a tag in it: what kohya's trainer uses of a caption file."""
    return first_line_and_rest(text)[0]


def first_line_and_rest(text: str) -> tuple[str, str]:
    """That line, stripped, and what follows it; both "" where there is none. Only CR and LF end a line."""
    for line in re.finditer(r"[^\r\n]+", text):
        if split_tags(line[0]):
            return line[0].strip(), text[line.end():]
    return "", ""


def split_tags(caption: str) -> list[str]:
    """The comma-separated parts of a caption in its normal form, stripped; empty parts are left out."""
    return [tag for part in normal_form(caption).split(",") if (tag := part.strip())]


def split_to_edit(caption: str) -> list[str]:
    """The tags as whoever edits them sees them: a wildcard ({red, dark|blue}) belongs to one tag, and kohya's separator of kept
    tags stands between two, as a tag of its own. Otherwise those of `split_tags`; `join_edited` makes a caption of them."""
    if SEPARATOR not in caption and "{" not in caption:
        return split_tags(caption)
    parts = (part for piece in _SEPARATORS.split(normal_form(caption)) for part in _COMMAS.split(piece))
    return [tag for part in parts if (tag := part.strip())]


def join_edited(tags: Iterable[str]) -> str:
    """Tags as a caption, without commas beside the separator."""
    return re.sub(rf"(^|, )({re.escape(SEPARATOR)})(, |$)", r" \2 ", ", ".join(tags)).strip()


def folded(text: str) -> str:
    """What two texts share that differ in their form, in case, or in the escaping of brackets."""
    return normal_form(text).replace(r"\(", "(").replace(r"\)", ")").casefold()


@lru_cache(maxsize=1 << 16)
def tag_key(tag: str) -> str:
    """What two spellings of a tag share: `folded`, and spaces count once."""
    return " ".join(folded(tag).split())


def count_tags(captions: Iterable[str], *, key: Callable[[str], str] = tag_key) -> dict[str, int]:
    """How many captions hold each tag, the most frequent first, then by name.

    Spellings of one `key` are one tag, shown as it is written most often.
    """
    spellings: dict[str, Counter[str]] = {}
    for caption in captions:
        for one, tag in {key(tag): tag for tag in split_to_edit(caption) if tag != SEPARATOR}.items():
            spellings.setdefault(one, Counter())[tag] += 1
    counts = [(forms.most_common(1)[0][0], sum(forms.values())) for forms in spellings.values()]
    return dict(sorted(counts, key=lambda item: (-item[1], item[0])))


def with_trigger_word(caption: str, trigger_word: str, *, separators: Sequence[str] = (",",)) -> str:
    """The caption with the trigger word as its first tag, unless it already is one of its tags.

    Compared by `tag_key`: CLIP's tokens are lower case. A trigger of several tags ("sks, armour") adds those that are missing.
    `separators` are what parts tags in the caption; the first is put behind the trigger word.
    """
    parted = caption
    for separator in separators:
        parted = parted.replace(separator, ",")
    present = set(map(tag_key, split_tags(parted)))
    missing = [tag for tag in split_tags(trigger_word) if tag_key(tag) not in present]
    return f"{separators[0]} ".join([*missing, caption.strip()] if present else missing)
