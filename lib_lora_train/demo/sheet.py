"""The demo's image: some of the dataset, and what the model paints for other words without and with the LoRA."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from PIL import Image, ImageDraw

from lib_lora_train.adapters import file
from lib_lora_train.adapters.network import AdapterNetwork
from lib_lora_train.adapters.targets import find_targets
from lib_lora_train.dataset.crop_sheet import font_for
from lib_lora_train.dataset.images import read_image
from lib_lora_train.host.lease import frozen_model
from lib_lora_train.host.placement import PARTS
from lib_lora_train.host.port import ModelSource
from lib_lora_train.model.ops.layers import Adapter
from lib_lora_train.model.sampler import SampleRequest, sample_batch, to_image
from lib_lora_train.settings import Settings

SIDE, STEPS, CFG_SCALE, SEED = 128, 20, 2.0, 1000
DATASET = ("grapes", "cupcake", "tiger-face", "koala", "whale", "maple-leaf", "locomotive", "top-hat")
# None of these is in the dataset.
WORDS = ("red apple", "strawberry", "cat face", "penguin", "fish", "sunflower", "house", "rocket")
_MARGIN, _LABEL = 12, 150


@dataclasses.dataclass(frozen=True)
class SheetRow:
    """One row of images with its label, and a word below each."""

    label: str
    words: tuple[str, ...]
    images: tuple[Image.Image, ...]


def sample_rows(host: ModelSource, lora: Path, *, dataset: Path) -> list[SheetRow]:
    """Three rows: some of the dataset; the model's own paintings of other words; those with the LoRA, from the same noise."""
    with host.lease() as leased:
        leased.reload_parts(PARTS)
        model = frozen_model(leased, Settings())
        content = file.load(lora)
        family = model.architecture.family
        targets = find_targets(model.components, family=family, text_encoder=family.adapts_text(content.tensors))
        adapters = AdapterNetwork.continued(targets, content.tensors, seed=0).to(model.device).adapters()

        def sample(prompts: list[str], chosen: dict[str, dict[str, Adapter]]) -> tuple[Image.Image, ...]:
            latents = sample_batch(model, [
                SampleRequest(prompt, width=SIDE, height=SIDE, steps=STEPS, cfg_scale=CFG_SCALE, seed=SEED + place)
                for place, prompt in enumerate(prompts)], adapters=chosen)
            return tuple(to_image(model, one[None]) for one in latents)

        return [
            SheetRow("dataset (8 of 24)", tuple(name.replace("-", " ") for name in DATASET),
                     tuple(read_image(dataset / f"{name}.png").resize((SIDE, SIDE)) for name in DATASET)),
            SheetRow("without LoRA", WORDS, sample(list(WORDS), {})),
            SheetRow("with LoRA", WORDS, sample(list(WORDS), adapters))]


def draw_sheet(rows: list[SheetRow]) -> Image.Image:
    """The rows under each other on white, labels on the left, words below the images."""
    across, down = SIDE + _MARGIN, SIDE + 20 + _MARGIN
    sheet = Image.new("RGB", (_LABEL + across * max(len(row.images) for row in rows), _MARGIN + down * len(rows)), "white")
    pen, large, small = ImageDraw.Draw(sheet), font_for("", 16), font_for("", 13)
    for line, row in enumerate(rows):
        top = _MARGIN + line * down
        pen.text((_MARGIN, top + SIDE // 2 - 8), row.label, fill="black", font=large)
        for column, (word, image) in enumerate(zip(row.words, row.images, strict=True)):
            left = _LABEL + column * across
            sheet.paste(image, (left, top))
            width = pen.textlength(word, font=small)
            pen.text((left + (SIDE - width) / 2, top + SIDE + 2), word, fill="black", font=small)
    return sheet
