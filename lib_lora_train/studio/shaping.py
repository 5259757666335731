"""What is done to single pictures at once: cut by hand, mirrored, split, brought back as they were; and previews.

Shaping many is long work: see `work.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lib_lora_train.dataset.buckets import DEFAULT_RESOLUTION
from lib_lora_train.dataset.crop_sheet import crop_sheet
from lib_lora_train.errors import DatasetError
from lib_lora_train.studio import thumbs
from lib_lora_train.studio.cropping import crop as shapes
from lib_lora_train.studio.cropping import mask as masks
from lib_lora_train.studio.dataset_session import Opened
from lib_lora_train.studio.session import Studio


def preview(studio: Studio, name: str, values: Mapping[str, Any]) -> bytes:
    """The picture as a shape would make it, a JPEG; nothing is written. Raises UserError."""
    shape = shapes.Shape.from_dict(values)
    with studio.using() as opened:
        opened.path(name)
        dataset = opened.dataset
    return thumbs.jpeg(shapes.preview_shape(dataset, name, shape, family=studio.family(),
                                            models_folder=studio.host.models_folder))


def crop_by_hand(studio: Studio, name: str, box: Sequence[float]) -> None:
    """Keep only `box` (left, top, right, bottom in pixels of the picture as it is)."""
    with studio.changing("cropped") as opened:
        opened.path(name)
        shapes.crop_by_hand(opened.dataset, name, box)
        opened.reshaped([name])


def flip(studio: Studio, name: str, *, copy: bool) -> str:
    """Mirror a picture, or with `copy` add a mirrored one beside it; the name of the mirrored one."""
    with studio.changing("mirrored") as opened:
        opened.path(name)
        made = shapes.flip(opened.dataset, name, copy=copy)
        if copy:
            _add(opened, name, [made])
        opened.reshaped([made])
        return made


def split(studio: Studio, name: str, *, tile: int = 0) -> list[str]:
    """Cut a large picture into tiles of at most `tile` pixels a side (0: the training's size), which take its place;
    undo brings it back beside them."""
    with studio.changing("split") as opened:
        opened.path(name)
        made = list(shapes.split(opened.dataset, name, tile=tile or DEFAULT_RESOLUTION.get(studio.family(), 512)))
        _add(opened, name, made)
        studio.removed(opened, [name])
        opened.reshaped(made)
        return made


def unshape(studio: Studio, names: Sequence[str]) -> dict[str, Any]:
    """Bring pictures back as they were imported: {"done": how many, "skipped": [[name, sentence], …]}."""
    with studio.changing("brought back") as opened:
        for name in names:
            opened.path(name)
        shaped = shapes.unshape(opened.dataset, names)
        opened.reshaped(shaped.done)
        return {"done": len(shaped.done), "skipped": [list(pair) for pair in shaped.skipped]}


def mask(studio: Studio, name: str) -> bytes:
    """What of a picture is learnt (white), a JPEG of its size. Raises DatasetError where it has no mask."""
    with studio.using() as opened:
        opened.path(name)
        dataset = opened.dataset
    found = masks.read_mask(dataset, name)
    if found is None:
        raise DatasetError(f"{name} has no mask", why="all of it is learnt")
    return thumbs.jpeg(found)


def put_mask(studio: Studio, name: str, sent: Path) -> None:
    """Keep the picture in `sent` as the mask of a picture; of its size, white is learnt."""
    painted = masks.mask_from_file(sent)
    with studio.changing("masked") as opened:
        opened.path(name)
        masks.put_mask(opened.dataset, name, painted)
        opened.renew()


def remove_mask(studio: Studio, name: str) -> None:
    """Learn all of a picture again."""
    with studio.changing("unmasked") as opened:
        opened.path(name)
        masks.remove_mask(opened.dataset, name)
        opened.renew()


def crops(studio: Studio) -> bytes:
    """What crops lose, one sheet for the last report, a JPEG. Raises DatasetError where there is no report."""
    with studio.using() as opened:
        report = opened.report
    if report is None:
        raise DatasetError("The pictures were not looked at yet", remedy="check the dataset first")
    return thumbs.jpeg(crop_sheet(report))


def _add(opened: Opened, name: str, made: Sequence[str]) -> None:
    """New pictures made from one: known to the book, with its caption as it is edited."""
    folder, caption = opened.dataset.pictures_folder, opened.book.caption(opened.index(name))
    opened.book.add([folder / new for new in made])
    opened.renew()
    different = {index: caption for new in made if opened.book.caption(index := opened.index(new)) != caption}
    if different:
        opened.book.set_captions(different, f"Captions from {name}")
