"""What a style LoRA learnt: 24 Twemoji images to train on, 64 other words to be generated in that style."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from PIL import Image

from lib_lora_train.host.port import Host
from tools.bench.evaluator import Band, Evaluator, Memorised, Row, loss_bands
from tools.bench.real_images import NOTO, SIDE, TWEMOJI, read_dataset, to_image
from tools.bench.sampler import TOGETHER, WITHOUT, Adapters, Sampler
from tools.bench.training import Say, measured_steps, train_lora

TRIGGER = "twemoji"


@dataclasses.dataclass(frozen=True)
class StyleResult:
    """What the measurement of a style found.

    rows                      real images, the base model, and the LoRA at weights 0, 0.5 and 1
    weight_0_is_base_model    whether weight 0 gives the base model's first images bit for bit
    own                       the style share for its own training captions: the most that other words can be expected to reach
    intermediate              what the run had learnt after so many steps, at weight 1
    """

    steps: int
    rows: list[Row]
    weight_0_is_base_model: bool
    own: float
    intermediate: list[Row]
    memorised: list[Memorised]
    loss: list[Band]
    training_seconds: float


def measure_style(host: Host, sampler: Sampler, evaluator: Evaluator, *, data: Path, output: Path,
                  settings: Mapping[str, object], steps: int, say: Say) -> StyleResult:
    """Train on the folder `data`, sample the held-out words, and write a sheet of some of them to `output`/style.png.

    All images of a word start from the same noise, and all but one row are prompted with the trigger word.
    """
    begin = time.monotonic()
    files = train_lora(host, settings=settings, data=data, trigger_word=TRIGGER, name="bench-style", steps=steps,
                       wanted=measured_steps(steps), say=say)
    training_seconds = time.monotonic() - begin
    last, prompts, real = files[steps], [f"{TRIGGER}, {word}" for word in evaluator.words], evaluator.shown
    half, full = (sampler.lora(last, weight=weight) for weight in (0.5, 1.0))

    def sample(what: str, lora: Adapters, prompts: list[str]) -> torch.Tensor:
        say(f"  sampling {len(prompts)} pictures: {what}")
        return sampler.sample(prompts, lora)

    base = sample("base", WITHOUT, prompts)
    # The first that are generated together tell whether all are equal; then there is nothing to sample.
    none, first = sampler.lora(last, weight=0.0), prompts[:TOGETHER]
    same = torch.equal(sample("LoRA at 0", none, first), base[:TOGETHER])
    zero = base if same else sample("LoRA at 0", none, prompts)
    final = sample("LoRA at 1", full, prompts)
    rows = [evaluator.row("real Noto", real[NOTO][evaluator.indices]),
            evaluator.row("real Twemoji", real[TWEMOJI][evaluator.indices]),
            evaluator.row("base, the word alone", sample("base, the word alone", WITHOUT, evaluator.words)),
            evaluator.row("base", base), evaluator.row("LoRA at 0", zero),
            evaluator.row("LoRA at 0.5", sample("LoRA at 0.5", half, prompts)), evaluator.row("LoRA at 1", final)]
    intermediate = [evaluator.row(f"{step} steps", final if step == steps else
                                 sample(f"after {step} steps", sampler.lora(file, weight=1.0), prompts))
                  for step, file in files.items()]

    _, captions, training = read_dataset(data)
    asked_again = sample("training captions", full, [f"{TRIGGER}, {caption}" for caption in captions])
    memorised = evaluator.memorised({
        "base, held-out words": base, "LoRA at 1, held-out words": final, "LoRA at 1, training captions": asked_again,
    }, training=sampler.through_vae(training))
    say("  the loss on held-out pictures")
    loss = loss_bands(sampler, evaluator.real.pixels[TWEMOJI][evaluator.indices], prompts, full)
    save_sheet(output / "style.png", [base, final, real[TWEMOJI][evaluator.indices]])
    return StyleResult(steps=steps, rows=rows, weight_0_is_base_model=same, own=evaluator.style_share(asked_again),
                       intermediate=intermediate, memorised=memorised, loss=loss, training_seconds=training_seconds)


def save_sheet(path: Path, rows: list[torch.Tensor], *, most: int = 16) -> None:
    """Images [n, 3, 128, 128] under each other, a line for each of `rows`, at most `most` in a line, evenly chosen."""
    count = min(most, len(rows[0]))
    chosen = [index * len(rows[0]) // count for index in range(count)]
    sheet = Image.new("RGB", (count * SIDE, len(rows) * SIDE), "white")
    for line, images in enumerate(rows):
        for column, index in enumerate(chosen):
            sheet.paste(to_image(images[index]), (column * SIDE, line * SIDE))
    sheet.save(path)
