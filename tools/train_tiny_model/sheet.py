"""The model card's image: what the model samples for the 64 words that the benchmark asks for."""

from __future__ import annotations

from pathlib import Path

import torch
from images import HELD_OUT
from PIL import Image, ImageDraw, ImageFont

from lib_lora_train.host.standalone import StandaloneHost
from lib_lora_train.model import frozen
from lib_lora_train.model.sampler import SampleRequest, sample_batch, to_image

SIDE, CAPTION, COLUMNS = 128, 27, 8
SEED, STEPS, CFG_SCALE = 1, 20, 4.0


def write_sheet(checkpoint: Path, target: Path, *, words: tuple[str, ...] = HELD_OUT) -> None:
    """One image a word, eight a row, the word below it."""
    host = StandaloneHost(checkpoint, lora_folder=target.parent, runs_folder=target.parent, device=torch.device("cpu"))
    rows = -(-len(words) // COLUMNS)
    sheet = Image.new("RGB", (COLUMNS * SIDE, rows * (SIDE + CAPTION)), "white")
    pen = ImageDraw.Draw(sheet)
    with host.lease() as borrowed:
        model = frozen.build(borrowed.tensors, hints=borrowed.hints, tokenizers=borrowed.tokenizers)
        for first in range(0, len(words), COLUMNS):
            row = words[first:first + COLUMNS]
            latents = sample_batch(model, [
                SampleRequest(word, width=SIDE, height=SIDE, steps=STEPS, cfg_scale=CFG_SCALE, seed=SEED + first + index)
                for index, word in enumerate(row)])
            for column, (word, one) in enumerate(zip(row, latents, strict=True)):
                x, y = column * SIDE, first // COLUMNS * (SIDE + CAPTION)
                sheet.paste(to_image(model, one[None]), (x, y))
                _write(pen, word, middle=x + SIDE / 2, top=y + SIDE + 2)
    sheet.save(target, optimize=True)
    print(f"{target}: {len(words)} words", flush=True)


def _write(pen: ImageDraw.ImageDraw, word: str, *, middle: float, top: float) -> None:
    """The word below its image; in two lines where it is wider than that."""
    font = ImageFont.load_default()
    lines = [word]
    if pen.textlength(word, font=font) > SIDE - 4:
        half = len(word) // 2
        cut = min((index for index, letter in enumerate(word) if letter == " "), key=lambda index: abs(index - half))
        lines = [word[:cut], word[cut + 1:]]
    for number, line in enumerate(lines):
        pen.text((middle - pen.textlength(line, font=font) / 2, top + 11 * number), line, fill="black", font=font)
