"""What a memory plan is told of the device and of the run: bytes that may be taken, attention's kernel, the largest input."""

from __future__ import annotations

import re
from collections.abc import Iterable

import torch

from lib_lora_train.inputs.vae_batches import free_bytes
from lib_lora_train.memory.plan import CONTEXT, GIGABYTE
from lib_lora_train.memory.tracker import AttentionKernel
from lib_lora_train.model.sd.text import CHUNK


def budget_of(wanted: float, device: torch.device, *, ours: int) -> int | None:
    """Bytes that all of a run may take: `wanted` GB (0 for as much as there is), and on a card no more than there is.

    `ours` are bytes on the card already that the plan counts too: the lender's model, the LoRA. None without a card, where
    nothing was wanted. A card is asked for its free memory, which waits for nothing.
    """
    asked = int(wanted * GIGABYTE) or None
    if device.type != "cuda":
        return asked
    there = free_bytes(device) + min(torch.cuda.memory_allocated(device), ours) + CONTEXT
    there -= there % (GIGABYTE // 4)  # a little less from time to time is no other question
    return there if asked is None else min(asked, there)


def largest(buckets: Iterable[tuple[tuple[int, int], int]]) -> tuple[int, int]:
    """(width, height) of the bucket that needs the most memory, of ((width, height), pictures)."""
    return max((size for size, _ in buckets), key=lambda size: (size[0] * size[1], size))


def shapes_of(buckets: Iterable[tuple[tuple[int, int], int]], batch: int) -> int:
    """Shapes of batches that occur: one for each bucket, and one for what is left of it when batches of so many are taken."""
    return sum((images >= batch) + bool(images % batch) for _, images in buckets)


def chunks_of(captions: Iterable[str]) -> int:
    """Chunks of 75 tokens that the longest of the captions takes, without reading it word for word: about four tokens for
    three words or marks."""
    longest = max(captions, key=len, default="")
    return 1 + len(re.findall(r"\w+|[^\w\s]", longest)) * 4 // 3 // CHUNK


def attention_kernel(device: torch.device, dtype: torch.dtype) -> AttentionKernel:
    """What torch's attention is on this device: whether it keeps the whole map."""
    if device.type != "cuda":
        return "fused" if device.type == "cpu" else "math"
    capability = torch.cuda.get_device_capability(device)
    flash = torch.backends.cuda.flash_sdp_enabled() and capability >= (8, 0) and dtype != torch.float32
    efficient = torch.backends.cuda.mem_efficient_sdp_enabled() and capability >= (5, 3)
    return "fused" if flash or efficient else "math"
