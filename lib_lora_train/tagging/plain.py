r"""Captions that need no model: the prompt inside the image, the words of its name, a template.

AUTOMATIC1111's WebUI writes the prompt into the file so:

    a cat, (blue eyes:1.2) <lora:fluff:0.8>
    Negative prompt: blurry
    Steps: 20, Sampler: Euler a, …

A caption is plain text: emphasis, editing, LoRAs and the words BREAK and AND are instructions to the program, not to the
model, and are removed. `\(` means a bracket.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import torch

from lib_lora_train.dataset.images import read_texts
from lib_lora_train.dataset.listing import repeats_and_name
from lib_lora_train.dataset.progress import ShouldStop
from lib_lora_train.errors import DatasetError, SettingError, printable
from lib_lora_train.tagging.captioner import Description, FileCaptioner
from lib_lora_train.tagging.options import TagOptions

_NUMBER_IN_FRONT = re.compile(r"^(?:\d+\s*[_-]+|0\d*\s+)+")  # 00012-1234567-…, 01 …; not that of 1girl or 3 cats
_NUMBER_BEHIND = re.compile(r"(?:[\s_-]*\(\d+\)|[\s_-]+\d+)+$")
_FIELD = re.compile(r"\{(\w*)\}")
_FIELDS = ("trigger", "folder", "name")

_PARAMETERS = re.compile(r"Steps: \d+,")
_EXTRA_NETWORK = re.compile(r"<[A-Za-z]\w*:[^<>]*>")
_INNERMOST = re.compile(r"\[([^\[\]]*)\]")
_NUMBER = r"\s*[+-]?(?:\d+\.?\d*|\.\d+)\s*"
_WEIGHT = re.compile(rf":{_NUMBER}\)")
_KEYWORD = re.compile(rf"(?::{_NUMBER})?\s*\b(?:BREAK|AND)\b\s*")
_LAST_WEIGHT = re.compile(rf":{_NUMBER}$")
_EDIT = re.compile(rf"(?:([^:]*):)?([^:]*):{_NUMBER}")
_MARKED = {"\\\\": "\ue000", "\\(": "\ue001", "\\)": "\ue002", "\\[": "\ue003", "\\]": "\ue004"}
"""Private-use characters stand for escaped ones while the others are read."""
_MEANT = str.maketrans({"\ue000": "\\", "\ue001": "(", "\ue002": ")", "\ue003": "[", "\ue004": "]"})


@dataclasses.dataclass(frozen=True)
class PlainSource:
    """A source without a model: always ready, opened at once. `describe` reads a file; it and opening raise what it raises."""

    name: str
    label: str
    describe: Callable[[Path, TagOptions], Description]
    check: Callable[[TagOptions], None] = lambda options: None
    reads: Literal["file"] = "file"

    def missing(self) -> str:
        """Nothing ever is."""
        return ""

    @contextlib.contextmanager
    def open(self, options: TagOptions, device: torch.device, *,
             should_stop: ShouldStop | None = None) -> Iterator[FileCaptioner]:
        """Raises SettingError for a template with an unknown field."""
        self.check(options)
        yield lambda path: self.describe(path, options)


def _infotext(path: Path, options: TagOptions) -> Description:
    """The prompt an image was generated with, as the WebUI (PNG, JPEG, WebP) or NovelAI kept it; without the negative prompt,
    LoRAs and emphasis."""
    texts = read_texts(path)
    parameters = texts.get("parameters") or texts.get("UserComment") or ""
    if not parameters and texts.get("Software") == "NovelAI":
        parameters = texts.get("Description", "")
    parameters = parameters or texts.get("comment", "")
    words = plain_words(positive_prompt(parameters))
    if not words:
        raise DatasetError(f"There is no prompt inside {path.name}", why="a program that paints did not keep one in it"
                           if not parameters else "what it keeps holds no words")
    return Description(text=words)


def _file_name(path: Path, options: TagOptions) -> Description:
    """The words of a file's name: "00012-1234-red_cat (2).png" says "red cat"."""
    words = words_of_name(path.stem)
    if not words:
        raise DatasetError(f"The name {path.name} holds no words")
    return Description(text=words)


def _template(path: Path, options: TagOptions) -> Description:
    """The template with its fields filled in; a field with nothing to say leaves nothing behind."""
    values = {"trigger": options.trigger_word, "folder": words_of_folder(path.parent.name), "name": words_of_name(path.stem)}
    text = _FIELD.sub(lambda match: values[match[1]], options.template)
    if not text.strip(" ,"):
        raise DatasetError(f"The template says nothing about {path.name}")
    return Description(text=text)


def _check_template(options: TagOptions) -> None:
    unknown = [field for field in _FIELD.findall(options.template) if field not in _FIELDS]
    if unknown:
        raise SettingError(f"The template names {{{unknown[0]}}}, which there is not",
                           remedy=f"there are {', '.join(f'{{{field}}}' for field in _FIELDS)}")


PLAIN_SOURCES = (
    PlainSource("infotext", "Prompt inside the picture", _infotext),
    PlainSource("filename", "File name", _file_name),
    PlainSource("template", "Template", _template, _check_template),
)


def words_of_name(stem: str) -> str:
    """A file's name as words: numbers around them, which programs give, left out; "" where nothing else is there."""
    stem = _NUMBER_BEHIND.sub("", _NUMBER_IN_FRONT.sub("", printable(stem)))
    if not set(stem) & set("_ "):
        stem = stem.replace("-", " ")  # top-hat: nothing else parts its words
    words = " ".join(stem.replace("_", " ").split()).strip(" -,")
    return words if any(map(str.isalpha, words)) else ""


def words_of_folder(name: str) -> str:
    """A folder's name as words, without kohya's repeats in front."""
    found = repeats_and_name(name)
    return " ".join(printable(found[1] if found else name).replace("_", " ").split())


def positive_prompt(parameters: str) -> str:
    """The prompt alone, of a text as the WebUI keeps it: what is before the negative prompt and the parameters."""
    lines = []
    for line in parameters.strip().splitlines():
        if line.startswith("Negative prompt:") or _PARAMETERS.match(line):
            break
        lines.append(line.strip())
    return "\n".join(lines).strip()


def plain_words(prompt: str) -> str:
    """A prompt without what only the WebUI understands, in one line; "" where nothing else was there.

    `[from:to:when]` becomes what the image was finished with, `[a|b]` both.
    """
    text = _EXTRA_NETWORK.sub(" ", prompt)
    for written, mark in _MARKED.items():
        text = text.replace(written, mark)
    had_and = " AND " in f" {text} "
    text = _KEYWORD.sub(", ", text.replace("\n", ", "))
    if had_and:
        text = _LAST_WEIGHT.sub("", text)
    text = _WEIGHT.sub(")", text)
    while (match := _INNERMOST.search(text)) is not None:
        text = text[:match.start()] + _edited(match[1]) + text[match.end():]
    text = re.sub(r"[()\[\]]", "", text)
    parts = (" ".join(part.split()) for part in text.split(","))
    return ", ".join(part for part in parts if part).translate(_MEANT)


def _edited(content: str) -> str:
    """What `[content]` leaves: an alternation all of its words, an edit its last ones, a de-emphasis its words."""
    if "|" in content:
        return ", ".join(content.split("|"))
    match = _EDIT.fullmatch(content)
    if match is None:
        return content
    before, after = match[1], match[2]
    return after if after.strip() or before is None else before
