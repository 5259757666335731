"""Masks: which parts of an image are learnt (white) and which are not (black), beside the image for masked loss.

They are masks/<stem>.png, mode L, of the image's size, as kohya's trainer takes them from its conditioning_data_dir.
"""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from lib_lora_train.dataset.images import read_image, read_layers, read_size
from lib_lora_train.errors import DatasetError, translated
from lib_lora_train.storage.atomic import write_atomic
from lib_lora_train.studio.cropping.crop import in_step
from lib_lora_train.studio.cropping.encode import encode
from lib_lora_train.studio.importing.owned import OwnedDataset


def read_mask(dataset: OwnedDataset, name: str) -> Image.Image | None:
    """The mask of the image `name` (mode L); None if all of it is learnt. Raises DatasetError if it is damaged."""
    path = dataset.mask_path(dataset.image(name).name)
    return read_image(path).convert("L") if path.is_file() else None


def mask_from_file(path: Path) -> Image.Image:
    """A mask from a file, mode L: how opaque each pixel is if anything is transparent, else how bright.

    Raises DatasetError as `read_image`.
    """
    layers = read_layers(path)
    return layers.alpha if layers.alpha is not None else layers.image.convert("L")


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
            done, kept = in_step(dataset, name, dataset.notes()), dataset.unshaped_mask_path(name)
            whole = read_image(kept).convert("L") if kept.is_file() else Image.new("L", read_size(unshaped), 255)
            left, top, right, bottom = map(round, done.box or (0, 0, *whole.size))
            part = mask.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if done.flip else mask
            whole.paste(part.resize((max(1, right - left), max(1, bottom - top)), Image.Resampling.BILINEAR), (left, top))
            write_atomic(kept, encode(whole, suffix=".png"))
        write_atomic(dataset.mask_path(name), encode(mask, suffix=".png"))


def remove_mask(dataset: OwnedDataset, name: str) -> None:
    """Remove an image's mask: all of it is learnt."""
    dataset.image(name)
    with translated("a mask was removed"):
        dataset.mask_path(name).unlink(missing_ok=True)
        dataset.unshaped_mask_path(name).unlink(missing_ok=True)
