"""The autoencoder: a linear encoder that is fitted in closed form, and a decoder that is trained to undo it.

Emoji have 64 pixels, the model's images 128, latents 16. So the outermost level of the autoencoder does nothing but halve
and double; what is in between shrinks by four:

- The encoder takes the four principal components of 4×4 blocks (of the 64-pixel image): the three colours' means and a
  gradient. ldm's layers are made to pass them through: residual blocks and attention add zero; the last group norm is made
  nearly linear by constants that share a signal's group and are much larger than it (K and −K: then the deviation is K·√⅔
  whatever the image, and a third of the signal's mean is lost, which is linear too); a shift keeps SiLU where it is straight.
- The decoder is trained at 64 pixels. Its last 3×3 convolution is a 1×1 one until it is exported: there it gets the kernel
  that smooths the doubled pixels, and the norm before it does not see the doubling, which keeps mean and deviation.

Why not train both halves? On two CPU cores there is no time for it, and latents that look like the image are what
a small UNet learns soonest.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from graph import Average, TrainedVAE
from images import ASKED, FRAME, HELD_OUT, HUES, enlarged, on_paper, turned_hue
from PIL import Image
from torch import Tensor

from lib_lora_train.model.sd import vae
from tools import styles

LEARNING_RATE, BATCH, DECAY = 1.5e-3, 8, 0.998
CONSTANT, SHIFT, LOG_VARIANCE = 60.0, 12.0, -9.0
IDENTITY_BLOCKS = ("decoder.up.1.block.1", "decoder.up.0.block.0", "decoder.up.0.block.1")
"""Residual blocks of the decoder that add nothing: at full size they would cost more than all others together."""


def bank(packages: Path) -> Tensor:
    """uint8 [N, 72, 72, 3]: every shared word by Noto, by Twemoji where it is not held out, and some in other hues."""
    rows = []
    hues = list(HUES)
    emoji, _ = styles.shared(packages, always=ASKED)
    drawn = {style.name: styles.drawings(packages, style, emoji) for style in (styles.NOTO, styles.TWEMOJI)}
    for index, one in enumerate(emoji):
        for style, of in drawn.items():
            if one.label not in of or (style == styles.TWEMOJI.name and one.label in HELD_OUT):
                continue
            image = Image.fromarray(of[one.label])
            rows.append(on_paper(image))
            source, target = hues[index % len(hues)], hues[(index * 3 + 1 + len(style)) % len(hues)]
            if source != target:
                rows.append(on_paper(turned_hue(image, source=source, target=target)))
    return torch.from_numpy(np.stack(rows))


def at_64(images: Tensor) -> Tensor:
    """uint8 [N, h, w, 3] -> fp32 [N, 3, 64, 64] in [-1, 1], as the encoder's first halving sees the 128-pixel image."""
    return F.avg_pool2d(enlarged(images), 2)


def fit_encoder(tensors: dict[str, Tensor], images: Tensor) -> None:
    """Make the encoder (local names, in place) give the four principal components of 4×4 blocks of `images`."""
    some = at_64(images[torch.linspace(0, len(images) - 1, 512).long()]) - 1  # counted from white paper
    blocks = F.unfold(some, 4, stride=4).transpose(1, 2).reshape(-1, 48)
    _, _, directions = torch.linalg.svd(blocks[::7] - blocks.mean(0), full_matrices=False)
    components = directions[:4] / (blocks @ directions[:4].T).std(0)[:, None]  # [4, (colour, row, column)]
    components = components.view(4, 3, 4, 4)

    for name, tensor in tensors.items():
        if name.startswith("encoder.") and any(part in name for part in (".conv2.", "proj_out.", "downsample", "conv_in")):
            tensor.zero_()
    quarter = [(row, column) for row in (0, 1) for column in (0, 1)]
    for colour in range(3):
        tensors["encoder.conv_in.weight"][colour, colour, 1, 1] = 1.0
        tensors["encoder.conv_in.bias"][colour] = -1.0
        for row, column in quarter:
            tensors["encoder.down.0.downsample.conv.weight"][colour, colour, row, column] = 0.25
    for index, (row, column) in enumerate(quarter):  # every pixel of a 2×2 block into a channel of its own
        for colour in range(3):
            tensors["encoder.down.1.downsample.conv.weight"][3 * index + colour, colour, row, column] = 1.0
    last, bias = tensors["encoder.down.2.downsample.conv.weight"], tensors["encoder.down.2.downsample.conv.bias"]
    norm, norm_bias = tensors["encoder.norm_out.weight"], tensors["encoder.norm_out.bias"]
    out, out_bias = tensors["encoder.conv_out.weight"], tensors["encoder.conv_out.bias"]
    out.zero_()
    for signal in range(4):
        channel = 3 * signal  # its group of three: itself, K, −K
        for index, (row, column) in enumerate(quarter):
            for colour in range(3):
                for y, x in quarter:
                    last[channel, 3 * index + colour, y, x] = components[signal, colour, 2 * y + row, 2 * x + column]
        bias[channel + 1], bias[channel + 2] = CONSTANT, -CONSTANT
        norm[channel], norm_bias[channel] = CONSTANT * math.sqrt(2 / 3), SHIFT
        out[signal, channel, 1, 1] = 1.0
    out_bias[:4], out_bias[4:] = -SHIFT, LOG_VARIANCE
    for name in ("quant_conv", "post_quant_conv"):
        weight = tensors[f"{name}.weight"]
        weight.copy_(torch.eye(len(weight))[:, :, None, None])
        tensors[f"{name}.bias"].zero_()


