"""kohya's lists of "key=value", such as optimizer_args."""

from __future__ import annotations

import ast
import re

from lib_lora_train.errors import SettingError
from lib_lora_train.settings.field import Declaration

_BETWEEN = re.compile(r"""[\s;]+(?=["']?[A-Za-z_]\w*\s*=)""")
_WORDS = {"true": True, "false": False, "none": None}


def arguments_of(declaration: Declaration, text: str) -> dict[str, object]:
    """{name: value} of "decouple=True betas=0.9,0.99", each value a Python literal as in sd-scripts. Raises SettingError that
    names the setting."""
    found: dict[str, object] = {}
    for entry in filter(None, (part.strip().strip(";,") for part in _BETWEEN.split(text.strip()))):
        if len(entry) > 1 and entry[0] == entry[-1] and entry[0] in "\"'":
            entry = entry[1:-1]
        name, equals, value = (part.strip() for part in entry.partition("="))
        if not equals or not name.isidentifier():
            raise _refused(declaration, entry, "it is not of the form name=value")
        if name in found:
            raise _refused(declaration, entry, f"{name} is given twice")
        try:
            found[name] = _WORDS[value.lower()] if value.lower() in _WORDS else ast.literal_eval(value)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            raise _refused(declaration, entry, "the value is no number, True, False, None, text in quotes or list of these"
                           ) from None
    return found


def _refused(declaration: Declaration, entry: str, why: str) -> SettingError:
    shown = entry if len(entry) <= 60 else f"{entry[:57]}…"
    return SettingError(f"{declaration.named} holds {shown!r}, which is not possible", why=why,
                        remedy="write for example: eps=1e-6 betas=0.9,0.99")
