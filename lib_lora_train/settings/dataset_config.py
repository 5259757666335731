"""Settings of single folders, in the format of sd-scripts' `dataset_config` (library/config_util.py, 48d368fa).

    [general]               for all folders
    [[datasets]]            folders of one size: resolution, buckets, batch_size
    [[datasets.subsets]]    one folder: image_dir, num_repeats, captions, augmentation

What a table leaves open, the one above says, and in the end the run's own settings. A folder of no repeats is left out. Our own
names (trigger_word, loss_weight, rotation) may also stand in `custom_attributes`, where sd-scripts passes over them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import os
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from lib_lora_train.errors import SettingError, counted
from lib_lora_train.settings import DECLARATIONS, Settings, flat, named, no_effect, parse
from lib_lora_train.settings.areas import CaptionSettings, DatasetSettings
from lib_lora_train.settings.field import Value, declarations
from lib_lora_train.settings.loss import MaskSettings
from lib_lora_train.settings.toml import tables_in, text_of

_OF_BLOCKS = ("resolution", "enable_bucket", "min_bucket_reso", "max_bucket_reso", "bucket_reso_steps", "bucket_no_upscale",
              "batch_size")
_OF_FOLDERS = ("num_repeats", "trigger_word", "flip_aug", "color_aug", "random_crop", "rotate_aug_degrees",
               "rotate_aug_variants", "class_tokens", "loss_weight", "alpha_mask", "conditioning_data_dir",
               *(declaration.name for declaration in declarations(CaptionSettings) if declaration.name != "clip_skip"))
_OF_ONE_FOLDER = ("image_dir", "is_reg", "custom_attributes")
_UNUSED: dict[str, Value | None] = {
    "network_multiplier": 1, "validation_split": 0, "resize_interpolation": "", "face_crop_aug_range": "",
    "cache_info": None, "validation_seed": None}
"""sd-scripts' names that change nothing here, and the value with which they change nothing there (None: any)."""
KNOWN_NAMES = frozenset({*_OF_BLOCKS, *_OF_FOLDERS, *_OF_ONE_FOLDER, *_UNUSED})
"""What may stand in one."""
_OTHER_KINDS = {"metadata_file": "captions are read from files beside the pictures"}


@dataclasses.dataclass(frozen=True)
class SubsetSettings:
    """How the images of one folder are trained.

    dataset, captions   the settings in effect for it
    image_dir           as it is written: absolute, or seen from the dataset folder, "" for that itself
    class_tokens        the caption of images without one
    loss_weight         how much its images count
    masks               those in effect for it; a conditioning_data_dir of its own as image_dir
    """

    dataset: DatasetSettings = DatasetSettings()
    captions: CaptionSettings = CaptionSettings()
    image_dir: str = ""
    class_tokens: str = ""
    is_reg: bool = False
    loss_weight: float = 1.0
    masks: MaskSettings = MaskSettings()


DEFAULT_SUBSET = SubsetSettings()


def with_text(settings: Settings) -> Settings:
    """The settings with the text of a `dataset_config` that names a file, and what the text says of the whole run. Raises
    SettingError."""
    text, folder = settings.dataset.dataset_config, settings.dataset.train_data_dir
    if not text:
        return settings
    if DECLARATIONS["dataset_config"].holds_path(text):
        path = Path(text)
        text, folder = text_of(path).strip(), folder or str(path.absolute().parent)
    settings = dataclasses.replace(settings, dataset=dataclasses.replace(settings.dataset, dataset_config=text))
    if not folder:
        try:
            folder = os.path.commonpath([os.path.join(os.path.abspath(found.image_dir), "") for found in subsets_of(settings)])
        except ValueError as error:
            raise SettingError(f"{named('train_data_dir')} is empty", why="the folders lie on several drives",
                               remedy="name the folder to keep the choice of held-out pictures in") from error
    sizes = _batch_sizes(settings)
    optimizer = settings.optimizer if not sizes else dataclasses.replace(settings.optimizer, train_batch_size=min(sizes))
    return dataclasses.replace(settings, optimizer=optimizer,
                               dataset=dataclasses.replace(settings.dataset, train_data_dir=folder))


@lru_cache(maxsize=8)
def subsets_of(settings: Settings) -> tuple[SubsetSettings, ...]:
    """The folders that `dataset_config`, which holds the text (`with_text`), asks for; without one, the dataset folder as it
    is. Raises SettingError."""
    tables = _read(settings.dataset.dataset_config)
    if not tables:
        return (SubsetSettings(settings.dataset, settings.captions, masks=settings.masks),)
    found = tuple(_subset(settings, values) for values in tables if values.get("num_repeats") != 0)
    if not any(not subset.is_reg for subset in found):
        raise SettingError(f"{named('dataset_config')} names no folder to train on",
                           remedy="write image_dir under [[datasets.subsets]], with repeats")
    return found


