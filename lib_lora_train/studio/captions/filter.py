"""Which captions are meant: by tags, by text, by a regular expression. Upper and lower case are the same throughout,
because CLIP's tokens are lower case."""

from __future__ import annotations

from collections.abc import Callable

from pydantic import StrictBool
from pydantic.dataclasses import dataclass

from lib_lora_train.dataset.captions import folded, split_to_edit, tag_key
from lib_lora_train.studio.captions.patterns import Pattern
from lib_lora_train.studio.requests import Text


@dataclass(frozen=True)
class Filter:
    """Every condition that is given must hold; an empty filter accepts everything."""

    all_of: tuple[Text, ...] = ()  # carries each of these tags
    any_of: tuple[Text, ...] = ()  # carries at least one
    none_of: tuple[Text, ...] = ()  # carries none
    prefix: Text = ""  # a tag begins so
    suffix: Text = ""  # a tag ends so
    text: Text = ""  # the caption holds it anywhere
    regex: Text = ""  # the caption matches it anywhere
    changed_only: StrictBool = False  # not saved yet (the store knows)
    empty_only: StrictBool = False  # no caption
    problem: Text = ""  # a code of the last report, or "any" (the dataset's session knows)

    def accepts(self) -> Callable[[str], bool]:
        """A function of the caption, for one pass; `changed_only` and `problem` are left to the caller.

        Raises SettingError for a bad regular expression; the function raises it for one that takes too long.
        """
        all_of, any_of, none_of = (frozenset(map(tag_key, tags)) - {""} for tags in (self.all_of, self.any_of, self.none_of))
        prefix, suffix, text = folded(self.prefix).lstrip(), folded(self.suffix).rstrip(), folded(self.text)
        pattern = Pattern(self.regex) if self.regex else None
        by_tag = bool(all_of or any_of or none_of or prefix or suffix)

        def accepts(caption: str) -> bool:
            if self.empty_only and caption:
                return False
            if by_tag or text:
                whole = folded(caption)
                if text and text not in whole:
                    return False
                if by_tag and not tags_fit([" ".join(tag.split()) for tag in split_to_edit(whole)]):
                    return False
            return pattern is None or pattern.found_in(caption)

        def tags_fit(tags: list[str]) -> bool:
            present = set(tags)
            return (all_of <= present and not none_of & present and (not any_of or bool(any_of & present))
                    and (not prefix or any(tag.startswith(prefix) for tag in tags))
                    and (not suffix or any(tag.endswith(suffix) for tag in tags)))

        return accepts
