"""Training the UNet and the text encoder together, on latents that are computed once."""

from __future__ import annotations

import dataclasses
import random
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from captions import Description, caption, describe
from graph import Average, TrainedTextEncoder, TrainedUNet
from images import (
    ASKED,
    FRAME,
    HUES,
    OTHER_STYLES,
    SMALL_FRAME,
    TREATMENTS,
    Emoji,
    colours,
    enlarged,
    in_style,
    on_paper,
    open_rgba,
    turned_hue,
)
from PIL import Image, ImageOps
from torch import Tensor

from lib_lora_train.model.frozen import FrozenModel
from lib_lora_train.model.sd.tokens import Tokenizer, clip_tokenizer

LEARNING_RATE, WARM_UP, BATCH, DECAY = 1.3e-3, 300, 32, 0.9995
# ε-loss divided by ᾱ is v-loss. A small network that is to be done soon needs more of it at high noise, where it is
# decided what is generated; but not hundredfold.
HIGHEST_WEIGHT = 8.0
# The words of the sheet and of the benchmark are shown more often than the rest.
WEIGHT_OF_ASKED = 3.0


@dataclasses.dataclass(frozen=True)
class Material:
    """What is learnt: latents [N, 4, 16, 16] of unit size, what each row shows, how often it is drawn."""

    latents: Tensor
    descriptions: tuple[Description, ...]
    weights: Tensor


def prepare(emoji: list[Emoji], packages: Path, encode: Callable[[Tensor], Tensor]) -> Material:
    """Encode every emoji: as it is, mirrored, small, in other colours where one colour is most of it, in other styles.

    encode: pixels [B, 3, 128, 128] to latents of unit size.
    """
    rows: list[np.ndarray] = []
    said: list[Description] = []
    weights: list[float] = []
    for index, one in enumerate(emoji):
        image = open_rgba(packages / "noto" / one.image)
        variants = [*_variants(one, image, index), *_manners(one, image, packages)]
        weight = WEIGHT_OF_ASKED if one.label in ASKED else 1.0
        for shown, of, frame, share in variants:
            rows.append(np.asarray(Image.fromarray(on_paper(shown, frame)).resize((FRAME, FRAME), Image.Resampling.BICUBIC)))
            said.append(of)
            weights.append(weight * share)
    latents = [encode(enlarged(some)) for some in torch.from_numpy(np.stack(rows)).split(32)]
    return Material(torch.cat(latents), tuple(said), torch.tensor(weights))


def _variants(one: Emoji, image: Image.Image, index: int) -> Iterator[tuple[Image.Image, Description, int, float]]:
    """What is shown, what can be said of it, the size of its paper, and how often it is drawn."""
    yield image, describe(one, image), FRAME, 1.0
    yield ImageOps.mirror(image), describe(one, image), FRAME, 0.15
    yield image, describe(one, image, size="small"), SMALL_FRAME, 0.2
    covering = [colour for colour in colours(image) if colour in HUES]
    if covering:
        hues = list(HUES)
        start = hues.index(covering[0])
        for turn in (1 + index % 3, 4 + index % 3):
            target = hues[(start + turn) % len(hues)]
            shown = turned_hue(image, source=covering[0], target=target)
            if target != covering[0]:
                yield shown, describe(one, shown, turned_to=target), FRAME, 0.25


def _manners(one: Emoji, image: Image.Image, packages: Path) -> Iterator[tuple[Image.Image, Description, int, float]]:
    """The same in other styles, and treated; the words for it must be said, so that a bare name stays Noto's."""
    hands = {"": image, **{style: found for style in OTHER_STYLES if (found := in_style(packages, style, one))}}
    for style, drawn in hands.items():
        if style:
            yield drawn, describe(one, drawn, manner=(style,)), FRAME, 0.5
            yield ImageOps.mirror(drawn), describe(one, drawn, manner=(style,)), FRAME, 0.1
        for treatment in TREATMENTS:
            shown = treatment(drawn)
            words = (treatment.__name__, style) if style else (treatment.__name__,)
            yield shown, describe(one, shown, manner=words), FRAME, 0.12 if style == "" else 0.05


