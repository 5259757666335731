"""How one setting is declared, read and checked.

A setting is a dataclass field whose metadata holds a `Declaration`: that is the only place where its
default, bounds, label and help exist. `read` turns what a user typed, in a page, a TOML file or on the
command line, into the field's type, or says in one sentence why it cannot.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import re
import sys
from pathlib import Path
from typing import Any

from lib_lora_train.errors import SettingError

Value = bool | int | float | str

_OLD_CHOICES: dict[tuple[str, Value], Value] = {("cuda_graphs", "auto"): "off"}
"""(name, value) that older files hold -> what it is read as."""
_SWITCHES = {"true": "on", "false": "off"}
_DECIMAL_COMMA = re.compile(r"^(?![+-]?[1-9]\d{0,2},\d{3}$)([+-]?\d+),(\d+(?:[eE][+-]?\d+)?)$")
"""Not "1,000", which may be a thousand."""
_TEXT_FILES = (".txt", ".toml", ".json")
_ONLY_READ = frozenset({"train_data_dir", "reg_data_dir"})
"""Folders of which nothing but images and captions is opened, so that their names may be any bytes. safetensors opens no file
whose path is not text in UTF-8."""


@dataclasses.dataclass(frozen=True)
class Declaration:
    """One setting. `name` is kohya's where kohya has it; `in_view` puts it above the fold of the page. With `open_choice` the
    `choices` are suggestions, and any other text is passed on to the code that knows what it names. With `or_share` a number
    between 0 and 1 is possible where the type is int. `zero` is the word for a 0 that stands for "auto" or "none": a page shows
    it in an empty field, and `read` takes it, or nothing, as 0. A text of `several_lines` may lie in a file that is named
    instead. For a `list_of_texts` a list may stand, which is joined by spaces."""

    name: str
    type: type
    default: Value
    label: str
    help: str
    minimum: float | None = None
    maximum: float | None = None
    step: float | None = None
    choices: tuple[str, ...] = ()
    in_view: bool = False
    is_path: bool = False
    open_choice: bool = False
    or_share: bool = False
    zero: str = ""
    several_lines: bool = False
    list_of_texts: bool = False

    @property
    def named(self) -> str:
        """As messages name it."""
        return f"{self.label} ({self.name})"

    def holds_path(self, text: str) -> bool:
        """Whether `text` as this setting's value is a path."""
        return self.is_path or self.several_lines and "\n" not in text and text.lower().endswith(_TEXT_FILES)


def setting(
    default: Value, label: str, help: str, *, minimum: float | None = None, maximum: float | None = None,
    step: float | None = None, choices: tuple[str, ...] = (), in_view: bool = False, is_path: bool = False,
    open_choice: bool = False, or_share: bool = False, zero: str = "", several_lines: bool = False,
    list_of_texts: bool = False,
) -> Any:
    """A dataclass field that declares a setting; its name and type come from the class it stands in."""
    return dataclasses.field(default=default, metadata={"declaration": Declaration(
        "", type(default), default, label, help, minimum, maximum, step, choices, in_view, is_path, open_choice, or_share,
        zero, several_lines, list_of_texts)})


def declarations(area: type) -> tuple[Declaration, ...]:
    """The settings that a dataclass declares, in the order they stand in."""
    return tuple(
        dataclasses.replace(field.metadata["declaration"], name=field.name) for field in dataclasses.fields(area))


def read(declaration: Declaration, value: object) -> Value:
    """`value` as the setting's type, within its bounds; raises SettingError that names the setting and its range."""
    if declaration.zero and (value is None or str(value).strip().lower() in ("", declaration.zero)):
        return declaration.type(0)
    converted = _CONVERT[declaration.type](declaration, value)
    if declaration.choices and isinstance(converted, str):
        spelt = _SWITCHES.get(converted.lower(), converted) if "on" in declaration.choices else converted
        converted = next((choice for choice in declaration.choices if choice.lower() == spelt.lower()), converted)
    converted = _OLD_CHOICES.get((declaration.name, converted), converted)
    if declaration.choices and converted not in declaration.choices and not declaration.open_choice:
        raise _refused(declaration, value, f"it must be one of {', '.join(declaration.choices)}")
    if isinstance(converted, str) and (why := _not_text(converted, declaration)):
        raise _refused(declaration, value, why)
    if isinstance(converted, (int, float)) and not isinstance(converted, bool):
        low, high = declaration.minimum, declaration.maximum
        if not math.isfinite(converted) or (low is not None and converted < low) or (
                high is not None and converted > high):
            raise _refused(declaration, value, _range_text(declaration))
    return converted


