"""Vectors of its own for a word, beside a text encoder's token embeddings (textual inversion, Gal et al. 2022,
arXiv 2208.01618).

They are trained together with a LoRA (pivotal tuning: the idea is Roich et al.'s, arXiv 2106.05744) and lie in its file, where
the WebUI finds them (v1.10.1, extensions-builtin/Lora/networks.py, `bundle_embeddings`): bundle_emb.WORD.string_to_param.* for
SD1 and SD2, bundle_emb.WORD.clip_l and bundle_emb.WORD.clip_g for SDXL, each [n, C].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from lib_lora_train.errors import LoraFileError
from lib_lora_train.model.family import FAMILIES
from lib_lora_train.model.sd.text import TextConditioner
from lib_lora_train.model.sd.text_encoder import TOKEN_EMBEDDING

EMBEDDING_PREFIX = "bundle_emb."
_KEYS = {spec.component: spec.embedding_key for family in FAMILIES.values() for spec in family.text}
_COMPONENTS = {key.partition(".")[0]: component for component, key in _KEYS.items()}


class WordEmbedding(nn.Module):
    """A word's vectors for each text encoder, {component: [n, C]} fp32.

    multiplier   0 for the word's ordinary tokens; otherwise without effect, as in `<lora:name:weight>`
    """

    def __init__(self, word: str, vectors: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.word, self.multiplier = word, 1.0
        self.by_component = nn.ParameterDict({component: nn.Parameter(own) for component, own in vectors.items()})

    @classmethod
    def initial(cls, word: str, *, count: int, text: str, conditioner: TextConditioner) -> WordEmbedding:
        """So many vectors that begin as those of the tokens of `text`, spread over them as the WebUI's `create_embedding` does;
        of one without tokens, as the word's own."""
        vectors = {}
        for encoder, tokenizer in zip(conditioner.encoders, conditioner.tokenizers, strict=True):
            tokens = tokenizer.encode(text) or tokenizer.encode(word)
            ids = torch.tensor([tokens[number * len(tokens) // count] for number in range(count)], device=encoder.device)
            vectors[encoder.config.component] = encoder.layers.embedding(TOKEN_EMBEDDING, ids, dtype=torch.float32)
        return cls(word, vectors)

    def tensors(self) -> dict[str, Tensor]:
        """As the file has them, sharing memory with the weights."""
        return {f"{EMBEDDING_PREFIX}{self.word}.{_KEYS[component]}": own.detach()
                for component, own in self.by_component.items()}


class WordVectors:
    """The vectors of several words for one text encoder, asked anew for each use, so that some may be in training; an
    `EmbeddingAdapter`. Of two with the same word the first stand for it."""

    def __init__(self, component: str, embeddings: Sequence[WordEmbedding]) -> None:
        self.component = component
        self.embeddings = tuple(one for one in embeddings if component in one.by_component)

    @property
    def words(self) -> tuple[tuple[str, int], ...]:
        """See `EmbeddingAdapter`."""
        return tuple((one.word, len(one.by_component[self.component])) for one in self.embeddings if one.multiplier)

    def vectors(self) -> Tensor:
        """See `EmbeddingAdapter`."""
        return torch.cat([one.by_component[self.component] for one in self.embeddings if one.multiplier])


def split_embeddings(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], tuple[WordEmbedding, ...]]:
    """(the other tensors, the words that have vectors in it) of a LoRA file; the vectors are frozen. Raises LoraFileError for
    what the WebUI cannot read either."""
    others = {key: tensor for key, tensor in tensors.items() if not key.startswith(EMBEDDING_PREFIX)}
    found: dict[str, dict[str, Tensor]] = {}
    for key in tensors.keys() - others.keys():
        word, _, name = key.removeprefix(EMBEDDING_PREFIX).partition(".")
        component, vectors = _COMPONENTS.get(name.partition(".")[0]), tensors[key]
        if component is None or vectors.ndim not in (1, 2):
            raise LoraFileError("The LoRA file holds an embedding that is not known", why=f"it calls it {key}",
                                remedy="choose another LoRA")
        found.setdefault(word, {})[component] = torch.atleast_2d(vectors.detach()).to(torch.float32, copy=True)
    embeddings = tuple(WordEmbedding(word, dict(sorted(found[word].items()))) for word in sorted(found))
    for one in embeddings:
        one.requires_grad_(False)
    return others, embeddings
