"""How captions vary from step to step: kohya's settings, in kohya's order (sd-scripts, `process_caption`, 48d368fa).

    prefix, suffix, trigger word → dropout of the caption → one line → wildcards → fixed and flexible tags → tag warm-up →
    shuffle → dropout of single tags → separators within tags

Unlike there, prefix and suffix belong to every line, and the separator of kept tags never stays in a caption. Beyond kohya the
tags of the trigger word are protected: never left out singly, and where they open the caption, never shuffled.
"""

from __future__ import annotations

import itertools
import math
import random
import re
from collections.abc import Callable, Iterable, Iterator, Sequence

from lib_lora_train.dataset.captions import split_tags, tag_key, with_trigger_word
from lib_lora_train.dataset.examples import Example
from lib_lora_train.settings import CaptionSettings

FEW_CAPTIONS = 4096  # more than one an image: so many are encoded before the training
_WILDCARD = re.compile(r"\{([^}]+)\}")
_BRACKETS = {"{{": "\x02", "}}": "\x03"}  # written twice they mean themselves; no caption holds control characters


def written(text: str, chosen: CaptionSettings, *, trigger_word: str = "") -> str:
    """One caption of an image with what is the same at each step: prefix, suffix, and the trigger word in front."""
    text = " ".join(part for part in (chosen.caption_prefix, text, chosen.caption_suffix) if part)
    return with_trigger_word(text, trigger_word, separators=_separators(chosen))


def plain(text: str, chosen: CaptionSettings) -> str:
    """What a caption says where nothing varies: the first of each wildcard's words, and no separators but that of tags."""
    text = "".join(words[0] for words in _alternatives(text, chosen))
    return _arranged(text, chosen, protected=frozenset(), shown=None, rng=None)


def process_caption(lines: Sequence[str], chosen: CaptionSettings, *, rng: random.Random, trigger_word: str = "",
                    epoch: int = 1, step: int = 0, total_steps: int = 0) -> str:
    """The caption of one visit to an image whose captions are `lines`. Same rng state, same result.

    `epoch` is counted from 1; `step` of `total_steps` were made before. A caption whose tags do not vary is returned
    as written.
    """
    if chosen.caption_dropout_rate > 0 and rng.random() < chosen.caption_dropout_rate:
        return ""
    if chosen.caption_dropout_every_n_epochs and epoch % chosen.caption_dropout_every_n_epochs == 0:
        return ""
    line = lines[0] if len(lines) == 1 else rng.choice(lines)
    text = "".join(words[0] if len(words) == 1 else rng.choice(words) for words in _alternatives(line, chosen))
    text = with_trigger_word(text, trigger_word, separators=_separators(chosen))
    return _arranged(text, chosen, protected=_protected(trigger_word), shown=_warm_up(chosen, step, total_steps), rng=rng)


def known_captions(examples: Iterable[Example]) -> tuple[str, ...] | None:
    """All captions that can occur, in the order of the examples; None where they are too many to encode beforehand, because
    tags are shuffled or dropped, or for their wildcards."""
    found: dict[str, None] = {}
    dropped = False
    for number, example in enumerate(examples, 1):
        chosen = example.subset.captions
        if chosen.shuffle_caption or chosen.caption_tag_dropout_rate > 0:
            return None
        for caption in _outcomes(example.lines, chosen, trigger_word=example.trigger_word):
            found[caption] = None
            if len(found) > number + FEW_CAPTIONS:
                return None
        dropped = dropped or chosen.caption_dropout_rate > 0 or chosen.caption_dropout_every_n_epochs > 0
    return tuple(found | {"": None} if dropped else found)


def _outcomes(lines: Sequence[str], chosen: CaptionSettings, *, trigger_word: str) -> Iterator[str]:
    """Every caption that these can become, except for the empty one; some may come twice."""
    for words in itertools.chain.from_iterable(itertools.product(*_alternatives(line, chosen)) for line in lines):
        text = with_trigger_word("".join(words), trigger_word, separators=_separators(chosen))
        counts = range(chosen.token_warmup_min, len(_split(text, chosen))) if chosen.token_warmup_step else ()
        for shown in (*(lambda _, count=count: count for count in counts), None):
            yield _arranged(text, chosen, protected=_protected(trigger_word), shown=shown, rng=None)