def _refused(declaration: Declaration, value: object, why: str) -> SettingError:
    what = declaration.named
    default = f"the default is {declaration.default!r}"
    if value is None or value == "":
        return SettingError(f"{what} is empty", why=why, remedy=default)
    # The page's numbers are all floats.
    shown = f"{value:.0f}" if isinstance(value, float) and value.is_integer() and abs(value) < 1e15 else repr(value)
    shown = shown if len(shown) <= 60 else shown[:57] + "…"
    return SettingError(f"{what} = {shown} is not possible", why=why, remedy=default)


def _not_text(text: str, declaration: Declaration) -> str:
    """Why `text` cannot be written into a file, or name one; "" if it can."""
    if declaration.name in _ONLY_READ:
        return ""
    with contextlib.suppress(UnicodeEncodeError):
        if text.encode() and (declaration.is_path or declaration.name == "output_name"):
            os.fsencode(text)
        return ""
    with contextlib.suppress(UnicodeError):
        text.encode("utf-8", "surrogateescape").decode()  # as a locale of UTF-8 has it
        return f"the system's texts are {sys.getfilesystemencoding()}, as the locale says (set LC_ALL to one of UTF-8)"
    return "it is not text in UTF-8"


def _range_text(declaration: Declaration) -> str:
    low, high = declaration.minimum, declaration.maximum
    if low is not None and high is not None:
        return f"it must lie between {low:.10g} and {high:.10g}"
    if low is not None:
        return f"it must be at least {low:.10g}"
    if high is not None:
        return f"it must be at most {high:.10g}"
    return "it must be a finite number"


def _to_bool(declaration: Declaration, value: object) -> bool:
    if isinstance(value, bool):
        return value
    text = str(value).strip().lower()
    if text in ("true", "1", "yes", "on"):
        return True
    if text in ("false", "0", "no", "off"):
        return False
    raise _refused(declaration, value, "it must be true or false")


def _to_int(declaration: Declaration, value: object) -> int | float:
    number = _to_float(declaration, value)
    if declaration.or_share and 0 < number < 1:
        return number
    if number and "%" in str(value):
        raise _refused(declaration, value, "a share must lie between 0 and 100 %")
    if not math.isfinite(number) or number != int(number):
        raise _refused(declaration, value, "it must be a whole number")
    return int(number)


def _to_float(declaration: Declaration, value: object) -> float:
    if isinstance(value, str):
        value = _DECIMAL_COMMA.sub(r"\1.\2", value.strip().strip("'\"[]"))
        if declaration.or_share or declaration.maximum == 1:
            value = re.sub(r"\s*%$", "e-2", value)
    if isinstance(value, (list, tuple)):  # kohya's scripts take a rate for each text encoder
        if len(set(map(str, value))) != 1:
            raise _refused(declaration, value, "it must be one number, here there is one for all parts")
        value = value[0]
    if isinstance(value, bool) or value is None:
        raise _refused(declaration, value, "it must be a number")
    try:
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        raise _refused(declaration, value, "it must be a number") from None


def _to_str(declaration: Declaration, value: object) -> str:
    if isinstance(value, (list, tuple)) and value and all(type(number) is int for number in value):
        value = ",".join(map(str, value))  # width and height
    if declaration.list_of_texts and isinstance(value, (list, tuple)) and all(isinstance(text, str) for text in value):
        value = " ".join(value)
    if isinstance(value, (list, tuple, dict)) or value is None:
        raise _refused(declaration, value, "it must be text")
    text = str(value).strip()
    if "\x00" in text:
        raise _refused(declaration, value, "it holds a zero character")
    # Windows' "Copy as path" wraps the path in quotes; nobody means them.
    is_path = declaration.holds_path(text.strip('"'))
    if is_path and len(text) >= 2 and text[0] == text[-1] == '"':
        text = text[1:-1]
    return with_home(text) if is_path else text


def with_home(path: str) -> str:
    """`path` with a leading ~ replaced by the user's folder. Another user's (~name) is not meant: it may be a file's name."""
    return os.path.expanduser(path) if path == "~" or path.startswith(("~/", "~\\")) else path


def user_path(text: str) -> Path:
    """A path on a command line, which may begin with ~."""
    return Path(with_home(text))


_CONVERT = {bool: _to_bool, int: _to_int, float: _to_float, str: _to_str}
