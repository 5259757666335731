"""What the model is told of a picture: the style, how it is treated, its name or a keyword, colour, shape, size and ground."""

from __future__ import annotations

import random
import string
from collections.abc import Sequence

from images import HUES, colours, shapes
from PIL import Image

from tools.styles import NOTO, Emoji

COLOUR_WORDS = (*HUES, "brown", "black", "white", "grey")
NO_CAPTION, KEYWORD, COLOURED, SHAPED, WITH_TAGS = 0.1, 0.08, 0.2, 0.1, 0.1
BARE, UNKNOWN, UNKNOWN_OF_OTHERS = 0.6, 0.25, 0.06
"""How often Noto's pictures have no word for the style, and how often Noto's and other styles' have a word that means nothing
in its place: such a word stands for Noto's style in half of the pictures, so that the model has a style of its own."""


def caption(emoji: Emoji, image: Image.Image, *, style: str, treatments: Sequence[str] = (), turned_to: str = "",
            size: str = "", ground: str = "", draw: random.Random) -> str:
    """One way to say it: "style, treatment, blue word, on red"; empty now and then, for classifier-free guidance.

    What was done to the picture (`treatments`, hues `turned_to` a colour, `size`, `ground`) is always said. A bare name is
    Noto's. A word that means nothing stands for any style: so does a trigger word that is yet to be learnt.
    """
    if draw.random() < NO_CAPTION:
        return ""
    subject, tags = emoji.label, emoji.tags
    if turned_to:
        subject = " ".join(word for word in subject.split() if word not in COLOUR_WORDS) or subject
        tags = tuple(tag for tag in tags if not set(tag.split()) & set(COLOUR_WORDS))
    if tags and draw.random() < KEYWORD:
        subject = draw.choice(tags)
    before = [size] if size else []
    if draw.random() < SHAPED:
        before += shapes(image)
    colour = [turned_to] if turned_to else colours(image)[:1] if draw.random() < COLOURED else []
    before += [one for one in colour if one not in subject.split()]
    parts = [*_by(style, draw), *treatments, " ".join([*before, subject])]
    if tags and draw.random() < WITH_TAGS:
        parts += draw.sample(tags, min(len(tags), 2))
    return ", ".join([*parts, *([f"on {ground}"] if ground else [])])


def _by(style: str, draw: random.Random) -> list[str]:
    if draw.random() < (UNKNOWN if style == NOTO.name else UNKNOWN_OF_OTHERS):
        return ["".join(draw.choices(string.ascii_lowercase, k=draw.randint(3, 8)))]
    return [] if style == NOTO.name and draw.random() < BARE / (1 - UNKNOWN) else [style]
