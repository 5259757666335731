"""A dataset as a save of captions leaves it that was broken off half-way."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lib_lora_train.errors import OutputError
from lib_lora_train.studio.captions.edits import SetCaption
from lib_lora_train.studio.captions.store import CaptionStore

FINISHED = "A save that was interrupted was finished: 1 caption."


def interrupt_save(folder: Path, image: str, caption: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Save a new caption of one image of the dataset in `folder` until the disk is full: its file is still the old one."""
    replace = os.replace

    def full(source: Path, target: Path) -> None:
        if Path(target).suffix == ".txt":
            raise OSError(28, "No space left on device")
        replace(source, target)

    store = CaptionStore.open(folder)
    store.apply(SetCaption(caption), [[path.name for path in store.images].index(image)])
    with monkeypatch.context() as patch, pytest.raises(OutputError, match="No space left"):
        patch.setattr(os, "replace", full)
        store.save()
