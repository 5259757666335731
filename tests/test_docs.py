"""The documentation's links lead somewhere, and what it calls the page's parts are their names."""

from __future__ import annotations

import json
import re
import unicodedata
from pathlib import Path

import pytest

from lib_lora_train.settings import DECLARATIONS, read
from lib_lora_train.settings.presets import presets

ROOT = Path(__file__).resolve().parent.parent
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md")), ROOT / "lib_lora_train/demo/model/README.md"]
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
CODE = re.compile(r"^(?: {4}|```).*?$|`[^`\n]*`", re.MULTILINE)
LARGEST = 150 * 1024


def anchors(page: Path) -> set[str]:
    """Those that GitHub makes of the page's headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    plain = (re.sub(r"[`*]|\[([^\]]*)\]\([^)]*\)", r"\1", heading).strip().lower() for heading in headings)
    return {"".join(c for c in text.replace(" ", "-") if c in "-_" or unicodedata.category(c)[0] in "LN") for text in plain}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_link_leads_to_a_file_or_heading_that_is_there(page: Path) -> None:
    for target in LINK.findall(CODE.sub("", page.read_text(encoding="utf-8"))):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.exists() and file.is_relative_to(ROOT), target
        assert not anchor or anchor in anchors(file), target


def test_every_page_is_reached_from_the_readme_and_every_picture_is_shown() -> None:
    reached, ahead = set[Path](), [ROOT / "README.md"]
    while ahead:
        page = ahead.pop()
        if page in reached:
            continue
        reached.add(page)
        if page.suffix == ".md" and page.exists():
            targets = LINK.findall(page.read_text(encoding="utf-8"))
            ahead += [(page.parent / target.partition("#")[0]).resolve() for target in targets if ":" not in target]
    assert {path for path in (ROOT / "docs").rglob("*") if path.is_file()} <= reached


def test_pictures_of_the_tutorial_are_small() -> None:
    assert [path.name for path in (ROOT / "docs/first-lora").iterdir() if path.stat().st_size > LARGEST] == []


@pytest.mark.parametrize("name", [
    "first-lora", "first-lora.zh_CN", "first-lora.ja", "character", "style", "object", "low-memory", "sdxl", "choosing-a-save"])
def test_fields_buttons_and_presets_are_called_as_on_the_page(name: str) -> None:
    """Short bold words are their names, but for those in `PROSE`. Of the step "5 Train" the script has the name alone."""
    sources = [*(ROOT / "javascript").glob("*.js"), ROOT / "lib_lora_train/ui/layout.py"]
    texts = {text for path in sources for text in re.findall(r'"[^"\n]+"', path.read_text(encoding="utf-8"))}
    labels = {declaration.label for declaration in DECLARATIONS.values()} | {preset.name for preset in presets()}
    text = (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")
    bold = set(re.findall(r"\*\*((?:[1-5] )?[A-Z][ -)+-~]{1,26})\*\*", text)) - labels - PROSE
    assert {words for words in bold if not {f'"{words}"', f'"{words[2:]}"'} & texts} == set()


@pytest.mark.parametrize("language", ["zh_CN", "ja_JP"])
def test_a_translated_tutorial_has_the_words_of_the_translated_page(language: str) -> None:
    """Behind each English name stands in brackets what the page in that language says."""
    texts = json.loads((ROOT / "localizations" / f"{language}.json").read_text(encoding="utf-8"))
    page = (ROOT / "docs" / f"first-lora.{language.removesuffix('_JP')}.md").read_text(encoding="utf-8")
    named = re.findall(r"\*((?:[1-5] )?[A-Z][^*\n;]*|likeness|prompt|drift|copies)\*{1,2}（([^）]+)）", page)
    assert len(named) > 20
    for english, other in set(named) - {("Generate", "生成")}:  # the WebUI's own button
        shown = texts.get(english) or texts.get(f"{english}.") or texts.get(english[2:])
        assert shown and re.sub(r"^[1-5] |。$", "", shown) == other, english


@pytest.mark.parametrize("name", ["Character", "Style", "Object"])
def test_the_page_of_a_purpose_has_its_presets_numbers(name: str) -> None:
    values = next(preset.values for preset in presets() if preset.name == name)
    by_label = {declaration.label: declaration for declaration in DECLARATIONS.values()}
    text = (ROOT / "docs" / f"{name.lower()}.md").read_text(encoding="utf-8").partition("\n## Settings\n")[2]
    told = {}
    for labels, shown in re.findall(r"^\| ([A-Z][^|]+) \| ([^|]+) \|", text.partition("Worth changing")[0], re.MULTILINE):
        told |= dict(zip(labels.split(", "), shown.split(", "), strict=True))
    assert {"Rank", "Alpha", "Learning rate", "Flip"} <= told.keys()
    for label, shown in told.items():
        declaration = by_label[label]
        read_back = {"on": True, "off": False, declaration.zero or "0": 0}.get(shown, shown)
        assert read(declaration, read_back) == values[declaration.name], label


PROSE = {
    "Generate", "In the WebUI", "In AUTOMATIC1111's WebUI", "Without a WebUI", "The curve", "The pictures", "The sentence",
    "One picture only (SDXL)",
    "Different places and light.", "Close what holds GPU memory", "Both still rise at the end", "Falling below 0", "Flat at 0",
    "Read the verdict.", "Look, then take."}
