"""Shapes given to the images of a dataset, and reverted.

An image that is shaped for the first time is kept as it was in .studio/unshaped. Whatever is done later, crops by hand,
mirrors, another size, is made from that one, so that nothing gets worse by being done twice; its mask is treated alike.
dataset.json says what was done: {"hand": edges | null, "mirrored": bool, "shape": {…} | null, "box": edges, "size": [w, h]},
edges in pixels of the unshaped image.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pydantic.dataclasses
from PIL import Image
from pydantic import StrictBool, ValidationError, confloat

from lib_lora_train.dataset.images import WRITTEN_SUFFIXES, decode_image, encode_image, read_image, read_size
from lib_lora_train.dataset.progress import Progress, ShouldStop, Watch
from lib_lora_train.dataset.text_files import CAPTION_SUFFIXES
from lib_lora_train.errors import DatasetError, SettingError, counted, translated
from lib_lora_train.storage.atomic import copy_atomic, write_atomic
from lib_lora_train.studio.cropping.crop_plan import Box, Edges, Shape, find_subject, plan_shape, render
from lib_lora_train.studio.importing.names import FreeNames
from lib_lora_train.studio.importing.owned import Note, OwnedDataset

SMALLEST_CROP = 16  # pixels of a side
_FARTHEST = 1e9  # pixels
Pixel = confloat(ge=-_FARTHEST, le=_FARTHEST)
_MOST_TILES = 400
_NOTES_EVERY = 100


@dataclasses.dataclass(frozen=True)
class Shaped:
    """What came of shaping several images."""

    done: tuple[str, ...]  # names of the images that have the shape now
    skipped: tuple[tuple[str, str], ...]  # (name, why: one sentence)
    notes: tuple[str, ...] = ()  # what else the user should know, one sentence each


@pydantic.dataclasses.dataclass(frozen=True)
class Done:
    """What was done to one image so far, as dataset.json has it; edges are in pixels of the unshaped image."""

    hand: tuple[Pixel, Pixel, Pixel, Pixel] | None = None  # what was cut by hand
    mirrored: StrictBool = False
    shape: Shape | None = None
    box: tuple[Pixel, Pixel, Pixel, Pixel] | None = None  # what of the unshaped image is seen; None: all
    size: tuple[int, int] | None = None

    @property
    def flip(self) -> bool:
        """Whether it is seen mirrored: twice is not at all."""
        return self.mirrored != (self.shape is not None and self.shape.flip)


def apply_shape(
    dataset: OwnedDataset, names: Sequence[str], shape: Shape, *, family: str = "", models_folder: Path | None = None,
    on_progress: Progress | None = None, should_stop: ShouldStop | None = None,
) -> Shaped:
    """Give images a shape, made from the unshaped ones within what was cut by hand.

    Raises Interrupted when `should_stop()` says so (what was shaped stays, each image complete) and OutputError if the disk
    refuses.
    """
    small, enlarged = 0, 0.0

    def change(before: Done, image: Image.Image, mask: Image.Image | None) -> Done:
        nonlocal small, enlarged
        subject = find_subject(image, shape, mask=mask, models_folder=models_folder)
        box = plan_shape(image.size, shape, subject=subject, region=before.hand, family=family)
        full_size = box if shape.mode == "keep" else plan_shape(
            image.size, dataclasses.replace(shape, enlarge=True), region=before.hand, family=family)
        if full_size.enlarged > 1.005:
            small, enlarged = small + 1, max(enlarged, full_size.enlarged)
        return dataclasses.replace(before, shape=shape, box=box.edges, size=box.size)

    watch = Watch(len(names), doing="pictures were shaped", on_progress=on_progress, should_stop=should_stop)
    shaped = _each(dataset, names, watch=watch, change=lambda name, notes: _change_image(dataset, name, notes, change))
    notes = []
    if small and shape.enlarge:
        notes.append(f"{counted(small, 'picture')} had to be enlarged, up to {enlarged:.1f} times: they have less detail than "
                     "it seems.")
    elif small:
        notes.append(f"{counted(small, 'picture')} {'is' if small == 1 else 'are'} smaller than asked for (up to "
                     f"{enlarged:.1f} times), and not enlarged.")
    return dataclasses.replace(shaped, notes=tuple(notes))


def preview_shape(dataset: OwnedDataset, name: str, shape: Shape, *, family: str = "",
                  models_folder: Path | None = None) -> Image.Image:
    """The image as `apply_shape` would make it; nothing is written. Raises DatasetError and SettingError."""
    before, source, mask = _before(dataset, name, dataset.notes())
    image = read_image(source)
    subject = find_subject(image, shape, mask=mask, models_folder=models_folder)
    box = plan_shape(image.size, shape, subject=subject, region=before.hand, family=family)
    return render(image, box, flip=dataclasses.replace(before, shape=shape).flip)


def unshape(dataset: OwnedDataset, names: Sequence[str]) -> Shaped:
    """Bring images back as they were imported, with their masks; those that were never shaped stay as they are."""
    watch = Watch(len(names), doing="pictures were brought back", on_progress=None, should_stop=None)
    return _each(dataset, names, watch=watch, change=lambda name, notes: _unshaped(dataset, name, notes.get(name, {})))


def crop_to_box(dataset: OwnedDataset, name: str, box: Sequence[float]) -> None:
    """Keep only `box` (left, top, right, bottom, in pixels of the image as it is now) of an image.

    What was cut before stays cut; the result is made from the unshaped image, at most of the area that its shape allowed.
    Raises DatasetError for a box that is too small or outside.
    """

    def change(before: Done, image: Image.Image, mask: Image.Image | None) -> Done:
        hand = _in_unshaped(before, _checked_box(box, before.size or image.size), image.size)
        keep = Shape(mode="keep", side=before.shape.side, flip=before.shape.flip) if before.shape else None
        made = plan_shape(image.size, keep, region=hand) if keep else _native(hand)
        return dataclasses.replace(before, hand=made.edges, shape=keep, box=made.edges, size=made.size)

    _one(dataset, name, change)


def flip(dataset: OwnedDataset, name: str, *, copy: bool = False) -> str:
    """Mirror an image with its mask, or with `copy` add a mirrored one beside it; the name of the mirrored one."""
    if not copy:
        _one(dataset, name, lambda before, image, mask: dataclasses.replace(
            before, mirrored=not before.mirrored, box=before.box or (0.0, 0.0, *map(float, image.size)),
            size=before.size or image.size))
        return name
    path = dataset.image(name)
    with translated("a picture was mirrored"):
        return _add_parts(dataset, path, [Box((0.0, 0.0, *map(float, read_size(path))), read_size(path))], flip=True,
                          endings=["flipped"])[0]


def split(dataset: OwnedDataset, name: str, *, tile: int, overlap: float = 0.25) -> tuple[str, ...]:
    """Cut a large image into tiles of at most `tile` pixels a side that share at least `overlap` of it; their names.

    Each gets the caption and its part of the mask. The image itself is removed, and can be restored. Raises DatasetError
    if it is no larger than a tile, SettingError for a tile or overlap that cannot be.
    """
    if not SMALLEST_CROP <= tile <= 16384 or not 0 <= overlap <= 0.9:
        raise SettingError(f"Tiles of {tile} pixels that share {overlap} are not possible",
                           remedy=f"choose {SMALLEST_CROP} to 16384 pixels, and a share of 0 to 0.9")
    path = dataset.image(name)
    width, height = read_size(path)
    rows, columns = _tiles(height, tile, overlap), _tiles(width, tile, overlap)
    count = len(rows) * len(columns)
    if count == 1:
        raise DatasetError(f"{name} cannot be split", why=f"it is only {width}×{height} pixels large",
                           remedy="choose smaller tiles")
    if count > _MOST_TILES:
        raise DatasetError(f"{name} cannot be split", why=f"that would make {count} pictures", remedy="choose larger tiles")
    boxes = [Box((float(x), float(y), float(x + across), float(y + down)), (across, down))
             for y, down in rows for x, across in columns]
    with translated("a picture was split"):
        made = _add_parts(dataset, path, boxes, flip=False, endings=[str(i + 1) for i in range(count)])
        dataset.remove([name])
    return made


def done_to(note: Mapping[str, Any]) -> Done:
    """What dataset.json's note on an image says was done to it; a damaged one says nothing."""
    try:
        return Done(**note["shaped"])
    except (ValidationError, TypeError, KeyError):
        return Done()


