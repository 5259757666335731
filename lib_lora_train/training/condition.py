"""How a batch's captions become the UNet's condition, in two halves: what the CPU prepares, and what the device makes of it.

The second half computes with tensors alone, so that it can be part of a step that is recorded once and replayed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch

from lib_lora_train.inputs.text import TextCache
from lib_lora_train.model.ops.layers import Adapters
from lib_lora_train.model.sd.text import Conditioning, TextConditioner

Prepared = tuple[torch.Tensor, ...]


class Condition(Protocol):
    """The text of a run's batches."""

    def prepare(self, captions: Sequence[str]) -> Prepared:
        """What the device needs to know of them: tensors [B, ...] on the CPU, as many in every call."""

    def encode(self, prepared: Prepared) -> Conditioning:
        """The condition of what was prepared, with gradients for the layers that are trained; no synchronisation."""


class CachedText:
    """The condition looked up, while the text encoders are frozen."""

    def __init__(self, cache: TextCache) -> None:
        self._cache = cache

    def prepare(self, captions: Sequence[str]) -> Prepared:
        """The condition itself; a caption met for the first time is encoded, which waits for the device."""
        known = self._cache.get(captions)
        return (known.context,) if known.pooled is None else (known.context, known.pooled)

    def encode(self, prepared: Prepared) -> Conditioning:
        """As it was prepared."""
        context, *pooled = prepared
        return Conditioning(context, pooled[0] if pooled else None)


class TrainedText:
    """The condition computed at each step, by text encoders whose layers are trained."""

    def __init__(self, text: TextConditioner, *, clip_skip: int, adapters: Mapping[str, Adapters], checkpointing: bool,
                 dtype: torch.dtype) -> None:
        self._text, self._clip_skip, self._adapters = text, clip_skip, adapters
        self._checkpointing, self._dtype = checkpointing, dtype

    def prepare(self, captions: Sequence[str]) -> Prepared:
        """Token ids, [B, n, 77] for each encoder."""
        return self._text.ids([self._text.tokenize(caption) for caption in captions])

    def encode(self, prepared: Prepared) -> Conditioning:
        """What the encoders say of the ids."""
        return self._text.encode_ids(prepared, clip_skip=self._clip_skip, adapters=self._adapters,
                                     checkpointing=self._checkpointing, dtype=self._dtype)
