"""What the model is told of an image: its name or a keyword, and colour, shape and size where the image has them."""

from __future__ import annotations

import dataclasses
import random
import string

from images import HUES, Emoji, colours, shapes
from PIL import Image

COLOUR_WORDS = (*HUES, "brown", "black", "white", "grey")
NO_CAPTION, NAMED, COLOURED, SHAPED, WITH_TAGS, WITH_UNKNOWN = 0.1, 0.92, 0.2, 0.15, 0.15, 0.1


@dataclasses.dataclass(frozen=True)
class Description:
    """What can be said of one variant of an emoji."""

    name: str
    tags: tuple[str, ...]
    colour: tuple[str, ...]
    shape: tuple[str, ...]
    size: str
    must_say_colour: bool
    manner: tuple[str, ...] = ()


def describe(emoji: Emoji, image: Image.Image, *, turned_to: str | None = None, size: str = "",
          manner: tuple[str, ...] = ()) -> Description:
    """Of `emoji` as shown by `image`; `turned_to` is the colour that its hues were turned to, `manner` the words for how it
    is drawn, () for Noto's style; both must be said."""
    name, tags = emoji.label, emoji.tags
    if turned_to:
        name = " ".join(word for word in name.split() if word not in COLOUR_WORDS) or name
        tags = tuple(tag for tag in tags if not set(tag.split()) & set(COLOUR_WORDS))
    return Description(name, tags, (turned_to,) if turned_to else tuple(colours(image)), tuple(shapes(image)), size,
                 turned_to is not None, manner)


def caption(of: Description, draw: random.Random) -> str:
    """One way to say it; empty now and then, for classifier-free guidance.

    Now and then a word that means nothing comes first, so that a trigger word which is yet to be learnt does no harm.
    """
    if draw.random() < NO_CAPTION:
        return ""
    subject = draw.choice(of.tags) if of.tags and draw.random() > NAMED else of.name
    words = [of.size] if of.size else []
    if of.shape and not of.manner and draw.random() < SHAPED:
        words.append(of.shape[0])
    if of.colour and (of.must_say_colour or draw.random() < COLOURED) and of.colour[0] not in subject.split():
        words.append(of.colour[0])
    parts = [" ".join([*words, subject])]
    if of.tags and draw.random() < WITH_TAGS:
        parts += draw.sample(of.tags, min(len(of.tags), draw.randint(1, 3)))
    if of.manner:
        parts = [*of.manner, *parts]
    elif draw.random() < WITH_UNKNOWN:
        parts.insert(0, "".join(draw.choices(string.ascii_lowercase, k=draw.randint(3, 7))))
    return ", ".join(parts)
