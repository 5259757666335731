"""The same things in many styles: emoji of 64 pixels, with names, out of npm packages.

A *style* is one set of emoji, drawn in one manner. `SEEN` is what the demo's model learns from; their licences (read in each
package) let a model be trained and passed on, with credits. `UNSEEN` is never shown to that model: on those it is measured
how it takes a style that is new to it, and LoRAs are trained on them.

Packages are fetched with `npm pack` into a folder and unpacked once; drawings in SVG are rasterised with resvg-py.
"""

from __future__ import annotations

import dataclasses
import io
import json
import re
import shutil
import subprocess
import tarfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from safetensors import safe_open
from safetensors.numpy import save_file

SIDE = 64
FEWEST = 6
"""In how many of SEEN a thing must exist to be learnt: some of them are by one house and alike."""


@dataclasses.dataclass(frozen=True)
class Style:
    """One set of emoji.

    name      its word in captions
    package   of npm, with its version
    files     the folder of its pictures, named by code points; "" where one icons.json holds all of them by name
    """

    name: str
    package: str
    files: str
    licence: str
    credit: str


NOTO = Style("noto", "emoji-datasource-google@16.0.0", "img/google/64", "Apache-2.0", "Noto Emoji, Google LLC")
TWEMOJI = Style("twemoji", "emoji-datasource-twitter@16.0.0", "img/twitter/64", "CC-BY-4.0",
               "Twemoji, Twitter, Inc and other contributors")
OPENMOJI = Style("openmoji", "@iconify-json/openmoji@1.2.29", "", "CC-BY-SA-4.0", "OpenMoji, the OpenMoji contributors")
SEEN = (
    NOTO,
    Style("blob", "emoji-datasource-google@3.0.0", "img/google/64", "Apache-2.0", "Noto Emoji's earlier blobs, Google LLC"),
    Style("fluent", "@lobehub/fluent-emoji-3d@1.1.0", "assets", "MIT", "Fluent Emoji, Microsoft Corporation"),
    Style("modern", "@lobehub/fluent-emoji-modern@1.0.0", "assets", "MIT", "Fluent Emoji, Microsoft Corporation"),
    Style("plain", "@lobehub/fluent-emoji-flat@1.1.0", "assets", "MIT", "Fluent Emoji, Microsoft Corporation"),
    Style("ink", "@iconify-json/fluent-emoji-high-contrast@1.2.6", "", "MIT", "Fluent Emoji, Microsoft Corporation"),
    Style("firefox", "@iconify-json/fxemoji@1.2.2", "", "Apache-2.0", "FxEmojis, Mozilla"),
    Style("emojione", "@iconify-json/emojione@1.2.3", "", "CC-BY-4.0", "EmojiOne 2, JoyPixels, by EmojiTwo"),
    Style("streamline", "@iconify-json/streamline-emojis@1.2.4", "", "CC-BY-4.0", "Streamline Emojis, Streamline"),
)
UNSEEN = (TWEMOJI, OPENMOJI)
WORDS = "emojibase-data@17.0.0"
"""Names and keywords, after Unicode's CLDR (MIT)."""
_LEFT_OUT = ("Flags", "Component", "People & Body", "Symbols")
_KEPT = "geometric"
"""Of the categories of emoji-datasource; of those subcategories this one is kept."""


@dataclasses.dataclass(frozen=True)
class Emoji:
    """A thing: its code points as emoji-datasource writes them ("1f34e"), name, keywords, kind, and what icons of it may be
    called, letters and digits only."""

    code: str
    label: str
    tags: tuple[str, ...]
    subcategory: str
    names: tuple[str, ...]


def words(folder: Path) -> list[Emoji]:
    """All things one can draw and name, in Unicode's order: no people, flags, signs, and faces of clocks."""
    known = {entry["hexcode"]: entry for entry in _read(_unpacked(folder, WORDS) / "en" / "data.json")}
    found: dict[str, Emoji] = {}
    for entry in sorted(_read(_unpacked(folder, NOTO.package) / "emoji.json"), key=lambda entry: entry["sort_order"]):
        word = known.get(entry["unified"]) or known.get(entry["unified"].replace("-FE0F", ""))
        left_out = entry["category"] in _LEFT_OUT and entry["subcategory"] != _KEPT
        if word is None or left_out or not entry["has_img_google"]:
            continue
        label = word["label"].lower().replace("’", "'")
        if label in found or "oncoming" in label or "o'clock" in label or "-thirty" in label:
            continue
        tags = tuple(tag.lower() for tag in word.get("tags", ()) if tag.isascii() and len(tag) > 2)
        names = (label, entry["name"] or label, *entry["short_names"])
        found[label] = Emoji(entry["image"].removesuffix(".png"), label, tags, entry["subcategory"],
                             tuple(dict.fromkeys(_plain(name) for name in names)))
    return list(found.values())


