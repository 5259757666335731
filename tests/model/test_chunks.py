"""Captions are cut as the WebUI cuts prompts, and nothing of them is lost."""

from __future__ import annotations

import functools
import random
from pathlib import Path

import pytest
import torch

from lib_lora_train.errors import ModelError
from lib_lora_train.model.frozen import build
from lib_lora_train.model.sd.text import TextConditioner, size_vector, split_into_chunks
from lib_lora_train.model.sd.tokens import clip_tokenizer, tokenizer_from_folder
from tests.model.small_checkpoints import COMMA, END, HINTS, START, checkpoint, tokenizers


def cut_by_the_rule(tokens: list[int], backtrack: int) -> list[list[int]]:
    """The WebUI's rule said once more, as a recursion on what is left.

    75 tokens fit. If more are left and the next is no comma, look back over the chunk: a comma among its last
    `backtrack` tokens ends it. A comma that opens a chunk after the first is never looked back to.
    """
    def cut(left: list[int], first: bool) -> list[list[int]]:
        if len(left) <= 75:
            return [left] if left or first else []
        commas = [place for place in range(75) if left[place] == COMMA and (first or place > 0)]
        length = 75
        if backtrack and left[75] != COMMA and commas and 75 - commas[-1] <= backtrack:
            length = commas[-1] + 1
        return [left[:length], *cut(left[length:], False)]

    return cut(tokens, True)


@pytest.mark.parametrize("backtrack", [0, 1, 20, 74, 120])
def test_cuts_are_those_of_the_rule(backtrack: int) -> None:
    draw = random.Random(backtrack)
    for _ in range(300):
        rarity = draw.choice([2, 5, 15, 40])
        length = draw.randrange(320)
        tokens = [COMMA if draw.randrange(rarity) == 0 else draw.randrange(10, 500) for _ in range(length)]
        assert split_into_chunks(tokens, comma=COMMA, backtrack=backtrack) == cut_by_the_rule(tokens, backtrack)


@pytest.mark.parametrize("comma_at, first_chunk", [(74, 75), (60, 61), (55, 56), (54, 75), (None, 75)])
def test_a_comma_among_the_last_twenty_tokens_ends_a_full_chunk(comma_at: int | None, first_chunk: int) -> None:
    tokens = [COMMA if place == comma_at else 100 + place for place in range(90)]
    assert [len(chunk) for chunk in split_into_chunks(tokens, comma=COMMA, backtrack=20)] == [
        first_chunk, 90 - first_chunk]


def test_a_chunk_is_not_shortened_for_a_comma_that_comes_next() -> None:
    tokens = [COMMA if place in (70, 75) else 100 + place for place in range(80)]
    assert [len(chunk) for chunk in split_into_chunks(tokens, comma=COMMA, backtrack=20)] == [75, 5]


def test_exactly_75_tokens_are_one_chunk_and_none_are_one_empty_chunk() -> None:
    assert split_into_chunks(list(range(75)), comma=None, backtrack=20) == [list(range(75))]
    assert split_into_chunks([], comma=None, backtrack=20) == [[]]


@functools.cache
def conditioner(family: str, *, backtrack: int = 20) -> TextConditioner:
    return build(checkpoint(family), hints=HINTS[family], tokenizers=tokenizers(family),
                 comma_padding_backtrack=backtrack).text


def test_long_captions_are_not_cut() -> None:
    words = list(range(100, 500))
    (chunks,) = conditioner("sd1").tokenize(" ".join(map(str, words))).encoders
    assert all(len(chunk) == 77 and chunk[0] == START and chunk[76] == END for chunk in chunks)
    assert [token for chunk in chunks for token in chunk if token not in (START, END)] == words


def test_clip_pads_with_end_tokens_and_openclip_with_zeros_after_the_first() -> None:
    first, second = conditioner("sdxl").tokenize("11 22").encoders
    assert first == ((START, 11, 22, END, *[END] * 73),)
    assert second == ((START, 11, 22, END, *[0] * 73),)
    assert conditioner("sd1").tokenize("").encoders == (((START, *[END] * 76),),)
    assert conditioner("sd2").tokenize("").encoders == (((START, END, *[0] * 75),),)


def test_the_backtrack_is_a_setting() -> None:
    caption = "100 " * 70 + ", " + "200 " * 20
    assert conditioner("sd1").tokenize(caption).encoders[0][0][72] == END
    assert conditioner("sd1", backtrack=0).tokenize(caption).encoders[0][0][72] == 200


def test_captions_are_plain_text() -> None:
    tokenizer = clip_tokenizer()
    assert tokenizer.encode("saber_(fate:1.2)")[-3:] == tokenizer.encode("1.2)")[-3:] != tokenizer.encode("1.2")[-3:]
    assert len(tokenizer.encode("(cat)")) == len(tokenizer.encode("cat")) + 2


def test_clip_tokens_are_the_published_ones() -> None:
    tokenizer = clip_tokenizer()
    assert (tokenizer.start, tokenizer.end, tokenizer.comma) == (49406, 49407, 267)
    assert tokenizer.encode("A photo of a cat, a dog") == [320, 1125, 539, 320, 2368, 267, 320, 1929]


def test_a_folder_with_clips_vocabulary_gives_the_same_tokens(tmp_path: Path) -> None:
    import gzip
    import json

    import open_clip

    packed = Path(open_clip.__file__).parent / "bpe_simple_vocab_16e6.txt.gz"
    merges = gzip.decompress(packed.read_bytes()).decode().split("\n")[1:48895]
    vocabulary = dict(open_clip.tokenizer.SimpleTokenizer().encoder)
    for ours, theirs in (("<start_of_text>", "<|startoftext|>"), ("<end_of_text>", "<|endoftext|>")):
        vocabulary[theirs] = vocabulary.pop(ours)
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8")
    folder, shipped = tokenizer_from_folder(tmp_path), clip_tokenizer()
    assert (folder.start, folder.end, folder.comma) == (shipped.start, shipped.end, shipped.comma)
    for caption in ("1girl, solo, long hair", "a café — déjà vu!", "it's   spaced\nout", "saber_(fate)", "日本語"):
        assert folder.encode(caption) == shipped.encode(caption)


def test_a_folder_without_a_vocabulary_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="vocab.json"):
        tokenizer_from_folder(tmp_path)


def test_the_size_vector_is_sgms() -> None:
    """Each of six numbers as 128 cosines and 128 sines with periods from 2π up, after the pooled vector."""
    pooled = torch.randn(2, 5, generator=torch.Generator().manual_seed(0))
    y = size_vector(pooled, original=[(1024, 768), (640, 480)], crop=(0, 16), target=torch.tensor([512, 384]))
    frequencies = torch.tensor([10000 ** (-k / 128) for k in range(128)], dtype=torch.float64)
    for row, numbers in enumerate(([1024, 768, 0, 16, 512, 384], [640, 480, 0, 16, 512, 384])):
        angles = torch.tensor(numbers, dtype=torch.float64)[:, None] * frequencies
        expected = torch.cat([pooled[row].double(), torch.cat([angles.cos(), angles.sin()], dim=1).flatten()])
        # fp32 angles of up to 1024 radians are exact to 1024 · 2^-24 or so.
        assert (y[row].double() - expected).abs().max() < 2e-4
