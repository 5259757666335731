"""The emoji images the tiny model learns from, and the words that go with them.

Images: the same emoji in four styles. `emoji-datasource-google` holds Noto Emoji (Apache-2.0), in its version 3 still the
"blobs" that Google drew before; `@lobehub/fluent-emoji-3d` holds Microsoft's Fluent Emoji (MIT); `emoji-datasource-twitter`
Twemoji (CC-BY 4.0). Words: `emojibase-data` (MIT, after Unicode's CLDR). All of them are npm packages.
The UNet sees all styles but Twemoji's, which a LoRA is to teach it; the autoencoder sees Noto's and Twemoji's, but no Twemoji
of a word that the benchmark holds out.
"""

from __future__ import annotations

import colorsys
import dataclasses
import json
import subprocess
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageEnhance, ImageFilter

PACKAGES = {"noto": "emoji-datasource-google@16.0.0", "twemoji": "emoji-datasource-twitter@16.0.0",
            "words": "emojibase-data@17.0.0", "blob": "emoji-datasource-google@3.0.0",
            "fluent": "@lobehub/fluent-emoji-3d@1.1.0"}
OTHER_STYLES = ("blob", "fluent")
"""What the model is taught beside Noto's, so that what is shown and how it is drawn are two things to it."""
SIDE, FRAME, SMALL_FRAME = 128, 72, 112
"""The model's images; the white paper a 64-pixel emoji is laid on; the paper that makes it "small"."""

# Things one can draw and name. Flags, keycaps, people and the subtler faces are left out: a small model has better uses.
SUBCATEGORIES = frozenset((
    "face-smiling", "face-tongue", "face-sleepy", "face-affection", "face-glasses", "face-hat", "face-costume",
    "face-negative", "monkey-face", "heart", "animal-mammal", "animal-bird", "animal-amphibian", "animal-reptile",
    "animal-marine", "animal-bug", "plant-flower", "plant-other", "food-fruit", "food-vegetable", "food-prepared",
    "food-asian", "food-sweet", "drink", "dishware", "transport-ground", "transport-air", "transport-water",
    "place-building", "place-geographic", "sky & weather", "sport", "game", "event", "award-medal", "arts & crafts",
    "clothing", "musical-instrument", "music", "tool", "computer", "light & video", "household", "writing", "science",
    "phone", "lock", "book-paper", "geometric"))
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
ASKED = frozenset((*HELD_OUT, *STYLE))


@dataclasses.dataclass(frozen=True)
class Emoji:
    """One emoji: its name and keywords, and its file in both packages ("1f34e.png")."""

    label: str
    tags: tuple[str, ...]
    image: str


def gather(folder: Path, *, at_most: int | None = None) -> list[Emoji]:
    """The chosen emoji, in Unicode's order; packages are fetched with npm and unpacked into `folder` once.

    at_most: how many of a subcategory; those that sheet and benchmark ask for come in addition.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, package in PACKAGES.items():
        if not (folder / name).is_dir():
            _unpack(folder, name, package)
    words = {entry["hexcode"]: entry for entry in _read(folder / "words" / "data.json")}
    chosen, seen, kept = [], set(), Counter()
    for entry in sorted(_read(folder / "noto" / "emoji.json"), key=lambda entry: entry["sort_order"]):
        word = words.get(entry["unified"]) or words.get(entry["unified"].replace("-FE0F", ""))
        if entry["subcategory"] not in SUBCATEGORIES or word is None or word["label"] in seen:
            continue
        if entry["has_img_google"] and entry["has_img_twitter"] and "oncoming" not in word["label"]:
            label = word["label"].lower().replace("’", "'")
            if at_most is not None and kept[entry["subcategory"]] >= at_most and label not in ASKED:
                continue
            kept[entry["subcategory"]] += label not in ASKED
            tags = tuple(tag.lower() for tag in word.get("tags", ()) if tag.isascii() and len(tag) > 2)
            chosen.append(Emoji(label, tags, entry["image"]))
            seen.add(word["label"])
    missing = ASKED - {emoji.label for emoji in chosen}
    assert not missing, f"not in the packages: {sorted(missing)}"
    return chosen


def _unpack(folder: Path, name: str, package: str) -> None:
    done = subprocess.run(["npm", "pack", "--silent", package], cwd=folder, capture_output=True, text=True, check=True)
    archive = folder / done.stdout.split()[-1]
    target = folder / f"{name}.part"
    target.mkdir(exist_ok=True)
    with tarfile.open(archive) as tar:
        for member in tar:
            path = Path(member.name)
            wanted = (path.match("img/*/64/*.png") or path.match("assets/*.webp") or path.name == "LICENSE"
                      or member.name in ("package/emoji.json", "package/en/data.json"))
            if member.isfile() and wanted:
                source = tar.extractfile(member)
                assert source is not None
                (target / path.name).write_bytes(source.read())
    archive.unlink()
    target.rename(folder / name)


def _read(path: Path) -> list[dict]:
    return list(json.loads(path.read_text(encoding="utf-8")))


def open_rgba(path: Path) -> Image.Image:
    """The image of `path` with its alpha, 64×64."""
    with Image.open(path) as image:
        return image.convert("RGBA").resize((64, 64), Image.Resampling.LANCZOS)


def in_style(packages: Path, style: str, emoji: Emoji) -> Image.Image | None:
    """The emoji as one of OTHER_HANDS draws it; None where it does not."""
    stem = emoji.image.removesuffix(".png")
    for name in (stem, stem.replace("-fe0f", "")):
        for path in (packages / style / f"{name}.png", packages / style / f"{name}.webp"):
            if path.is_file():
                return open_rgba(path)
    return None


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


TREATMENTS = (flat, pastel, dark, muted, outlined)
"""Ways to draw anything; the function's name is the word for it."""


def _mixed(image: Image.Image, colour: str, share: float) -> Image.Image:
    mixed = Image.blend(image.convert("RGB"), Image.new("RGB", image.size, colour), share)
    mixed.putalpha(image.getchannel("A"))
    return mixed


def on_paper(image: Image.Image, frame: int = FRAME) -> np.ndarray:
    """A 64-pixel RGBA image in the middle of a white square of `frame` pixels: uint8 [frame, frame, 3]."""
    paper = Image.new("RGBA", (frame, frame), "white")
    paper.alpha_composite(image, ((frame - image.width) // 2, (frame - image.height) // 2))
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
    """The names of the colours that cover at least a fifth of what is generated, the most frequent first."""
    pixels = np.asarray(image).reshape(-1, 4)
    counts: dict[str, int] = {}
    generated = pixels[pixels[:, 3] > 128][:, :3] / 255
    for r, g, b in generated[::3]:
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
    generated = np.asarray(image)[:, :, 3] > 128
    rows, columns = np.flatnonzero(generated.any(1)), np.flatnonzero(generated.any(0))
    if not len(rows):
        return []
    box = generated[rows[0]:rows[-1] + 1, columns[0]:columns[-1] + 1]
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
