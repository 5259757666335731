"""The documentation of settings is what the declarations say."""

from __future__ import annotations

from tools.settings_docs import documents


def test_the_pages_on_settings_are_up_to_date():
    old = [path.name for path, text in documents().items() if path.read_text(encoding="utf-8") != text]
    assert not old, "run `python tools/settings_docs.py` after a setting has changed"
