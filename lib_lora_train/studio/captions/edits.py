"""What can be done to captions: small frozen values, each a function from a caption to a caption.

Tags are compared without regard to case. A caption that an edit has nothing to do with stays as it was written, with its
spaces and empty tags.
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

from lib_lora_train.dataset.captions import split_tags
from lib_lora_train.dataset.patterns import Pattern
from lib_lora_train.errors import SettingError

MOST_CHARACTERS = 10_000  # of a caption that an edit makes: a replacement must not fill the memory
Change = Callable[[str], str]
Captions = Callable[[], Iterable[str]]


class Encoder(Protocol):
    """The one thing needed of a tokenizer: how many tokens a text has."""

    def encode(self, text: str) -> Sequence[int]:
        """The tokens of `text`."""
        ...


class Edit(Protocol):
    """One kind of change. `whole`: it also replaces captions that cannot be read."""

    whole: ClassVar[bool]

    @property
    def label(self) -> str:
        """What the undo button says."""
        ...

    def change(self, captions: Captions) -> Change:
        """The function for one pass; `captions()` gives every caption of the dataset, for edits that count."""
        ...


@dataclass(frozen=True)
class AddTags:
    """Adds the tags a caption does not have yet, in front or behind."""

    tags: tuple[str, ...]
    at: Literal["start", "end"] = "end"
    whole: ClassVar[bool] = False

    @property
    def label(self) -> str:
        """What the undo button says."""
        return f"Add {_named(self.tags)}"

    def change(self, captions: Captions) -> Change:
        """The function for one pass."""
        tags = list({_key(tag): tag for tag in _split(self.tags)}.values())

        def change(caption: str) -> str:
            present = set(map(_key, split_tags(caption)))
            missing = [tag for tag in tags if _key(tag) not in present]
            own = [caption.strip(" ,")] if present else []
            return ", ".join([*missing, *own] if self.at == "start" else [*own, *missing]) if missing else caption
        return change


@dataclass(frozen=True)
class RemoveTags:
    """Removes these tags wherever they stand."""

    tags: tuple[str, ...]
    whole: ClassVar[bool] = False

    @property
    def label(self) -> str:
        """What the undo button says."""
        return f"Remove {_named(self.tags)}"

    def change(self, captions: Captions) -> Change:
        """The function for one pass."""
        gone = set(map(_key, _split(self.tags)))
        return lambda caption: _joined(caption, [tag for tag in split_tags(caption) if _key(tag) not in gone])


@dataclass(frozen=True)
class ReplaceTag:
    """Puts `new` (one tag, several, or none) where the tag `old` stands; a `new` that is there twice then is kept once."""

    old: str
    new: str
    whole: ClassVar[bool] = False

    @property
    def label(self) -> str:
        """What the undo button says."""
        return f"Replace {_short(self.old)} by {_short(self.new)}"

    def change(self, captions: Captions) -> Change:
        """The function for one pass."""
        old, new = _key(self.old), split_tags(self.new)
        once = set(map(_key, new))

        def change(caption: str) -> str:
            tags = split_tags(caption)
            if old not in map(_key, tags):
                return caption
            result: list[str] = []
            seen: set[str] = set()
            for tag in tags:
                for part in new if _key(tag) == old else [tag]:
                    if _key(part) in once and _key(part) in seen:
                        continue
                    seen.add(_key(part))
                    result.append(part)
            return ", ".join(result)
        return change


@dataclass(frozen=True)
class ReplaceText:
    """Replaces a piece of text wherever it stands, inside tags too."""

    old: str
    new: str
    whole: ClassVar[bool] = False

    @property
    def label(self) -> str:
        """What the undo button says."""
        return f"Replace the text {_short(self.old)} by {_short(self.new)}"

    def change(self, captions: Captions) -> Change:
        """The function for one pass; raises SettingError where there is nothing to look for."""
        if not self.old:
            raise SettingError("There is no text to look for", remedy="write what is to be replaced")
        pattern = re.compile(re.escape(self.old), re.IGNORECASE)  # a plain text: it cannot run away
        return lambda caption: pattern.sub(lambda _: self.new, caption)


@dataclass(frozen=True)
class ReplaceRegex:
    r"""Replaces every match of a regular expression; `new` may name its groups (\1)."""

    pattern: str
    new: str
    whole: ClassVar[bool] = False

    @property
    def label(self) -> str:
        """What the undo button says."""
        return f"Replace {_short(self.pattern)} by {_short(self.new)}"

    def change(self, captions: Captions) -> Change:
        """The function for one pass; it and this raise SettingError for a pattern that is wrong or takes too long."""
        if not self.pattern:
            raise SettingError("There is no regular expression", remedy="write what is to be replaced")
        pattern = Pattern(self.pattern)
        return lambda caption: pattern.replaced(caption, self.new)


@dataclass(frozen=True)
class SortTags:
    """Sorts the tags by name, or the most frequent of the dataset first; the first `keep` stay where they are."""

    by: Literal["name", "frequency"] = "name"
    keep: int = 0
    whole: ClassVar[bool] = False

    @property
    def label(self) -> str:
        """What the undo button says."""
        return f"Sort tags by {self.by}"

    def change(self, captions: Captions) -> Change:
        """The function for one pass."""
        counts: Counter[str] = Counter()
        if self.by == "frequency":
            for caption in captions():
                counts.update(set(map(_key, split_tags(caption))))

        def change(caption: str) -> str:
            tags = split_tags(caption)
            order = sorted(tags[self.keep:], key=lambda tag: (-counts[_key(tag)], _key(tag)))
            return _joined(caption, tags[:self.keep] + order)
        return change


@dataclass(frozen=True)
class Deduplicate:
    """Keeps the first of tags that stand twice, and leaves out empty ones."""

    whole: ClassVar[bool] = False

    @property
    def label(self) -> str:
        """What the undo button says."""
        return "Remove double tags"

    def change(self, captions: Captions) -> Change:
        """The function for one pass."""
        def change(caption: str) -> str:
            first: dict[str, str] = {}
            for tag in split_tags(caption):
                first.setdefault(_key(tag), tag)
            return ", ".join(first.values()) if len(first) < len(caption.split(",")) else caption
        return change


@dataclass(frozen=True)
class TruncateTokens:
    """Leaves out tags at the end until at most `n` tokens are left; a single longer tag loses words at its end."""

    n: int
    tokenizer: Encoder
    whole: ClassVar[bool] = False

    @property
    def label(self) -> str:
        """What the undo button says."""
        return f"Cut to {self.n} tokens"

    def change(self, captions: Captions) -> Change:
        """The function for one pass; raises SettingError for less than one token."""
        if self.n < 1:
            raise SettingError(f"A caption cannot be cut to {self.n} tokens", remedy="ask for at least one")

        def fits(text: str) -> bool:
            return len(self.tokenizer.encode(text)) <= self.n

        def longest(parts: list[str], glue: str) -> str:
            fitting, too_many = 0, len(parts)  # halving: a caption is encoded a few times and not once a tag
            while too_many - fitting > 1:
                middle = (fitting + too_many) // 2
                fitting, too_many = (middle, too_many) if fits(glue.join(parts[:middle])) else (fitting, middle)
            return glue.join(parts[:fitting])

        def change(caption: str) -> str:
            if fits(caption):
                return caption
            tags = split_tags(caption)
            return ", ".join(tags) if fits(", ".join(tags)) else longest(tags, ", ") or longest(tags[0].split(), " ")
        return change


@dataclass(frozen=True)
class SetCaption:
    """Replaces the whole caption."""

    text: str
    whole: ClassVar[bool] = True

    @property
    def label(self) -> str:
        """What the undo button says."""
        return "Edit caption"

    def change(self, captions: Captions) -> Change:
        """The function for one pass."""
        return lambda _: self.text


_KINDS: dict[str, type] = {
    "add_tags": AddTags, "remove_tags": RemoveTags, "replace_tag": ReplaceTag, "replace_text": ReplaceText,
    "replace_regex": ReplaceRegex, "sort_tags": SortTags, "deduplicate": Deduplicate, "truncate_tokens": TruncateTokens,
    "set_caption": SetCaption}
_CHOICES = {"at": ("start", "end"), "by": ("name", "frequency")}


def edit_from_dict(values: Mapping[str, object], *, tokenizer: Encoder | None = None) -> Edit:
    """An edit from JSON: {"kind": "add_tags", "tags": ["smile"], "at": "end"}; the names are those of the classes' fields.

    `truncate_tokens` needs the tokenizer. Raises SettingError naming what is wrong.
    """
    kind = _KINDS.get(str(values.get("kind")))
    if kind is None:
        raise SettingError(f"There is no edit {values.get('kind')}", remedy=f"use {', '.join(_KINDS)}")
    fields = {field.name: field for field in dataclasses.fields(kind) if field.name != "tokenizer"}
    given = {name: value for name, value in values.items() if name != "kind"}
    if unknown := sorted(set(given) - set(fields)):
        raise SettingError(f"The edit {values['kind']} has no {unknown[0]}", remedy=f"use {', '.join(fields) or 'nothing'}")
    absent = [name for name, field in fields.items() if field.default is dataclasses.MISSING and name not in given]
    if absent:
        raise SettingError(f"The edit {values['kind']} needs {absent[0]}")
    arguments = {name: _checked(name, value) for name, value in given.items()}
    if kind is TruncateTokens:
        if tokenizer is None:
            raise SettingError("Captions cannot be cut by tokens", why="there is no tokenizer")
        arguments["tokenizer"] = tokenizer
    return kind(**arguments)


def _checked(name: str, value: object) -> object:
    """A field's value of the right kind; the field's name decides."""
    if name == "tags":
        if isinstance(value, str):
            return tuple(split_tags(value))
        if isinstance(value, (list, tuple)) and all(isinstance(tag, str) for tag in value):
            return tuple(value)
        raise SettingError("tags of an edit is a list of tags")
    if name in ("n", "keep"):
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise SettingError(f"{name} of an edit is a whole number")
    elif not isinstance(value, str):
        raise SettingError(f"{name} of an edit is a text")
    elif name in _CHOICES and value not in _CHOICES[name]:
        raise SettingError(f"{name} of an edit is {' or '.join(_CHOICES[name])}, not {value}")
    elif len(value) > MOST_CHARACTERS:
        raise SettingError(f"{name} of an edit is longer than {MOST_CHARACTERS} characters", remedy="shorten it")
    return value


def _key(tag: str) -> str:
    return tag.strip().casefold()


def _split(tags: Iterable[str]) -> list[str]:
    """Tags that were typed with commas between them count as several."""
    return [part for tag in tags for part in split_tags(tag)]


def _joined(caption: str, tags: list[str]) -> str:
    """The tags as a caption; the caption itself where they are its own."""
    return caption if tags == split_tags(caption) else ", ".join(tags)


def _named(tags: Sequence[str]) -> str:
    return _short(tags[0] if len(tags) == 1 else f"{len(tags)} tags") if tags else "nothing"


def _short(text: str) -> str:
    return (text if len(text) <= 30 else f"{text[:29]}…") or "nothing"
