"""Our sources make no markup of text: read, not run, so that this holds where there is no browser to show it (test_markup)."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

JAVASCRIPT = sorted((Path(__file__).parents[2] / "javascript").glob("*.js"))
SOURCES = sorted((Path(__file__).parents[2] / "lib_lora_train" / "ui").glob("*.py"))


@pytest.mark.parametrize("path", JAVASCRIPT, ids=lambda path: path.name)
def test_no_script_of_ours_makes_markup_of_text(path: Path):
    found = re.findall(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|createContextualFragment|DOMParser|\beval\(|"
                       r"new Function|srcdoc|setTimeout\(\s*[\"'`]", path.read_text(encoding="utf-8"))
    assert not found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_what_python_puts_into_html_is_escaped(path: Path):
    """Every f-string with a tag in it holds only what was escaped, a list of such, or an attribute of our own."""
    for line in path.read_text(encoding="utf-8").splitlines():
        if re.search(r"f(['\"]).*<(div|ul|li|span|b|p)\b.*\{", line):
            for inserted in re.findall(r"\{([^{}]+)\}", line):
                assert inserted.startswith("html.escape(") or inserted in ("items", "attribute"), f"{path.name}: {line.strip()}"