def notes(settings: Settings) -> list[str]:
    """What the user should know of the folders' settings, a sentence each."""
    tables = _read(settings.dataset.dataset_config)
    unused = {name for values in tables for name, harmless in _UNUSED.items()
              if harmless is not None and values.get(name, harmless) != harmless}
    unused |= {name for values in tables for name in values.get("custom_attributes", {}) if name not in _OF_FOLDERS}
    found = [f"Of {named('dataset_config')} {', '.join(sorted(unused))} {'is' if len(unused) == 1 else 'are'} not used here."
             ] if unused else []
    if off := sum(values.get("num_repeats") == 0 for values in tables):
        found.append(f"{counted(off, 'folder')} of {named('dataset_config')} "
                     f"{'has no repeats and is left out' if off == 1 else 'have no repeats and are left out'}.")
    if len(sizes := _batch_sizes(settings)) > 1:
        found.append(f"{named('dataset_config')} has batches of {' and '.join(map(str, sorted(sizes)))}: here all are of "
                     f"{min(sizes)}.")
    if tables and settings.dataset.reg_data_dir:
        found.append(no_effect("reg_data_dir", f"{named('dataset_config')} names all folders, with is_reg"))
    if not settings.masks.masked_loss and any(values.get("conditioning_data_dir") for values in tables):
        found.append(no_effect("conditioning_data_dir", f"{named('masked_loss')} is off"))
    return found


def folders_in(text: str) -> list[str]:
    """The folders that such a text names, as they are written in it; none where it cannot be read."""
    with contextlib.suppress(SettingError):
        return [str(values["image_dir"]) for values in _read(text)]
    return []


def each_resolution(subset: SubsetSettings) -> tuple[SubsetSettings, ...]:
    """The same folder at each of the sizes that its resolution lists."""
    return tuple(dataclasses.replace(subset, dataset=dataclasses.replace(subset.dataset, resolution=size.strip()))
                 for size in subset.dataset.resolution.split(";") if size.strip())


def _subset(settings: Settings, values: Mapping[str, Any]) -> SubsetSettings:
    own = {name: value for name, value in values.items() if name in DECLARATIONS}
    merged = parse({**flat(settings), "num_repeats": settings.dataset.num_repeats or 1, **own})
    weight, is_reg = values.get("loss_weight", 1.0), values.get("is_reg", False)
    if not isinstance(is_reg, bool):
        raise SettingError(f"is_reg = {is_reg!r} of {named('dataset_config')} is not possible",
                           why="it must be true or false")
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 <= weight <= 100:
        raise SettingError(f"loss_weight = {weight!r} of {named('dataset_config')} is not possible",
                           why="it must be a number from 0 to 100")
    return SubsetSettings(merged.dataset, merged.captions, str(values["image_dir"]), str(values.get("class_tokens") or ""),
                          is_reg, float(weight), merged.masks)


def _batch_sizes(settings: Settings) -> set[int]:
    sizes = {values["batch_size"] for values in _read(settings.dataset.dataset_config) if "batch_size" in values}
    return {parse({**flat(settings), "train_batch_size": size}).optimizer.train_batch_size for size in sizes}


@lru_cache(maxsize=8)
def _read(text: str) -> list[dict[str, Any]]:
    """What the tables say of each folder, the inner before the outer; [] where there is no text, or it is in a file still."""
    if not text or DECLARATIONS["dataset_config"].holds_path(text):
        return []
    setting = named("dataset_config")
    config = tables_in(text, name=setting)
    blocks, general = config.get("datasets") or None, config.get("general", {})
    if not isinstance(blocks, list) or not isinstance(general, dict) or not all(
            isinstance(block, dict) and isinstance(block.get("subsets"), list) and block["subsets"] and all(
                isinstance(subset, dict) and isinstance(subset.get("custom_attributes", {}), dict)
                and (isinstance(subset.get("image_dir"), str) or _OTHER_KINDS.keys() & subset)
                for subset in block["subsets"]) for block in blocks):
        raise SettingError(f"{setting} is not one of sd-scripts'", why="it does not hold [[datasets]] with "
                           "[[datasets.subsets]], each with an image_dir", remedy="see its docs/config_README-en.md")
    found, unknown = [], set[str]()
    for block in blocks:
        above = {name: value for name, value in block.items() if name != "subsets"}
        unknown |= (general.keys() | above.keys()) - {*_OF_BLOCKS, *_OF_FOLDERS, *_UNUSED}
        for subset in block["subsets"]:
            attributes = subset.get("custom_attributes", {})
            own = {**{name: value for name, value in attributes.items() if name in _OF_FOLDERS}, **subset}
            unknown |= own.keys() - {*_OF_FOLDERS, *_OF_ONE_FOLDER, *_UNUSED}
            found.append({name: value for name, value in {**general, **above, **own}.items() if value is not None})
    if unknown:
        raise SettingError(f"{setting} cannot be used", why=f"it holds {', '.join(map(_explained, sorted(unknown)))}")
    return found


def _explained(name: str) -> str:
    if name in _OTHER_KINDS:
        return f"{name!r}, which is not supported: {_OTHER_KINDS[name]}"
    if name in _OF_BLOCKS:
        return f"{name!r} in [[datasets.subsets]], which belongs in [[datasets]]"
    near = difflib.get_close_matches(name, [*_OF_BLOCKS, *_OF_FOLDERS, *_OF_ONE_FOLDER, *_UNUSED], n=1)
    return f"{name!r}, which is not known there{f' (did you mean {near[0]!r}?)' if near else ''}"
