"""Captions that need no model: the prompt inside the picture, the words of its name, a template."""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import torch

from lib_lora_train.dataset.images import read_texts
from lib_lora_train.dataset.progress import ShouldStop
from lib_lora_train.errors import DatasetError, SettingError, printable
from lib_lora_train.tagging.captioner import Description, FileCaptioner
from lib_lora_train.tagging.options import TagOptions
from lib_lora_train.tagging.prompt import plain_words, positive_prompt

_REPEATS = re.compile(r"\d+_")
_NUMBER_IN_FRONT = re.compile(r"^(?:\d+\s*[_-]+|0\d*\s+)+")  # 00012-1234567-…, 01 …; not that of 1girl or 3 cats
_NUMBER_BEHIND = re.compile(r"(?:[\s_-]*\(\d+\)|[\s_-]+\d+)+$")
_PLACE = re.compile(r"\{(\w*)\}")
_PLACES = ("trigger", "folder", "name")


@dataclasses.dataclass(frozen=True)
class PlainSource:
    """A source without a model: always ready, opened at once."""

    name: str
    label: str
    reads: Literal["file"] = "file"

    def missing(self) -> str:
        """Nothing ever is."""
        return ""

    @contextlib.contextmanager
    def open(self, options: TagOptions, device: torch.device, *,
             should_stop: ShouldStop | None = None) -> Iterator[FileCaptioner]:
        """Raises SettingError for a template that names something else than its three places."""
        if self.name == "infotext":
            yield Infotext()
        elif self.name == "filename":
            yield FileName()
        else:
            yield Template(options.template, trigger_word=options.trigger_word)


PLAIN_SOURCES = (
    PlainSource("infotext", "Prompt inside the picture"),
    PlainSource("filename", "File name"),
    PlainSource("template", "Template"),
)


class Infotext:
    """The prompt that the picture was painted with, as the WebUI (PNG, JPEG, WebP) or NovelAI kept it."""

    def describe_file(self, path: Path) -> Description:
        """The prompt without the negative one, without LoRAs and emphasis."""
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


class FileName:
    """The words of the file's name."""

    def describe_file(self, path: Path) -> Description:
        """Without numbers in front and behind: "00012-1234-red_cat (2).png" says "red cat"."""
        words = words_of_name(path.stem)
        if not words:
            raise DatasetError(f"The name {path.name} holds no words")
        return Description(text=words)


class Template:
    """The same text for every picture, but for what its folder and name say."""

    def __init__(self, template: str, *, trigger_word: str) -> None:
        unknown = [place for place in _PLACE.findall(template) if place not in _PLACES]
        if unknown:
            raise SettingError(f"The template names {{{unknown[0]}}}, which there is not",
                               remedy=f"there are {', '.join(f'{{{place}}}' for place in _PLACES)}")
        self._template, self._trigger_word = template, trigger_word

    def describe_file(self, path: Path) -> Description:
        """The template with its places filled in; a place with nothing to say leaves nothing behind."""
        values = {"trigger": self._trigger_word, "folder": words_of_folder(path.parent.name), "name": words_of_name(path.stem)}
        text = _PLACE.sub(lambda match: values[match[1]], self._template)
        if not text.strip(" ,"):
            raise DatasetError(f"The template says nothing about {path.name}")
        return Description(text=text)


def words_of_name(stem: str) -> str:
    """A file's name as words: numbers around them, which programs give, left out; "" where nothing else is there."""
    stem = _NUMBER_BEHIND.sub("", _NUMBER_IN_FRONT.sub("", printable(stem)))
    if not set(stem) & set("_ "):
        stem = stem.replace("-", " ")  # top-hat: nothing else parts its words
    words = " ".join(stem.replace("_", " ").split()).strip(" -,")
    return words if any(map(str.isalpha, words)) else ""


def words_of_folder(name: str) -> str:
    """A folder's name as words, without kohya's repeats in front."""
    return " ".join(_REPEATS.sub("", printable(name), count=1).replace("_", " ").split())
