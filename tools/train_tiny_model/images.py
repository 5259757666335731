"""What is done to a drawing before the model sees it, what can be said of its colours and shape, and which words are kept for
what. Drawings are RGBA images of 64 pixels (`tools/styles.py`)."""

from __future__ import annotations

import colorsys

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageChops, ImageEnhance, ImageFilter, ImageOps

SIDE, FRAME, SMALL_FRAME = 128, 72, 112
"""The model's images; the white paper a 64-pixel emoji is laid on; the paper that makes it "small"."""

# What the model card's sheet asks for, and what the benchmark holds out: concrete, and told apart at a glance.
HELD_OUT = (
    "red apple", "banana", "strawberry", "watermelon", "pineapple", "carrot", "mushroom", "hamburger", "pizza", "doughnut",
    "ice cream", "birthday cake", "cookie", "hot beverage", "beer mug", "fried shrimp", "cat face", "dog face", "panda",
    "frog", "fox", "pig face", "penguin", "owl", "fish", "octopus", "turtle", "snail", "butterfly", "lady beetle", "spider",
    "elephant", "sunflower", "rose", "tulip", "cactus", "evergreen tree", "four leaf clover", "rainbow", "snowman", "fire",
    "full moon", "house", "automobile", "bus", "bicycle", "sailboat", "rocket", "airplane", "soccer ball", "basketball",
    "trophy", "guitar", "drum", "umbrella", "crown", "light bulb", "key", "wrench", "hammer", "red heart", "ghost", "robot",
    "smiling face with sunglasses")
# What the style LoRA of the demo and of the benchmark is trained on, in Twemoji's style.
STYLE = (
    "grapes", "lemon", "cherries", "avocado", "bread", "cheese wedge", "cupcake", "teapot", "tiger face", "rabbit face",
    "koala", "chicken", "whale", "crab", "honeybee", "cherry blossom", "maple leaf", "sun with face", "locomotive",
    "helicopter", "violin", "top hat", "pencil", "grinning face with big eyes")
# What the benchmark asks for where it is to be told whether a choice holds: looked at by nobody while choices are made.
TEST = (
    "monkey face", "horse", "mouse face", "bear", "rooster", "bird", "crocodile", "dragon", "spiral shell", "bouquet",
    "croissant", "pancakes", "taco", "spaghetti", "office building", "tram", "taxi", "anchor", "sports medal", "baseball",
    "wrapped gift", "ice skate", "backpack", "jeans", "lipstick", "microphone", "telephone", "television", "open book", "door",
    "battery", "red paper lantern")
ASKED = frozenset((*HELD_OUT, *STYLE, *TEST))
# What the gate asks for: 64 words by lot, of those that exist in most styles and that the first training left out. Noto's
# pictures of them are shown to nobody, those of the other styles that the model learns from are.
GATE = (
    "ambulance", "anxious face with sweat", "candle", "card file box", "card index", "chart decreasing", "cityscape",
    "cityscape at dusk", "cloud with lightning and rain", "computer disk", "confounded face", "construction", "cricket game",
    "droplet", "dvd", "face with crossed-out eyes", "fearful face", "first quarter moon face", "flag in hole",
    "flower playing cards", "french fries", "globe showing americas", "globe showing europe-africa", "green salad", "hamster",
    "handbag", "heart decoration", "honey pot", "hospital", "hourglass done", "incoming envelope", "kaaba", "kimono",
    "kissing cat", "man's shoe", "moon viewing ceremony", "mosque", "neutral face", "newspaper", "oden",
    "open mailbox with lowered flag", "paperclip", "pine decoration", "ping pong", "postal horn", "poultry leg", "pouting cat",
    "prayer beads", "railway track", "shooting star", "shopping cart", "shower", "shrimp", "slot machine", "snowflake",
    "spiral calendar", "sunset", "tiger", "tokyo tower", "trackball", "trolleybus", "upside-down face", "weary cat", "zzz")


def flat(image: Image.Image) -> Image.Image:
    """In its five most important colours, without shades."""
    few = image.convert("RGB").quantize(5, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE).convert("RGB")
    few.putalpha(image.getchannel("A"))
    return few


def pastel(image: Image.Image) -> Image.Image:
    """Halfway to white."""
    return _mixed(image, "white", 0.5)


def dark(image: Image.Image) -> Image.Image:
    """Nearly halfway to black."""
    return _mixed(image, "black", 0.45)


def muted(image: Image.Image) -> Image.Image:
    """With half of its colour."""
    pale = ImageEnhance.Color(image.convert("RGB")).enhance(0.4)
    pale.putalpha(image.getchannel("A"))
    return pale


def outlined(image: Image.Image) -> Image.Image:
    """With a black line around it."""
    alpha = image.getchannel("A")
    line = Image.new("RGBA", image.size, "black")
    line.putalpha(alpha.filter(ImageFilter.MaxFilter(5)))
    return Image.alpha_composite(line, image)


def grey(image: Image.Image) -> Image.Image:
    """Without colour."""
    return _toned(image, "#000000", "#ffffff")


def sepia(image: Image.Image) -> Image.Image:
    """From dark brown to cream."""
    return _toned(image, "#3b2413", "#fff4dc")


