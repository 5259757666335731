r"""The prompt inside an image, as words.

Image generators write the prompt into the file; AUTOMATIC1111's WebUI so:

    a cat, (blue eyes:1.2) <lora:fluff:0.8>
    Negative prompt: blurry
    Steps: 20, Sampler: Euler a, …

A caption is plain text: emphasis, editing, LoRAs and the words BREAK and AND are instructions to the program, not to the
model, and are removed. `\(` means a bracket.
"""

from __future__ import annotations

import re

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
