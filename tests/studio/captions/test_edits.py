"""Each edit does what it says, and nothing to captions it has nothing to do with."""

from __future__ import annotations

import pytest

from lib_lora_train.errors import SettingError
from lib_lora_train.studio.captions.edits import (
    AddTags,
    Deduplicate,
    Edit,
    RemoveTags,
    ReplaceRegex,
    ReplaceTag,
    ReplaceText,
    SetCaption,
    SortTags,
    TruncateTokens,
    edit_from_dict,
)


class Words:
    """A token for each word and each comma."""

    def encode(self, text: str) -> list[int]:
        return [1] * len(text.replace(",", " , ").split())


def done(edit: Edit, caption: str) -> str:
    return edit.change(lambda: [caption])(caption)


@pytest.mark.parametrize(("edit", "before", "after"), [
    (AddTags(("zzk",), "start"), "a,b", "zzk, a,b"),
    (AddTags(("zzk",)), "a, b,", "a, b, zzk"),
    (AddTags(("zzk", "new")), "ZZK, a", "ZZK, a, new"),
    (AddTags(("x, y", "x")), "", "x, y"),
    (AddTags(("a",)), "a ,b", "a ,b"),
    (RemoveTags(("A", "c")), "a, b,c, ab", "b, ab"),
    (RemoveTags(("x",)), "a,b ,", "a,b ,"),
    (ReplaceTag("cat", "dog"), "a Cat, cat, b", "a Cat, dog, b"),
    (ReplaceTag("cat", "dog"), "dog, cat, b", "dog, b"),
    (ReplaceTag("cat", "small dog, fur"), "cat, b", "small dog, fur, b"),
    (ReplaceTag("cat", ""), "a, cat", "a"),
    (ReplaceTag("Cat", "cat"), "Cat, b", "cat, b"),
    (ReplaceTag("x", "y"), "a,y,y", "a,y,y"),
    (ReplaceText("blue ", "green "), "Blue eyes, blue hair", "green eyes, green hair"),
    (ReplaceText("(a+b)", r"\1"), "x (A+B) y", r"x \1 y"),
    (ReplaceRegex(r"(\w+) hair", r"hair of \1"), "Blue hair, eyes", "hair of Blue, eyes"),
    (ReplaceRegex(r"\d+", ""), "a1, b22", "a, b"),
    (SortTags(), "b, C, a", "a, b, C"),
    (SortTags(keep=1), "zzk, b, a", "zzk, a, b"),
    (SortTags(), "a,b", "a,b"),
    (Deduplicate(), "a, A, b, , a", "a, b"),
    (Deduplicate(), "a,b", "a,b"),
    (TruncateTokens(3, Words()), "a, b, c, d", "a, b"),
    (TruncateTokens(4, Words()), "a, b, c, d", "a, b"),
    (TruncateTokens(7, Words()), "a, b,c,  d", "a, b,c,  d"),
    (TruncateTokens(2, Words()), "a very long tag, b", "a very"),
    (SetCaption("new"), "old", "new"),
    # A wildcard is one tag, and what stands on one side of the separator stays there.
    (RemoveTags(("b",)), "a ||| b, {b, c|d}, e ||| b", "a ||| {b, c|d}, e |||"),
    (RemoveTags(("{b, c|d}",)), "a, {b, c|d}", "a"),
    (ReplaceTag("c", "x"), "c ||| {c|d}, c", "x ||| {c|d}"),
    (AddTags(("c", "z")), "a ||| b, c", "a ||| b, c, z"),
    (AddTags(("c", "z"), "start"), "a ||| b, c", "z, a ||| b, c"),
    (SortTags(), "c, b ||| e, {z, d|y}, a ||| g, f", "b, c ||| a, e, {z, d|y} ||| f, g"),
    (SortTags(keep=1), "c, b ||| e, a", "c, b ||| a, e"),
    (Deduplicate(), "a, b ||| b, {a, a|b}, a", "a, b ||| {a, a|b}"),
    (Deduplicate(), "a ||| b ||| c", "a ||| b ||| c"),
    (TruncateTokens(4, Words()), "a, b ||| c, d", "a, b |||"),
])
def test_edits(edit: Edit, before: str, after: str) -> None:
    assert done(edit, before) == after
    assert edit.label()


def test_clips_own_tokens_are_counted() -> None:
    from lib_lora_train.model.sd.tokens import clip_tokenizer
    tokenizer = clip_tokenizer()
    caption = ", ".join(f"tag number {number}" for number in range(100))
    cut = done(TruncateTokens(75, tokenizer), caption)
    kept = len(cut.split(", "))
    assert len(tokenizer.encode(cut)) <= 75 < len(tokenizer.encode(", ".join(caption.split(", ")[:kept + 1])))


@pytest.mark.parametrize("pattern", ["(", "a{2,1}", "*", "(?R)", "(?P<a>x)(?P=b)", "x" * 1001, "(" * 300 + ")" * 300 + "["])
def test_what_is_no_pattern_is_refused_in_a_sentence(pattern: str) -> None:
    with pytest.raises(SettingError, match="regular expression"):
        done(ReplaceRegex(pattern, ""), "text")


def test_a_replacement_that_names_a_group_which_is_not_there_is_refused() -> None:
    with pytest.raises(SettingError, match="replacement"):
        done(ReplaceRegex("a", r"\2"), "a")


@pytest.mark.parametrize(("values", "expected"), [
    ({"kind": "add_tags", "tags": ["a"], "at": "start"}, AddTags(("a",), "start")),
    ({"kind": "add_tags", "tags": "a, b"}, AddTags(("a", "b"))),
    ({"kind": "remove_tags", "tags": ["a"]}, RemoveTags(("a",))),
    ({"kind": "replace_tag", "old": "a", "new": ""}, ReplaceTag("a", "")),
    ({"kind": "replace_text", "old": "a", "new": "b"}, ReplaceText("a", "b")),
    ({"kind": "replace_regex", "pattern": "a", "new": "b"}, ReplaceRegex("a", "b")),
    ({"kind": "sort_tags"}, SortTags()), ({"kind": "sort_tags", "by": "frequency"}, SortTags("frequency")),
    ({"kind": "deduplicate"}, Deduplicate()), ({"kind": "set_caption", "text": "x"}, SetCaption("x")),
])
def test_edits_come_as_json(values: dict, expected: Edit) -> None:
    assert edit_from_dict(values) == expected


@pytest.mark.parametrize("values", [
    {}, {"kind": "burn"}, {"kind": "add_tags"}, {"kind": "add_tags", "tags": [1]}, {"kind": "add_tags", "tags": [], "at": 3},
    {"kind": "add_tags", "tags": [], "at": "middle"}, {"kind": "replace_tag", "old": "a"}, {"kind": "deduplicate", "x": 1},
    {"kind": "truncate_tokens", "n": 3}, {"kind": "sort_tags", "keep": True}, {"kind": ["add_tags"]},
    {"kind": "set_caption", "text": "x" * 20_000}, {"kind": "set_caption", "text": None}])
def test_json_that_is_no_edit_is_refused(values: dict) -> None:
    with pytest.raises(SettingError):
        edit_from_dict(values)


def test_cutting_needs_a_tokenizer_and_a_number() -> None:
    words = Words()
    assert edit_from_dict({"kind": "truncate_tokens", "n": 3}, tokenizer=words) == TruncateTokens(3, words)
    with pytest.raises(SettingError, match="at least one"):
        done(TruncateTokens(0, words), "a")
