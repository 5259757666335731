"""Names and folders of the result: found out before any long work."""

import os

import pytest

from lib_lora_train.errors import OutputError
from lib_lora_train.output import checked_name, destination, epoch_path, step_path


@pytest.mark.parametrize("name", ["zzk", "my character v2", "日本語", "a.b", "it's_100%"])
def test_plain_names_are_taken_as_they_are(name):
    assert checked_name(name) == name


@pytest.mark.parametrize("name", [
    "", "  ", "a/b", "..\\b", "../up", "a:b", "a<b", "what?", "a|b", "nul", "COM1", "com1.x", " a", "a ", "a.", ".hidden",
    "x" * 200, "a\nb", "zzk.safetensors", "a*", "a\ud800b"])
def test_names_that_some_system_or_the_prompt_cannot_hold_are_refused(name):
    with pytest.raises(OutputError):
        checked_name(name)


def test_an_existing_lora_is_never_overwritten_unasked(tmp_path):
    (tmp_path / "zzk.safetensors").write_bytes(b"precious")
    with pytest.raises(OutputError, match="already.*set overwrite = true"):
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
