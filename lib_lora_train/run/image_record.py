"""Which images a run was made with, in its folder: `images.json`, for a comparison with other runs."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
from pathlib import Path

from lib_lora_train.dataset.held_out import name_of
from lib_lora_train.records import from_plain
from lib_lora_train.run.planning import RunPlan
from lib_lora_train.run.resume import ends_of
from lib_lora_train.storage.atomic import write_atomic

log = logging.getLogger(__name__)
FILE_NAME = "images.json"


@dataclasses.dataclass(frozen=True)
class RecordedImages:
    """The images of a run by their path in the dataset's folder, with those held out: (a hash of the file, the caption)."""

    images: dict[str, tuple[str, str]]


def record_images(folder: Path | None, plan: RunPlan) -> None:
    """Write the images of a plan into the run's folder, where it has one. What cannot be read or written is logged, and ends no
    training."""
    if folder is None:
        return
    examples = [*plan.dataset.examples, *(image.example for image in plan.held_out)]
    try:
        found = {name_of(example.path, plan.dataset.folder): (
            hashlib.sha256(ends_of(example.path)).hexdigest()[:16], "\n".join(example.lines)) for example in examples}
        write_atomic(folder / FILE_NAME, json.dumps({"images": found}).encode())
    except (OSError, ValueError) as error:
        log.warning("The run %s does not say which images it had: %s", folder.name, error)


def read_images(folder: Path) -> dict[str, tuple[str, str]] | None:
    """As `RecordedImages.images`; None where the run does not say."""
    try:
        return from_plain(RecordedImages, json.loads((folder / FILE_NAME).read_bytes())).images
    except (OSError, ValueError, TypeError, RecursionError):
        return None
