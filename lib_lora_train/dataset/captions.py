"""Captions: found beside the image, and varied from step to step in kohya's order."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from lib_lora_train.errors import DatasetError

CAPTION_SUFFIXES = (".txt", ".caption")


class Tokenizer(Protocol):
    """What counts a caption's tokens; `model.sd.tokens.clip_tokenizer()` is one."""

    def encode(self, text: str) -> Sequence[int]:
        """The tokens of `text`."""
        ...


def find_captions(files: Sequence[Path]) -> dict[str, list[Path]]:
    """Caption files by the stem they share with their image; `.txt` comes before `.caption`."""
    found: dict[str, list[Path]] = {}
    for suffix in CAPTION_SUFFIXES:
        for file in files:
            if file.suffix.lower() == suffix:
                found.setdefault(file.stem, []).append(file)
    return found


def read_caption(path: Path) -> str:
    """The text of a caption file, stripped; a byte order mark is accepted.

    Raises DatasetError naming the file if it is not UTF-8 text or cannot be read.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DatasetError(
            f"The caption file {path} is not UTF-8 text", why=f"byte {error.start} is not valid",
            remedy="save it again with the encoding UTF-8") from error
    except OSError as error:
        raise DatasetError(f"The caption file {path} cannot be read", why=str(error)) from error
    if "\0" in text:
        raise DatasetError(
            f"The caption file {path} is not UTF-8 text", why="it holds zero bytes",
            remedy="save it again with the encoding UTF-8")
    return text.strip()


@dataclass(frozen=True)
class CaptionFile:
    """What training uses of a caption file, and what is odd about it."""

    file: Path
    line: str  # the first that is not empty; "" where the file cannot be read
    several_lines: bool = False
    several_files: bool = False  # the image has a .txt and a .caption; the .txt is used
    error: DatasetError | None = None


def first_line(text: str) -> str:
    """The first line that is not empty: what kohya's trainer uses of a caption file."""
    return next((line.strip() for line in text.splitlines() if line.strip()), "")


def split_tags(caption: str) -> list[str]:
    """The comma-separated parts of a caption, stripped; empty parts are left out."""
    return [tag for part in caption.split(",") if (tag := part.strip())]


def count_tags(captions: Iterable[str]) -> dict[str, int]:
    """How many captions hold each tag, the most frequent first, then by name.

    Spellings that differ in case only are one tag, shown as it is written most often.
    """
    spellings: dict[str, Counter[str]] = {}
    for caption in captions:
        for key, tag in {tag.casefold(): tag for tag in split_tags(caption)}.items():
            spellings.setdefault(key, Counter())[tag] += 1
    counts = [(forms.most_common(1)[0][0], sum(forms.values())) for forms in spellings.values()]
    return dict(sorted(counts, key=lambda item: (-item[1], item[0])))


def with_trigger_word(caption: str, trigger_word: str) -> str:
    """The caption with the trigger word as its first tag, unless it already is one of its tags.

    Compared without regard to case, because CLIP's tokens are lower case. A trigger of several tags
    ("sks, armour") adds those that are missing.
    """
    present = {tag.casefold() for tag in split_tags(caption)}
    missing = [tag for tag in split_tags(trigger_word) if tag.casefold() not in present]
    return ", ".join([*missing, caption.strip()] if caption.strip() else missing)


def process_caption(
    caption: str, *, rng: random.Random, trigger_word: str = "", shuffle_caption: bool = False, keep_tokens: int = 0,
    caption_dropout_rate: float = 0.0, caption_tag_dropout_rate: float = 0.0,
) -> str:
    """The caption of one visit, varied in kohya's order (sd-scripts, `process_caption`).

    trigger word → dropout of the caption → split at commas → `keep_tokens` → shuffle → dropout
    of single tags → join. Beyond kohya, the tags of the trigger word are protected: never dropped
    singly, and where they open the caption, never shuffled (as if `keep_tokens` counted them).
    A caption that is neither shuffled nor thinned is returned as written. Same rng state, same result.
    """
    caption = with_trigger_word(caption, trigger_word)
    if caption_dropout_rate > 0 and rng.random() < caption_dropout_rate:
        return ""
    if not shuffle_caption and caption_tag_dropout_rate <= 0:
        return caption
    tags = split_tags(caption)
    protected = {tag.casefold() for tag in split_tags(trigger_word)}
    opening = next((i for i, tag in enumerate(tags) if tag.casefold() not in protected), len(tags))
    kept = max(keep_tokens, opening)
    fixed, flexible = tags[:kept], tags[kept:]
    if shuffle_caption:
        rng.shuffle(flexible)
    if caption_tag_dropout_rate > 0:
        # One draw a tag, protected or not, so that a trigger word does not change the fate of the others.
        draws = [rng.random() for _ in flexible]
        flexible = [tag for tag, draw in zip(flexible, draws, strict=True)
                    if draw >= caption_tag_dropout_rate or tag.casefold() in protected]
    return ", ".join(fixed + flexible)
