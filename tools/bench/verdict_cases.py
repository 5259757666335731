"""The runs of `bench verdict`: a good one, and those that are made to go wrong, each in one manner."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from lib_lora_train.demo import STYLE, SUBJECT
from lib_lora_train.demo.embedded import CHECKPOINT
from lib_lora_train.settings.field import Value

Entry = tuple[Path, str]
"""An image and its caption."""
Write = Callable[[list[Entry], Path], None]

GOOD: dict[str, Value] = {
    "resolution": "128", "num_repeats": 1, "train_batch_size": 1, "network_dim": 16, "network_alpha": 16.0,
    "learning_rate": 1e-3, "optimizer_type": "AdamW", "lr_scheduler": "cosine", "sample_images": False,
    "validate_every_n_steps": 15, "save_every_n_epochs": 0}
"""The settings of the good run; what they do not name has its default. Saves would be measured too, and there are few steps."""
STEPS, SHORT, LONG = 120, 60, 480
"""Steps of a run, of one in which something shows at once, and of far too long a one. Every 15 steps are measured, as often for
its length as in a run of usual length; by itself so short a one would be measured twice."""


@dataclasses.dataclass(frozen=True)
class DataSet:
    """A dataset of the demo, and the trigger word it is trained with."""

    name: str
    folder: Path
    trigger_word: str

    def entries(self) -> list[Entry]:
        """Its images by name."""
        files = sorted(self.folder.glob("*.png"))
        return [(file, file.with_suffix(".txt").read_text(encoding="utf-8").strip()) for file in files]


DATA = (DataSet("style", STYLE, ""), DataSet("subject", SUBJECT, "zorbi"))


@dataclasses.dataclass(frozen=True)
class Case:
    """One run.

    expected   the findings that are right; "refused" where the run must not start
    setting    the one that must be named, "" for none
    about      what the sentence must say
    changes    of the good run's settings
    steps      about so many, in whole epochs
    data       the demo's images that it is made with, unless others are asked for
    write      how its images and captions are laid
    damaged    whether the checkpoint is
    """

    name: str
    expected: tuple[str, ...]
    setting: str = ""
    changes: Mapping[str, Value] = dataclasses.field(default_factory=dict)
    steps: int = STEPS
    data: str = "style"
    write: Write = lambda entries, folder: write_images(entries, folder)
    damaged: bool = False
    about: str = ""


def write_images(entries: list[Entry], folder: Path) -> None:
    """The images with their captions."""
    for image, caption in entries:
        shutil.copyfile(image, folder / image.name)
        (folder / image.with_suffix(".txt").name).write_text(caption, encoding="utf-8")


def mislabelled(entries: list[Entry], folder: Path) -> None:
    """Each image with the caption of another one, five further on."""
    captions = [caption for _, caption in entries]
    write_images([(image, caption) for (image, _), caption in
                  zip(entries, [*captions[5:], *captions[:5]], strict=True)], folder)


def one_image(entries: list[Entry], folder: Path) -> None:
    """One image twenty times, each file with another pixel changed a little."""
    image, caption = entries[len(entries) // 2]
    with Image.open(image) as file:
        pixels = file.convert("RGB")
    for number in range(20):
        copy = pixels.copy()
        red, green, blue = copy.getpixel((number, number))
        copy.putpixel((number, number), (red ^ 1, green, blue))
        copy.save(folder / f"{number:02}.png")
        (folder / f"{number:02}.txt").write_text(caption, encoding="utf-8")


def without_captions(entries: list[Entry], folder: Path) -> None:
    """The images with caption files that are empty."""
    write_images([(image, "") for image, _ in entries], folder)


def three_images(entries: list[Entry], folder: Path) -> None:
    """Three of the images."""
    write_images(entries[::len(entries) // 3][:3], folder)


def damaged_checkpoint(folder: Path) -> Path:
    """The demo's model with a weight of the UNet that is not a number."""
    tensors = load_file(CHECKPOINT)
    name = next(name for name in tensors if name.startswith("model.diffusion_model.middle_block") and name.endswith("weight"))
    tensors[name] = tensors[name].clone()
    tensors[name].view(-1)[7] = torch.nan
    path = folder / "damaged.safetensors"
    save_file(tensors, path)
    for companion in (".yaml", "-text"):
        source = CHECKPOINT.with_name(CHECKPOINT.stem + companion)
        if source.is_dir():
            shutil.copytree(source, folder / f"{CHECKPOINT.stem}-text", dirs_exist_ok=True)
        elif source.is_file():
            shutil.copyfile(source, path.with_suffix(companion))
    return path


_RATE = float(GOOD["learning_rate"])  # type: ignore[arg-type]
CASES = (
    Case("good run", ("learning",)),
    Case("rate ×100", ("diverging", "ruined"), "learning_rate", {"learning_rate": 100 * _RATE}, steps=SHORT),
    Case("rate ÷100", ("too slow", "no effect"), "learning_rate", {"learning_rate": _RATE / 100}),
    Case("alpha 0.01", ("too slow", "no effect"), "network_alpha", {"network_alpha": 0.01}),
    Case("far too many epochs", ("overfitting",), "max_train_epochs",
         {"lr_scheduler": "constant", "validate_every_n_steps": 60}, steps=LONG, data="subject"),
    Case("text encoder too hot", ("diverging", "overfitting", "ruined"), "text_encoder_lr",
         {"network_train_unet_only": False, "text_encoder_lr": 100 * _RATE}, steps=SHORT),
    Case("captions of other pictures", ("words",), steps=SHORT, write=mislabelled, about="do not describe"),
    Case("one picture twenty times", ("words",), steps=SHORT, write=one_image, about="in several copies"),
    Case("three pictures", ("words",), steps=SHORT, write=three_images, about="only 3 pictures"),
    Case("empty captions, no trigger word", ("words",), "trigger_word", {"trigger_word": ""}, steps=SHORT,
         write=without_captions, about="No picture has a caption"),
    Case("trigger word of something else", ("words",), "trigger_word", {"trigger_word": "penguin"}, steps=SHORT,
         about="already means something else"),
    Case("checkpoint that is not a number", ("refused",), damaged=True, about="not numbers"),
)
