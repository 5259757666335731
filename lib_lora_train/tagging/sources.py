"""Everything that captions can come from on this host."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from lib_lora_train.errors import SettingError
from lib_lora_train.tagging.captioner import CaptionerSource
from lib_lora_train.tagging.plain import PLAIN_SOURCES
from lib_lora_train.tagging.wd import FILES, PUBLISHED, WDSource

_RECOMMENDED = PUBLISHED[0]


class OffersCaptioners(Protocol):
    """The part of a host that is used here."""

    @property
    def taggers_folder(self) -> Path:
        """It holds a folder for each tagger."""

    def captioners(self) -> Sequence[CaptionerSource]:
        """What the host brings itself."""


def sources(host: OffersCaptioners) -> list[CaptionerSource]:
    """WD taggers that are there, or the recommended one with what is missing; the host's own; those without a model."""
    return [*wd_sources(host.taggers_folder), *host.captioners(), *PLAIN_SOURCES]


def wd_sources(folder: Path) -> list[WDSource]:
    """A tagger for each folder in `folder` that holds one of its files, and for each published one that was fetched."""
    try:
        names = sorted(path.name for path in folder.iterdir() if any((path / name).is_file() for name in FILES))
    except OSError:
        names = []  # not made yet
    here = [WDSource(folder / name) for name in names]
    fetched = [source for name in PUBLISHED if name not in names and not (source := WDSource(folder / name)).missing()]
    return here + fetched or [WDSource(folder / _RECOMMENDED)]


def find_source(name: str, among: Sequence[CaptionerSource]) -> CaptionerSource:
    """The source called `name`. A published WD tagger is found by its name too where it is not there yet: it can be fetched.

    Raises SettingError with the names there are.
    """
    for source in among:
        if source.name == name:
            return source
    places = [source.folder.parent for source in among if isinstance(source, WDSource)]
    if places and name.removeprefix("wd:") in PUBLISHED:
        return WDSource(places[0] / name.removeprefix("wd:"))
    raise SettingError(f"There is no tagger called {name!r}", remedy=f"there are {', '.join(s.name for s in among)}")