def _alternatives(text: str, chosen: CaptionSettings) -> list[list[str]]:
    """A caption's parts, each with the words of which one is drawn: only one outside of wildcards."""
    if not chosen.enable_wildcard:
        return [[text]]
    for brackets, mark in _BRACKETS.items():
        text = text.replace(brackets, mark)
    parts = [part.split("|") if number % 2 else [part] for number, part in enumerate(_WILDCARD.split(text))]
    return [[word.replace("\x02", "{").replace("\x03", "}") for word in words] for words in parts]


def _arranged(text: str, chosen: CaptionSettings, *, protected: frozenset[str], shown: Callable[[int], int] | None,
              rng: random.Random | None) -> str:
    """The caption with its flexible tags thinned out and shuffled. `shown`: of so many flexible tags, how many the warm-up
    shows; None shows all. Without `rng` nothing is drawn."""
    separator, within = chosen.keep_tokens_separator, chosen.secondary_separator
    varied = chosen.shuffle_caption or chosen.caption_tag_dropout_rate > 0 or chosen.token_warmup_step
    if varied or (separator and separator in text):
        def is_protected(tag: str) -> bool:
            return any(tag_key(part) in protected for part in (tag.split(within) if within else [tag]))

        fixed, flexible, tail = _parted(text, chosen, is_protected=is_protected)
        if shown is not None:
            count = shown(len(flexible))
            flexible = flexible[:count] + list(filter(is_protected, flexible[count:]))
        if rng is not None and chosen.shuffle_caption:
            rng.shuffle(flexible)
        if rng is not None and (rate := chosen.caption_tag_dropout_rate) > 0:
            # One draw a tag, protected or not, so that a trigger word does not change the fate of the others.
            draws = [rng.random() for _ in flexible]
            flexible = [tag for tag, draw in zip(flexible, draws, strict=True) if draw >= rate or is_protected(tag)]
        text = ", ".join([*fixed, *flexible, *tail])
    return text.replace(within, chosen.caption_separator) if within else text


def _parted(text: str, chosen: CaptionSettings, *, is_protected: Callable[[str], bool]
            ) -> tuple[list[str], list[str], list[str]]:
    """(tags that stay in front, flexible ones, those that stay at the end)."""
    if chosen.keep_tokens_separator and chosen.keep_tokens_separator in text:
        parts = [_split(part, chosen) for part in text.split(chosen.keep_tokens_separator, 2)]
        return parts[0], parts[1], parts[2] if len(parts) == 3 else []
    tags = _split(text, chosen)
    opening = next((number for number, tag in enumerate(tags) if not is_protected(tag)), len(tags))
    kept = max(chosen.keep_tokens, opening)
    return tags[:kept], tags[kept:], []


def _split(text: str, chosen: CaptionSettings) -> list[str]:
    if chosen.caption_separator == ",":
        return split_tags(text)
    return [tag.strip() for tag in text.split(chosen.caption_separator or ",") if tag.strip()]


def _warm_up(chosen: CaptionSettings, step: int, total_steps: int) -> Callable[[int], int] | None:
    """Of so many flexible tags, how many are shown after `step` steps; None where that is all of them."""
    steps, least = chosen.token_warmup_step, chosen.token_warmup_min
    steps = math.floor(steps * total_steps) if steps < 1 else steps
    return (lambda count: math.floor(step * ((count - least) / steps)) + least) if 0 < steps > step else None


def _protected(trigger_word: str) -> frozenset[str]:
    return frozenset(map(tag_key, split_tags(trigger_word)))


def _separators(chosen: CaptionSettings) -> tuple[str, ...]:
    """All that can stand between two tags, that of tags first."""
    return tuple(filter(None, (chosen.caption_separator, chosen.keep_tokens_separator, chosen.secondary_separator)))
