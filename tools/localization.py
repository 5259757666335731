"""The texts of the page in other languages: which there are, which a language lacks, which are of no use any more.

    python tools/localization.py                 what each language lacks, and has too much
    python tools/localization.py --keys FILE     every text with the file it stands in, as JSON
    python tools/localization.py --tidy          bring the catalogues into order: sorted, without what is of no use

A text is its own key, as in gettext: the English sentence beside the code, with a `{field}` for what it is filled with. A
catalogue is localizations/LANGUAGE.json, the WebUI's own format; javascript/lora_train_language.js applies it.

A text is what somebody may read on the page: in Python what errors, warnings, findings, verdicts, settings and tasks say
(`texts_python.py`), in the scripts what they draw (`texts_javascript.py`), and what presets and the list of kohya's settings
explain. Not what only the command line says (`NOT_SHOWN`), nor the log.
"""

from __future__ import annotations

import argparse
import functools
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from lib_lora_train.settings.toml import tables  # noqa: E402
from tools import texts_javascript, texts_python  # noqa: E402

PACKAGE, SCRIPTS, CATALOGUES = ROOT / "lib_lora_train", ROOT / "javascript", ROOT / "localizations"
LANGUAGES = ("zh_CN", "zh_TW", "ja_JP")
NOT_SHOWN = (
    "__main__.py", "terminal.py", "demo/", "studio/commands/", "distributed/", "run/consistency.py", "run/diagnostics.py",
    "results/report.py", "results/charts.py", "results/inline_images.py", "results/sample_sheet.py", "results/shared_texts.py",
    "ui/standalone.py",
    "evaluation/check_sheet.py", "dataset/crop_sheet.py", "records.py")
"""Below PACKAGE: what only the command line and the terminal show, and pictures and files that are handed on."""
NO_TEXTS = frozenset({
    "system volume information", "Enter", "Escape", "Tab", "Arrow", "Files", "grid zero", "raw behind", "smooth behind",
    "0 0 {width} {height}", "Hiragino Sans GB.ttc", "Arial Unicode.ttf", "activation text", "negative text", "preferred weight",
    "sd version", "lora train", "can't allocate memory", "kohya locon", "Negative prompt: {negative_prompt}", "not known",
    "no valid execution plans", "unable to find an engine to execute this computation", "not enough memory", "out of memory",
    "{value}. {text}{translated}", "Train LoRA stays in English:", "None",
    "{trigger}, {folder}, {name}", "too slow", "no effect", "Plan", "Restore", "Fill", "Enqueue", "sticker style"})
"""Keys of files, of browsers and of other programs, a dataset's name, and parts that nobody sees, which look like words."""
JOINTS = ("{first} {second}", "{first} · {second}", "{first}; {second}", "{first}: {second}", "{first}, {second}",
          "{first} and {second}", "{sentence}.", "{label} ({setting})")
"""What stands between texts that are shown one after the other, and how a setting is named; of no file."""
GRADIO = ("number input for {setting_label}", "range slider for {setting_label}")
"""What gradio 4 says itself about a setting's field, to who hears the page."""
FIELD = re.compile(r"\{([A-Za-z_]\w*)\}")


@functools.cache
def texts() -> dict[str, str]:
    """template -> "file:line" of the first place it stands in, in the order of the files."""
    found: dict[str, str] = dict.fromkeys((*JOINTS, *GRADIO), "tools/localization.py")
    shapes = set(map(shape, JOINTS))
    for path, texts in _sources():
        for text, line in texts.items():
            if text not in NO_TEXTS and shape(text) not in shapes:
                shapes.add(shape(text))
                found[text] = f"{path.relative_to(ROOT).as_posix()}:{line}"
    return found


def _sources() -> Iterator[tuple[Path, dict[str, int]]]:
    paths = [path for path in sorted(PACKAGE.rglob("*.py"))
             if not path.relative_to(PACKAGE).as_posix().startswith(NOT_SHOWN)]
    constants = texts_python.constants_of(paths)
    for path in (PACKAGE / "ui" / "layout.py", *(path for path in paths if path.name != "layout.py")):
        yield path, texts_python.texts_of(path, constants)
    for path in sorted(SCRIPTS.glob("lora_train*.js")):
        yield path, texts_javascript.texts_of(path)
    for path in sorted((PACKAGE / "settings" / "presets").glob("*.toml")):
        yield path, {str(tables(path)["preset"][name]): 1 for name in ("name", "description")}
    kohya = PACKAGE / "settings" / "kohya.toml"
    reasons = tables(kohya)
    yield kohya, {reason: 1 for table in ("not_needed", "not_supported") for reason in reasons.get(table, {})}


def shape(template: str) -> str:
    """A template without the names of its fields: those of one shape cannot be told apart, and are one text."""
    return FIELD.sub("{}", template)


def catalogue(language: str) -> dict[str, str]:
    """template -> translation, "" or absent where there is none yet."""
    path = CATALOGUES / f"{language}.json"
    return json.loads(path.read_text("utf-8")) if path.exists() else {}


def faults(language: str) -> dict[str, list[str]]:
    """What is wrong with a language's catalogue: {kind: texts}; empty where nothing is."""
    wanted, there = texts(), catalogue(language)
    found = {
        "missing": [text for text in wanted if not there.get(text)],
        "of no use": [text for text in there if text not in wanted],
        "other fields": [text for text, translation in there.items()
                         if translation and set(FIELD.findall(translation)) != set(FIELD.findall(text))]}
    return {kind: texts for kind, texts in found.items() if texts}


def tidy(language: str) -> None:
    """Write the catalogue in the order of the texts, without those of no use."""
    there = catalogue(language)
    kept = {text: there[text] for text in texts() if there.get(text)}
    (CATALOGUES / f"{language}.json").write_text(json.dumps(kept, indent=1, ensure_ascii=False) + "\n", "utf-8")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keys", type=Path, metavar="FILE")
    parser.add_argument("--tidy", action="store_true")
    chosen = parser.parse_args(arguments)
    if chosen.keys:
        chosen.keys.write_text(json.dumps(texts(), indent=1, ensure_ascii=False) + "\n", "utf-8")
        return 0
    wrong: dict[str, Any] = {}
    for language in LANGUAGES:
        if chosen.tidy:
            tidy(language)
        wrong[language] = faults(language)
        print(f"{language}: {len(texts())} texts" + "".join(f", {len(t)} {kind}" for kind, t in wrong[language].items()))
        for kind, list_of_texts in wrong[language].items():
            print(*(f"  {kind}: {text}" for text in list_of_texts), sep="\n")
    return 1 if any(wrong.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