def prepare_decoder(tensors: dict[str, Tensor]) -> None:
    """Start the decoder (local names, in place) as a path that carries its input through; residual blocks add zero."""
    for name, tensor in tensors.items():
        if name.startswith("decoder.") and (".conv2." in name or "proj_out." in name):
            tensor.zero_()
        if name.startswith("decoder.") and "upsample" in name:
            if tensor.ndim == 4:
                tensor *= 0.1 if ".up.1." not in name else 0.0
                tensor[:, :, 1, 1] += torch.eye(len(tensor))
            else:
                tensor.zero_()
    tensors["decoder.conv_out.bias"].fill_(1.0)  # paper
    head = tensors["decoder.conv_out.weight"]
    head.copy_(head[:, :, 1:2, 1:2] * _SMOOTH)


_SMOOTH = torch.tensor([[1.0, 2.0, 1.0], [2.0, 4.0, 2.0], [1.0, 2.0, 1.0]]) / 16


class DecoderAt64(TrainedVAE):
    """The decoder without its outermost level."""

    def sample(self, latents: Tensor) -> Tensor:
        """Latents [B, 4, h, w] -> pixels [B, 3, 4h, 4w]; what the whole decoder samples, before it is doubled and smoothed."""
        layers = self.layers
        x = layers.conv2d("decoder.conv_in", layers.conv2d("post_quant_conv", latents), padding=1)
        x = self._middle("decoder", x)
        for level in (3, 2):
            for block in (0, 1):
                x = self._resnet(f"decoder.up.{level}.block.{block}", x)
            x = F.interpolate(x, scale_factor=2.0, mode="nearest")
            x = layers.conv2d(f"decoder.up.{level}.upsample.conv", x, padding=1)
        x = self._resnet("decoder.up.1.block.0", x)
        x = F.silu(layers.group_norm("decoder.norm_out", x, eps=vae.EPS))
        head = layers.weight("decoder.conv_out").sum((2, 3), keepdim=True)
        return F.conv2d(x.float(), head, layers.bias("decoder.conv_out"))


@dataclasses.dataclass(frozen=True)
class LatentStatistics:
    """Mean and standard deviation of each latent channel, [1, 4, 1, 1], over the images that were learnt."""

    mean: Tensor
    deviation: Tensor


@torch.no_grad()
def latent_statistics(autoencoder: vae.VAE, images: Tensor) -> LatentStatistics:
    """Over 512 of `images`, evenly spread."""
    some = images[torch.linspace(0, len(images) - 1, 512).long()]
    latents = torch.cat([encoded(autoencoder, enlarged(part)) for part in some.split(64)])
    return LatentStatistics(latents.mean((0, 2, 3), keepdim=True), latents.std((0, 2, 3), keepdim=True))


def normalised(weights: Mapping[str, Tensor], statistics: LatentStatistics, scale: float) -> dict[str, Tensor]:
    """The same autoencoder with latents of mean 0 and size 1 / `scale`: the change is made in the two 1×1 convolutions."""
    made = {name: tensor.detach().float().clone() for name, tensor in weights.items()}
    mean, size = statistics.mean.flatten().cpu(), statistics.deviation.flatten().cpu() * scale
    into, out_of = made["quant_conv.weight"], made["post_quant_conv.weight"]
    into[:4] /= size[:, None, None, None]
    made["quant_conv.bias"][:4] = (made["quant_conv.bias"][:4] - mean) / size
    made["quant_conv.bias"][4:] -= 2 * torch.log(size)
    made["post_quant_conv.bias"] += out_of[:, :, 0, 0] @ mean
    out_of *= size[None, :, None, None]
    return made


@torch.no_grad()
def scaled_latents(autoencoder: vae.VAE, pixels: Tensor, scale: float) -> Tensor:
    """What the UNet is given for pixels [B, 3, 128, 128], by a `normalised` autoencoder: the means times `scale`."""
    weight, bias = (autoencoder.layers.weight("quant_conv"), autoencoder.layers.bias("quant_conv"))
    return scale * F.conv2d(encoded(autoencoder, pixels), weight[:4, :4], bias[:4])