def train(frozen: FrozenModel, weights: dict[str, dict[str, Tensor]], material: Material, *, state_file: Path, minutes: float,
          seed: int, device: torch.device, dtype: torch.dtype) -> dict[str, dict[str, Tensor]]:
    """Train `weights` ("unet" and "te", changed in place) for `minutes`, going on from `state_file`; returns their average."""
    flat = {f"{part}/{name}": tensor.requires_grad_() for part, tensors in weights.items() for name, tensor in tensors.items()}
    unet = TrainedUNet(frozen.unet, weights["unet"])
    text = TrainedTextEncoder(frozen.text.encoders[0], weights["te"])
    optimizer = torch.optim.AdamW(flat.values(), lr=LEARNING_RATE, betas=(0.9, 0.99), weight_decay=0.0)
    average, step, spent = Average(flat, DECAY), 0, 0.0
    if state_file.is_file():
        state = torch.load(state_file, map_location=device, weights_only=True)
        for name, tensor in flat.items():
            tensor.data.copy_(state["weights"][name])
        average.restore(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        step, spent = state["step"], state["spent"]
    tokenizer, alphas = clip_tokenizer(), frozen.schedule.alphas_cumprod.to(device)
    begin, saved, shown = time.monotonic() - spent, time.monotonic(), []
    while (elapsed := time.monotonic() - begin) < minutes * 60:
        draw = random.Random(seed * 1_000_003 + step)
        generator = torch.Generator().manual_seed(draw.getrandbits(63))
        for group in optimizer.param_groups:
            share = elapsed / (minutes * 60)
            group["lr"] = LEARNING_RATE * min(1.0, (step + 1) / WARM_UP) * max(0.01, (1 - share) ** 0.7)
        loss, bands = _loss(unet, text, material, alphas, tokenizer, draw=draw, generator=generator, device=device, dtype=dtype)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(flat.values(), 1.0)
        optimizer.step()
        average.update(flat)
        step += 1
        shown.append(bands)
        if step % 50 == 0:
            by_band = "  ".join(f"{value:.3f}" for value in torch.stack(shown).nanmean(0).tolist())
            print(f"denoiser step {step}  eps loss by noise {by_band}  {elapsed / 60:.1f} min", flush=True)
            shown.clear()
        if time.monotonic() - saved > 180:
            _save(state_file, flat, average, optimizer, step=step, spent=elapsed)
            saved = time.monotonic()
    if minutes:
        _save(state_file, flat, average, optimizer, step=step, spent=elapsed)
    return {part: {name.removeprefix(f"{part}/"): tensor for name, tensor in average.tensors.items()
                   if name.startswith(f"{part}/")} for part in weights}


def _loss(unet: TrainedUNet, text: TrainedTextEncoder, material: Material, alphas: Tensor, tokenizer: Tokenizer, *,
          draw: random.Random, generator: torch.Generator, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The weighted loss of one batch, and the plain one in four bands of the timestep."""
    rows = torch.multinomial(material.weights, BATCH, replacement=True, generator=generator)
    x_0 = material.latents[rows].to(device)
    noise = torch.randn(x_0.shape, generator=generator).to(device)
    # One timestep from each slice of the range: less chance, the same distribution.
    t = ((torch.arange(BATCH) + torch.rand(BATCH, generator=generator)) * (len(alphas) / BATCH)).long().to(device)
    alpha = alphas[t][:, None, None, None]
    x_t = alpha.sqrt() * x_0 + (1 - alpha).sqrt() * noise
    captions = [caption(material.descriptions[row], draw) for row in rows.tolist()]
    context, _ = text(tokens(captions, tokenizer).to(device))
    eps = unet(x_t.to(dtype), t, context)
    each = (eps.float() - noise).square().mean((1, 2, 3))
    weights = (1 / alphas[t]).clamp(max=HIGHEST_WEIGHT)
    bands = torch.stack([some.mean() for some in each.detach().split(BATCH // 4)])
    return (each * weights).mean(), bands


def tokens(captions: list[str], tokenizer: Tokenizer) -> Tensor:
    """[B, 77] token ids: start, text, end, and the end again up to the length."""
    rows = []
    for one in captions:
        ids = [tokenizer.start, *tokenizer.encode(one)[:75], tokenizer.end]
        rows.append(ids + [tokenizer.end] * (77 - len(ids)))
    return torch.tensor(rows)


def _save(file: Path, flat: Mapping[str, Tensor], average: Average, optimizer: torch.optim.Optimizer, *, step: int,
          spent: float) -> None:
    part = file.with_suffix(".part")
    torch.save({"weights": {name: tensor.detach() for name, tensor in flat.items()}, "average": average.state(),
                "optimizer": optimizer.state_dict(), "step": step, "spent": spent}, part)
    part.replace(file)
