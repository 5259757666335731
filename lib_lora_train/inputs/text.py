"""What the text encoder says about a caption, computed once: for runs in which it is not trained.

Keyed by the final caption of a visit, so shuffling and dropout stay correct; what is above a bound in bytes is computed at
each visit. Not for a text encoder that is being trained: its answers change.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Protocol

import torch

from lib_lora_train.dataset.progress import Progress, ShouldStop, Watch
from lib_lora_train.model.sd.text import Conditioning, Tokens

DEFAULT_MAX_BYTES = 2 << 30
MAX_BYTES_VARIED = 256 << 20
"""Where captions are so many that few are met again: 800 of SDXL in fp16."""
CAPTIONS_AT_ONCE = 32
"""Captions that are encoded together: a GPU takes hardly longer for them than for one."""
_BYTES_A_TOKEN = 14 * 4 * 1280
"""What the widest encoder holds in fp32 in a feed-forward layer: its input, what is normed of it, and three of four times the
width."""


def encoding_bytes(chunks: int) -> int:
    """What encoding captions of so many chunks takes for a moment, beside the text encoders' weights."""
    return CAPTIONS_AT_ONCE * 77 * chunks * _BYTES_A_TOKEN


class Conditioner(Protocol):
    """The part of `model.sd.text.TextConditioner` that is needed here."""

    def tokenize(self, caption: str) -> Tokens:
        """All of a caption, in chunks of 77 ids; its length is the number of chunks."""

    def encode(self, batch: Sequence[Tokens], *, clip_skip: int, dtype: torch.dtype) -> Conditioning:
        """context [B, 77·n, C] and pooled [B, P] or None; each chunk encoded independently of the others."""


class TextCache:
    """Caption → Conditioning, on the CPU."""

    def __init__(self, conditioner: Conditioner, *, clip_skip: int = 1, max_bytes: int = DEFAULT_MAX_BYTES,
                 one_by_one: bool = False, lru: bool = False, kept_as: torch.dtype = torch.float32) -> None:
        """`one_by_one`: what `get` does not know is encoded caption by caption. Slower than together, but then the last bits
        of a caption do not depend on those it was met with: for captions that are kept and met again, after a resume too.
        `lru`: the least recently used go where there is no room; else those stay that came first, which serves captions better
        that all come once in an epoch. `kept_as`: in which dtype conditions are kept and given; they are computed in fp32.
        Where the step computes in it anyway, nothing is lost, and twice as many fit."""
        self._conditioner, self._clip_skip, self._one_by_one, self._kept_as = conditioner, clip_skip, one_by_one, kept_as
        self._max_bytes, self._bytes, self._lru = max_bytes, 0, lru
        self._known: OrderedDict[str, Conditioning] = OrderedDict()  # batch size 1 each, the least recently used first
        self._empty: torch.Tensor | None = None  # [1, 77, C]: what the WebUI appends where chunks are missing

    def get(self, captions: Sequence[str]) -> Conditioning:
        """The condition of a batch of captions; those with fewer chunks than the longest get empty ones.

        Equal to what `conditioner.encode` says of the batch, because chunks are encoded independently.
        """
        new = [caption for caption in dict.fromkeys(captions) if caption not in self._known]
        found = {caption: self._encode([caption])[caption] for caption in new} if self._one_by_one else self._encode(new)
        batch = [found[caption] if caption in found else self._known[caption] for caption in captions]
        for caption, one in dict(zip(captions, batch, strict=True)).items():
            self._keep(caption, one)
        tokens = max(one.context.shape[1] for one in batch)
        context = torch.cat([self._filled(one.context, tokens) for one in batch])
        pooled = [one.pooled for one in batch if one.pooled is not None]
        return Conditioning(context=context, pooled=torch.cat(pooled) if pooled else None)

    def fill(self, captions: Sequence[str], *, batch_size: int = CAPTIONS_AT_ONCE, on_progress: Progress | None = None,
             should_stop: ShouldStop | None = None) -> None:
        """Encode these captions beforehand, as many as may be kept; Interrupted when `should_stop()` says so.

        Those with the same number of chunks together.
        """
        wanted = [caption for caption in dict.fromkeys(captions) if caption not in self._known]
        watch = Watch(len(wanted), doing="the captions were encoded", on_progress=on_progress, should_stop=should_stop)
        for group in self._by_length(wanted):
            for start in range(0, len(group), batch_size):
                watch.check()
                part = self._encode_group(group[start:start + batch_size])
                if not all([self._keep(caption, one) for caption, one in part.items()]):
                    return
                watch.advance(len(part))

    def holds(self, captions: Sequence[str]) -> bool:
        """Whether `get` needs the conditioner no more for batches of these. The empty caption is among what it may need."""
        return all(caption in self._known for caption in (*captions, ""))

    def _encode(self, captions: Sequence[str]) -> dict[str, Conditioning]:
        """Those with the same number of chunks together, so that none is filled up."""
        return {caption: one for group in self._by_length(captions) for caption, one in self._encode_group(group).items()}

    def _by_length(self, captions: Iterable[str]) -> list[list[tuple[str, Tokens]]]:
        """Captions with their tokens, those with the same number of chunks together."""
        groups: dict[int, list[tuple[str, Tokens]]] = {}
        for caption in captions:
            tokens = self._conditioner.tokenize(caption)
            groups.setdefault(len(tokens), []).append((caption, tokens))
        return list(groups.values())

    @torch.no_grad()
    def _encode_group(self, group: Sequence[tuple[str, Tokens]]) -> dict[str, Conditioning]:
        encoded = self._conditioner.encode([t for _, t in group], clip_skip=self._clip_skip, dtype=torch.float32)
        # A synchronisation for each new caption, none for a known one.
        context = encoded.context.to("cpu", self._kept_as)
        pooled = None if encoded.pooled is None else encoded.pooled.to("cpu", self._kept_as)
        result = {}
        for row, (caption, _) in enumerate(group):
            own = slice(row, row + 1)  # cloned: a view would keep the whole group in memory
            result[caption] = Conditioning(
                context=context[own].clone(), pooled=None if pooled is None else pooled[own].clone())
        return result

    def _filled(self, context: torch.Tensor, tokens: int) -> torch.Tensor:
        missing = tokens - context.shape[1]
        if missing == 0:
            return context
        if self._empty is None:
            self._empty = (self._known.get("") or self._encode([""])[""]).context
        return torch.cat([context, self._empty.repeat(1, missing // self._empty.shape[1], 1)], dim=1)

    def _keep(self, caption: str, one: Conditioning) -> bool:
        """Keep a caption's condition, if there is room for it, or others may go; whether it is kept."""
        if caption in self._known:
            self._known.move_to_end(caption)
            return True
        size = _bytes(one)
        while self._lru and self._known and self._bytes + size > self._max_bytes >= size:
            _, oldest = self._known.popitem(last=False)
            self._bytes -= _bytes(oldest)
        if self._bytes + size > self._max_bytes:
            return False
        self._known[caption] = one
        self._bytes += size
        return True


def _bytes(one: Conditioning) -> int:
    return sum(tensor.nbytes for tensor in (one.context, one.pooled) if tensor is not None)