# ---- masks: what of an image is learnt (white), as masks/<stem>.png of its size, for masked loss

def read_mask(dataset: OwnedDataset, name: str) -> Image.Image | None:
    """The mask of the image `name` (mode L); None if all of it is learnt. Raises DatasetError if it is damaged."""
    path = dataset.mask_path(dataset.image(name).name)
    return read_image(path).convert("L") if path.is_file() else None


def mask_from_file(path: Path) -> Image.Image:
    """A mask from a file, mode L: how opaque each pixel is if anything is transparent, else how bright.

    Raises DatasetError as `read_image`.
    """
    decoded = decode_image(path)
    return decoded.alpha if decoded.alpha is not None else decoded.image.convert("L")


def put_mask(dataset: OwnedDataset, name: str, mask: Image.Image) -> None:
    """Keep `mask` (mode L, size of the image as it is now) beside an image and replace the one it had.

    Of a shaped image the unshaped one gets it too, in the part that was cut; what was cut off keeps its mask, or is learnt.
    Raises DatasetError if the size is another.
    """
    path = dataset.image(name)
    size = read_size(path)
    if mask.size != size:
        raise DatasetError(f"The mask does not fit {name}", why=f"it is {mask.width}×{mask.height} pixels large, the picture "
                           f"{size[0]}×{size[1]}", remedy="paint it on the picture as it is now")
    mask = mask.convert("L")
    with translated("a mask was written"):
        unshaped = dataset.unshaped_path(name)
        if unshaped.is_file():
            done, kept = _in_step(dataset, name, dataset.notes()), dataset.unshaped_mask_path(name)
            whole = read_image(kept).convert("L") if kept.is_file() else Image.new("L", read_size(unshaped), 255)
            left, top, right, bottom = map(round, done.box or (0, 0, *whole.size))
            part = mask.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if done.flip else mask
            whole.paste(part.resize((max(1, right - left), max(1, bottom - top)), Image.Resampling.BILINEAR), (left, top))
            write_atomic(kept, encode_image(whole, suffix=".png"))
        write_atomic(dataset.mask_path(name), encode_image(mask, suffix=".png"))


