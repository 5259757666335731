"""What a run's images are compared with: those it was not trained on, and those it was."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from lib_lora_train.dataset.captions import split_tags, tag_key
from lib_lora_train.dataset.examples import Example
from lib_lora_train.dataset.folder import read_folder
from lib_lora_train.dataset.held_out import HeldOutImage, name_of, split
from lib_lora_train.dataset.progress import ShouldStop
from lib_lora_train.errors import SettingError
from lib_lora_train.results.history import read_history
from lib_lora_train.run.record import read_settings
from lib_lora_train.settings import DECLARATIONS, Settings, parse
from lib_lora_train.settings.allowed_paths import AllowedPaths, check_allowed
from lib_lora_train.settings.dataset_config import subsets_of, with_text


@dataclasses.dataclass(frozen=True)
class References:
    """The images of a run, in the dataset's `folder`. `derived`: the held-out ones are crops of images that were trained."""

    folder: Path
    held_out: tuple[HeldOutImage, ...]
    training: tuple[Example, ...]
    derived: bool


def settings_of(folder: Path) -> Settings:
    """What the run was started with. Raises SettingError where that cannot be read."""
    values = {name: value for name, value in read_settings(folder).items() if name in DECLARATIONS}
    if not values:
        raise SettingError(f"The settings of the run {folder.name} cannot be read", remedy="choose another run")
    return parse(values)


def resolution_of(folder: Path) -> tuple[int, int]:
    """(width, height) that the run was planned for, in multiples of 64, which fit every model; (512, 512) where it does not
    say."""
    planned = read_history(folder).planned
    width, _, height = (planned.resolution if planned else "").replace("×", "x").partition("x")
    sides = [max(64, round(int(side) / 64) * 64) if side.isdecimal() else 512 for side in (width, height)]
    return sides[0], sides[1]


def references_of(folder: Path, settings: Settings, *, allowed: AllowedPaths | None,
                  should_stop: ShouldStop | None = None) -> References:
    """The images of the run in `folder`. Those it held out are the ones that its events name, also where the dataset has
    changed since; without such an event there are none. Raises DatasetError where its folder cannot be read."""
    check_allowed(settings, allowed)
    settings = with_text(settings)
    dataset = read_folder(Path(settings.dataset.train_data_dir), subsets=subsets_of(settings), should_stop=should_stop,
                          may_read=allowed.may_read if allowed else None)
    said = read_history(folder).held_out
    names, derived = (set(said.pictures), said.derived) if said else (set[str](), False)
    if derived:
        drawn = split(dataset, share=settings.evaluation.validation_split, seed=settings.optimizer.seed)
        crops = tuple(image for image in drawn.held_out if name_of(image.example.path, dataset.folder) in names)
        return References(dataset.folder, crops, dataset.examples, True)
    held_out = tuple(HeldOutImage(example) for example in dataset.examples if name_of(example.path, dataset.folder) in names)
    training = tuple(example for example in dataset.examples if name_of(example.path, dataset.folder) not in names)
    return References(dataset.folder, held_out, training, False)


def without_trigger(text: str, trigger_word: str) -> str:
    """`text` without the tags of the trigger word; the same text where it has none of them."""
    trigger = set(map(tag_key, split_tags(trigger_word)))
    tags = split_tags(text)
    kept = [tag for tag in tags if tag_key(tag) not in trigger]
    return text if len(kept) == len(tags) else ", ".join(kept)
