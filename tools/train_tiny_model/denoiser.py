"""Training the UNet and the text encoder together, on pictures that are made anew for each batch.

The learning rate rises for WARM_UP steps, stays, and falls to nothing in the last COOL_DOWN of the time. The state is kept up
to where it begins to fall: whoever goes on later goes on from there, at the full rate.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path

import torch
from gate import Gate, passed
from graph import Average, TrainedTextEncoder, TrainedUNet
from images import SIDE
from torch import Tensor
from training_images import TrainingImages

from lib_lora_train.model.frozen import FrozenModel
from lib_lora_train.model.sd.tokens import Tokenizer, clip_tokenizer

LEARNING_RATE, WARM_UP, COOL_DOWN, BATCH, SMALL_BATCH, DECAY = 1e-3, 50, 0.25, 32, 64, 0.998
# ε-loss divided by ᾱ is v-loss. A small network that is to be done soon needs more of it at high noise, where it is
# decided what the image shows; but not hundredfold.
HIGHEST_WEIGHT = 8.0
SAVED_EVERY, MEASURED_EVERY = 240.0, 20_000
"""Seconds between two saves of the state; samples between two measurements of the gate."""


class Denoiser:
    """UNet and text encoder with their optimizer and average; `weights` ("unet" and "te") are changed in place."""

    def __init__(self, frozen: FrozenModel, weights: dict[str, dict[str, Tensor]], *, device: torch.device, dtype: torch.dtype
                 ) -> None:
        self._flat = {f"{part}/{name}": tensor.requires_grad_() for part, tensors in weights.items()
                      for name, tensor in tensors.items()}
        self._frozen, self._device, self._dtype = frozen, device, dtype
        self._tokenizer, self._alphas = clip_tokenizer(), frozen.schedule.alphas_cumprod.to(device)
        self._parts = self._networks(weights)
        self._optimizer = torch.optim.AdamW(self._flat.values(), lr=LEARNING_RATE, betas=(0.9, 0.99), weight_decay=0.0)
        self._average, self.step, self.samples = Average(self._flat, DECAY), 0, 0

    def average(self) -> dict[str, dict[str, Tensor]]:
        """The averaged weights, which sample better than those of the last step."""
        made: dict[str, dict[str, Tensor]] = {"unet": {}, "te": {}}
        for name, tensor in self._average.tensors.items():
            part, _, local = name.partition("/")
            made[part][local] = tensor
        return made

    def losses(self, latents: Tensor, timestep: int, captions: list[str], noise: Tensor) -> Tensor:
        """What the gate asks, of the averaged weights."""
        t = torch.full((len(latents),), timestep)
        return self._errors(self._networks(self.average()), latents, t, captions, noise)

    def learn(self, latents: Tensor, captions: list[str], *, rate: float, generator: torch.Generator) -> Tensor:
        """One step; returns the plain ε-loss in four bands of the timestep."""
        noise = torch.randn(latents.shape, generator=generator)
        # One timestep from each slice of the range: less chance, the same distribution.
        slices = torch.arange(len(latents)) + torch.rand(len(latents), generator=generator)
        t = (slices * (len(self._alphas) / len(latents))).long()
        each = self._errors(self._parts, latents, t, captions, noise)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.zero_grad(set_to_none=True)
        (each * (1 / self._alphas[t.to(self._device)]).clamp(max=HIGHEST_WEIGHT)).mean().backward()
        torch.nn.utils.clip_grad_norm_(self._flat.values(), 1.0)
        self._optimizer.step()
        self._average.update(self._flat)
        self.step, self.samples = self.step + 1, self.samples + len(latents)
        return torch.stack([some.mean() for some in each.detach().chunk(4)])

    def save(self, file: Path) -> None:
        """Everything that `restore` needs, at once or not at all."""
        part = file.with_suffix(".part")
        torch.save({"weights": {name: tensor.detach() for name, tensor in self._flat.items()}, "average": self._average.state(),
                    "optimizer": self._optimizer.state_dict(), "step": self.step, "samples": self.samples}, part)
        part.replace(file)

    def restore(self, file: Path) -> None:
        """Go on from what `save` wrote."""
        state = torch.load(file, map_location=self._device, weights_only=True)
        for name, tensor in self._flat.items():
            tensor.data.copy_(state["weights"][name])
        self._average.restore(state["average"])
        self._optimizer.load_state_dict(state["optimizer"])
        self.step, self.samples = state["step"], state["samples"]

    def _networks(self, weights: Mapping[str, dict[str, Tensor]]) -> tuple[TrainedUNet, TrainedTextEncoder]:
        return TrainedUNet(self._frozen.unet, weights["unet"]), TrainedTextEncoder(self._frozen.text.encoders[0], weights["te"])

    def _errors(self, networks: tuple[TrainedUNet, TrainedTextEncoder], latents: Tensor, t: Tensor, captions: list[str],
                noise: Tensor) -> Tensor:
        unet, text = networks
        x_0, noise, t = latents.to(self._device), noise.to(self._device), t.to(self._device)
        alpha = self._alphas[t][:, None, None, None]
        context, _ = text(tokens(captions, self._tokenizer).to(self._device))
        eps = unet((alpha.sqrt() * x_0 + (1 - alpha).sqrt() * noise).to(self._dtype), t, context)
        return (eps.float() - noise).square().mean((1, 2, 3))


def train(denoiser: Denoiser, images: TrainingImages, gate: Gate, *, folder: Path, seconds: float, small: float,
          seed: int) -> None:
    """Train for `seconds` from now, going on from `folder`/denoiser.pt; the gate's figures are added to `folder`/gate.jsonl.

    In a share `small` of the batches pictures have half the side, which makes three times as many of them a second: what words
    and styles mean is learnt sooner there.
    """
    state_file = folder / "denoiser.pt"
    if state_file.is_file():
        denoiser.restore(state_file)
    elif seconds:
        _measure(denoiser, gate, folder)
    begin = saved = time.monotonic()
    cpu, counted, shown = time.process_time(), denoiser.samples, list[Tensor]()
    while (elapsed := time.monotonic() - begin) < seconds:
        draw = random.Random(seed * 1_000_003 + denoiser.step)
        share = min(1.0, (denoiser.step + 1) / WARM_UP) * min(1.0, (1 - elapsed / seconds) / COOL_DOWN)
        batch, side = (SMALL_BATCH, SIDE // 2) if draw.random() < small else (BATCH, SIDE)
        latents, captions = images.batch(batch, draw, side=side)
        generator = torch.Generator().manual_seed(draw.getrandbits(63))
        shown.append(denoiser.learn(latents, captions, rate=LEARNING_RATE * max(share, 0.01), generator=generator))
        if denoiser.step % 25 == 0:
            by_band = "  ".join(f"{value:.3f}" for value in torch.stack(shown).nanmean(0).tolist())
            done, used = denoiser.samples - counted, time.process_time() - cpu
            print(f"denoiser step {denoiser.step}  samples {denoiser.samples}  eps loss by noise {by_band}  "
                  f"{done / used:.1f} samples a CPU second  {elapsed / 60:.1f} of {seconds / 60:.0f} min", flush=True)
            shown.clear()
            cpu, counted = time.process_time(), denoiser.samples
        if denoiser.samples % MEASURED_EVERY < batch:
            _measure(denoiser, gate, folder)
        if time.monotonic() - saved > SAVED_EVERY and elapsed < (1 - COOL_DOWN) * seconds:
            denoiser.save(state_file)
            saved = time.monotonic()
    if seconds:
        _measure(denoiser, gate, folder)


def tokens(captions: list[str], tokenizer: Tokenizer) -> Tensor:
    """[B, 77] token ids: start, text, end, and the end again up to the length."""
    rows = []
    for one in captions:
        ids = [tokenizer.start, *tokenizer.encode(one)[:75], tokenizer.end]
        rows.append(ids + [tokenizer.end] * (77 - len(ids)))
    return torch.tensor(rows)


def _measure(denoiser: Denoiser, gate: Gate, folder: Path) -> None:
    figures = gate.measure(denoiser.losses)
    line = {"samples": denoiser.samples, **{name: round(value, 4) for name, value in figures.items()},
            "passed": passed(figures), "at": datetime.now().isoformat(timespec="seconds")}
    print(f"gate {line}", flush=True)
    with (folder / "gate.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
