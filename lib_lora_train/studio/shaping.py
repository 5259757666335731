"""Operations on single images: cropped by hand, mirrored, split, brought back as imported, masks, and previews.

Shaping many images is a background task: see `operations.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lib_lora_train.dataset.crop_sheet import crop_sheet
from lib_lora_train.errors import DatasetError
from lib_lora_train.model.family import training_sizes
from lib_lora_train.studio import thumbs
from lib_lora_train.studio.cropping import crop as shapes
from lib_lora_train.studio.dataset_session import DatasetSession
from lib_lora_train.studio.requests import validated
from lib_lora_train.studio.session import Studio


def preview(studio: Studio, name: str, values: Mapping[str, Any]) -> bytes:
    """The image as a shape would make it, a JPEG; nothing is written. Raises UserError."""
    shape = validated(shapes.Shape, values, what="shape")
    with studio.using() as session:
        session.path(name)
        dataset = session.dataset
    return thumbs.jpeg(shapes.preview_shape(dataset, name, shape, family=studio.family(),
                                            models_folder=studio.host.models_folder))


def crop_to_box(studio: Studio, name: str, box: Sequence[float]) -> None:
    """Keep only `box` (left, top, right, bottom in pixels of the image as it is)."""
    with studio.changing("cropped", names=[name]) as session:
        shapes.crop_to_box(session.dataset, name, box)
        session.renew([name])


def flip(studio: Studio, name: str, *, copy: bool) -> str:
    """Mirror an image, or with `copy` add a mirrored one beside it; the name of the mirrored one."""
    with studio.changing("mirrored", names=[name]) as session:
        made = shapes.flip(session.dataset, name, copy=copy)
        if copy:
            _add(session, name, [made])
        session.renew([made])
        return made


def split(studio: Studio, name: str, *, tile: int = 0) -> list[str]:
    """Cut a large image into tiles of at most `tile` pixels a side (0: the training's size), which replace it;
    undo brings it back beside them."""
    with studio.changing("split", names=[name]) as session:
        made = list(shapes.split(session.dataset, name, tile=tile or training_sizes(studio.family()).default))
        _add(session, name, made)
        studio.removed(session, [name])
        session.renew(made)
        return made


def unshape(studio: Studio, names: Sequence[str]) -> dict[str, Any]:
    """Bring images back as they were imported: {"done": how many, "skipped": [[name, sentence], …]}."""
    with studio.changing("brought back", names=names) as session:
        shaped = shapes.unshape(session.dataset, names)
        session.renew(shaped.done)
        return {"done": len(shaped.done), "skipped": [list(pair) for pair in shaped.skipped]}


def mask(studio: Studio, name: str) -> bytes:
    """What of an image is learnt (white), a JPEG of its size. Raises DatasetError where it has no mask."""
    with studio.using() as session:
        session.path(name)
        dataset = session.dataset
    found = shapes.read_mask(dataset, name)
    if found is None:
        raise DatasetError(f"{name} has no mask", why="all of it is learnt")
    return thumbs.jpeg(found)


def put_mask(studio: Studio, name: str, sent: Path) -> None:
    """Keep the image in `sent` as the mask of an image; of its size, white is learnt."""
    drawn = shapes.mask_from_file(sent)
    with studio.changing("masked", names=[name]) as session:
        shapes.put_mask(session.dataset, name, drawn)
        session.renew()


def remove_mask(studio: Studio, name: str) -> None:
    """Remove an image's mask: all of it is learnt."""
    with studio.changing("unmasked", names=[name]) as session:
        shapes.remove_mask(session.dataset, name)
        session.renew()


def crops(studio: Studio) -> bytes:
    """What crops lose, one sheet for the last report, a JPEG. Raises DatasetError where there is no report."""
    with studio.using() as session:
        report = session.report
    if report is None:
        raise DatasetError("The pictures were not looked at yet", remedy="check the dataset first")
    return thumbs.jpeg(crop_sheet(report))


def _add(session: DatasetSession, name: str, made: Sequence[str]) -> None:
    """Tell the store of new images made from `name`, with its caption as edited."""
    folder, caption = session.dataset.images_folder, session.store.caption(session.index(name))
    session.store.add([folder / new for new in made])
    different = {index: caption for new in made if session.store.caption(index := session.index(new)) != caption}
    if different:
        session.store.set_captions(different, f"Captions from {name}")
