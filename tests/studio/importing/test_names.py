"""Names that every system takes."""

from __future__ import annotations

import random

import pytest

from lib_lora_train.run.output import checked_name
from lib_lora_train.studio.importing.names import FreeNames, file_key, safe_stem

# https://learn.microsoft.com/windows/win32/fileio/naming-a-file
RESERVED = ["CON", "con", "PRN", "AUX", "NUL", "COM1", "com9", "LPT1", "COM¹", "NUL.txt", "con.a.b", "CONIN$"]


@pytest.mark.parametrize("name", RESERVED)
def test_a_name_that_windows_keeps_for_itself_gets_another(name: str):
    assert safe_stem(name).startswith("_") and checked_name(safe_stem(name))


@pytest.mark.parametrize(("name", "safe"), [
    ("日本の猫", "日本の猫"), ("Ünïcode é", "Ünïcode é"), ("кот", "кот"), ("a.b", "a.b"), ("00012-123456", "00012-123456"),
    ("e\u0301", "é"), ("a/b\\c:d", "a_b_c_d"), ("a\tb\0c", "a_b_c"), ("invoice\u202egnp", "invoice_gnp"), ("  x. ", "x"),
    ("--help", "help"), (".hidden", "hidden"), ("a\u3000b", "a b"), ("\ud800x", "_x"), ("👩\u200d🎨", "👩\u200d🎨")])
def test_letters_stay_and_what_is_not_taken_everywhere_goes(name: str, safe: str):
    assert safe_stem(name) == safe


@pytest.mark.parametrize("name", ["", " ", "...", "///", "\0", "-", "_ _", "\u202e"])
def test_of_nothing_readable_something_is_made(name: str):
    assert safe_stem(name, otherwise="picture") == "picture"


def test_any_text_becomes_a_name_that_is_accepted_as_a_loras():
    rng = random.Random(1)
    parts = ["CON", ".", " ", "-", "\ud800", "\u202e", "日", "x" * 70, "💥" * 40, "/", "\\", "..", ".pt", "COM1", "é", "\0"]
    for _ in range(3000):
        text = "".join(rng.choice([*parts, chr(rng.randrange(0x110000))]) for _ in range(rng.randrange(1, 6)))
        stem = safe_stem(text)
        assert checked_name(stem) == stem, repr(text)
        assert safe_stem(stem) == stem, repr(text)
        assert len(f"{stem}_999.png".encode()) < 200


def test_names_differ_without_regard_to_case_and_to_how_accents_are_written():
    names = FreeNames(["Katze", "é"])
    assert [names.claim(name) for name in ("katze", "KATZE", "e\u0301", "hund", "hund_2", "hund")] == [
        "katze_2", "KATZE_3", "e\u0301_2", "hund", "hund_2", "hund_3"]


def test_ten_thousand_images_of_one_name_get_names_of_their_own():
    names = FreeNames(())
    given = [names.claim("image" if i % 2 else "IMAGE") for i in range(10_000)]
    assert len({file_key(name) for name in given}) == 10_000 and given[-1].endswith("_10000")
