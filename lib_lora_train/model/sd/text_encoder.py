"""The transformer of CLIP's text encoders (Radford et al. 2021, arXiv 2103.00020), over borrowed tensors.

One implementation for CLIP-L and OpenCLIP: `components.py` gives both Hugging Face's names.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lib_lora_train.errors import SettingError
from lib_lora_train.model.architecture import TextConfig
from lib_lora_train.model.ops.layers import NO_ADAPTERS, Adapters, Layers, attention
from lib_lora_train.model.ops.recipes import GELU

TOKEN_EMBEDDING = "text_model.embeddings.token_embedding"


class TextEncoder:
    """Token ids to a hidden state for each token and, on request, one pooled vector."""

    def __init__(self, tensors: Mapping[str, Tensor], config: TextConfig) -> None:
        """`tensors` under Hugging Face names ("text_model.encoder.layers.0.self_attn.q_proj.weight")."""
        self.config = config
        self.layers = Layers(tensors)
        self.tensors = self.layers.tensors

    @property
    def device(self) -> torch.device:
        """Where the token embeddings are, hence where tokens belong."""
        return self.layers.weight(TOKEN_EMBEDDING).device

    def __call__(self, tokens: Tensor, *, skip: int = 1, final_norm: bool = True, pooled: bool = False,
                 adapters: Adapters = NO_ADAPTERS, checkpointing: bool = False,
                 dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor | None]:
        """tokens [B, n ≤ 77] -> hidden states [B, n, C] and the pooled vector [B, P] or None, in `dtype`.

        skip: which layer's output: 1 the last, 2 the one before, …; layers behind it are not run unless `pooled` needs them.
        final_norm: whether the final layer norm is applied to it.
        pooled: whether to run all layers and project the normed state at the end token, which is the largest id.
        adapters: by module; tokens below zero are vectors of the one on the token embedding.
        checkpointing: recompute each layer in backward instead of keeping its activations.
        Raises SettingError for a `skip` beyond the embeddings.
        """
        layers = self.layers.adapted(adapters)
        used = self.config.layers - skip + 1
        if not 0 <= used <= self.config.layers:
            raise SettingError(f"A clip skip of {skip} is impossible",
                               why=f"the text encoder has {self.config.layers} layers", remedy="choose a smaller one")
        x = layers.embedding(TOKEN_EMBEDDING, tokens, dtype=dtype)
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        x = x + layers.embedding("text_model.embeddings.position_embedding", positions, dtype=dtype)

        hidden = x
        for index in range(self.config.layers if pooled else used):
            arguments = layers, f"text_model.encoder.layers.{index}", x, self.config
            x = checkpoint(transformer_layer, *arguments, use_reentrant=False, preserve_rng_state=False) \
                if checkpointing and torch.is_grad_enabled() else transformer_layer(*arguments)
            if index + 1 == used:
                hidden = x
        if final_norm:
            hidden = layers.layer_norm("text_model.final_layer_norm", hidden)
        return hidden, self._pool(layers, x, tokens) if pooled else None

    def _pool(self, layers: Layers, last: Tensor, tokens: Tensor) -> Tensor:
        at_end = last[torch.arange(last.shape[0], device=last.device), tokens.argmax(dim=-1)]
        return layers.linear("text_projection", layers.layer_norm("text_model.final_layer_norm", at_end), bias=False)


def transformer_layer(layers: Layers, name: str, x: Tensor, config: TextConfig) -> Tensor:
    """Causal self-attention and a feed-forward, each after its norm and beside a skip connection; x [B, n, C]."""
    q, k, v = layers.linears([f"{name}.self_attn.{part}_proj" for part in "qkv"], x,
                             recipe=layers.layer_normed(f"{name}.layer_norm1"))
    x = x + layers.linear(f"{name}.self_attn.out_proj", attention(q, k, v, heads=config.heads, causal=True))
    h = layers.linear(f"{name}.mlp.fc1", x, recipe=layers.layer_normed(f"{name}.layer_norm2"))
    return x + layers.linear(f"{name}.mlp.fc2", h, recipe=GELU(quick=config.activation == "quick_gelu"))
