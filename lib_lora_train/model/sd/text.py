"""Captions to the UNet's condition, exactly as the WebUI makes it from a prompt.

Captions are cut into chunks of 75 tokens, each with its own start and end token, encoded separately and concatenated; a
full chunk with a comma near its end is cut after that comma. A caption is plain text: `saber_(fate)` is not emphasis.
Words may have vectors of their own (textual inversion), which are never parted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from lib_lora_train.model.architecture import TextConfig
from lib_lora_train.model.ops.layers import NO_ADAPTERS, Adapters, EmbeddingAdapter
from lib_lora_train.model.sd.text_encoder import TOKEN_EMBEDDING, TextEncoder
from lib_lora_train.model.sd.tokens import Tokenizer
from lib_lora_train.model.sd.unet import timestep_embedding

CHUNK = 75
OPENCLIP_PAD = 0
SIZE_EMBEDDING = 256

Chunk = tuple[int, ...]
Token = int | tuple[int, ...]
"""A token's id, or those of a word's own vectors, -1 - k the k-th."""
Size = tuple[int, int] | Sequence[tuple[int, int]] | Tensor


@dataclass(frozen=True)
class Tokens:
    """A caption as token ids: for each text encoder its chunks, each of 77 ids. Hashable."""

    encoders: tuple[tuple[Chunk, ...], ...]

    def __len__(self) -> int:
        """The number of chunks, at least 1."""
        return max(len(chunks) for chunks in self.encoders)


@dataclass(frozen=True, eq=False)
class Conditioning:
    """The text condition: context [B, 77·n, C], and pooled [B, P] where the family has one."""

    context: Tensor
    pooled: Tensor | None

    def vector(self, *, original: Size, crop: Size, target: Size) -> Tensor | None:
        """The UNet's vector condition (see `size_vector`); None where the family has none."""
        return None if self.pooled is None else size_vector(self.pooled, original=original, crop=crop, target=target)


class TextConditioner:
    """Tokenizers and text encoders of a model. Their hidden states are concatenated; a pooled vector is the first chunk's."""

    def __init__(self, encoders: Sequence[TextEncoder], tokenizers: Sequence[Tokenizer], *,
                 comma_padding_backtrack: int = 20) -> None:
        """One tokenizer an encoder. `comma_padding_backtrack` is the WebUI's option of that name, 0 is never."""
        assert len(encoders) == len(tokenizers)
        self.encoders = tuple(encoders)
        self.tokenizers = tuple(tokenizers)
        self.comma_padding_backtrack = comma_padding_backtrack

    @property
    def uses_clip_skip(self) -> bool:
        """Whether `clip_skip` has an effect. Most families fix the layer, as the WebUI does."""
        return len(self.encoders) == 1 and self.encoders[0].config.skip == 1

    def tokenize(self, caption: str, *, adapters: Mapping[str, Adapters] = MappingProxyType({})) -> Tokens:
        """All of `caption`, however long: nothing is cut off. Words that have vectors in `adapters` become these, and are to
        be encoded with the same adapters."""
        return Tokens(tuple(
            tuple(_framed(chunk, tokenizer, encoder.config) for chunk in split_into_chunks(
                _with_vectors(caption, tokenizer, adapters.get(encoder.config.component, NO_ADAPTERS).get(TOKEN_EMBEDDING)),
                comma=tokenizer.comma, backtrack=self.comma_padding_backtrack))
            for encoder, tokenizer in zip(self.encoders, self.tokenizers, strict=True)))

    def encode(self, batch: Sequence[Tokens], *, clip_skip: int = 1,
               adapters: Mapping[str, Adapters] = MappingProxyType({}),
               dtype: torch.dtype = torch.float32) -> Conditioning:
        """The condition of a batch of captions; captions with fewer chunks than the longest get empty ones.

        clip_skip: 1 is the last layer; see `uses_clip_skip`.
        adapters: for each component the adapters by module name.
        Gradients reach the adapters unless the caller says `torch.no_grad()`.
        """
        return self.encode_ids(self.ids(batch), clip_skip=clip_skip, adapters=adapters, dtype=dtype)

    def ids(self, batch: Sequence[Tokens]) -> tuple[Tensor, ...]:
        """The token ids of a batch of captions on the CPU, [B, n, 77] for each encoder; those with fewer chunks than the
        longest get empty ones."""
        count = max(len(tokens) for tokens in batch)
        result = []
        for index, (encoder, tokenizer) in enumerate(zip(self.encoders, self.tokenizers, strict=True)):
            empty = _framed((), tokenizer, encoder.config)
            chunks = [tokens.encoders[index] for tokens in batch]
            result.append(torch.tensor([[*caption, *[empty] * (count - len(caption))] for caption in chunks]))
        return tuple(result)

    def encode_ids(self, ids: Sequence[Tensor], *, clip_skip: int = 1,
                   adapters: Mapping[str, Adapters] = MappingProxyType({}),
                   checkpointing: bool = False, dtype: torch.dtype = torch.float32) -> Conditioning:
        """The condition of a batch given as `ids`: with ids on the encoders' device there is no synchronisation."""
        contexts, pooled = [], None
        for encoder, numbers in zip(self.encoders, ids, strict=True):
            config, (captions, count, _) = encoder.config, numbers.shape
            hidden, pools = encoder(
                numbers.flatten(0, 1).to(encoder.device), skip=self._skip(config, clip_skip), final_norm=config.final_norm,
                pooled=config.pooled, adapters=adapters.get(config.component, NO_ADAPTERS),
                checkpointing=checkpointing, dtype=dtype)
            contexts.append(hidden.reshape(captions, -1, config.width))
            if pools is not None:
                pooled = pools[::count]  # of each caption's first chunk
        return Conditioning(torch.cat(contexts, dim=-1), pooled)

    def unused_layers(self, clip_skip: int) -> dict[str, tuple[str, ...]]:
        """For each component the transformer layers behind the one that is asked for, which are never run."""
        result = {}
        for encoder in self.encoders:
            config = encoder.config
            used = config.layers if config.pooled else config.layers - self._skip(config, clip_skip) + 1
            result[config.component] = tuple(f"text_model.encoder.layers.{i}" for i in range(used, config.layers))
        return result

    def _skip(self, config: TextConfig, clip_skip: int) -> int:
        return clip_skip if self.uses_clip_skip else config.skip