def drawings(folder: Path, style: Style, of: Sequence[Emoji]) -> dict[str, np.ndarray]:
    """{label: uint8 [64, 64, 4]}: those of `of` that exist in the style. What was made once is read again from `folder`."""
    cache = folder / f"{style.name}.safetensors"
    if not cache.is_file():
        made = dict(_rasterised(_unpacked(folder, style.package), style, words(folder)))
        part = cache.with_suffix(".part")
        save_file({"pixels": np.stack(list(made.values()))}, part, metadata={"labels": json.dumps(list(made))})
        part.replace(cache)
    with safe_open(cache, framework="np") as stored:
        known = dict(zip(json.loads(stored.metadata()["labels"]), stored.get_tensor("pixels"), strict=True))
    return {emoji.label: known[emoji.label] for emoji in of if emoji.label in known}


def shared(folder: Path, *, always: Collection[str] = ()) -> tuple[list[Emoji], dict[str, dict[str, np.ndarray]]]:
    """What exists in Noto and at least FEWEST of SEEN, and what `always` names; and {style: its drawings}."""
    all_words = words(folder)
    drawn = {style.name: drawings(folder, style, all_words) for style in SEEN}
    chosen = [emoji for emoji in all_words if emoji.label in drawn[NOTO.name] and (
        emoji.label in always or sum(emoji.label in of for of in drawn.values()) >= FEWEST)]
    missing = set(always) - {emoji.label for emoji in chosen}
    assert not missing, f"not in the packages: {sorted(missing)}"
    return chosen, drawn


def _rasterised(package: Path, style: Style, of: Sequence[Emoji]) -> Iterator[tuple[str, np.ndarray]]:
    icons = None if style.files else _Icons(package / "icons.json")
    for emoji in of:
        image = _file(package / style.files, emoji.code) if icons is None else icons.image(emoji)
        if image is not None:
            yield emoji.label, np.asarray(image.convert("RGBA").resize((SIDE, SIDE), Image.Resampling.LANCZOS))


def _file(folder: Path, code: str) -> Image.Image | None:
    for name in (code, code.replace("-fe0f", "")):
        for path in (folder / f"{name}{ending}" for ending in (".png", ".webp", ".svg")):
            if path.is_file():
                return _svg(path.read_text(encoding="utf-8")) if path.suffix == ".svg" else Image.open(path)
    return None


class _Icons:
    """A set in iconify's form: https://iconify.design/docs/types/iconify-json.html."""

    def __init__(self, path: Path) -> None:
        content = json.loads(path.read_text(encoding="utf-8"))
        self._set, self._icons = content, content["icons"]
        aliases = {name: alias["parent"] for name, alias in content.get("aliases", {}).items() if set(alias) == {"parent"}}
        self._names = {_plain(re.sub(r"-1$", "", name)): target
                       for name, target in (*aliases.items(), *((name, name) for name in self._icons))}

    def image(self, emoji: Emoji) -> Image.Image | None:
        """The first icon that has one of its names; where there is a "catside", "cat" is the face."""
        for name in emoji.names:
            sides, face = f"{name}side", name.removesuffix("face")
            if sides in self._names:
                return self._drawn(self._names[sides])
            if f"{face}side" in self._names and face in self._names:
                return self._drawn(self._names[face])
            if name in self._names:
                return self._drawn(self._names[name])
        return None

    def _drawn(self, name: str) -> Image.Image:
        icon = self._icons[name]
        left, top = icon.get("left", 0), icon.get("top", 0)
        width, height = (icon.get(side, self._set.get(side, 16)) for side in ("width", "height"))
        return _svg(f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" width="{width}" '
                    f'height="{height}" viewBox="{left} {top} {width} {height}" color="black">{icon["body"]}</svg>')


def _svg(text: str) -> Image.Image:
    import resvg_py  # imported late: only what rasterises needs it

    return Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=text, width=2 * SIDE, height=2 * SIDE))))


def _unpacked(folder: Path, package: str) -> Path:
    """The folder that holds the package's content, fetched if need be."""
    target = folder / re.sub(r"[@/]", "-", package).strip("-")
    if target.is_dir():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    npm = shutil.which("npm") or "npm"  # on Windows npm.cmd, which is found by its whole name only
    done = subprocess.run([npm, "pack", "--silent", package], cwd=folder, capture_output=True, text=True, check=True)
    archive, part = folder / done.stdout.split()[-1], target.with_suffix(".part")
    with tarfile.open(archive) as tar:
        for member in tar:
            name = member.name.partition("/")[2]
            wanted = (re.match(r"(img/\w+/64|assets)/[^/]+$", name) or name in ("emoji.json", "en/data.json", "icons.json")
                      or name.upper().startswith("LICENSE"))
            if member.isfile() and wanted:
                source, path = tar.extractfile(member), part / name
                assert source is not None
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(source.read())
    archive.unlink()
    part.rename(target)
    return target


def _read(path: Path) -> list[Mapping]:
    return list(json.loads(path.read_text(encoding="utf-8")))


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())
