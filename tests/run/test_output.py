"""Names and folders of the result: found out before any long work."""

import os

import pytest

from lib_lora_train.errors import OutputError
from lib_lora_train.run.output import checked_name, destination, epoch_path, step_path


@pytest.mark.parametrize("name", ["zzk", "my character v2", "日本語", "a.b", "it's_100%"])
def test_plain_names_are_taken_as_they_are(name):
    assert checked_name(name) == name


@pytest.mark.parametrize("name", [
    "", "  ", "a/b", "..\\b", "../up", "a:b", "a<b", "what?", "a|b", "nul", "COM1", "com1.x", " a", "a ", "a.", ".hidden",
    "x" * 200, "a\nb", "zzk.safetensors", "a*", "a\ud800b",
    # https://learn.microsoft.com/windows/win32/fileio/naming-a-file, with endings, in any case, with superscripts.
    "CON", "con.txt", "Prn", "aux.v1.2", "NUL .x", "COM0", "com¹", "LPT³.v2", "COM9", "LPT1", "CONIN$", "conout$.a", "clock$",
    "a\x00b", "a\x7f", "a\x85b", "a\x9f", "a\tb", "a\r", "a ", "a..", "a. ", "\u00a0a", "a\u3000", "..", ".", "-", "-rf",
    "--help",
    "gnp.\u202ezzk", "a\u200bb", "\ufeffa", "a\u2028b", "a\u2066b", "\u00adzzk",
    "日" * 41, "👩\u200d👧" * 12, "a\\b", "C:", "\\\\server\\x", "zzk.PT", "zzk.ckpt"])
def test_names_that_some_system_or_the_prompt_cannot_hold_are_refused(name):
    with pytest.raises(OutputError):
        checked_name(name)


def test_an_existing_lora_is_never_overwritten_unasked(tmp_path):
    (tmp_path / "zzk.safetensors").write_bytes(b"precious")
    with pytest.raises(OutputError, match="already.*switch Overwrite"):
        destination(tmp_path, name="zzk", overwrite=False)
    assert destination(tmp_path, name="zzk", overwrite=True) == tmp_path / "zzk.safetensors"
    assert (tmp_path / "zzk.safetensors").read_bytes() == b"precious"


def test_a_new_output_folder_is_made_and_left_empty(tmp_path):
    folder = tmp_path / "new" / "loras"
    destination(folder, name="zzk", overwrite=False)
    assert folder.is_dir() and os.listdir(folder) == []


def test_an_output_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="another folder"):
        destination(tmp_path / "file" / "loras", name="zzk", overwrite=False)


def test_saves_on_the_way_carry_kohyas_names(tmp_path):
    assert epoch_path(tmp_path / "zzk.safetensors", 10).name == "zzk-000010.safetensors"
    assert step_path(tmp_path / "zzk.safetensors", 500).name == "zzk-step00000500.safetensors"


def test_two_spellings_of_an_accent_are_one_name(tmp_path):
    composed, decomposed = "caf\u00e9", "cafe\u0301"
    assert checked_name(decomposed) == checked_name(composed) == composed
    (tmp_path / f"{composed}.safetensors").write_bytes(b"precious")
    with pytest.raises(OutputError, match="already"):
        destination(tmp_path, name=decomposed, overwrite=False)


def test_every_file_of_a_run_has_a_name_that_file_systems_can_hold(tmp_path):
    for letter in "x日😀":
        longest = letter * (120 // len(letter.encode()))
        path = destination(tmp_path, name=longest, overwrite=False)
        for file in (path, epoch_path(path, 999999), step_path(path, 99999999)):
            # ext4 and most others: 255 bytes; the run's folder adds 20, the part file of a save 25.
            assert len(file.name.encode()) + 45 <= 255


def test_joined_letters_of_a_script_are_no_tricks():
    for name in ("می\u200cخواهم", "क्\u200dष", "👩\u200d🎨", "naïve_œuvre", "Łódź", "ｆｕｌｌ"):
        assert checked_name(name) == name
