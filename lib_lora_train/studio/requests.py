"""What the studio's routes are sent, as one pydantic model; the subset that pydantic 1.10 and 2 share."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from pydantic import BaseModel, Field, StrictBool, StrictFloat, StrictInt, StrictStr, ValidationError, conint, constr

from lib_lora_train.errors import SettingError

MOST_CHARACTERS = 10_000
MOST_A_PAGE = 500
_BATCH = re.compile(r"[A-Za-z0-9_-]{1,64}")

Text = constr(strict=True, max_length=MOST_CHARACTERS)
Count = conint(strict=True, ge=0)
Side = conint(strict=True, ge=64, le=4096)
Pixels = StrictInt | StrictFloat
Table = dict[StrictStr, Any]
Model = TypeVar("Model")


@dataclasses.dataclass(frozen=True)
class Selection:
    """Images by name, or those that a filter accepts."""

    names: tuple[str, ...] | None
    filter: Mapping[str, Any] = dataclasses.field(default_factory=dict)


class StudioRequest(BaseModel):
    """Every value that a request may hold, under the API's name; which route reads which is written in `api/studio.py`.

    Values that no route knows are passed over.
    """

    name: Text = ""
    concept: Text = ""
    discard: StrictBool = False
    paths: list[Text] = []
    batch: Text = ""

    id: Text = ""
    ids: list[Text] | None = None
    filter: Table | None = None
    offset: Count = 0
    limit: conint(strict=True, ge=0, le=MOST_A_PAGE) = 48
    sort: Text = "name"

    text: Text = ""
    edit: Table = {}
    overwrite: StrictBool = False
    source: Text = ""
    options: Table = {}

    settings: Table = {}
    background: StrictBool = False
    shape: Table = {}
    box: tuple[Pixels, Pixels, Pixels, Pixels] | None = None
    copied: StrictBool = Field(False, alias="copy")
    tile: conint(strict=True, ge=0, le=16384) = 0

    held_out: StrictBool | None = None

    n: conint(ge=0, le=999) = 0
    seeds: conint(strict=True, ge=0, le=8) = 2
    steps: conint(strict=True, ge=1, le=150) = 20
    worst: Count = 48
    prompts: list[Text] = []
    count: conint(strict=True, ge=1, le=10_000) = 20
    size: Side | tuple[Side, Side] = 512
    cfg: conint(strict=True, ge=1, le=30) = 7
    seed: conint(strict=True, ge=0, le=2**32 - 1) = 1

    def selection(self) -> Selection:
        """The images of "ids", or else those of "filter"; raises SettingError where the request holds neither."""
        if self.ids is not None:
            return Selection(tuple(dict.fromkeys(self.ids)))
        if self.filter is None:
            raise SettingError("No picture was named", why='the request holds neither "ids" nor "filter"')
        return Selection(None, self.filter)

    def filtered(self) -> Selection:
        """The images of "filter", by default all."""
        return Selection(None, self.filter or {})


def validated(model: type[Model], values: Mapping[str, Any], *, what: str = "request") -> Model:
    """`model` from JSON. Raises SettingError naming the first value that does not fit; `what` completes "of the …".

    A dataclass takes no other names than its fields; a BaseModel passes over those that it does not know.
    """
    if dataclasses.is_dataclass(model):
        fields = {field.name: field for field in dataclasses.fields(model)}
        if unknown := sorted(set(map(str, values)) - set(fields)):
            raise SettingError(f"The {what} has no {unknown[0]}", remedy=f"use {', '.join(fields) or 'nothing'}")
        needed = (name for name, field in fields.items() if field.default is dataclasses.MISSING)
        if absent := [name for name in needed if name not in values]:
            raise SettingError(f"The {what} needs {absent[0]}")
    # JSON's 20.0 is the integer 20.
    exact = {name: int(value) if isinstance(value, float) and value.is_integer() else value for name, value in values.items()}
    try:
        return model(**exact)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"] if part != "__root__")
        raise SettingError(f'"{name}" of the {what} cannot be used', why=first["msg"]) from error


def some(values: Sequence[str] | None, name: str) -> Sequence[str]:
    """A list of texts that a route needs; raises SettingError where it is left out or holds an empty text."""
    if not values or not all(value.strip() for value in values):
        raise SettingError(f'"{name}" must be a list of texts')
    return values


def batch_name(value: str | None) -> str:
    """What the page calls files that are imported together; it becomes a folder's name. Raises SettingError."""
    if not _BATCH.fullmatch(value or ""):
        raise SettingError('"batch" must be up to 64 letters, digits, dashes and underscores')
    return value or ""
