"""What a captioner offers. Two kinds: those that look at an image, and those that look at its file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

import torch
from PIL import Image

from lib_lora_train.dataset.progress import ShouldStop
from lib_lora_train.tagging.options import TagOptions

Category = Literal["general", "character", "rating"]


class Tag(NamedTuple):
    """A tag as its model names it (with underscores), how sure it is (0…1), and what the tag is about."""

    name: str
    score: float
    category: Category = "general"


@dataclass(frozen=True)
class Description:
    """What was found for one image: tags, the surest first, or plain text, or both."""

    tags: tuple[Tag, ...] = ()
    text: str = ""


class Captioner(Protocol):
    """Looks at images."""

    def describe(self, images: Sequence[Image.Image]) -> list[Description]:
        """One description for each image (upright, RGB), all of them looked at in one pass where that is possible."""


FileCaptioner = Callable[[Path], Description]
"""Looks at what the file says and not at the image. Raises DatasetError, naming the file, where it says nothing."""


class CaptionerSource(Protocol):
    """A captioner that is not loaded yet."""

    name: str  # for programs: "wd:wd-vit-tagger-v3", "infotext"
    label: str  # for users
    reads: Literal["pixels", "file"]  # whether `open` gives a Captioner or a FileCaptioner

    def missing(self) -> str:
        """"" where it can be opened as it is, else one sentence: what is missing, and where it belongs. Never loads."""

    def open(self, options: TagOptions, device: torch.device, *,
             should_stop: ShouldStop | None = None) -> AbstractContextManager[Captioner | FileCaptioner]:
        """Load it, and unload it in any case. `should_stop` ends a wait for others with Interrupted.

        Raises a LoraTrainError where it cannot be loaded; with the sentence of `missing` where that is why.
        """