def lines(image: Image.Image) -> Image.Image:
    """Nothing but dark lines, where colours or outline change."""
    opaque = Image.alpha_composite(Image.new("RGBA", image.size, "#808080"), image).convert("RGB")
    ink = Image.new("L", image.size)
    for band in (*opaque.split(), image.getchannel("A")):
        ink = ImageChops.lighter(ink, ImageChops.subtract(band.filter(ImageFilter.MaxFilter(3)), band))
    drawn = Image.new("RGBA", image.size, "#202028")
    drawn.putalpha(ink.point(lambda value: max(0, min(255, (value - 28) * 4))))
    return drawn


def _toned(image: Image.Image, darkest: str, lightest: str) -> Image.Image:
    toned = ImageOps.colorize(image.convert("L"), darkest, lightest)
    toned.putalpha(image.getchannel("A"))
    return toned


TREATMENTS = (flat, pastel, dark, muted, outlined, lines, grey, sepia)
"""Ways to draw anything; the function's name is the word for it."""
GROUNDS = {"black": "#101014", "grey": "#8a8a8a", "brown": "#7a5230", "red": "#d83a34", "orange": "#f08c2e",
           "yellow": "#f7d84a", "green": "#4fa64f", "blue": "#3f78d8", "purple": "#8650b8", "pink": "#f2a0c0"}
"""The colours of paper beside white; said as "on blue"."""


def _mixed(image: Image.Image, colour: str, share: float) -> Image.Image:
    mixed = Image.blend(image.convert("RGB"), Image.new("RGB", image.size, colour), share)
    mixed.putalpha(image.getchannel("A"))
    return mixed


def on_paper(image: Image.Image, frame: int = FRAME, *, ground: str = "white", offset: tuple[int, int] = (0, 0)) -> np.ndarray:
    """A 64-pixel RGBA image on a square of paper of `frame` pixels, `offset` from its middle: uint8 [frame, frame, 3]."""
    paper = Image.new("RGBA", (frame, frame), ground)
    middle = (frame - image.width) // 2
    paper.alpha_composite(image, (middle + offset[0], middle + offset[1]))
    return np.asarray(paper.convert("RGB"))


def enlarged(images: torch.Tensor, side: int = SIDE) -> torch.Tensor:
    """uint8 [N, h, w, 3] -> fp32 [N, 3, side, side] in [-1, 1], smoothly."""
    pixels = images.permute(0, 3, 1, 2).float() / 127.5 - 1
    return F.interpolate(pixels, size=(side, side), mode="bicubic", align_corners=False, antialias=True).clamp(-1, 1)


HUES = {"red": 0.0, "orange": 0.08, "yellow": 0.15, "green": 0.33, "blue": 0.6, "purple": 0.77, "pink": 0.9}


def turned_hue(image: Image.Image, *, source: str, target: str) -> Image.Image:
    """`image` with every hue turned as far as `source` lies from `target`; greys stay grey."""
    hue, saturation, value = (np.asarray(band) for band in image.convert("RGB").convert("HSV").split())
    shift = round((HUES[target] - HUES[source]) * 256)
    bands = (hue.astype(int) + shift).astype(np.uint8), saturation, value
    turned = Image.merge("HSV", [Image.fromarray(band) for band in bands]).convert("RGB")
    turned.putalpha(image.getchannel("A"))
    return turned


def colours(image: Image.Image) -> list[str]:
    """The names of the colours that cover at least a fifth of the opaque pixels, the most frequent first."""
    pixels = np.asarray(image).reshape(-1, 4)
    counts: dict[str, int] = {}
    opaque = pixels[pixels[:, 3] > 128][:, :3] / 255
    for r, g, b in opaque[::3]:
        counts[_colour(r, g, b)] = counts.get(_colour(r, g, b), 0) + 1
    return [name for name, count in sorted(counts.items(), key=lambda item: -item[1]) if count * 5 >= sum(counts.values())]


def _colour(r: float, g: float, b: float) -> str:
    hue, saturation, value = colorsys.rgb_to_hsv(r, g, b)
    if value < 0.3:
        return "black"
    if saturation < 0.15:
        return "white" if value > 0.85 else "grey"
    if (hue < 0.12 and value < 0.7) or (hue < 0.12 and saturation < 0.6 and value < 0.85):
        return "brown"
    if hue < 0.045 or hue > 0.955:
        return "red" if saturation > 0.5 else "pink"
    for name, limit in (("orange", 0.11), ("yellow", 0.17), ("green", 0.46), ("blue", 0.7), ("purple", 0.83)):
        if hue < limit:
            return name
    return "pink"


def shapes(image: Image.Image) -> list[str]:
    """ "round", "square", "tall" or "wide", as far as the outline is one of them."""
    opaque = np.asarray(image)[:, :, 3] > 128
    rows, columns = np.flatnonzero(opaque.any(1)), np.flatnonzero(opaque.any(0))
    if not len(rows):
        return []
    box = opaque[rows[0]:rows[-1] + 1, columns[0]:columns[-1] + 1]
    height, width = box.shape
    if height > 1.35 * width:
        return ["tall"]
    if width > 1.35 * height:
        return ["wide"]
    y, x = np.mgrid[-1:1:height * 1j, -1:1:width * 1j]
    ellipse = x ** 2 + y ** 2 <= 1
    if (box & ellipse).sum() / (box | ellipse).sum() > 0.93:
        return ["round"]
    return ["square"] if box.mean() > 0.93 else []
