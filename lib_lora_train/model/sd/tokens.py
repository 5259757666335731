"""Text to token ids: CLIP's byte-pair vocabulary, from open_clip (which ships it) or from a folder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Protocol

from lib_lora_train.errors import ModelError


class Tokenizer(Protocol):
    """Splits text into tokens and names the special ones."""

    start: int
    end: int
    comma: int | None
    """The token of a comma that ends a word, None where the vocabulary has none."""

    def encode(self, text: str) -> list[int]:
        """The tokens of `text`, however many, without start and end token. Plain text: brackets mean brackets."""


@dataclass(frozen=True)
class FunctionTokenizer:
    """A tokenizer that asks the function `tokens`."""

    tokens: Callable[[str], list[int]]
    start: int
    end: int
    comma: int | None

    def encode(self, text: str) -> list[int]:
        """See `Tokenizer`."""
        return list(self.tokens(text))


@lru_cache(maxsize=1)
def clip_tokenizer() -> Tokenizer:
    """CLIP's own vocabulary of 49408 tokens, which all Stable Diffusion models share; open_clip carries it, no download."""
    from open_clip.tokenizer import SimpleTokenizer  # imported late: it takes seconds and may not be needed

    tokenizer = SimpleTokenizer()
    ids = tokenizer.encoder
    return FunctionTokenizer(tokenizer.encode, start=ids["<start_of_text>"], end=ids["<end_of_text>"], comma=ids[",</w>"])


def tokenizer_from_folder(path: str | Path) -> Tokenizer:
    """A CLIPTokenizer of a folder with `vocab.json` and `merges.txt`; ModelError where one is missing or damaged."""
    path = Path(path)
    for name in ("vocab.json", "merges.txt"):
        if not (path / name).is_file():
            raise ModelError(f"The folder '{path}' holds no tokenizer", why=f"it has no {name}",
                             remedy="give the folder of the checkpoint's text encoder")
    from transformers import CLIPTokenizer

    try:
        tokenizer = CLIPTokenizer.from_pretrained(str(path))
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ModelError(f"The tokenizer in the folder '{path}' cannot be read", why=" ".join(str(error).split()),
                         remedy="copy or download it again") from error
    return FunctionTokenizer(
        lambda text: tokenizer(text, truncation=False, add_special_tokens=False)["input_ids"],
        start=tokenizer.bos_token_id, end=tokenizer.eos_token_id, comma=tokenizer.get_vocab().get(",</w>"))
