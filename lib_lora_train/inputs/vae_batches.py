"""What the VAE is asked: batches of images of one size, as many at once as the device holds.

Here alone the cache touches the model, always in the thread that trains.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from lib_lora_train.dataset.augment import to_network
from lib_lora_train.dataset.buckets import Size
from lib_lora_train.dataset.examples import Example
from lib_lora_train.errors import TrainingError, is_out_of_memory
from lib_lora_train.inputs.latent_files import MeanAndStd
from lib_lora_train.settings import named

# What the encoder holds at its widest, for each pixel of an image: 128 channels of fp32 at full size, seven times (a block's
# input, what is normed, activated and convolved of it, and a convolution's two sides in another order).
_BYTES_A_PIXEL = 3700
_BYTES_A_DECODED_PIXEL = 4400
"""Of the decoder: 256 channels at full size, at its widest three times, and the same on top as for the encoder."""
_MOST_BYTES = 2 << 30  # a step of the training takes as much: encoding shall not be what a run's memory is measured by
_MOST_AT_ONCE = 8  # more gains nothing: two images of 512² fill a GPU with work already


EncodingBudget = Callable[[int], int]
"""Sees to it that the encoder is on the device with so many bytes free beside it, if it can. Returns how many may be taken."""


class Encoder(Protocol):
    """The part of the VAE that is needed here."""

    def encode(self, pixels: torch.Tensor) -> MeanAndStd:
        """pixels [B, 3, H, W] in [-1, 1] → (mean, std), each [B, 4, H/8, W/8], unscaled."""


class VaeBatches:
    """Encodes samples in parts that fit; `warn` is told in a sentence what the user should know of it."""

    def __init__(self, vae: Encoder, *, device: torch.device, batch_size: int, warn: Callable[[str], None],
                 budget: EncodingBudget | None = None) -> None:
        """`batch_size` 0 chooses by what is free on a CUDA device, and is 1 elsewhere. `budget` is asked before images of
        a size are first encoded; by default what is free may be taken."""
        self.device, self._vae, self._batch_size, self._warn, self._budget = device, vae, batch_size, warn, budget
        self._wanted: dict[Size, int] = {}
        self._most = sys.maxsize  # less after the memory did not suffice

    def at_once(self, bucket: Size) -> int:
        """How many images of this size (width, height) are encoded together."""
        if bucket not in self._wanted:
            free = None if self._budget is None else self._budget(encoding_bytes(bucket) * (self._batch_size or 1))
            self._wanted[bucket] = self._batch_size or automatic_batch(self.device, bucket, free=free)
        return min(self._wanted[bucket], self._most)

    def encode(self, samples: Sequence[torch.Tensor], flips: Sequence[bool]) -> torch.Tensor:
        """samples [H, W, 3] uint8 each, of one size → [N, flips, 2, 4, h, w] fp32 on the device: mean, then standard deviation.

        For each of `flips` once, mirrored where it is true (the VAE is not symmetric: a mirrored latent is another one).
        Where the memory does not suffice, half as many are encoded at once, now and later.
        """
        height, width, _ = samples[0].shape
        done: list[torch.Tensor] = []
        while samples:
            part = samples[:self.at_once((width, height))]
            try:
                done.append(self._encoded(part, flips))
                samples = samples[len(part):]
                continue
            except (MemoryError, RuntimeError) as error:
                if len(part) == 1 or not is_out_of_memory(error):
                    raise
            # Outside of the except clause, whose error holds what filled the memory.
            self._most = len(part) // 2
            self._warn(f"The memory does not suffice to encode {len(part)} pictures at once, "
                       f"{named('vae_batch_size')}; it goes on with {self._most}.")
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
        return done[0] if len(done) == 1 else torch.cat(done)

    @torch.no_grad()
    def _encoded(self, part: Sequence[torch.Tensor], flips: Sequence[bool]) -> torch.Tensor:
        pixels = to_network(torch.stack(list(part)).to(self.device))
        encoded = []
        for flip in flips:
            mean, std = self._vae.encode(pixels.flip(-1) if flip else pixels)
            encoded.append(torch.stack([mean.to(torch.float32), std.to(torch.float32)], dim=1))
        return torch.stack(encoded, dim=1)


def encoding_bytes(bucket: Size) -> int:
    """What encoding an image of this size (width, height) takes for a moment, beside the VAE's weights."""
    return _BYTES_A_PIXEL * bucket[0] * bucket[1]


def decoding_bytes(size: Size) -> int:
    """What decoding an image of this size (width, height) takes for a moment, beside the VAE's weights."""
    return _BYTES_A_DECODED_PIXEL * size[0] * size[1]


def free_bytes(device: torch.device) -> int:
    """What can be had on a CUDA device: from its driver, and of what torch keeps unused. Waits for nothing."""
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def automatic_batch(device: torch.device, bucket: Size, *, free: int | None = None) -> int:
    """Images of this size (width, height) that 2 GiB hold, or half of a CUDA device's `free` memory (by default all of it)
    where that is less: 1, 2, 4 or 8; 1 elsewhere."""
    if device.type != "cuda":
        return 1
    free = free_bytes(device) if free is None else free
    fitting = min(free // 2, _MOST_BYTES) // encoding_bytes(bucket)
    # A power of two: a little more or less memory in use should not change how the numbers are rounded.
    return 1 << max(0, min(int(fitting), _MOST_AT_ONCE).bit_length() - 1)


def check_finite(latents: torch.Tensor, examples: Sequence[Example]) -> None:
    """Each image [N, …] by itself: one bad image in a batch would otherwise hide among the good ones.

    Raises TrainingError. One synchronisation where the latents are on a device.
    """
    for example, fine in zip(examples, torch.isfinite(latents).flatten(1).all(dim=1).tolist(), strict=True):
        if not fine:
            raise TrainingError(
                f"The VAE turns the picture {example.path} into numbers that are not finite",
                why="its activations overflow, although they are fp32", remedy="choose another VAE, or remove this picture")
