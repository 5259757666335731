"""Captions from step to step: which can come, and how probable each is, exactly, as sd-scripts' `process_caption` has it."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path

import pytest

from lib_lora_train.dataset.caption_variation import FEW_CAPTIONS, known_captions, plain, process_caption, written
from lib_lora_train.dataset.examples import Example
from lib_lora_train.settings import CaptionSettings, parse
from lib_lora_train.settings.dataset_config import SubsetSettings, subsets_of


class Draw:
    """A number from 0 to 1 that is only ever compared with a rate."""

    def __init__(self, decide: Callable[[Sequence[tuple[object, Fraction]]], object]) -> None:
        self._decide = decide

    def __lt__(self, rate: float) -> object:
        share = Fraction(str(rate))
        return self._decide([(True, share), (False, 1 - share)])

    def __ge__(self, rate: float) -> object:
        return not self < rate


class EveryDraw(random.Random):
    """Takes the branches that `path` names, then the first ones; `probability` is that of what was drawn."""

    def __init__(self, path: Sequence[int]) -> None:
        self.path, self.counts, self.probability = list(path), list[int](), Fraction(1)

    def _decide(self, branches: Sequence[tuple[object, Fraction]]) -> object:
        branches = [branch for branch in branches if branch[1]]
        number = self.path[len(self.counts)] if len(self.counts) < len(self.path) else 0
        self.counts.append(len(branches))
        value, share = branches[number]
        self.probability *= share
        return value

    def random(self) -> Draw:
        return Draw(self._decide)

    def choice(self, values):
        return self._decide([(value, Fraction(1, len(values))) for value in values])

    def shuffle(self, values) -> None:
        orders = list(itertools.permutations(values))
        values[:] = self._decide([(order, Fraction(1, len(orders))) for order in orders])


def distribution(*lines: str, trigger: str = "", epoch: int = 1, step: int = 0, steps: int = 0,
                 **changes) -> dict[str, Fraction]:
    """Every caption that can come, and how probable it is: all branches of the draws are gone through."""
    chosen, found, path = parse(changes).captions, dict[str, Fraction](), list[int]()
    while True:
        rng = EveryDraw(path)
        caption = process_caption(lines, chosen, rng=rng, trigger_word=trigger, epoch=epoch, step=step, total_steps=steps)
        found[caption] = found.get(caption, Fraction(0)) + rng.probability
        path = (path + [0] * len(rng.counts))[:len(rng.counts)]
        while path and path[-1] + 1 == rng.counts[len(path) - 1]:
            path.pop()
        if not path:
            assert sum(found.values()) == 1
            return found
        path[-1] += 1


def evenly(*captions: str) -> dict[str, Fraction]:
    return {caption: Fraction(1, len(captions)) for caption in captions}


def test_a_caption_that_is_not_varied_stays_as_it_was_written() -> None:
    assert distribution("a  cat,on a mat,") == {"a  cat,on a mat,": 1}


def test_kept_tags_stay_in_front_and_every_order_of_the_others_is_equally_probable() -> None:
    orders = [f"k1, k2, {', '.join(order)}" for order in itertools.permutations("abc")]
    assert distribution("k1, k2, a, b, c", shuffle_caption=True, keep_tokens=2) == evenly(*orders)
    assert distribution("a,b,c", shuffle_caption=True, keep_tokens=0) == evenly(*map(", ".join, itertools.permutations("abc")))


def test_around_the_separator_tags_stay_in_front_and_at_the_end_whatever_keep_tokens_says() -> None:
    changes = {"keep_tokens_separator": "|||", "keep_tokens": 3}
    assert distribution("k, l ||| a, b ||| y, z", shuffle_caption=True, **changes) == evenly(
        "k, l, a, b, y, z", "k, l, b, a, y, z")
    assert distribution("k, l ||| a, b", shuffle_caption=True, **changes) == evenly("k, l, a, b", "k, l, b, a")
    assert distribution("k ||| a, b ||| z", caption_tag_dropout_rate=1.0, **changes) == {"k, z": 1}
    assert distribution("k ||| a, b ||| z", **changes) == {"k, a, b, z": 1}
    assert distribution("k ||| a") == {"k ||| a": 1}, "without the setting it is text"


def test_tags_with_the_secondary_separator_are_shuffled_and_dropped_as_one() -> None:
    changes = {"secondary_separator": ";;;", "keep_tokens": 0}
    assert distribution("a;;;b, c", shuffle_caption=True, **changes) == evenly("a,b, c", "c, a,b")
    assert distribution("a;;;b, c", caption_tag_dropout_rate=0.5, **changes) == evenly("a,b, c", "a,b", "c", "")
    assert distribution("a;;;b", **changes) == {"a,b": 1}


def test_tags_may_be_parted_by_another_character() -> None:
    assert distribution("a, b; c", shuffle_caption=True, keep_tokens=0, caption_separator=";") == evenly("a, b, c", "c, a, b")


def test_each_word_of_a_wildcard_and_each_line_is_equally_probable() -> None:
    assert distribution("a {red|blue} hat", enable_wildcard=True) == evenly("a red hat", "a blue hat")
    assert distribution("{a|b} {c|d|e}", enable_wildcard=True) == evenly(*map(" ".join, itertools.product("ab", "cde")))
    assert distribution("{{a|b}} {c}", enable_wildcard=True) == {"{a|b} c": 1}
    assert distribution("one", "{two|2}", enable_wildcard=True) == {
        "one": Fraction(1, 2), "two": Fraction(1, 4), "2": Fraction(1, 4)}
    assert distribution("a {red|blue} hat") == {"a {red|blue} hat": 1}


def test_captions_are_dropped_at_their_rate_and_in_every_nth_epoch() -> None:
    assert distribution("k, a", caption_dropout_rate=0.25) == {"": Fraction(1, 4), "k, a": Fraction(3, 4)}
    assert distribution("k", trigger="k", caption_dropout_rate=1.0) == {"": 1}
    empty = [epoch for epoch in range(1, 8) if distribution("k", caption_dropout_every_n_epochs=3, epoch=epoch) == {"": 1}]
    assert empty == [3, 6]


def test_each_tag_is_dropped_at_its_rate_but_those_that_are_kept() -> None:
    assert distribution("k, a, b", caption_tag_dropout_rate=0.3) == {
        "k, a, b": Fraction(49, 100), "k, a": Fraction(21, 100), "k, b": Fraction(21, 100), "k": Fraction(9, 100)}


def test_tags_warm_up_as_in_sd_scripts() -> None:
    tags = [f"t{number}" for number in range(10)]

    def shown(step: int, steps: int = 100, **changes) -> int:
        (caption,) = distribution(", ".join(["k", *tags]), step=step, steps=steps, **changes)
        assert caption == ", ".join(["k", *tags][:caption.count(",") + 1])
        return caption.count(",")

    for step in (0, 1, 19, 20, 21, 39, 40, 99):  # from 1 (the default) or 3 to 10 tags over 40 steps
        assert shown(step, token_warmup_step=40) == (10 if step >= 40 else math.floor(step * ((10 - 1) / 40)) + 1)
        assert shown(step, token_warmup_step=40, token_warmup_min=3) == (10 if step >= 40 else math.floor(step * (7 / 40)) + 3)
        assert shown(step, token_warmup_step=0.4) == shown(step, token_warmup_step=40)
    # What warms up is the captions' order, which is shuffled only then.
    assert distribution("k, a, b, c", step=1, token_warmup_step=2, shuffle_caption=True) == evenly("k, a, b", "k, b, a")


@pytest.mark.parametrize("caption", ["a, b, c", "a, sks, b", "sks, a, b", "a, b, sks"])
@pytest.mark.parametrize("changes", [{"caption_tag_dropout_rate": 1.0}, {"token_warmup_step": 9, "token_warmup_min": 0},
                                     {"caption_tag_dropout_rate": 1.0, "keep_tokens_separator": "|||"}])
def test_the_trigger_word_is_never_left_out_wherever_it_is(caption: str, changes: dict[str, object]) -> None:
    assert distribution(caption, trigger="sks", keep_tokens=0, **changes) == {"sks": 1}
    assert distribution("x ||| a;;;sks, b", trigger="sks", caption_tag_dropout_rate=1.0, secondary_separator=";;;",
                        keep_tokens_separator="|||") == {"x, a,sks": 1}


def test_an_opening_trigger_word_is_not_shuffled_away() -> None:
    assert set(distribution("a, b", trigger="sks", shuffle_caption=True, keep_tokens=0)) == {"sks, a, b", "sks, b, a"}


def test_prefix_and_suffix_are_put_around_a_caption_with_a_space_and_the_trigger_word_before_them() -> None:
    chosen = CaptionSettings(caption_prefix="best,", caption_suffix="by zzk", keep_tokens_separator="|||")
    assert written("a cat", chosen) == "best, a cat by zzk" and written("", CaptionSettings(caption_prefix="best")) == "best"
    assert written("a cat", chosen, trigger_word="sks") == "sks, best, a cat by zzk"
    assert written("best ||| sks ||| b", chosen, trigger_word="sks") == "best, best ||| sks ||| b by zzk"


def test_what_a_caption_says_by_itself_is_its_first_words_without_separators() -> None:
    chosen = CaptionSettings(enable_wildcard=True, keep_tokens_separator="|||", secondary_separator=";;;", shuffle_caption=True,
                             caption_tag_dropout_rate=0.9, token_warmup_step=5)
    assert plain("k ||| {red|blue} hat;;;scarf, b", chosen) == "k, red hat,scarf, b"


VARIED = {
    "nothing": {}, "words": {"enable_wildcard": True}, "dropped": {"caption_dropout_rate": 0.3, "enable_wildcard": True},
    "warm-up": {"token_warmup_step": 7, "enable_wildcard": True}, "separators": {"keep_tokens_separator": "|||"},
    "epochs": {"caption_dropout_every_n_epochs": 2, "secondary_separator": ";;;"}}


@pytest.mark.parametrize("changes", VARIED.values(), ids=VARIED.keys())
def test_the_captions_that_are_known_beforehand_are_those_that_can_come(changes: dict[str, object]) -> None:
    lines = ("{x|y}, a ||| b, c;;;d", "sks, e")
    settings = parse({"trigger_word": "sks", **changes})
    example = Example(Path("a.png"), "", 1, "", 64, 64, captions=lines, subset=subsets_of(settings)[0])
    can_come = set().union(*(distribution(*lines, trigger="sks", epoch=epoch, step=step, **changes)
                             for epoch, step in itertools.product((1, 2), range(8))))
    assert set(known_captions([example])) == can_come


def test_captions_that_are_too_many_are_not_listed() -> None:
    def known(caption: str, **changes) -> tuple[str, ...] | None:
        subset = SubsetSettings(captions=parse(changes).captions)
        return known_captions([Example(Path("a.png"), caption, 1, "", 64, 64, subset=subset)])

    two = "{a|b}"
    assert len(known(" ".join([two] * 12), enable_wildcard=True)) == FEW_CAPTIONS == 2 ** 12
    assert known(" ".join([two] * 13), enable_wildcard=True) is None
    assert known(" ".join([two] * 60), enable_wildcard=True) is None
    assert known("a, b", shuffle_caption=True) is None and known("a, b", caption_tag_dropout_rate=0.1) is None


def test_the_same_randomness_gives_the_same_caption() -> None:
    chosen = parse({"shuffle_caption": True, "caption_tag_dropout_rate": 0.3, "caption_dropout_rate": 0.1}).captions
    assert len({process_caption(("a, b, c, d, e, f",), chosen, rng=random.Random(7)) for _ in range(3)}) == 1
