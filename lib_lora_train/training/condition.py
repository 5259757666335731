"""How the captions of a batch become the UNet's condition: tensors prepared on the CPU, and what the device makes of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from lib_lora_train.inputs.batch import Batch
from lib_lora_train.inputs.text import TextCache
from lib_lora_train.model.ops.layers import Adapters
from lib_lora_train.model.sd.text import Conditioning, TextConditioner
from lib_lora_train.model.sd.text_encoder import TOKEN_EMBEDDING


class Condition(Protocol):
    """The text of a run's batches."""

    def prepare(self, captions: Sequence[str]) -> Mapping[str, Tensor]:
        """The tensors [B, ...] by name, on the CPU, that `encode` reads from a batch; the same names in every call."""

    def encode(self, batch: Batch, *, adapted: bool = True) -> Conditioning:
        """The condition of a batch, with gradients for the layers that are trained, or, not `adapted`, without these layers.
        Nothing waits for the device."""


class CachedText:
    """The condition looked up, while the text encoders are frozen: "context", and "pooled" for SDXL."""

    def __init__(self, cache: TextCache) -> None:
        self._cache = cache

    def prepare(self, captions: Sequence[str]) -> Mapping[str, Tensor]:
        """The condition itself. A caption met for the first time is encoded, which waits for the device."""
        known = self._cache.get(captions)
        return {"context": known.context} if known.pooled is None else {"context": known.context, "pooled": known.pooled}

    def encode(self, batch: Batch, *, adapted: bool = True) -> Conditioning:
        """As it was prepared: no layer is trained."""
        return Conditioning(batch["context"], batch["pooled"] if "pooled" in batch else None)


class TrainedText:
    """The condition computed at each step by text encoders whose layers or words are trained: "ids.te", or "ids.te1" and
    "ids.te2"; with words that have vectors also the ids without these, "plain.ids.te"."""

    def __init__(self, text: TextConditioner, *, clip_skip: int, adapters: Mapping[str, Adapters], checkpointing: bool,
                 dtype: torch.dtype) -> None:
        self._text, self._clip_skip, self._adapters = text, clip_skip, adapters
        self._checkpointing, self._dtype = checkpointing, dtype
        self._names = tuple(f"ids.{encoder.config.component}" for encoder in text.encoders)
        self._has_words = any(TOKEN_EMBEDDING in layers for layers in adapters.values())

    def prepare(self, captions: Sequence[str]) -> Mapping[str, Tensor]:
        """Token ids, [B, n, 77] for each encoder."""
        ids = self._text.ids([self._text.tokenize(caption, adapters=self._adapters) for caption in captions])
        found = dict(zip(self._names, ids, strict=True))
        if self._has_words:
            plain = self._text.ids([self._text.tokenize(caption) for caption in captions])
            found |= {f"plain.{name}": tensor for name, tensor in zip(self._names, plain, strict=True)}
        return found

    def encode(self, batch: Batch, *, adapted: bool = True) -> Conditioning:
        """What the encoders make of the ids."""
        plain = "plain." if self._has_words and not adapted else ""
        return self._text.encode_ids(
            [batch[plain + name] for name in self._names], clip_skip=self._clip_skip,
            adapters=self._adapters if adapted else {}, checkpointing=self._checkpointing, dtype=self._dtype)
