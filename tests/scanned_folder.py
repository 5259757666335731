"""A folder as a run reads it that has no `dataset_config`: images with captions and repeats."""

from __future__ import annotations

from pathlib import Path

from lib_lora_train.dataset.examples import Dataset, with_repeats
from lib_lora_train.dataset.folder import read_folder
from lib_lora_train.dataset.listing import MayRead
from lib_lora_train.dataset.progress import Progress, ShouldStop
from lib_lora_train.settings import DatasetSettings
from lib_lora_train.settings.dataset_config import SubsetSettings


def scan(folder: Path | str, *, max_train_epochs: int, num_repeats: int = 0, trigger_word: str = "",
         reg_data_dir: Path | str | None = None, on_progress: Progress | None = None,
         should_stop: ShouldStop | None = None, may_read: MayRead | None = None) -> Dataset:
    """What `read_folder` finds, each image with its repeats (`with_repeats`). Arguments and errors are theirs."""
    subset = SubsetSettings(DatasetSettings(trigger_word=trigger_word))
    found = read_folder(folder, subsets=(subset,), reg_data_dir=reg_data_dir, on_progress=on_progress, should_stop=should_stop,
                        may_read=may_read)
    return with_repeats(found, max_train_epochs=max_train_epochs, num_repeats=num_repeats)
