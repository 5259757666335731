"""The product's own UNet, autoencoder and text encoder, with weights that can be trained.

The graph is the one that trains LoRAs, so what is learnt here is generated alike there. Only the layers differ: these are
leaves with gradients, kept in fp32 and cast to the activations' dtype for each call.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

from lib_lora_train.model.ops.layers import Adapters, Layers
from lib_lora_train.model.ops.recipes import Recipe
from lib_lora_train.model.sd import text_encoder, unet, vae


class TrainedLayers(Layers):
    """Layers over tensors that take part in autograd: all is computed by torch's own functions, which know how to."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__({})
        self.tensors = dict(tensors)

    def adapted(self, adapters: Adapters) -> Layers:
        """Itself: here the layers are trained, not what is laid over them."""
        assert not adapters
        return self

    def linears(self, names: Sequence[str], source: Tensor, *, bias: bool = True,
                recipe: Recipe | None = None) -> tuple[Tensor, ...]:
        """The outputs of several layers for one x; SD1's 1x1 convolutions are among them."""
        x = source if recipe is None else _plain(recipe, source)
        return tuple(F.linear(x, self.weight(name).flatten(1).to(x.dtype), self.bias(name).to(x.dtype) if bias else None)
                     for name in names)

    def conv2d(self, name: str, x: Tensor, *, stride: int = 1, padding: int = 0) -> Tensor:
        """x [B, in, h, w] -> [B, out, h', w']."""
        return F.conv2d(x, self.weight(name).to(x.dtype), self.bias(name).to(x.dtype), stride=stride, padding=padding)

    def group_norm(self, name: str, x: Tensor, *, eps: float, silu: bool = False) -> Tensor:
        """x [B, C, h, w] -> the same."""
        return _plain(self.group_normed(name, eps=eps, silu=silu), x)

    def layer_norm(self, name: str, x: Tensor) -> Tensor:
        """x [..., C] -> the same."""
        return _plain(self.layer_normed(name), x)


def _plain(recipe: Recipe, source: Tensor) -> Tensor:
    return recipe.finish(source, recipe.known(source))


class TrainedUNet(unet.UNet):
    """The UNet over trained tensors (local names)."""

    def __init__(self, frozen: unet.UNet, tensors: Mapping[str, Tensor]) -> None:
        super().__init__({}, frozen.config)
        self.layers = TrainedLayers(tensors)


class TrainedTextEncoder(text_encoder.TextEncoder):
    """The text encoder over trained tensors (local names)."""

    def __init__(self, frozen: text_encoder.TextEncoder, tensors: Mapping[str, Tensor]) -> None:
        super().__init__({}, frozen.config)
        self.layers = TrainedLayers(tensors)


class TrainedVAE(vae.VAE):
    """The autoencoder over trained tensors (local names); its encode and decode build a graph."""

    def __init__(self, frozen: vae.VAE, tensors: Mapping[str, Tensor]) -> None:
        super().__init__({}, frozen.config)
        self.layers = TrainedLayers(tensors)

    def moments(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """As `encode`, with gradients."""
        return vae.VAE.encode.__wrapped__(self, pixels, dtype=pixels.dtype)  # type: ignore[attr-defined]

    def sample(self, latents: Tensor) -> Tensor:
        """As `decode`, with gradients."""
        return vae.VAE.decode.__wrapped__(self, latents, dtype=latents.dtype)  # type: ignore[attr-defined]


@contextmanager
def plain_attention() -> Iterator[None]:
    """On a CPU, attention over few rows with narrow heads written out as two products: twice as fast as torch's kernel."""
    def written_out(q: Tensor, k: Tensor, v: Tensor, *, heads: int, causal: bool = False) -> Tensor:
        q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
        scores = torch.matmul(q * q.shape[-1] ** -0.5, k.transpose(-1, -2))
        if causal:
            scores = scores + torch.full(scores.shape[-2:], float("-inf"), dtype=scores.dtype, device=scores.device).triu(1)
        return torch.matmul(scores.softmax(-1), v).transpose(1, 2).flatten(-2)

    modules = (unet, text_encoder, vae)
    before = [module.attention for module in modules]  # type: ignore[attr-defined]
    try:
        for module in modules:
            module.attention = written_out  # type: ignore[attr-defined]
        yield
    finally:
        for module, attention in zip(modules, before, strict=True):
            module.attention = attention  # type: ignore[attr-defined]


class Average:
    """An exponential moving average of weights, which samples better than the weights of the last step."""

    def __init__(self, tensors: Mapping[str, Tensor], decay: float) -> None:
        self.tensors = {name: tensor.detach().clone() for name, tensor in tensors.items()}
        self._decay, self._updates = decay, 0

    @torch.no_grad()
    def update(self, tensors: Mapping[str, Tensor]) -> None:
        """Move towards `tensors`; in the first updates faster, so that the random beginning is soon forgotten."""
        self._updates += 1
        weight = 1 - min(self._decay, (1 + self._updates) / (10 + self._updates))
        for average, tensor in zip(self.tensors.values(), tensors.values(), strict=True):
            average.lerp_(tensor, weight)

    def state(self) -> dict[str, object]:
        """What `restore` needs."""
        return {"tensors": self.tensors, "updates": self._updates}

    def restore(self, state: Mapping[str, object]) -> None:
        """Continue from `state`."""
        self.tensors, self._updates = state["tensors"], state["updates"]  # type: ignore[assignment]
