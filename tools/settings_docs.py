"""Write docs/settings.md, and the table of names in docs/coming-from-kohya.md, from `lib_lora_train/settings/`; and the routes
in docs/api.md from `lib_lora_train/api/`.

    python tools/settings_docs.py          after a setting, one of kohya's names or a route has changed
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lib_lora_train.settings.field import Declaration

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- written by tools/settings_docs.py -->", "<!-- end -->"


def main() -> int:
    """Write all three; returns the exit code."""
    sys.path.insert(0, str(ROOT))
    for path, text in documents().items():
        path.write_text(text, encoding="utf-8", newline="\n")
    return 0


def documents() -> dict[Path, str]:
    """{file: what it holds when it is up to date}."""
    from tools.api_docs import reference

    kohya, api = ROOT / "docs" / "coming-from-kohya.md", ROOT / "docs" / "api.md"
    return {ROOT / "docs" / "settings.md": "\n".join(settings_page()) + "\n",
            kohya: _filled(kohya, names_table()), api: _filled(api, reference())}


def _filled(path: Path, lines: Iterable[str]) -> str:
    """The page, with these lines between its two marks."""
    before, _, rest = path.read_text(encoding="utf-8").partition(BEGIN)
    return f"{before}{BEGIN}\n\n" + "\n".join(lines) + f"\n\n{END}" + rest.partition(END)[2]


def settings_page() -> Iterator[str]:
    """Every setting with its default, range and help, an area at a time."""
    from lib_lora_train.settings import AREAS
    from lib_lora_train.settings.field import declarations

    yield "# Settings"
    yield ""
    yield "Every setting by its name in files, on the command line and in the API, and by its label on the page. Names are"
    yield "kohya's where kohya has the setting. Written by `tools/settings_docs.py` from `lib_lora_train/settings/`."
    for area in AREAS.values():
        yield f"\n## {area.__doc__.strip().rstrip('.')}\n"
        yield "| name | label | default | possible | |"
        yield "|---|---|---|---|---|"
        for d in declarations(area):
            yield f"| `{d.name}` | {d.label} | {_default(d)} | {_possible(d)} | {d.help.replace('|', chr(92) + '|')} |"


def _default(d: Declaration) -> str:
    if d.type is bool:
        return "on" if d.default else "off"
    return _code(d.zero if d.zero and not d.default else d.default)


def _possible(d: Declaration) -> str:
    if d.choices:
        return ", ".join(map(_code, d.choices)) + (", others" if d.open_choice else "")
    if d.type is bool:
        return "on, off"
    if d.type is str:
        return "a path" if d.is_path else "text"
    kind = "a share below 1, or " if d.or_share else ""
    return f"{kind}{d.minimum:.10g} to {d.maximum:.10g}"


def _code(value: object) -> str:
    return f"`{value}`" if value != "" else "empty"


def names_table() -> Iterator[str]:
    """What became of kohya's names that are others here, or are not here."""
    from lib_lora_train.settings.kohya import name_table

    table = name_table()
    yield "| kohya's name | here |"
    yield "|---|---|"
    for name, ours in sorted(table["renamed"].items()):
        yield f"| `{name}` | `{ours}` |"
    for name, switch in sorted(table["switches"].items()):
        yield f"| `{name}` | {', '.join(f'`{ours} = {value}`' for ours, value in switch.items())} |"
    for kind, word in (("not_needed", "not needed"), ("not_supported", "not supported")):
        for reason, names in table[kind].items():
            yield f"| {', '.join(f'`{name}`' for name in names)} | {word}: {reason} |"


if __name__ == "__main__":
    sys.exit(main())
