"""What the WebUI's card of a LoRA shows: the user metadata NAME.json and the image NAME.preview.png beside it.

Both may be the user's own. The metadata are merged into: what they lack is filled in, and what we wrote is written anew only
while it is still what we wrote. An image that is not ours stays.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo

from lib_lora_train.errors import OutputError, printable, translated
from lib_lora_train.storage.atomic import remove, write_atomic

OURS = "lora train"
"""The card's entry and the image's text that tell what we wrote."""
THUMBNAIL = 256
"""Pixels, as ModelSpec recommends."""
# What the WebUI's editor writes where the user chose nothing.
_EMPTY = (None, "", 0, "Unknown")
_KINDS = ("png", "jpg", "jpeg", "webp", "gif")  # of images that the WebUI shows
_UNREADABLE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)


def metadata_path(lora: Path) -> Path:
    """Where the WebUI looks for the card of this LoRA."""
    return lora.with_name(f"{lora.stem}.json")


def preview_path(lora: Path) -> Path:
    """Where our image of this LoRA goes."""
    return lora.with_name(f"{lora.stem}.preview.png")


def read_user_metadata(lora: Path) -> dict[str, Any]:
    """The card as it stands, {} where there is none. Raises OutputError where it cannot be read: it may be all that the user
    ever wrote there."""
    path, why = metadata_path(lora), "it is not what the WebUI writes"
    try:
        with translated(f"reading {path.name}"):
            known = json.loads(path.read_text(encoding="utf-8-sig"))
    except OutputError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            return {}
        raise
    except (ValueError, RecursionError) as error:
        known, why = None, str(error)
    if not isinstance(known, dict):
        raise OutputError(f"The card {path} is damaged, so nothing is written", why=why, remedy="repair it, or move it away")
    return known


def merged(known: Mapping[str, Any], values: Mapping[str, object]) -> dict[str, Any]:
    """The card with our `values` by the WebUI's names, and nothing of the user's changed."""
    recorded = known.get(OURS)
    ours = {key: value for key, value in (recorded if isinstance(recorded, dict) else {}).items() if known.get(key) == value}
    free = {key: value for key, value in values.items() if key in ours or known.get(key) in _EMPTY}
    return {**known, **free, OURS: {**ours, **free}}


def write_user_metadata(lora: Path, known: Mapping[str, Any]) -> None:
    """Write the card of this LoRA as the WebUI does. Raises OutputError."""
    text = json.dumps(known, indent=4, ensure_ascii=False)
    with translated(f"writing {metadata_path(lora).name}"):
        write_atomic(metadata_path(lora), text.encode("utf-8", "backslashreplace"))


def read_preview(path: Path | None) -> Image.Image | None:
    """The image, RGB, with what generators wrote into it; None where there is none or it cannot be read."""
    with contextlib.suppress(*_UNREADABLE):
        if path is not None:
            with Image.open(path) as image:
                found = image.convert("RGB")
                found.info = {"parameters": str(image.info.get("parameters", ""))}
                return found
    return None


def write_preview(lora: Path, image: Image.Image | None) -> Path | None:
    """Have the WebUI show `image` for this LoRA, None for nothing, unless the user chose one. Returns what is shown. Raises
    OutputError."""
    path = preview_path(lora)
    names = [name for kind in _KINDS for name in (f"{lora.stem}.{kind}", f"{lora.stem}.preview.{kind}")]
    chosen = next((lora.with_name(name) for name in names if lora.with_name(name).is_file()), None)
    if chosen is not None and not (chosen == path and _is_ours(path)):
        return chosen
    with translated(f"writing {path.name}"):
        if image is None:
            if chosen:
                remove(path)  # it showed other weights
            return None
        text, file = PngInfo(), io.BytesIO()
        text.add_text(OURS, _digest(image))
        if image.info.get("parameters"):
            text.add_itxt("parameters", printable(image.info["parameters"]))
        image.save(file, "PNG", pnginfo=text)
        write_atomic(path, file.getvalue())
    return path


def thumbnail(image: Image.Image) -> bytes:
    """A square JPEG for the metadata of a file."""
    file = io.BytesIO()
    ImageOps.fit(image, (THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS).save(file, "JPEG", quality=80)
    return file.getvalue()


def remove_ours(lora: Path) -> None:
    """Remove the card and the image of a LoRA that is gone, where nothing in them is the user's. Raises OutputError."""
    with translated(f"removing what belongs to {lora.stem}"):
        if _is_ours(preview_path(lora)):
            remove(preview_path(lora))
        with contextlib.suppress(OutputError):
            card = read_user_metadata(lora)
            if {key: value for key, value in card.items() if key != OURS} == card.get(OURS):
                remove(metadata_path(lora))


def _is_ours(path: Path) -> bool:
    """Whether the image is still what we wrote."""
    with contextlib.suppress(*_UNREADABLE):
        with Image.open(path) as image:
            return bool(image.info.get(OURS) == _digest(image.convert("RGB")))
    return False


def _digest(image: Image.Image) -> str:
    return hashlib.sha256(f"{image.size}".encode() + image.tobytes()).hexdigest()
