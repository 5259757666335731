"""Sample prompts, one a line, as kohya's scripts read them (sd-scripts, `line_to_prompt_dict`):

    a photo of zzk <lora:style:0.6> --n blurry --w 512 --h 768 --d 42 --l 7 --s 20

What a line leaves out is the default's. Empty lines and those that begin with # are comments.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from lib_lora_train.adapters.stack import LoraTag, split_tags
from lib_lora_train.dataset.captions import with_trigger_word
from lib_lora_train.dataset.text_files import read_text
from lib_lora_train.errors import DatasetError, LoraFileError, SettingError, plain_line
from lib_lora_train.model.sampler import SampleRequest
from lib_lora_train.settings import DECLARATIONS, named

DEFAULT_PROMPTS, DEFAULT_STEPS = 3, 12
_FLAG = re.compile(r"(?:^|\s)--([A-Za-z]\w*)(?=\s|$)")


@dataclasses.dataclass(frozen=True)
class SamplePrompt:
    """One line: `text` is the prompt as it is written, of which `request` has all but the `loras`."""

    text: str
    request: SampleRequest
    loras: tuple[LoraTag, ...] = ()


def read_prompts(setting: str) -> str:
    """The prompts that the setting sample_prompts holds, or that the file holds which it names. Raises SettingError for a file
    that cannot be read; whether it may be is the caller's to check."""
    if not DECLARATIONS["sample_prompts"].holds_path(setting):
        return setting
    what, remedy = f"{named('sample_prompts')} = {setting} cannot be used", "check the path, or write the prompts themselves"
    if not setting.lower().endswith(".txt"):
        raise SettingError(what, why="prompts are read from .txt files", remedy="write them one a line into such a file")
    try:
        return read_text(Path(setting)).text
    except DatasetError as error:
        raise SettingError(what, why=error.why or error.what, remedy=remedy) from error


def parse_prompts(text: str, *, defaults: SampleRequest) -> tuple[SamplePrompt, ...]:
    """The prompts of a text. Raises SettingError for a flag that is not known and a value that is not possible."""
    lines = (line.strip() for line in text.splitlines())
    return tuple(_prompt(line, defaults) for line in lines if line and not line.startswith("#"))


def bare_prompts(lines: Sequence[str]) -> tuple[str, ...]:
    """The prompts among these lines, for what samples all of them alike: without comments and empty lines. Raises SettingError
    for one with a flag, which would become a part of the prompt."""
    texts = [" ".join(line.split()) for line in lines]
    texts = [text for text in texts if text and not text.startswith("#")]
    for text in texts:
        if found := _FLAG.search(text):
            raise SettingError(f"The prompt {plain_line(text)[:80]!r} is not possible here", remedy=f"leave --{found[1]} out",
                               why="all are sampled in one size, with the same seeds and steps")
    return tuple(texts)


def default_prompts(captions: Sequence[str], *, trigger_word: str, defaults: SampleRequest,
                    others: Sequence[str] = ()) -> tuple[SamplePrompt, ...]:
    """Three different captions, evenly from all, with the trigger word in front; where there are fewer, some of the `others` as
    well."""
    chosen: list[str] = []
    for texts in (captions, others):
        different = [text for text in dict.fromkeys(with_trigger_word(caption, trigger_word) for caption in texts)
                     if text not in chosen]
        count = min(DEFAULT_PROMPTS - len(chosen), len(different))
        chosen += [different[index * (len(different) - 1) // max(1, count - 1)] for index in range(count)]
    return tuple(SamplePrompt(caption, dataclasses.replace(defaults, prompt=caption)) for caption in chosen)


def fitted(prompts: Sequence[SamplePrompt], *, multiple: int) -> tuple[tuple[SamplePrompt, ...], list[str]]:
    """The prompts in sizes that a model has, which are multiples of `multiple` pixels, and a sentence where one had another."""
    found, notes = [], dict[str, None]()
    for prompt in prompts:
        request = prompt.request
        width, height = (max(multiple, round(side / multiple) * multiple) for side in (request.width, request.height))
        if (width, height) != (request.width, request.height):
            notes[f"Samples of {request.width}×{request.height} pixels become {width}×{height}: this model's sizes are "
                  f"multiples of {multiple}."] = None
        found.append(dataclasses.replace(prompt, request=dataclasses.replace(request, width=width, height=height)))
    return tuple(found), list(notes)


def _prompt(line: str, defaults: SampleRequest) -> SamplePrompt:
    text, *parts = _FLAG.split(line)
    values: dict[str, object] = {}
    for flag, value in zip(parts[::2], parts[1::2], strict=True):
        field, read = _FLAGS.get(flag.lower(), ("", _no_text))
        if not field:
            why = "samples are made with Euler" if flag.lower() == "ss" else "it is not known here"
            raise _refused(line, f"--{flag}", why=why, remedy="leave it out; there are --w, --h, --d, --l, --s and --n")
        try:
            values[field] = read(value.strip())
        except ValueError as error:
            raise _refused(line, f"--{flag} {value.strip()}", why=str(error), remedy="write for example --w 512 --h 768 --d 42 "
                           "--l 7 --s 20") from None
    try:
        prompt, loras = split_tags(text.strip())
    except LoraFileError as error:
        raise _refused(line, text.strip(), why=error.why, remedy=error.remedy) from error
    return SamplePrompt(text.strip(), dataclasses.replace(defaults, prompt=prompt, **values), loras)


def _refused(line: str, part: str, *, why: str, remedy: str) -> SettingError:
    shown = "" if part in (line, "") else f" in {plain_line(line)[:60]!r}"
    return SettingError(f"{named('sample_prompts')}: {plain_line(part)[:80]!r}{shown} cannot be understood", why=why,
                        remedy=remedy)


def _no_text(text: str) -> str:
    return text


def _integer(low: int, high: int) -> Callable[[str], int]:
    def read(text: str) -> int:
        if not (text.isascii() and text.isdigit() and len(text) < 12 and low <= int(text) <= high):
            raise ValueError(f"it must be a whole number from {low} to {high}")
        return int(text)
    return read


def _scale(text: str) -> float:
    try:
        scale = float(text)
    except ValueError:
        scale = math.nan
    if not 0 <= scale <= 100:
        raise ValueError("it must be a number from 0 to 100")
    return scale


_FLAGS: dict[str, tuple[str, Callable[[str], object]]] = {
    "w": ("width", _integer(64, 4096)), "h": ("height", _integer(64, 4096)), "d": ("seed", _integer(0, 2**32 - 1)),
    "s": ("steps", _integer(1, 1000)), "l": ("cfg_scale", _scale), "n": ("negative_prompt", _no_text)}
