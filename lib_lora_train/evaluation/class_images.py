"""Class images for prior preservation: samples of the subject's class by the model before it learns the subject.

Trained beside the dataset (kohya's regularisation, DreamBooth's prior preservation; Ruiz et al. 2022, arXiv 2208.12242),
they keep "a girl" from becoming everywhere the one girl of the dataset. The folder has kohya's layout: FOLDER/1_class with
images and their prompts as captions; FOLDER is what reg_data_dir names.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from lib_lora_train.dataset.images import is_image_name
from lib_lora_train.dataset.progress import Progress, ShouldStop
from lib_lora_train.dataset.text_files import read_text
from lib_lora_train.errors import DatasetError, SettingError, translated
from lib_lora_train.evaluation.infotext import png_of
from lib_lora_train.host.lease import LeaseHost, lease_for
from lib_lora_train.model.sampler import SampleRequest, to_image
from lib_lora_train.settings import Settings
from lib_lora_train.storage.atomic import write_atomic

SUBFOLDER = "1_class"
MOST = 10_000


@dataclasses.dataclass(frozen=True)
class ClassImages:
    """Where they are (what reg_data_dir names), how many were sampled now, and how many existed before."""

    folder: Path
    made: int
    found: int


def make_class_images(host: LeaseHost, *, prompts: Sequence[str], count: int, folder: Path, size: tuple[int, int],
                      steps: int = 20, cfg: float = 7.0, seed: int = 1, negative_prompt: str = "",
                      on_progress: Progress | None = None, should_stop: ShouldStop | None = None) -> ClassImages:
    """Sample until `folder`/1_class holds `count` images of `prompts`, used in turn; `size` is (width, height).

    Images of these prompts that exist count, so a second call continues where the first was stopped, with the images that
    it would have sampled: number k has the seed `seed` + k − 1. Images of other prompts stay and do not count. An image
    is there whole, with its caption, or not at all.
    Raises SettingError (no prompt, a count or size that is not possible), HostError, ModelError, OutputError, TrainingError
    where the memory ran out, and Interrupted; what was sampled by then stays.
    """
    prompts = [prompt for text in prompts if (prompt := " ".join(text.split()))]
    if not prompts:
        raise SettingError("There is no prompt to paint from", remedy="write what the class is, such as: a photo of a girl")
    if not 1 <= count <= MOST:
        raise SettingError(f"{count} pictures are not possible", why=f"it must be 1 to {MOST}")
    target = folder / SUBFOLDER
    with translated("reading the class pictures"):
        captions, numbers = _existing(target)
    missing = _missing(prompts, count=count, captions=captions)
    found = count - len(missing)
    if on_progress:
        on_progress(found, count)
    if not missing:
        return ClassImages(folder, 0, found)
    free = (number for number in itertools.count(1) if number not in numbers)
    with lease_for(host, "Painting class pictures", settings=Settings(), should_stop=should_stop) as lease, \
            translated("painting class pictures"):
        for done, (prompt, number) in enumerate(zip(missing, free, strict=False), start=found):
            lease.before_item(done, count)
            request = SampleRequest(prompt, negative_prompt, width=size[0], height=size[1], steps=steps, cfg_scale=cfg,
                                    seed=seed + number - 1)
            image = to_image(lease.model, lease.sample(request))
            # The caption first: an image without one would be trained on the folder's name.
            write_atomic(target / f"{number:06d}.txt", (prompt + "\n").encode("utf-8"))
            write_atomic(target / f"{number:06d}.png", png_of(image, request, checkpoint=lease.checkpoint))
            if on_progress:
                on_progress(done + 1, count)
    return ClassImages(folder, len(missing), found)


def _existing(folder: Path) -> tuple[Counter[str], frozenset[int]]:
    """What the folder holds: how many images of each caption, and the numbers that are used."""
    images = [path for path in folder.iterdir() if is_image_name(path)] if folder.is_dir() else []
    captions: Counter[str] = Counter()
    for path in images:
        try:
            captions[read_text(path.with_suffix(".txt")).text.strip()] += 1
        except DatasetError:
            continue  # no caption, or none of ours: not one of the images that are asked for
    stems = (path.stem for path in images)
    return captions, frozenset(int(stem) for stem in stems if stem.isascii() and stem.isdigit())


def _missing(prompts: Sequence[str], *, count: int, captions: Counter[str]) -> list[str]:
    """The prompts still to sample, in the order in which one call would have sampled them all."""
    left, missing = Counter(captions), []
    for place in range(count):
        prompt = prompts[place % len(prompts)]
        if left[prompt] > 0:
            left[prompt] -= 1
        else:
            missing.append(prompt)
    return missing
