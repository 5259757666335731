"""What becomes of what was found: every rule of the caption."""

from __future__ import annotations

import pytest

from lib_lora_train.errors import SettingError
from lib_lora_train.tagging.captioner import Description, Tag
from lib_lora_train.tagging.options import OPTIONS, TagOptions, parse_options
from lib_lora_train.tagging.rules import compose, is_face

FOUND = Description((
    Tag("1girl", 0.99), Tag("long_hair", 0.9), Tag("saber_(fate)", 0.86, "character"), Tag("^_^", 0.5), Tag("smile", 0.34),
    Tag("rin", 0.8, "character"), Tag("general", 0.7, "rating"), Tag("sensitive", 0.2, "rating")))
# Underscores that are mouths, as the taggers' authors list them.
FACES = ("0_0 (o)_(o) +_+ +_- ._. <o>_<o> <|>_<|> =_= >_< 3_3 6_9 >_o @_@ ^_^ o_o u_u x_x |_| ||_||").split()


@pytest.mark.parametrize(("changes", "caption"), [
    ({}, "1girl, long hair, saber (fate), ^_^"),
    ({"general_threshold": 0.3}, "1girl, long hair, saber (fate), ^_^, smile"),
    ({"general_threshold": 0.34}, "1girl, long hair, saber (fate), ^_^, smile"),
    ({"character_threshold": 0.8}, "1girl, long hair, saber (fate), rin, ^_^"),
    ({"character_tags": False}, "1girl, long hair, ^_^"),
    ({"character_tags_first": True}, "saber (fate), 1girl, long hair, ^_^"),
    ({"use_rating_tags": True}, "1girl, long hair, saber (fate), ^_^, general"),
    ({"use_rating_tags": True, "general_threshold": 1.0, "character_threshold": 1.0}, "general"),
    ({"remove_underscore": False}, "1girl, long_hair, saber_(fate), ^_^"),
    ({"escape_brackets": True}, r"1girl, long hair, saber \(fate\), ^_^"),
    ({"undesired_tags": "Long Hair, saber_(fate)"}, "1girl, ^_^"),
    ({"undesired_tags": r"saber \(fate\)"}, "1girl, long hair, ^_^"),
    ({"trigger_word": "zzk"}, "zzk, 1girl, long hair, saber (fate), ^_^"),
    ({"trigger_word": "zzk, long_hair"}, "zzk, long_hair, 1girl, saber (fate), ^_^"),
    ({"trigger_word": "zzk", "undesired_tags": "zzk"}, "zzk, 1girl, long hair, saber (fate), ^_^"),
])
def test_options_decide_which_tags_are_written_and_how(changes: dict[str, object], caption: str):
    assert compose("", FOUND, TagOptions(**changes)) == caption


@pytest.mark.parametrize(("mode", "existing", "caption"), [
    ("overwrite", "a cat, zzk", "zzk, 1girl, long hair"),
    ("prepend", "a cat, Long_Hair", "zzk, 1girl, long hair, a cat"),
    ("append", "a cat, Long_Hair", "zzk, a cat, Long_Hair, 1girl"),
    ("append", "", "zzk, 1girl, long hair"),
    ("only_empty", "", "zzk, 1girl, long hair"),
    ("only_empty", "a cat,, a cat", "a cat,, a cat"),
    ("only_empty", "  ", "zzk, 1girl, long hair"),
])
def test_the_mode_decides_what_becomes_of_the_caption_that_is_there(mode: str, existing: str, caption: str):
    found = Description((Tag("1girl", 0.9), Tag("long_hair", 0.8)))
    assert compose(existing, found, TagOptions(mode=mode, trigger_word="zzk")) == caption


@pytest.mark.parametrize("mode", ["prepend", "append"])
def test_adding_the_same_again_changes_nothing(mode: str):
    options = TagOptions(mode=mode, trigger_word="zzk", escape_brackets=True)
    once = compose("a cat", FOUND, options)
    assert compose(once, FOUND, options) == once


def test_tags_that_the_user_wrote_stay_even_if_they_are_not_wanted():
    options = TagOptions(mode="append", undesired_tags="a cat, smile", general_threshold=0.0)
    assert compose("a cat", Description((Tag("smile", 0.9), Tag("sky", 0.8))), options) == "a cat, sky"


def test_text_is_one_line_and_tags_follow_it():
    found = Description((Tag("red_hat", 0.9),), "a man\nin a hat,  outside, Red Hat")
    assert compose("", found, TagOptions()) == "a man in a hat, outside, Red Hat"


def test_no_name_can_smuggle_in_a_second_tag_or_a_line():
    assert compose("", Description((Tag("a,b\nc", 0.9),)), TagOptions()) == "a b c"


def test_nothing_found_leaves_the_trigger_word():
    assert compose("", Description(), TagOptions(trigger_word="zzk")) == "zzk"
    assert compose("", Description(), TagOptions()) == ""


def test_only_faces_keep_their_underscore():
    assert [face for face in FACES if not is_face(face)] == []
    assert [tag for tag in ("long_hair", "v-neck_shirt", "t_shirt", "_x", "a_b_c", "solo", "_") if is_face(tag)] == []


def test_options_are_read_like_every_setting():
    assert parse_options({"general_threshold": "0.5", "remove_underscore": "false"}) == TagOptions(
        general_threshold=0.5, remove_underscore=False)
    with pytest.raises(SettingError, match="general_threshold"):
        parse_options({"general_treshold": 0.5})
    with pytest.raises(SettingError, match="between 0 and 1"):
        parse_options({"general_threshold": 1.5})
    with pytest.raises(SettingError, match="overwrite"):
        parse_options({"mode": "replace"})
    assert all(option.label and option.help for option in OPTIONS.values())
