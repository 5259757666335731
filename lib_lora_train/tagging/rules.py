"""From what was found to the caption: thresholds, spelling, unwanted tags, what was there before, the trigger word first."""

from __future__ import annotations

from collections.abc import Iterable

from lib_lora_train.dataset.captions import split_tags
from lib_lora_train.tagging.captioner import Description, Tag
from lib_lora_train.tagging.options import TagOptions

_ESCAPED = str.maketrans({"\\": r"\\", "(": r"\(", ")": r"\)"})
_UNESCAPED = ((r"\\", "\\"), (r"\(", "("), (r"\)", ")"))


def compose(existing: str, found: Description, options: TagOptions) -> str:
    """The caption of an image that has the caption `existing` ("" for none) and for which `found` was found.

    Every tag occurs once, compared without regard to case, underscores and escapes; which spelling stays is that of the
    earlier one. What the user wrote is otherwise kept as it is: unwanted tags are those that would be added. Captions are
    one line each.
    """
    existing = existing.strip()
    if options.mode == "only_empty" and existing:
        return existing
    new = [*split_tags(" ".join(found.text.split())), *(spelt(tag.name, options) for tag in chosen(found.tags, options))]
    unwanted = {alike(tag) for tag in split_tags(options.undesired_tags)}
    new = [tag for tag in new if alike(tag) not in unwanted]
    kept = [] if options.mode == "overwrite" else split_tags(existing)
    tags = new + kept if options.mode == "prepend" else kept + new
    return ", ".join(_once([*split_tags(options.trigger_word), *tags]))


def chosen(tags: Iterable[Tag], options: TagOptions) -> list[Tag]:
    """The tags that the options let through: the surest first, characters' names before all if so wished.

    Of the ratings only the surest can be chosen, whatever the thresholds: an image has exactly one.
    """
    ranked = sorted(tags, key=lambda tag: -tag.score)
    rating = next((tag for tag in ranked if tag.category == "rating"), None)
    characters = [tag for tag in ranked if tag.category == "character" and tag.score >= options.character_threshold]
    general = [tag for tag in ranked if tag.category == "general" and tag.score >= options.general_threshold]
    named = characters if options.character_tags else []
    # A rating describes the image as such: it does not compete with the tags of its contents.
    ending = [rating] if rating is not None and options.use_rating_tags else []
    if options.character_tags_first:
        return named + general + ending
    return sorted(named + general, key=lambda tag: -tag.score) + ending


def spelt(name: str, options: TagOptions) -> str:
    """A model's tag as it is written in a caption. A comma inside a name would end it, so it becomes a space."""
    name = " ".join(name.replace(",", " ").split())
    if options.remove_underscore and not is_face(name):
        name = name.replace("_", " ").strip()
    return name.translate(_ESCAPED) if options.escape_brackets else name


def is_face(name: str) -> bool:
    """Whether a tag is an emoticon like ^_^, 0_0 or (o)_(o), whose underscore is its mouth: no word on either side."""
    sides = name.split("_")
    return len(sides) == 2 and all(0 < len(side) and sum(map(str.isalnum, side)) <= 1 for side in sides)


def alike(tag: str) -> str:
    """What two spellings of the same tag share."""
    for written, meant in _UNESCAPED:
        tag = tag.replace(written, meant)
    return " ".join(tag.replace("_", " ").casefold().split())


def _once(tags: Iterable[str]) -> list[str]:
    seen: dict[str, str] = {}
    for tag in tags:
        seen.setdefault(alike(tag), tag)
    return list(seen.values())
