"""Captions: their tags, lines and trigger word."""

from __future__ import annotations

import pytest

from lib_lora_train.dataset.captions import (
    count_tags,
    first_line,
    first_line_and_rest,
    join_edited,
    split_tags,
    split_to_edit,
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


@pytest.mark.parametrize(("caption", "tags"), [
    ("a, b ,,c", ["a", "b", "c"]), ("a ||| b, c|||d", ["a", "|||", "b", "c", "|||", "d"]),
    ("{red, dark|blue} hat, x", ["{red, dark|blue} hat", "x"]), ("{a, b", ["{a", "b"]), ("a}, b", ["a}", "b"])])
def test_tags_to_edit_keep_wildcards_whole_and_separators_apart(caption: str, tags: list[str]) -> None:
    assert split_to_edit(caption) == tags and split_to_edit(join_edited(tags)) == tags
    assert set(count_tags([caption])) == {*tags} - {"|||"}


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
