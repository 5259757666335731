"""Captions: their tags, and kohya's order of changes."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from lib_lora_train.dataset.captions import (
    count_tags,
    first_line,
    first_line_and_rest,
    process_caption,
    split_tags,
    tag_key,
    with_trigger_word,
)


def test_only_the_first_line_with_text_is_used() -> None:
    assert first_line("\n  one, two \nthree") == "one, two"
    assert first_line(" \n ") == "" and first_line(" , ，\n,") == "" and first_line(", ,\n one") == "one"


@pytest.mark.parametrize("inside", ["\u2028", "\x0b", "\x0c", "\x85", "\x1c"])
def test_only_carriage_return_and_line_feed_end_a_line(inside: str) -> None:
    assert first_line_and_rest(f"one{inside} two\r\nthree") == (f"one{inside} two", "\r\nthree")
    assert first_line("one\rtwo") == "one"


@pytest.mark.parametrize(("one", "other"), [
    ("zzk\u200b", "zzk"), ("\ufeffzzk", "ZZK"), ("cafe\u0301", "caf\u00e9"), ("red  hat", "red hat"),
    (r"saber \(fate\)", "saber (fate)"),
    ("z\u2060zk", "zzk"), ("zzk\u200d", "zzk")])
def test_what_the_tokenizer_reads_alike_is_one_tag(one: str, other: str) -> None:
    assert tag_key(one) == tag_key(other)
    assert len(count_tags([f"{one}, {other}", other])) == 1
    assert with_trigger_word(f"a, {one}", other) == f"a, {one}"


def test_commas_of_every_width_part_tags_and_emoji_and_scripts_keep_their_joiners() -> None:
    assert split_tags("a，b、c､d, e") == ["a", "b", "c", "d", "e"]
    assert split_tags("👩\u200d🚀, می\u200cخواهم") == ["👩\u200d🚀", "می\u200cخواهم"]


@pytest.mark.parametrize(("caption", "trigger", "expected"), [
    ("1girl, smile", "sks", "sks, 1girl, smile"),
    ("1girl, SKS, smile", "sks", "1girl, SKS, smile"),
    ("a photo of sks dog", "sks", "sks, a photo of sks dog"),  # not a tag of its own
    ("", "sks", "sks"), ("1girl", "", "1girl"), ("", "", ""),
    ("armour, smile", "sks, armour", "sks, armour, smile"),
])
def test_the_trigger_word_is_the_first_tag_unless_it_is_there(caption: str, trigger: str, expected: str) -> None:
    assert with_trigger_word(caption, trigger) == expected
    assert with_trigger_word(expected, trigger) == expected


def test_a_caption_that_is_not_varied_stays_as_it_was_written() -> None:
    assert process_caption("a  cat,on a mat,", rng=random.Random(0)) == "a  cat,on a mat,"


def test_kept_tokens_stay_and_the_others_are_shuffled_evenly() -> None:
    rng = random.Random(0)
    seen = Counter(process_caption("k1, k2, a, b, c", rng=rng, shuffle_caption=True, keep_tokens=2)
                   for _ in range(3000))
    assert len(seen) == 6  # 3!
    assert all(caption.startswith("k1, k2, ") for caption in seen)
    assert all(abs(n - 500) < 100 for n in seen.values())


def test_caption_dropout_empties_the_whole_caption_at_its_rate() -> None:
    rng = random.Random(0)
    captions = [process_caption("k, a, b", rng=rng, keep_tokens=1, caption_dropout_rate=0.25, trigger_word="k")
                for _ in range(4000)]
    assert set(captions) == {"", "k, a, b"}
    assert abs(captions.count("") / 4000 - 0.25) < 0.03


def test_tag_dropout_spares_kept_tokens_and_drops_the_others_at_its_rate() -> None:
    rng = random.Random(0)
    seen = Counter(tag for _ in range(2000) for tag in split_tags(
        process_caption("k, a, b", rng=rng, keep_tokens=1, caption_tag_dropout_rate=0.3)))
    assert seen["k"] == 2000
    assert abs(seen["a"] / 2000 - 0.7) < 0.04 and abs(seen["b"] / 2000 - 0.7) < 0.04


@pytest.mark.parametrize("caption", ["a, b, c", "a, sks, b", "sks, a, b"])
def test_the_trigger_word_survives_tag_dropout_wherever_it_is(caption: str) -> None:
    rng = random.Random(0)
    for _ in range(50):
        assert process_caption(caption, rng=rng, trigger_word="sks", caption_tag_dropout_rate=1.0) == "sks"


def test_an_opening_trigger_word_is_not_shuffled_away() -> None:
    rng = random.Random(0)
    assert all(process_caption("a, b, c, d", rng=rng, trigger_word="sks", shuffle_caption=True).startswith("sks, ")
               for _ in range(50))


def test_the_same_randomness_gives_the_same_caption() -> None:
    results = [process_caption("a, b, c, d, e, f", rng=random.Random(7), shuffle_caption=True,
                               caption_tag_dropout_rate=0.3, caption_dropout_rate=0.1) for _ in range(3)]
    assert len(set(results)) == 1