def remove_mask(dataset: OwnedDataset, name: str) -> None:
    """Remove an image's mask: all of it is learnt."""
    dataset.image(name)
    with translated("a mask was removed"):
        dataset.mask_path(name).unlink(missing_ok=True)
        dataset.unshaped_mask_path(name).unlink(missing_ok=True)


# ---- one image

Change = Callable[[Done, Image.Image, "Image.Image | None"], Done]


def _in_step(dataset: OwnedDataset, name: str, notes: Mapping[str, Note]) -> Done:
    """What was done to an image, known to be what the file shows.

    Raises DatasetError if it is not, because another program changed it, or this one was killed before it made its note:
    then positions on it cannot be mapped to the unshaped one.
    """
    now, kept = dataset.image(name), dataset.unshaped_path(name)
    if not kept.is_file():
        return Done()
    done = done_to(notes.get(name, {}))
    if (done.size or read_size(kept)) != read_size(now):
        raise DatasetError(f"{name} cannot be changed by hand", why="it is not as it was when it was last shaped",
                           remedy="shape it again, or bring it back as it was imported")
    return done


def _before(dataset: OwnedDataset, name: str, notes: Mapping[str, Note]) -> tuple[Done, Path, Image.Image | None]:
    """(what was done to it, the image to make it from, that one's mask)."""
    now, kept = dataset.image(name), dataset.unshaped_path(name)
    shaped = kept.is_file()
    before = done_to(notes.get(name, {})) if shaped else Done()
    mask = dataset.unshaped_mask_path(name) if shaped else dataset.mask_path(name)
    return before, kept if shaped else now, read_image(mask).convert("L") if mask.is_file() else None


def _one(dataset: OwnedDataset, name: str, change: Change) -> None:
    with translated("a picture was shaped"):
        notes = dataset.notes()
        _in_step(dataset, name, notes)
        dataset.write_notes({name: _change_image(dataset, name, notes, change)})


def _change_image(dataset: OwnedDataset, name: str, notes: Mapping[str, Note], change: Change) -> Note:
    """Make the image anew as `change` says; its new note. The unshaped one is there before anything is replaced."""
    path = dataset.image(name)
    if path.suffix.lower() not in WRITTEN_SUFFIXES:
        encode_image(Image.new("RGB", (1, 1)), suffix=path.suffix.lower())  # refuses it, and says why
    before, source, mask = _before(dataset, name, notes)
    decoded = decode_image(source)
    after = change(before, decoded.image, mask)
    assert after.box is not None and after.size is not None
    box, note = Box(after.box, after.size), dict(notes.get(name, {}))
    unchanged = after.box == (0, 0, *decoded.image.size) and after.size == decoded.image.size and not after.flip
    if unchanged:
        return note if source == path else _unshaped(dataset, name, note)
    if source == path:
        copy_atomic(path, dataset.unshaped_path(name), one_of_many=True)
        if mask is not None:
            copy_atomic(dataset.mask_path(name), dataset.unshaped_mask_path(name), one_of_many=True)
    if mask is not None:
        write_atomic(dataset.mask_path(name), encode_image(render(mask, box, flip=after.flip), suffix=".png"), one_of_many=True)
    made = render(decoded.image, box, flip=after.flip)
    write_atomic(path, encode_image(made, suffix=path.suffix.lower(), source=decoded), one_of_many=True)
    return {**note, "shaped": dataclasses.asdict(after)}


