"""From another program's names over kohya's, which `settings/kohya.py` knows, to ours."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping

from lib_lora_train.errors import SettingError
from lib_lora_train.settings import DECLARATIONS, kohya, named
from lib_lora_train.settings.field import Value, read
from lib_lora_train.settings.importing.entries import Entry, Imported, Kind, shown
from lib_lora_train.settings.network import NetworkSettings
from lib_lora_train.settings.network_checks import check_kind

_OFF = ("", None)


@dataclasses.dataclass
class Translation:
    """One file on its way: `values` under kohya's names, and which names of the file they came from."""

    program: str
    values: dict[str, object] = dataclasses.field(default_factory=dict)
    notes: list[str] = dataclasses.field(default_factory=list)
    _origins: list[tuple[str, object, str, str]] = dataclasses.field(default_factory=list)
    """(name, value, kohya's name, "key=value" of kohya's lists)"""
    _entries: list[Entry] = dataclasses.field(default_factory=list)

    def add(self, name: str, value: object, *, origin: str = "", given: object = None) -> None:
        """A value under kohya's name; `origin` is the file's name for it and `given` its value there, where they are others."""
        self.values[name] = value
        self._origins.append((origin or name, given if origin else value, name, ""))

    def add_argument(self, name: str, argument: str, *, origin: str, given: object) -> None:
        """One more "key=value" of kohya's lists, `optimizer_args` or `network_args`."""
        before = self.values.get(name) or []
        self.values[name] = [*(before.split() if isinstance(before, str) else before), argument]  # type: ignore[misc]
        self._origins.append((origin, given, name, argument))

    def unused(self, name: str, value: object, why: str) -> None:
        """A name that is not needed here."""
        self._entries.append(Entry(name, value, "unused", why))

    def refuse(self, name: str, value: object, why: str) -> None:
        """A name that means what cannot be done here."""
        self._entries.append(Entry(name, value, "refused", why))

    def finish(self, defaults: Mapping[str, object]) -> Imported:
        """The file in our names. `defaults` is what the program does where a file names nothing, under kohya's names; "@name"
        is the value of another."""
        known = {**defaults, **{name: value for name, value in self.values.items() if value not in _OFF}}
        left_out = {name: known.get(value[1:], "") if isinstance(value, str) and value.startswith("@") else value
                    for name, value in defaults.items() if self.values.get(name) in _OFF}
        found = kohya.adopt({**self.values, **{name: value for name, value in left_out.items() if value not in _OFF}})
        values: dict[str, Value] = {}
        impossible: dict[str, str] = {}
        for name, value in found.values.items():
            if name not in DECLARATIONS:
                continue
            if name == "resume":
                impossible[name] = f"only states of our own are resumed; name its last LoRA in {named('network_weights')}"
                continue
            try:
                values[name] = read(DECLARATIONS[name], _first(value))
            except SettingError as error:
                impossible[name] = error.reason
        impossible |= _impossible_with_kind(values)
        values = {name: value for name, value in values.items() if name not in impossible}
        entries = [self._entry(*origin, adopted=found, values=values, impossible=impossible) for origin in self._origins]
        of_file = {name for _, _, name, _ in self._origins if self.values[name] not in _OFF}
        implied = {name: values[name] for name in (*left_out, *self.values)
                   if name in values and name not in of_file and values[name] != DECLARATIONS[name].default}
        told = [f"{sentence}." for sentence in found.became if _subject(sentence) not in self.values]
        return Imported(self.program, values, (*entries, *self._entries), implied, (*self.notes, *told))

    def _entry(self, origin: str, given: object, name: str, argument: str, *, adopted: kohya.Adopted,
               values: Mapping[str, Value], impossible: Mapping[str, str]) -> Entry:
        if origin == name and given != self.values[name] and kohya.changes_nothing(name, given):
            return Entry(origin, given, "unused", "another name in the file says it")
        kind, text = _fate(name, self.values[name], adopted=adopted, values=values, impossible=impossible)
        if kind == "refused" and argument and argument.partition("=")[0] not in str(adopted.values[name]):
            return Entry(origin, given, "changed", f"read as the network's {argument}")
        if kind == "refused" and name in kohya.ARGUMENTS and not argument:
            left = adopted.values[name]
            text = f"of it {shown(' '.join(map(str, left)) if isinstance(left, list) else left)} is left out: {text}"
        same_name = origin.rpartition(".")[2].removeprefix("ss_") == name and shown(given) == shown(self.values[name])
        if kind == "taken" and not same_name:
            kind, text = "changed", f"read as {name} = {shown(self.values[name])}"
        return Entry(origin, given, kind, text)


def _fate(name: str, value: object, *, adopted: kohya.Adopted, values: Mapping[str, Value],
          impossible: Mapping[str, str]) -> tuple[Kind, str]:
    """What became of a name of kohya's."""
    told = [sentence.partition(" is ")[2] for sentence in adopted.became if _subject(sentence) == name]
    if name in impossible:
        return "refused", impossible[name]
    if name in adopted.values and name not in DECLARATIONS:
        if name not in kohya.explanations() and kohya.changes_nothing(name, value):
            return "unused", "not known here, and off"
        return "refused", kohya.explanations().get(name, "").partition(": ")[2] or _unknown(name)
    if told:
        return "unused" if all(text.startswith("left out") for text in told) else "changed", "; ".join(told)
    if name in adopted.unused:
        return "unused", adopted.unused[name]
    if name in values:
        if _same(name, value, values[name]):
            return "taken", ""
        if not kohya.changes_nothing(name, value):
            return "changed", f"read as {name} = {shown(values[name])}"
    if kohya.changes_nothing(name, value):
        return "unused", "it changes nothing"
    return "unused", "it has no effect beside the file's other settings"


def _impossible_with_kind(values: Mapping[str, Value]) -> dict[str, str]:
    """{name: why} of settings that the kind of network that is chosen beside them cannot be trained with."""
    found, module = {}, str(values.get("network_module", "LoRA"))
    for name in ("network_dropout", "rank_dropout", "scale_weight_norms"):
        try:
            check_kind(NetworkSettings(**{name: values.get(name, 0.0)}), module=module,
                       dora=bool(values.get("dora_wd")) and module != "OFT")
        except SettingError as error:
            found[name] = error.reason
    return found


def _subject(sentence: str) -> str:
    """The name that a sentence of `kohya.adopt` is about."""
    return sentence.split(" ", 1)[0].rstrip(",")


def _same(name: str, value: object, ours: Value) -> bool:
    try:
        return read(DECLARATIONS[name], value) == ours
    except SettingError:
        return False


def _first(value: object) -> object:
    """Of a list of rates, one for each text encoder, the first."""
    rates = isinstance(value, (list, tuple)) and bool(value) and all(isinstance(rate, float) for rate in value)
    return value[0] if rates else value  # type: ignore[index]


def _unknown(name: str) -> str:
    near = difflib.get_close_matches(name, DECLARATIONS, n=1)
    return f"not known; did you mean {near[0]}?" if near else "not known"
