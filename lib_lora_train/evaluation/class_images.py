"""Preservation pictures: what the model paints of the subject's class before it learns the subject.

Trained beside the dataset (kohya's regularisation, DreamBooth's prior preservation; Ruiz et al. 2022, arXiv 2208.12242),
they keep "a girl" from becoming everywhere the one girl of the dataset. The folder has kohya's layout: FOLDER/1_class with
pictures and their prompts as captions; FOLDER is what reg_data_dir names.
"""

from __future__ import annotations

import dataclasses
import io
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from lib_lora_train.dataset.captions import read_caption
from lib_lora_train.dataset.images import is_image_name
from lib_lora_train.dataset.progress import Progress, ShouldStop
from lib_lora_train.errors import DatasetError, SettingError, translated
from lib_lora_train.evaluation.lease import Lease, leased
from lib_lora_train.evaluation.sampler import SampleRequest, sample_latents, to_image
from lib_lora_train.host.port import Host
from lib_lora_train.settings import Settings
from lib_lora_train.storage.atomic import write_atomic

SUBFOLDER = "1_class"
MOST = 10_000


@dataclasses.dataclass(frozen=True)
class ClassImages:
    """Where they are (what reg_data_dir names), how many were painted now, and how many were there before."""

    folder: Path
    made: int
    found: int


def make_class_images(host: Host, *, prompts: Sequence[str], count: int, folder: Path, size: tuple[int, int], steps: int = 20,
                        cfg: float = 7.0, seed: int = 1, negative_prompt: str = "", settings: Settings | None = None,
                        on_progress: Progress | None = None, should_stop: ShouldStop | None = None) -> ClassImages:
    """Paint until `folder`/1_class holds `count` pictures of `prompts`, taken in turn; `size` is (width, height).

    What is there of these prompts counts, so a second call goes on where the first was stopped, and paints what it would
    have painted: number k has the seed `seed` + k − 1. Pictures of other prompts stay and do not count. A picture is
    there whole, with its caption, or not at all.
    Raises SettingError (no prompt, a count or size that is not possible), HostError, ModelError, OutputError, TrainingError
    where the memory ran out, and Interrupted; what was painted by then stays.
    """
    prompts = [prompt for text in prompts if (prompt := " ".join(text.split()))]
    if not prompts:
        raise SettingError("There is no prompt to paint from", remedy="write what the class is, such as: a photo of a girl")
    if not 1 <= count <= MOST:
        raise SettingError(f"{count} pictures are not possible", why=f"it must be 1 to {MOST}")
    into = folder / SUBFOLDER
    with translated("reading the class pictures"):
        here = _Here.of(into)
    missing = _missing(prompts, count=count, captions=here.captions)
    found = count - len(missing)
    if on_progress:
        on_progress(found, count)
    if not missing:
        return ClassImages(folder, 0, found)
    with leased(host, work="Painting class pictures", settings=settings or Settings(), should_stop=should_stop) as loan, \
            translated("painting class pictures"):
        _check_size(loan, size)
        number = 0
        for done, prompt in enumerate(missing, start=found):
            loan.between(done, count)
            number = next(free for free in range(number + 1, MOST + len(here.numbers) + 1) if free not in here.numbers)
            request = SampleRequest(prompt, negative_prompt, width=size[0], height=size[1], steps=steps, cfg_scale=cfg,
                                    seed=seed + number - 1)
            latents = sample_latents(loan.model, request, clip_skip=loan.clip_skip, dtype=loan.dtype,
                                     on_step=lambda *_: loan.check())
            # The caption first: a picture without one would be trained on the folder's name.
            write_atomic(into / f"{number:06d}.txt", (prompt + "\n").encode("utf-8"))
            write_atomic(into / f"{number:06d}.png", _png(to_image(loan.model, latents), request, loan.checkpoint))
            if on_progress:
                on_progress(done + 1, count)
    return ClassImages(folder, len(missing), found)


@dataclasses.dataclass(frozen=True)
class _Here:
    """What the folder holds: how many pictures of each caption, and the numbers that are taken."""

    captions: Counter[str]
    numbers: frozenset[int]

    @classmethod
    def of(cls, folder: Path) -> _Here:
        images = [path for path in folder.iterdir() if is_image_name(path)] if folder.is_dir() else []
        captions: Counter[str] = Counter()
        for path in images:
            try:
                captions[read_caption(path.with_suffix(".txt"))] += 1
            except DatasetError:
                continue  # no caption, or none of ours: not one of the pictures that are asked for
        numbers = (path.stem for path in images)
        return cls(captions, frozenset(int(stem) for stem in numbers if stem.isascii() and stem.isdigit()))


def _missing(prompts: Sequence[str], *, count: int, captions: Counter[str]) -> list[str]:
    """The prompts still to paint, in the order in which one call would have painted them all."""
    left, missing = Counter(captions), []
    for place in range(count):
        prompt = prompts[place % len(prompts)]
        if left[prompt] > 0:
            left[prompt] -= 1
        else:
            missing.append(prompt)
    return missing


def _check_size(loan: Lease, size: tuple[int, int]) -> None:
    architecture = loan.model.architecture
    multiple = architecture.vae.factor * 2 ** architecture.unet.halvings
    if min(size) < multiple or size[0] % multiple or size[1] % multiple:
        raise SettingError(f"Pictures of {size[0]}×{size[1]} pixels do not fit this model",
                           why=f"its sizes are multiples of {multiple}")


def _png(image: Image.Image, request: SampleRequest, checkpoint: str) -> bytes:
    """The file, with how it was made in the words of the WebUI, which can read them back."""
    negative = f"\nNegative prompt: {request.negative_prompt}" if request.negative_prompt else ""
    text = PngInfo()
    text.add_text("parameters", f"{request.prompt}{negative}\nSteps: {request.steps}, Sampler: Euler, CFG scale: "
                  f"{request.cfg_scale:g}, Seed: {request.seed}, Size: {request.width}x{request.height}, Model: {checkpoint}")
    file = io.BytesIO()
    image.save(file, "PNG", pnginfo=text)
    return file.getvalue()
