"""The catalogues have every text of the page, with its fields, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools import texts_javascript, texts_python
from tools.localization import LANGUAGES, faults


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_text_is_translated_with_its_fields_and_nothing_else_is(language: str):
    assert faults(language) == {}, "see `python tools/localization.py`"


def found(tmp_path: Path, code: str, suffix: str = ".py") -> set[str]:
    path = tmp_path / f"some{suffix}"
    path.write_text(code, encoding="utf-8")
    return set((texts_javascript if suffix == ".js" else texts_python).texts_of(path, *([] if suffix == ".js" else [{}])))


def test_an_error_is_the_one_sentence_of_its_parts_in_each_of_its_forms(tmp_path: Path):
    assert found(tmp_path, '''
def read(path, error):
    """The docstring is no text."""
    assert path, "nor is what an assertion says"
    log.info("nor is the log")
    why = "it is gone"
    if error:
        why = f"it is damaged ({error.args[0]})"
    raise DatasetError(f"The file {path.name} cannot be read", remedy="choose another file", why=why)
''') == {
        "The file {name} cannot be read: it is gone; choose another file.",
        "The file {name} cannot be read: it is damaged ({args}); choose another file."}


def test_a_count_is_a_text_of_its_own_unless_its_noun_has_a_verb(tmp_path: Path):
    assert found(tmp_path, '''f"{counted(len(a), 'picture')} of {counted(total, 'tag is', 'tags are')} new here"''') == {
        "1 picture", "{number} pictures", "{counted_pictures} of 1 tag is new here",
        "{counted_pictures} of {number} tags are new here"}


def test_both_branches_and_what_a_variable_was_set_to_are_worked_out(tmp_path: Path):
    assert found(tmp_path, '''
def say(one, name):
    verb = "is" if one else "are"
    return f"{name} {verb} left out" + (" for good" if one else "")
''') == {f"{{name}} {verb} left out{end}" for verb in ("is", "are") for end in ("", " for good")}


def test_the_scripts_texts_are_told_from_what_only_programs_read(tmp_path: Path):
    assert found(tmp_path, r'''
// "a comment is no text"
make("b", {class: "lts-line lts-go", text: translated`${shown.length} of ${all} left`, title: "Two parts " +
    "of one text"}, button("Stop", () => /a "regular" expression/.test(name)), count(size, "picture"), "data-name");
''', ".js") == {"{length} of {all} left", "Two parts of one text", "Stop", "1 picture", "{number} pictures"}


def test_a_template_of_python_is_never_code(tmp_path: Path):
    assert found(tmp_path, 'a = re.compile("not a text here"); b = {"a-key": "text/plain; charset=utf-8"}') == set()