def split_into_chunks(tokens: Sequence[Token], *, comma: int | None, backtrack: int) -> list[list[int]]:
    """Cut `tokens` into chunks of at most 75, at least one chunk, as the WebUI does.

    Where a chunk is full and its last comma lies among its last `backtrack` tokens, what follows that comma moves to
    the next chunk, so that a phrase is not torn; unless the token that did not fit is itself a comma. Vectors of a word that
    do not fit begin the next one.
    """
    chunks, chunk, last_comma = [], [], None
    for token in tokens:
        if len(chunk) == CHUNK:
            near = last_comma is not None and CHUNK - last_comma <= backtrack and token != comma
            cut = last_comma + 1 if near else CHUNK
            chunks.append(chunk[:cut])
            chunk, last_comma = chunk[cut:], None
        elif token == comma:
            last_comma = len(chunk)
        ids = token if isinstance(token, tuple) else (token,)
        if len(chunk) + len(ids) > CHUNK:
            chunks.append(chunk)
            chunk, last_comma = [], None
        chunk.extend(ids)
    return [*chunks, chunk] if chunk or not chunks else chunks


def size_vector(pooled: Tensor, *, original: Size, crop: Size, target: Size) -> Tensor:
    """SDXL's vector condition y [B, P + 6·256] (arXiv 2307.01952, section 2.2; sgm's ConcatTimestepEmbedderND).

    pooled [B, P]. original (height, width) of the image, crop (top, left), target (height, width), in pixels: one
    pair for the whole batch, or B pairs.
    """
    pairs = [torch.as_tensor(pair, dtype=torch.float32, device=pooled.device).expand(pooled.shape[0], 2)
             for pair in (original, crop, target)]
    numbers = torch.cat(pairs, dim=1)
    embedded = timestep_embedding(numbers.flatten(), SIZE_EMBEDDING).reshape(pooled.shape[0], -1)
    return torch.cat([pooled, embedded.to(pooled.dtype)], dim=1)


def _with_vectors(caption: str, tokenizer: Tokenizer, adapter: EmbeddingAdapter | None) -> Sequence[Token]:
    """The caption's tokens, words of the adapter replaced wherever their tokens stand, the longest first, as in the WebUI's
    `find_embedding_at_position`; of two words of the same tokens the first."""
    tokens = tokenizer.encode(caption)
    if adapter is None:
        return tokens
    words, first = list[tuple[list[int], tuple[int, ...]]](), 0
    for word, count in adapter.words:
        words.append((tokenizer.encode(word), tuple(range(-1 - first, -1 - first - count, -1))))
        first += count
    words.sort(key=lambda word: -len(word[0]))
    found, place = list[Token](), 0
    while place < len(tokens):
        ids, vectors = next((word for word in words if word[0] == tokens[place:place + len(word[0])]),
                            (tokens[place:place + 1], tokens[place]))
        found.append(vectors)
        place += len(ids)
    return found


def _framed(chunk: Sequence[int], tokenizer: Tokenizer, config: TextConfig) -> Chunk:
    """Start, `chunk`, end and padding: 77 ids."""
    framed = [tokenizer.start, *chunk, *[tokenizer.end] * (CHUNK + 1 - len(chunk))]
    if config.openclip:
        first_end = framed.index(tokenizer.end)
        framed[first_end + 1:] = [OPENCLIP_PAD] * (len(framed) - first_end - 1)
    return tuple(framed)
