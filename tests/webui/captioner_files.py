"""The files of the WebUI's own captioners under their real names and keys, with numbers made up: a few kilobytes each.

Every tensor is one number seen many times (stride 0), which torch keeps as one number.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import torch

TAGS = 9176
WORD = "cat"
_VOCABULARY, _WIDTH, _DEEP, _LAYERS = 30524, 768, 3072, 12
_CONVOLUTION = re.compile(
    r"self\.(\w+) = nn\.Conv2d\(kernel_size=\((\d+), (\d+)\), in_channels=(\d+), out_channels=(\d+)")


def write_deepdanbooru(models: Path, webui: Path) -> list[str]:
    """DeepDanbooru's file below a models folder; returns its tags. Each tag's score rises or falls with the brightness.

    The shapes are read from the WebUI's own definition. Each convolution averages and quarters, so that the branches fade
    and what passes by them stays.
    """
    source = (webui / "modules" / "deepbooru_model.py").read_text(encoding="utf-8")
    weights: dict[str, object] = {}
    for name, *numbers in _CONVOLUTION.findall(source):
        high, wide, inside, outside = map(int, numbers)
        weights[f"{name}.weight"] = _many(0.25 / (inside * high * wide), outside, inside, high, wide)
        weights[f"{name}.bias"] = _many(0, outside)
    # The last one gives the tags; it has no bias.
    assert weights.pop(f"{name}.bias").shape == (TAGS,)
    weights[f"{name}.weight"] = torch.linspace(-2, 2, TAGS).view(TAGS, 1, 1, 1).expand(TAGS, inside, 1, 1)
    tags = [f"tag_{number}" for number in range(TAGS - 3)] + ["rating:safe", "rating:questionable", "rating:explicit"]
    folder = models / "torch_deepdanbooru"
    folder.mkdir(parents=True)
    torch.save({**weights, "tags": tags}, folder / "model-resnet_custom_v3.pt")
    return tags


def write_blip(models: Path) -> None:
    """BLIP's file below a models folder: a captioner to which everything is a `WORD`."""
    likely = torch.zeros(_VOCABULARY)
    likely[_words().index(WORD)] = 10
    weights = {name: _many(0, *shape) for name, shape in _blip_shapes()}
    weights |= {"text_decoder.cls.predictions.bias": likely, "text_decoder.cls.predictions.decoder.bias": likely}
    weights["text_decoder.bert.embeddings.position_ids"] = torch.arange(512)[None]
    folder = models / "BLIP"
    folder.mkdir(parents=True)
    torch.save({"model": weights}, folder / "model_base_caption_capfilt_large.pth")


def write_bert_tokenizer(hub: Path) -> None:
    """BLIP's tokenizer in a cache of the Hugging Face libraries, with made-up words."""
    commit = "0" * 40
    model = hub / "models--bert-base-uncased"
    (model / "snapshots" / commit).mkdir(parents=True)
    (model / "snapshots" / commit / "vocab.txt").write_text("\n".join(_words()), encoding="utf-8")
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text(commit, encoding="utf-8")


def _words() -> list[str]:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "picture", "of", WORD]
    # BLIP adds two special ones itself.
    return words + [f"word{number}" for number in range(_VOCABULARY - 2 - len(words))]


def _blip_shapes() -> Iterator[tuple[str, tuple[int, ...]]]:
    """BLIP's "base" captioner (models/blip.py, BLIP_Decoder): ViT-B/16 at 384 pixels, BERT with cross-attention."""
    def linear(name: str, outside: int, inside: int = _WIDTH) -> Iterator[tuple[str, tuple[int, ...]]]:
        yield from ((f"{name}.weight", (outside, inside)), (f"{name}.bias", (outside,)))

    def norm(name: str) -> Iterator[tuple[str, tuple[int, ...]]]:
        yield from ((f"{name}.weight", (_WIDTH,)), (f"{name}.bias", (_WIDTH,)))

    eye, bert = "visual_encoder", "text_decoder.bert"
    yield from ((f"{eye}.cls_token", (1, 1, _WIDTH)), (f"{eye}.pos_embed", (1, 577, _WIDTH)))
    yield from ((f"{eye}.patch_embed.proj.weight", (_WIDTH, 3, 16, 16)), (f"{eye}.patch_embed.proj.bias", (_WIDTH,)))
    yield from norm(f"{eye}.norm")
    yield from ((f"{bert}.embeddings.{table}_embeddings.weight", (rows, _WIDTH))
                for table, rows in (("word", _VOCABULARY), ("position", 512)))
    yield from norm(f"{bert}.embeddings.LayerNorm")
    for number in range(_LAYERS):
        block, layer = f"{eye}.blocks.{number}", f"{bert}.encoder.layer.{number}"
        yield from (*norm(f"{block}.norm1"), *norm(f"{block}.norm2"))
        yield from (*linear(f"{block}.attn.qkv", 3 * _WIDTH), *linear(f"{block}.attn.proj", _WIDTH))
        yield from (*linear(f"{block}.mlp.fc1", _DEEP), *linear(f"{block}.mlp.fc2", _WIDTH, _DEEP))
        for attention in (f"{layer}.attention", f"{layer}.crossattention"):
            for part in ("self.query", "self.key", "self.value", "output.dense"):
                yield from linear(f"{attention}.{part}", _WIDTH)
            yield from norm(f"{attention}.output.LayerNorm")
        yield from (*linear(f"{layer}.intermediate.dense", _DEEP), *linear(f"{layer}.output.dense", _WIDTH, _DEEP))
        yield from norm(f"{layer}.output.LayerNorm")
    head = "text_decoder.cls.predictions"
    yield from (*linear(f"{head}.transform.dense", _WIDTH), *norm(f"{head}.transform.LayerNorm"))
    yield from ((f"{head}.bias", (_VOCABULARY,)), *linear(f"{head}.decoder", _VOCABULARY))


def _many(value: float, *shape: int) -> torch.Tensor:
    return torch.full((1,), float(value)).expand(shape)