def _unshaped(dataset: OwnedDataset, name: str, note: Note) -> Note:
    """The image and its mask as they were imported; the note without what was done."""
    now = dataset.image(name)
    for kept, path in ((dataset.unshaped_mask_path(name), dataset.mask_path(name)), (dataset.unshaped_path(name), now)):
        if kept.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            os.replace(kept, path)
    return {key: value for key, value in note.items() if key != "shaped"}


def _each(dataset: OwnedDataset, names: Sequence[str], *, watch: Watch,
          change: Callable[[str, Mapping[str, Note]], Note]) -> Shaped:
    """`change` each image. Notes are written now and then, and at the end."""
    done, skipped, changed = [], [], {}
    with translated("pictures were shaped"):
        dataset.remove_parts()
        notes = dataset.notes()
        try:
            for name in dict.fromkeys(names):
                watch.check()
                try:
                    changed[name] = change(name, notes)
                    done.append(name)
                except DatasetError as error:
                    skipped.append((name, str(error)))
                if len(changed) >= _NOTES_EVERY:
                    dataset.write_notes(changed)
                    changed = {}
                watch.advance()
        finally:
            if changed:
                dataset.write_notes(changed)
    return Shaped(tuple(done), tuple(skipped))


def _add_parts(dataset: OwnedDataset, path: Path, boxes: Sequence[Box], *, flip: bool,
               endings: Sequence[str]) -> tuple[str, ...]:
    """New images from parts of one, each with its caption and its part of the mask; their names."""
    decoded, mask_path = decode_image(path), dataset.mask_path(path.name)
    mask = read_image(mask_path).convert("L") if mask_path.is_file() else None
    names, made, notes = FreeNames(dataset.taken_stems()), [], {}
    suffix = path.suffix.lower() if path.suffix.lower() in WRITTEN_SUFFIXES else ".png"
    for box, ending in zip(boxes, endings, strict=True):
        new = path.with_name(f"{names.claim(f'{path.stem}_{ending}')}{suffix}")
        if mask is not None:
            part = encode_image(render(mask, box, flip=flip), suffix=".png")
            write_atomic(dataset.mask_path(new.name), part, one_of_many=True)
        for caption in (path.with_suffix(caption) for caption in CAPTION_SUFFIXES):
            if caption.is_file():
                copy_atomic(caption, new.with_suffix(caption.suffix), one_of_many=True)
        write_atomic(new, encode_image(render(decoded.image, box, flip=flip), suffix=suffix, source=decoded), one_of_many=True)
        made.append(new.name)
        notes[new.name] = {"source": f"{path.name} {'mirrored' if flip else f'at {box.edges[0]:.0f}, {box.edges[1]:.0f}'}"}
    dataset.write_notes(notes)
    return tuple(made)


# ---- numbers

def _checked_box(box: Sequence[float], size: tuple[int, int]) -> Edges:
    if len(box) != 4 or not all(isinstance(edge, (int, float)) and abs(edge) < _FARTHEST for edge in box):
        raise DatasetError(f"{list(box)!r} is not a box", remedy="give left, top, right and bottom in pixels")
    left, top = max(0.0, box[0]), max(0.0, box[1])
    right, bottom = min(float(size[0]), box[2]), min(float(size[1]), box[3])
    if right - left < SMALLEST_CROP or bottom - top < SMALLEST_CROP:
        raise DatasetError("The crop holds too little of the picture", why=f"a side must be at least {SMALLEST_CROP} pixels",
                           remedy="draw a larger box")
    return left, top, right, bottom


def _in_unshaped(before: Done, box: Edges, size: tuple[int, int]) -> Edges:
    """A box on the image as it is now, on the unshaped one of (width, height) `size`."""
    seen, now = before.box or (0.0, 0.0, *map(float, size)), before.size or size
    left, top, right, bottom = box
    if before.flip:
        left, right = now[0] - right, now[0] - left
    across, down = (seen[2] - seen[0]) / now[0], (seen[3] - seen[1]) / now[1]
    return (seen[0] + left * across, seen[1] + top * down, min(size[0], seen[0] + right * across),
            min(size[1], seen[1] + bottom * down))


def _native(edges: Edges) -> Box:
    """The same part in whole pixels, neither enlarged nor made smaller."""
    left, top, right, bottom = map(round, edges)
    return Box((float(left), float(top), float(right), float(bottom)), (right - left, bottom - top))


def _tiles(length: int, tile: int, overlap: float) -> list[tuple[int, int]]:
    """(start, length) of evenly spread tiles along one side."""
    if length <= tile:
        return [(0, length)]
    count = -(-(length - tile) // max(1, int(tile * (1 - overlap)))) + 1
    return [(round(i * (length - tile) / (count - 1)), tile) for i in range(count)]
