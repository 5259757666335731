"""Training the autoencoder: pictures of 128 pixels to 16×16×4 latents and back."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from graph import Average, TrainedVAE
from pictures import FRAME, HELD_OUT, HUES, Emoji, enlarged, on_paper, open_rgba, turned_hue
from torch import Tensor

from lib_lora_train.model import vae

KL_WEIGHT, EDGE_WEIGHT = 1e-4, 1.0
LEARNING_RATE, BATCH, DECAY = 1.5e-3, 8, 0.998


def bank(emoji: list[Emoji], folder: Path) -> Tensor:
    """uint8 [N, 72, 72, 3]: every Noto picture, every Twemoji picture that is not held out, and some in other hues."""
    rows = []
    hues = list(HUES)
    for place, one in enumerate(emoji):
        for hand in ("noto", "twemoji"):
            if hand == "twemoji" and one.label in HELD_OUT:
                continue
            picture = open_rgba(folder / hand / one.image)
            rows.append(on_paper(picture))
            source, target = hues[place % len(hues)], hues[(place * 3 + 1 + len(hand)) % len(hues)]
            if source != target:
                rows.append(on_paper(turned_hue(picture, source=source, target=target)))
    return torch.from_numpy(np.stack(rows))


@dataclasses.dataclass(frozen=True)
class LatentStatistics:
    """Mean and standard deviation of each latent channel, [1, 4, 1, 1], over the pictures that were learnt."""

    mean: Tensor
    deviation: Tensor


@torch.no_grad()
def latent_statistics(autoencoder: vae.VAE, pictures: Tensor, *, device: torch.device) -> LatentStatistics:
    """Over 512 of `pictures`, evenly spread."""
    some = pictures[torch.linspace(0, len(pictures) - 1, 512).long()]
    latents = torch.cat([autoencoder.encode(enlarged(part).to(device))[0] for part in some.split(32)])
    return LatentStatistics(latents.mean((0, 2, 3), keepdim=True), latents.std((0, 2, 3), keepdim=True))


def train(frozen: vae.VAE, weights: dict[str, Tensor], pictures: Tensor, *, state_file: Path, minutes: float, seed: int,
          device: torch.device, dtype: torch.dtype, learn_encoder: bool = True) -> dict[str, Tensor]:
    """Train `weights` (changed in place) for `minutes`, going on from `state_file`; returns their moving average.

    `learn_encoder` off leaves the latents as they are and goes on with the decoder alone.
    """
    for name, tensor in weights.items():
        tensor.requires_grad_(learn_encoder or name.startswith(("decoder.", "post_quant_conv.")))
    trained = [tensor for tensor in weights.values() if tensor.requires_grad]
    model = TrainedVAE(frozen, weights)
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, betas=(0.9, 0.99), weight_decay=0.0)
    average, step, spent = Average(weights, DECAY), 0, 0.0
    if state_file.is_file():
        state = torch.load(state_file, map_location=device, weights_only=True)
        for name, tensor in weights.items():
            tensor.data.copy_(state["weights"][name])
        average.restore(state["average"])
        if state["learn_encoder"] == learn_encoder:
            optimizer.load_state_dict(state["optimizer"])
            step, spent = state["step"], state["spent"]
    begin, saved, shown = time.monotonic() - spent, time.monotonic(), []
    while (elapsed := time.monotonic() - begin) < minutes * 60:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1.0, (step + 1) / 100) * max(0.03, 1 - (elapsed / (minutes * 60)) ** 2)
        pixels = draw(pictures, generator).to(device)
        loss, distance = _loss(model, pixels.to(dtype), generator, learn_encoder=learn_encoder)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        average.update(weights)
        step += 1
        shown.append(distance.detach())
        if step % 50 == 0:
            print(f"autoencoder step {step}  L1 {torch.stack(shown).mean():.4f}  {elapsed / 60:.1f} min", flush=True)
            shown.clear()
        if time.monotonic() - saved > 120:
            _save(state_file, weights, average, optimizer, step=step, spent=elapsed, learn_encoder=learn_encoder)
            saved = time.monotonic()
    _save(state_file, weights, average, optimizer, step=step, spent=minutes * 60, learn_encoder=learn_encoder)
    return average.tensors


def draw(pictures: Tensor, generator: torch.Generator) -> Tensor:
    """A batch [BATCH, 3, 128, 128]: some mirrored, half of it shown smaller, on white."""
    rows = torch.randint(len(pictures), (BATCH,), generator=generator)
    chosen = pictures[rows]
    if torch.rand((), generator=generator) < 0.5:
        chosen = chosen.flip(2)
    if torch.rand((), generator=generator) < 0.3:
        wide = torch.full((BATCH, 104, 104, 3), 255, dtype=torch.uint8)
        y, x = torch.randint(104 - FRAME, (2,), generator=generator).tolist()
        wide[:, y:y + FRAME, x:x + FRAME] = chosen
        chosen = wide
    return enlarged(chosen)


def _loss(model: TrainedVAE, pixels: Tensor, generator: torch.Generator, *, learn_encoder: bool) -> tuple[Tensor, Tensor]:
    with torch.set_grad_enabled(learn_encoder):
        mean, deviation = model.moments(pixels)
    noise = torch.randn(mean.shape, generator=generator).to(mean.device)
    painted = model.paint((mean + deviation * noise).to(pixels.dtype))
    pixels = pixels.float()
    distance = (painted - pixels).abs().mean()
    edges = sum((F.avg_pool2d(painted, size).diff(dim=axis) - F.avg_pool2d(pixels, size).diff(dim=axis)).abs().mean()
                for axis in (2, 3) for size in (1, 2))
    divergence = 0.5 * (mean.square() + deviation.square() - 1 - 2 * deviation.log()).mean()
    squared = (painted - pixels).square().mean()
    # Without a word for colour the first thousand steps paint in grey: outlines are worth more at every single pixel.
    chroma = (_chroma(painted) - _chroma(pixels)).square().mean()
    coarse = (F.avg_pool2d(painted, 8) - F.avg_pool2d(pixels, 8)).square().mean()
    return distance + squared + chroma + 2 * coarse + EDGE_WEIGHT * edges + KL_WEIGHT * divergence, distance


def _chroma(pixels: Tensor) -> Tensor:
    """Red against green and blue against green, [B, 2, H, W]."""
    return pixels[:, ::2] - pixels[:, 1:2]


def _save(file: Path, weights: dict[str, Tensor], average: Average, optimizer: torch.optim.Optimizer, *, step: int,
          spent: float, learn_encoder: bool) -> None:
    part = file.with_suffix(".part")
    torch.save({"weights": {name: tensor.detach() for name, tensor in weights.items()}, "average": average.state(),
                "optimizer": optimizer.state_dict(), "step": step, "spent": spent, "learn_encoder": learn_encoder}, part)
    part.replace(file)
