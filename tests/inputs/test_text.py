"""Cached conditions equal those of the whole batch, and the cache stays within its bounds."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import pytest
import torch

from lib_lora_train.errors import Interrupted
from lib_lora_train.inputs.text import TextCache
from lib_lora_train.model.sd.text import Conditioning, Tokens

CHUNK, WIDTH = 77, 6


class FakeConditioner:
    """A chunk of 75 words becomes numbers that depend on nothing but the chunk; fills up batches as the WebUI does."""

    def __init__(self, *, pooled: bool = True) -> None:
        self.pooled = pooled
        self.encoded: list[int] = []  # captions of each call

    def tokenize(self, caption: str) -> Tokens:
        ids = [int.from_bytes(hashlib.sha256(word.encode()).digest()[:2], "big") for word in caption.split()]
        chunks = [ids[i:i + 75] for i in range(0, len(ids), 75)] or [[]]
        return Tokens((tuple(tuple([1, *chunk] + [2] * (76 - len(chunk))) for chunk in chunks),))

    def encode(self, batch: Sequence[Tokens], *, clip_skip: int, dtype: torch.dtype) -> Conditioning:
        assert not torch.is_grad_enabled()
        self.encoded.append(len(batch))
        empty = self.tokenize("").encoders[0][0]
        count = max(len(tokens) for tokens in batch)
        rows = []
        for tokens in batch:
            chunks = [*tokens.encoders[0], *[empty] * (count - len(tokens))]
            ids = torch.tensor(chunks, dtype=dtype).reshape(1, -1, 1)
            rows.append((ids * torch.arange(1, WIDTH + 1) + clip_skip).sin())
        context = torch.cat(rows)
        return Conditioning(context, context[:, :CHUNK].sum(1) if self.pooled else None)


def words(count: int, name: str) -> str:
    return " ".join(f"{name}{i}" for i in range(count))


@pytest.mark.parametrize("pooled", [True, False])
def test_a_batch_from_the_cache_equals_the_batch_encoded_together(pooled: bool) -> None:
    captions = [words(3, "a"), words(100, "b"), "", words(160, "c"), words(3, "a")]
    reference = FakeConditioner(pooled=pooled)
    with torch.no_grad():
        expected = reference.encode([reference.tokenize(c) for c in captions], clip_skip=2, dtype=torch.float32)
    cache = TextCache(FakeConditioner(pooled=pooled), clip_skip=2)
    for _ in range(2):  # computed, then known
        got = cache.get(captions)
        assert got.context.shape == (5, 3 * CHUNK, WIDTH)
        assert torch.equal(got.context, expected.context)
        assert (got.pooled is None) if expected.pooled is None else torch.equal(got.pooled, expected.pooled)


def test_each_caption_is_encoded_once() -> None:
    conditioner = FakeConditioner()
    cache = TextCache(conditioner)
    cache.fill(["a", "b", "a", "c"], batch_size=2)
    assert sum(conditioner.encoded) == 3
    cache.get(["c", "a"])
    cache.get(["b", "b"])
    assert sum(conditioner.encoded) == 3
    cache.get(["d", "d"])
    assert sum(conditioner.encoded) == 4


def test_the_cache_stays_within_its_bytes_and_keeps_what_came_first() -> None:
    one = CHUNK * WIDTH * 4
    conditioner = FakeConditioner(pooled=False)
    cache = TextCache(conditioner, max_bytes=2 * one)
    for caption in ("a", "b", "c", "a", "b", "c"):
        cache.get([caption])
    assert sum(conditioner.encoded) == 4  # a and b once, c each time


def test_where_captions_are_endless_the_least_recently_used_go() -> None:
    conditioner = FakeConditioner(pooled=False)
    cache = TextCache(conditioner, max_bytes=2 * CHUNK * WIDTH * 4, lru=True)
    for caption, encoded in (("a", 1), ("b", 2), ("a", 2), ("c", 3), ("a", 3), ("b", 4), ("c", 5)):  # b goes for c, c for b
        cache.get([caption])
        assert sum(conditioner.encoded) == encoded
    assert torch.equal(cache.get(["a", "b", "c"]).context, TextCache(FakeConditioner()).get(["a", "b", "c"]).context)


def test_a_batch_larger_than_the_cache_is_still_right() -> None:
    captions = [words(3, name) for name in "abcdef"]
    reference = FakeConditioner(pooled=False)
    with torch.no_grad():
        expected = reference.encode([reference.tokenize(c) for c in captions], clip_skip=1, dtype=torch.float32).context
    for max_bytes in (0, 3 * CHUNK * WIDTH * 4):
        conditioner = FakeConditioner(pooled=False)
        cache = TextCache(conditioner, max_bytes=max_bytes)
        for _ in range(3):
            assert torch.equal(cache.get(captions).context, expected)
        assert sum(conditioner.encoded) == 6 + 2 * (6 - max_bytes // (CHUNK * WIDTH * 4)), "it keeps what has room, and no more"


def test_filling_ends_where_the_cache_is_full() -> None:
    conditioner = FakeConditioner(pooled=False)
    cache = TextCache(conditioner, max_bytes=3 * CHUNK * WIDTH * 4)
    cache.fill([str(i) for i in range(100)], batch_size=1)
    assert sum(conditioner.encoded) == 4
    cache.get(["0", "1", "2"])
    assert sum(conditioner.encoded) == 4
    cache.get(["3"])
    assert sum(conditioner.encoded) == 5


def test_progress_is_told_and_a_stop_is_heard() -> None:
    seen: list[tuple[int, int]] = []
    TextCache(FakeConditioner()).fill(
        ["a", "b", "c"], batch_size=2, on_progress=lambda done, total: seen.append((done, total)))
    assert seen == [(2, 3), (3, 3)]
    with pytest.raises(Interrupted):
        TextCache(FakeConditioner()).fill(["a"], should_stop=lambda: True)


def one_by_one(captions: Sequence[str], conditioner: FakeConditioner) -> dict[str, Conditioning]:
    with torch.no_grad():
        return {c: conditioner.encode([conditioner.tokenize(c)], clip_skip=1, dtype=torch.float32) for c in captions}


def test_captions_of_one_length_are_encoded_together() -> None:
    conditioner = FakeConditioner()
    TextCache(conditioner).fill([words(3 if n % 2 else 100, f"w{n}-") for n in range(20)], batch_size=5)
    assert conditioner.encoded == [5, 5, 5, 5]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_kept_in_the_numbers_of_the_step_the_step_sees_the_same(dtype: torch.dtype) -> None:
    captions = [words(3, "a"), words(100, "b"), ""]
    plain, half = TextCache(FakeConditioner()), TextCache(FakeConditioner(), kept_as=dtype)
    for _ in range(2):
        one, other = plain.get(captions), half.get(captions)
        assert other.context.dtype == other.pooled.dtype == dtype
        assert torch.equal(one.context.to(dtype), other.context) and torch.equal(one.pooled.to(dtype), other.pooled)

    encoded = []
    for kept_as in (torch.float32, dtype):  # room for two chunks in fp32
        conditioner = FakeConditioner(pooled=False)
        cache = TextCache(conditioner, max_bytes=2 * CHUNK * WIDTH * 4, kept_as=kept_as)
        for caption in "abcdabcd":
            cache.get([caption])
        encoded.append(sum(conditioner.encoded))
    assert encoded == [6, 4], "twice as many have room"
