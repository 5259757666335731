"""The model card's picture: what the model paints for the 64 words that the yardstick asks for."""

from __future__ import annotations

from pathlib import Path

import torch
from pictures import HELD_OUT
from PIL import Image, ImageDraw, ImageFont

from lib_lora_train.evaluation.sampler import SampleRequest, sample_batch, to_picture
from lib_lora_train.host.standalone import StandaloneHost
from lib_lora_train.model import frozen

SIDE, CAPTION, COLUMNS = 128, 20, 8
SEED, STEPS, CFG_SCALE = 1, 20, 4.0


def paint_sheet(checkpoint: Path, target: Path, *, words: tuple[str, ...] = HELD_OUT) -> None:
    """One picture a word, eight a row, the word below it."""
    host = StandaloneHost(checkpoint, lora_folder=target.parent, runs_folder=target.parent, device=torch.device("cpu"))
    rows = -(-len(words) // COLUMNS)
    sheet = Image.new("RGB", (COLUMNS * SIDE, rows * (SIDE + CAPTION)), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default()
    with host.borrow() as borrowed:
        model = frozen.build(borrowed.tensors, hints=borrowed.hints, tokenizers=borrowed.tokenizers)
        for first in range(0, len(words), COLUMNS):
            row = words[first:first + COLUMNS]
            latents = sample_batch(model, [
                SampleRequest(word, width=SIDE, height=SIDE, steps=STEPS, cfg_scale=CFG_SCALE, seed=SEED + first + place)
                for place, word in enumerate(row)])
            for column, (word, one) in enumerate(zip(row, latents, strict=True)):
                x, y = column * SIDE, first // COLUMNS * (SIDE + CAPTION)
                sheet.paste(to_picture(model, one[None]), (x, y))
                pen.text((x + (SIDE - pen.textlength(word, font=font)) / 2, y + SIDE + 4), word, fill="black", font=font)
    sheet.save(target, optimize=True)
    print(f"{target}: {len(words)} words", flush=True)
