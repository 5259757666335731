"""What can be done to captions: small frozen values, each a function from a caption to a caption.

Tags are compared by `tag_key`. A caption that an edit has nothing to do with stays as it was written, with its
spaces and empty tags.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, Literal

from pydantic.dataclasses import dataclass

from lib_lora_train.dataset.captions import SEPARATOR, Tokenizer, join_edited, split_to_edit, tag_key
from lib_lora_train.errors import SettingError
from lib_lora_train.studio.captions.patterns import Pattern
from lib_lora_train.studio.requests import Count, Text, validated

Change = Callable[[str], str]
Captions = Callable[[], Iterable[str]]

_EMPTY_TAG = re.compile(r"(^|,)\s*(,|$)")


class Edit:
    """One kind of change to captions: what all kinds share."""

    wording: ClassVar[str]  # the text of the undo button, with the names of its fields
    replaces_unreadable: ClassVar[bool] = False  # whether it also replaces captions that cannot be read

    def label(self) -> str:
        """The text of the undo button."""
        return self.wording.format(**{field.name: _shown(getattr(self, field.name)) for field in dataclasses.fields(self)})

    def change(self, captions: Captions) -> Change:
        """The function for one pass; `captions()` gives every caption of the dataset, for edits that count.

        It and this raise SettingError for an edit that cannot be done.
        """
        return self._change(captions)

    def _change(self, captions: Captions) -> Change:
        raise NotImplementedError


@dataclass(frozen=True)
class AddTags(Edit):
    """Adds the tags a caption does not have yet, in front or behind."""

    wording: ClassVar[str] = "Add {tags}"
    tags: tuple[Text, ...]
    at: Literal["start", "end"] = "end"

    def _change(self, captions: Captions) -> Change:
        tags = list({tag_key(tag): tag for tag in _split(self.tags)}.values())

        def change(caption: str) -> str:
            present = set(map(tag_key, split_to_edit(caption)))
            missing = [tag for tag in tags if tag_key(tag) not in present]
            own = [caption.strip(" ,")] if present else []
            return ", ".join([*missing, *own] if self.at == "start" else [*own, *missing]) if missing else caption
        return change


@dataclass(frozen=True)
class RemoveTags(Edit):
    """Removes these tags wherever they are."""

    wording: ClassVar[str] = "Remove {tags}"
    tags: tuple[Text, ...]

    def _change(self, captions: Captions) -> Change:
        gone = set(map(tag_key, _split(self.tags)))
        return lambda caption: _with_tags(caption, [tag for tag in split_to_edit(caption) if tag_key(tag) not in gone])


@dataclass(frozen=True)
class ReplaceTag(Edit):
    """Puts `new` (one tag, several, or none) in place of the tag `old`; a `new` that would then occur twice is kept once."""

    wording: ClassVar[str] = "Replace {old} by {new}"
    old: Text
    new: Text

    def _change(self, captions: Captions) -> Change:
        old, new = tag_key(self.old), split_to_edit(self.new)
        once = set(map(tag_key, new))

        def change(caption: str) -> str:
            tags = split_to_edit(caption)
            if old not in map(tag_key, tags):
                return caption
            result: list[str] = []
            seen: set[str] = set()
            for tag in tags:
                for part in new if tag_key(tag) == old else [tag]:
                    if tag_key(part) in once and tag_key(part) in seen:
                        continue
                    seen.add(tag_key(part))
                    result.append(part)
            return join_edited(result)
        return change


@dataclass(frozen=True)
class ReplaceText(Edit):
    """Replaces a text wherever it occurs, inside tags too."""

    wording: ClassVar[str] = "Replace the text {old} by {new}"
    old: Text
    new: Text

    def _change(self, captions: Captions) -> Change:
        if not self.old:
            raise SettingError("There is no text to look for", remedy="write what is to be replaced")
        pattern = re.compile(re.escape(self.old), re.IGNORECASE)  # a plain text: it cannot take long
        return lambda caption: pattern.sub(lambda _: self.new, caption)


@dataclass(frozen=True)
class ReplaceRegex(Edit):
    r"""Replaces every match of a regular expression; `new` may name its groups (\1)."""

    wording: ClassVar[str] = "Replace {pattern} by {new}"
    pattern: Text
    new: Text

    def _change(self, captions: Captions) -> Change:
        if not self.pattern:
            raise SettingError("There is no regular expression", remedy="write what is to be replaced")
        pattern = Pattern(self.pattern)
        return lambda caption: pattern.replaced(caption, self.new)


@dataclass(frozen=True)
class SortTags(Edit):
    """Sorts the tags by name, or the most frequent of the dataset first; the first `keep` stay where they are."""

    wording: ClassVar[str] = "Sort tags by {by}"
    by: Literal["name", "frequency"] = "name"
    keep: Count = 0

    def _change(self, captions: Captions) -> Change:
        counts: Counter[str] = Counter()
        if self.by == "frequency":
            for caption in captions():
                counts.update(set(map(tag_key, split_to_edit(caption))))

        def change(caption: str) -> str:
            ordered, kept = list[str](), self.keep
            for is_separator, section in itertools.groupby(split_to_edit(caption), key=SEPARATOR.__eq__):
                tags = list(section)
                ordered += tags if is_separator else tags[:kept] + sorted(
                    tags[kept:], key=lambda tag: (-counts[tag_key(tag)], tag_key(tag)))
                kept = 0
            return _with_tags(caption, ordered)
        return change


@dataclass(frozen=True)
class Deduplicate(Edit):
    """Keeps the first of tags that occur twice, and leaves out empty ones."""

    wording: ClassVar[str] = "Remove double tags"
    def _change(self, captions: Captions) -> Change:
        def change(caption: str) -> str:
            first: dict[str, str] = {}
            tags = split_to_edit(caption)
            for number, tag in enumerate(tags):
                first.setdefault(f"{tag}{number}" if tag == SEPARATOR else tag_key(tag), tag)
            return join_edited(first.values()) if len(first) < len(tags) or _EMPTY_TAG.search(caption) else caption
        return change


@dataclass(frozen=True)
class TruncateTokens(Edit):
    """Leaves out tags at the end until at most `n` tokens are left; a single longer tag loses words at its end."""

    wording: ClassVar[str] = "Cut to {n} tokens"
    n: Count
    tokenizer: Any  # a Tokenizer

    def _change(self, captions: Captions) -> Change:
        if self.n < 1:
            raise SettingError(f"A caption cannot be cut to {self.n} tokens", remedy="ask for at least one")

        def fits(text: str) -> bool:
            return len(self.tokenizer.encode(text)) <= self.n

        def longest(parts: list[str], join: Callable[[Iterable[str]], str]) -> str:
            fitting, too_many = 0, len(parts)  # halving: a caption is encoded a few times and not once a tag
            while too_many - fitting > 1:
                middle = (fitting + too_many) // 2
                fitting, too_many = (middle, too_many) if fits(join(parts[:middle])) else (fitting, middle)
            return join(parts[:fitting])

        def change(caption: str) -> str:
            if fits(caption):
                return caption
            tags = split_to_edit(caption)
            return join_edited(tags) if fits(join_edited(tags)) else longest(tags, join_edited) or longest(
                tags[0].split(), " ".join)
        return change


@dataclass(frozen=True)
class SetCaption(Edit):
    """Replaces the caption."""

    wording: ClassVar[str] = "Edit caption"
    text: Text
    replaces_unreadable: ClassVar[bool] = True

    def _change(self, captions: Captions) -> Change:
        return lambda _: self.text


_KINDS: dict[str, type] = {
    "add_tags": AddTags, "remove_tags": RemoveTags, "replace_tag": ReplaceTag, "replace_text": ReplaceText,
    "replace_regex": ReplaceRegex, "sort_tags": SortTags, "deduplicate": Deduplicate, "truncate_tokens": TruncateTokens,
    "set_caption": SetCaption}


def edit_from_dict(values: Mapping[str, object], *, tokenizer: Tokenizer | None = None) -> Edit:
    """An edit from JSON: {"kind": "add_tags", "tags": ["smile"], "at": "end"}; the names are those of the classes' fields.

    `truncate_tokens` needs the tokenizer. Raises SettingError naming what is wrong.
    """
    kind = _KINDS.get(str(values.get("kind")))
    if kind is None:
        raise SettingError(f"There is no edit {values.get('kind')}", remedy=f"use {', '.join(_KINDS)}")
    given = {name: value for name, value in values.items() if name != "kind"}
    if isinstance(given.get("tags"), str):
        given["tags"] = split_to_edit(given["tags"])
    if kind is TruncateTokens:
        if tokenizer is None:
            raise SettingError("Captions cannot be cut by tokens", why="there is no tokenizer")
        given["tokenizer"] = tokenizer
    return validated(kind, given, what=f"edit {values['kind']}")


def _split(tags: Iterable[str]) -> list[str]:
    """Tags that were typed with commas between them count as several."""
    return [part for tag in tags for part in split_to_edit(tag)]


def _with_tags(caption: str, tags: list[str]) -> str:
    """The tags as a caption; the caption itself where they are its own."""
    return caption if tags == split_to_edit(caption) else join_edited(tags)


def _shown(value: object) -> str:
    """A field's value as the label shows it."""
    if isinstance(value, tuple):
        value = value[0] if len(value) == 1 else f"{len(value)} tags" if value else ""
    text = str(value)
    return (text if len(text) <= 30 else f"{text[:29]}…") or "nothing"
