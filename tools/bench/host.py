"""A host that lends a model of random weights from memory, and images to train on: what a measured run needs."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from PIL import Image, ImageDraw

from lib_lora_train.dataset.progress import ShouldStop
from lib_lora_train.errors import translated
from lib_lora_train.host import placement
from lib_lora_train.host.port import Checkpoint, Host, LeasedModel, Outline, never
from lib_lora_train.model.architecture import NO_HINTS
from tools.bench.true_size import true_size_shapes, true_size_tensors

IMAGES = 8
KOHYA_FOLDER = "1_cat"
"""How kohya's scripts want images to lie: a folder in the folder, its name begins with the number of repeats."""


class RandomHost(Host):
    """Lends true-size random weights on `device`; they are drawn at the first lease."""

    allowed = None

    def __init__(self, family: str, *, folder: Path, device: torch.device, dtype: torch.dtype, small: bool = False) -> None:
        self.lora_folder, self.runs_folder = folder / "loras", folder / "runs"
        self.datasets_folder = self.models_folder = self.taggers_folder = folder
        self._family, self._small, self._dtype, self._device = family, small, dtype, device
        self._tensors: Mapping[str, torch.Tensor] | None = None

    def checkpoint(self) -> Checkpoint:
        """What the random model is called."""
        name = f"random-{self._family}{'-small' if self._small else ''}"
        return Checkpoint(name, f"{name}.safetensors", self._family)

    def outline(self) -> Outline:
        """The shapes, known without drawing anything."""
        shapes = true_size_shapes(self._family, small=self._small)
        return Outline({name: torch.empty(shape, dtype=self._dtype, device="meta") for name, shape in shapes.items()},
                       NO_HINTS, self._device)

    @contextlib.contextmanager
    def lease(self, *, stop: ShouldStop = never) -> Iterator[LeasedModel]:
        """The tensors on the device."""
        with translated("making a model of random weights"):
            if self._tensors is None:
                self._tensors = true_size_tensors(self._family, dtype=self._dtype, device=self._device, small=self._small)
            placement.move(self._tensors.values(), self._device)
        yield LeasedModel(self._tensors, NO_HINTS, self.checkpoint(), self._device)


def make_images(folder: Path, *, side: int, count: int = IMAGES) -> Path:
    """Write `count` square images of coloured discs on noise, with captions, into FOLDER/1_cat; returns `folder`."""
    images, generator = folder / KOHYA_FOLDER, random.Random(side)
    with translated("writing the pictures to train on"):
        images.mkdir(parents=True, exist_ok=True)
        for index in range(count):
            image = Image.effect_noise((side, side), 60).convert("RGB")
            draw = ImageDraw.Draw(image)
            for _ in range(12):
                x, y = generator.randrange(side), generator.randrange(side)
                colour = tuple(generator.randrange(256) for _ in range(3))
                draw.ellipse((x, y, x + side // 4, y + side // 4), fill=colour)
            image.save(images / f"{index}.png")
            (images / f"{index}.txt").write_text(f"a photo of a cat, number {index}", encoding="utf-8")
    return folder