def train_decoder(frozen: vae.VAE, weights: dict[str, Tensor], images: Tensor, *, state_file: Path, minutes: float,
                  seed: int, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """Train the decoder in `weights` (in place) for `minutes`, going on from `state_file`; returns all weights, averaged."""
    fixed = (*IDENTITY_BLOCKS, "decoder.up.1.upsample")
    trained = {name: tensor.requires_grad_() for name, tensor in weights.items()
               if name.startswith(("decoder.", "post_quant_conv.")) and not name.startswith(fixed)}
    model = DecoderAt64(frozen, weights)
    optimizer = torch.optim.AdamW(trained.values(), lr=LEARNING_RATE, betas=(0.9, 0.99), weight_decay=0.0)
    average, step, spent = Average(trained, DECAY), 0, 0.0
    if state_file.is_file():
        state = torch.load(state_file, map_location=device, weights_only=True)
        for name, tensor in trained.items():
            tensor.data.copy_(state["weights"][name])
        average.restore(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        step, spent = state["step"], state["spent"]
    begin, saved, shown = time.monotonic() - spent, time.monotonic(), []
    while (elapsed := time.monotonic() - begin) < minutes * 60:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1.0, (step + 1) / 100) * max(0.03, 1 - (elapsed / (minutes * 60)) ** 2)
        pixels = draw(images, generator).to(device)
        with torch.no_grad():
            latents = encoded(model, pixels)
        # A sampler's latents are never quite those of an image: the decoder is to forgive small errors.
        latents = latents + 0.03 * torch.randn(latents.shape, generator=generator).to(device)
        generated = model.sample(latents.to(dtype))
        loss, distance = _loss(generated, F.avg_pool2d(pixels, 2))
        loss = loss + _rim(generated, weights["decoder.conv_out.bias"])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained.values(), 1.0)
        optimizer.step()
        average.update(trained)
        step += 1
        shown.append(distance.detach())
        if step % 50 == 0:
            print(f"decoder step {step}  L1 {torch.stack(shown).mean():.4f}  {elapsed / 60:.1f} min", flush=True)
            shown.clear()
        if time.monotonic() - saved > 120:
            _save(state_file, trained, average, optimizer, step=step, spent=elapsed)
            saved = time.monotonic()
    if minutes:
        _save(state_file, trained, average, optimizer, step=step, spent=elapsed)
    return {**{name: tensor.detach() for name, tensor in weights.items()}, **average.tensors}


def draw(images: Tensor, generator: torch.Generator) -> Tensor:
    """A batch [BATCH, 3, 128, 128]: some mirrored, some shown smaller, on white."""
    chosen = images[torch.randint(len(images), (BATCH,), generator=generator)]
    if torch.rand((), generator=generator) < 0.5:
        chosen = chosen.flip(2)
    if torch.rand((), generator=generator) < 0.2:
        wide = torch.full((BATCH, 104, 104, 3), 255, dtype=torch.uint8)
        y, x = torch.randint(104 - FRAME, (2,), generator=generator).tolist()
        wide[:, y:y + FRAME, x:x + FRAME] = chosen
        chosen = wide
    return enlarged(chosen)


def encoded(autoencoder: vae.VAE, pixels: Tensor) -> Tensor:
    """pixels [B, 3, 128, 128] -> means [B, 4, 16, 16]: what `encode` gives, without the work of its identity blocks."""
    layers = autoencoder.layers
    first, second = (layers.weight(f"encoder.down.{level}.downsample.conv") for level in (1, 2))
    x = F.avg_pool2d(pixels - 1, 2)
    x = F.conv2d(F.pad(x, (0, 1, 0, 1)), first[:12, :3], stride=2)
    x = F.conv2d(F.pad(x, (0, 1, 0, 1)), second[0:12:3, :12], stride=2)
    signals = []
    for signal in range(4):
        s = x[:, signal:signal + 1]
        group = torch.cat([s, torch.full_like(s, CONSTANT), torch.full_like(s, -CONSTANT)], 1)
        normed = F.group_norm(group, 1, eps=vae.EPS)[:, :1] * layers.weight("encoder.norm_out")[3 * signal]
        signals.append(F.silu(normed + SHIFT) - SHIFT)
    return torch.cat(signals, 1)


def _loss(generated: Tensor, pixels: Tensor) -> tuple[Tensor, Tensor]:
    generated = generated.float()
    distance = (generated - pixels).abs().mean()
    edges = sum((generated.diff(dim=axis) - pixels.diff(dim=axis)).abs().mean() for axis in (2, 3))
    return distance + (generated - pixels).square().mean() + edges, distance


def _rim(generated: Tensor, bias: Tensor) -> Tensor:
    """How far the outermost pixels are from the last bias alone, which becomes the colour of paper.

    The convolution that smooths at full size sees zeros beyond the rim: only where it adds nothing is there no frame.
    """
    added = generated - bias[:, None, None]
    return sum(added[..., index, :].square().mean() + added[..., :, index].square().mean() for index in (0, 63))


def _save(file: Path, weights: dict[str, Tensor], average: Average, optimizer: torch.optim.Optimizer, *, step: int,
          spent: float) -> None:
    part = file.with_suffix(".part")
    torch.save({"weights": {name: tensor.detach() for name, tensor in weights.items()}, "average": average.state(),
                "optimizer": optimizer.state_dict(), "step": step, "spent": spent}, part)
    part.replace(file)
