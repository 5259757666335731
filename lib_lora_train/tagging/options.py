"""What the user chooses when images are captioned. Names are those of kohya's tagger script where it has the option."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping

from lib_lora_train.errors import SettingError
from lib_lora_train.settings.field import Declaration, declarations, read, setting

MODES = ("overwrite", "prepend", "append", "only_empty")


@dataclasses.dataclass(frozen=True)
class TagOptions:
    """How images are captioned, and what becomes of the captions they have."""

    mode: str = setting(
        "overwrite", "Existing captions", "overwrite replaces them, prepend and append keep them and add what is new, "
        "only_empty leaves pictures that have one alone.", choices=MODES, in_view=True)
    trigger_word: str = setting(
        "", "Trigger word", "Put first in every caption that is written.", in_view=True)
    general_threshold: float = setting(
        0.35, "Threshold", "How sure a tagger must be of a tag. Lower finds more and errs more.", minimum=0, maximum=1,
        step=0.05, in_view=True)
    character_threshold: float = setting(
        0.85, "Character threshold", "How sure a tagger must be of a character's name. Lower finds more and errs more.",
        minimum=0, maximum=1, step=0.05, in_view=True)
    undesired_tags: str = setting(
        "", "Unwanted tags", "Tags that are never added, separated by commas.", in_view=True)
    character_tags: bool = setting(True, "Character names", "Add the names of characters that are recognised.")
    character_tags_first: bool = setting(
        False, "Character names first", "Put characters' names before the other tags.")
    use_rating_tags: bool = setting(
        False, "Rating", "Add the tagger's rating of the picture (general, sensitive, …).")
    remove_underscore: bool = setting(
        True, "Spaces for underscores", "Write long hair for long_hair. Faces like ^_^ stay.")
    escape_brackets: bool = setting(
        False, "Escape brackets", "Write saber \\(fate\\) as in a prompt. Training reads captions as plain text and does not "
        "need it.")
    template: str = setting(
        "{trigger}, {folder}, {name}", "Template", "The caption made by the template: {trigger} is the trigger word, {folder} "
        "the folder's name without its number, {name} the words of the file's name.")
    batch_size: int = setting(
        4, "Pictures at once", "More is faster on a graphics card and needs more memory.", minimum=1, maximum=64)
    download: bool = setting(
        False, "Download", "Fetch the WD tagger from huggingface.co (about 400 MB) where it is not there.")


OPTIONS: dict[str, Declaration] = {declaration.name: declaration for declaration in declarations(TagOptions)}


def parse_options(values: Mapping[str, object]) -> TagOptions:
    """Options from names and values as typed; what is not named keeps its default.

    Raises SettingError for an unknown name (with the nearest known one), a wrong type or a value out of range.
    """
    for name in values:
        if name not in OPTIONS:
            near = difflib.get_close_matches(name, OPTIONS, n=1)
            raise SettingError(f"There is no tagging option called {name!r}",
                               remedy=f"did you mean {near[0]!r}" if near else f"there are {', '.join(OPTIONS)}")
    return TagOptions(**{name: read(OPTIONS[name], value) for name, value in values.items()})
