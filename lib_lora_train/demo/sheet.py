"""The demo's picture: what the dataset shows, and what the model paints without and with the LoRA."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from lib_lora_train.dataset.pictures import read_picture
from lib_lora_train.evaluation.sampler import SampleRequest, sample_latents, to_picture
from lib_lora_train.host.port import Host
from lib_lora_train.model import frozen
from lib_lora_train.network import file
from lib_lora_train.network.network import LoRANetwork
from lib_lora_train.network.targets import find_targets

SIZE = 128
SHOWN = ("grinning", "sob", "heart_eyes", "sunglasses", "thinking_face", "sleeping")
# The untrained model sees the direction of the noise but not its strength (group norms take that away), so a start noise
# that is stronger than usual leaves noise in the picture. These seeds' noise is of ordinary strength, within 3 %.
SEEDS = (22, 26, 48, 123, 162, 188)
_MARGIN, _LABEL = 12, 120


@dataclasses.dataclass(frozen=True)
class SheetRow:
    """One row of pictures with its label."""

    label: str
    pictures: tuple[Image.Image, ...]


def paint_rows(host: Host, lora: Path, *, pictures: Path) -> list[SheetRow]:
    """Three rows: training pictures, the model's own paintings of their captions, and those with the LoRA `lora`."""
    originals = [read_picture(pictures / f"{name}.png").resize((SIZE, SIZE), Image.Resampling.LANCZOS) for name in SHOWN]
    captions = [(pictures / f"{name}.txt").read_text(encoding="utf-8").strip() for name in SHOWN]
    with host.borrow() as borrowed:
        model = frozen.build(borrowed.tensors, hints=borrowed.hints, tokenizers=borrowed.tokenizers)
        content = file.load(lora)
        targets = find_targets(model.components, family=model.architecture.family, text_encoder=False)
        adapters = LoRANetwork.continued(targets, content.tensors, seed=0).to(model.device).adapters()

        def paint(caption: str, seed: int, chosen: dict) -> Image.Image:
            request = SampleRequest(f"twemoji, {caption}", width=SIZE, height=SIZE, steps=20, cfg_scale=1.0, seed=seed)
            return to_picture(model, sample_latents(model, request, adapters=chosen))

        return [
            SheetRow("dataset", tuple(originals)),
            SheetRow("before", tuple(paint(caption, seed, {}) for seed, caption in zip(SEEDS, captions, strict=True))),
            SheetRow("after", tuple(paint(caption, seed, adapters) for seed, caption in zip(SEEDS, captions, strict=True)))]


def draw_sheet(rows: list[SheetRow]) -> Image.Image:
    """The rows under each other, labels on the left, on white."""
    step = SIZE + _MARGIN
    sheet = Image.new("RGB", (_LABEL + step * max(len(row.pictures) for row in rows), _MARGIN + step * len(rows)), "white")
    pen, font = ImageDraw.Draw(sheet), _font(18)
    for line, row in enumerate(rows):
        top = _MARGIN + line * step
        pen.text((_MARGIN, top + SIZE // 2 - 9), row.label, fill="black", font=font)
        for column, picture in enumerate(row.pictures):
            sheet.paste(picture, (_LABEL + column * step, top))
    return sheet


def _font(size: int) -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    for name in ("DejaVuSans.ttf", "arial.ttf", "Arial.ttf"):
        try:
            return ImageFont.truetype(name, size)
        except OSError:
            continue
    return ImageFont.load_default()
