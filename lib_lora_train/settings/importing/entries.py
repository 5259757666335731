"""What became of a file's settings, one by one."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from lib_lora_train.settings.field import Value

Kind = Literal["taken", "changed", "unused", "refused"]
KINDS: dict[Kind, str] = {
    "refused": "Not taken", "changed": "Read as something else here", "taken": "Taken as they are",
    "unused": "Not needed here, or off"}
OURS = "Train LoRA"
_MOST_SHOWN = 60
_SECRETS = frozenset({"wandb_api_key", "huggingface_token"})


@dataclasses.dataclass(frozen=True)
class Entry:
    """One name of a file. `text` says what became of it, or why it was not taken; "" where there is nothing to say."""

    name: str
    value: object
    kind: Kind
    text: str = ""

    @property
    def shown(self) -> str:
        """The value on one line, cut where it is long; what is secret is not shown."""
        return "…" if self.name in _SECRETS else shown(self.value)


@dataclasses.dataclass(frozen=True)
class Imported:
    """A file of settings as it was read.

    program     what wrote it
    values      settings by our names, each of them possible; what is not named keeps its default
    entries     every name in the file
    implied     values that the program has where its file names none, and we have others
    notes       sentences about the file
    """

    program: str
    values: Mapping[str, Value]
    entries: tuple[Entry, ...]
    implied: Mapping[str, Value] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def foreign(self) -> bool:
        """Whether another program wrote it: what it does not name is then as there, and not as it was on the page before."""
        return self.program != OURS

    def sentences(self) -> list[str]:
        """What a user should know, for a terminal; nothing about a file of our own."""
        if not self.foreign:
            return list(self.notes)
        found = [f"The settings are those of {self.program}."]
        for kind, title in KINDS.items():
            entries = [entry for entry in self.entries if entry.kind == kind]
            told = "; ".join(f"{e.name} = {e.shown} ({e.text})" if e.text else f"{e.name} = {e.shown}" for e in entries)
            found += [f"{title}: {told}."] if entries else []
        if self.implied:
            told = ", ".join(f"{name} = {shown(value)}" for name, value in self.implied.items())
            found.append(f"Left out there, and taken as {self.program} has it: {told}.")
        return [*found, *self.notes]

    def to_json(self) -> dict[str, Any]:
        """As plain data, for the page."""
        return {"program": self.program, "foreign": self.foreign, "values": dict(self.values), "implied": dict(self.implied),
                "notes": list(self.notes),
                "entries": [{"name": e.name, "value": e.shown, "kind": e.kind, "text": e.text} for e in self.entries]}


def shown(value: object) -> str:
    """A value on one line, cut where it is long."""
    text = " ".join(str(value).split())
    return text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN - 1]}…"
