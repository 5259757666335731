"""Frozen layers over borrowed tensors, and the adapters that change them.

A `Layers` computes `F.linear`, `F.conv2d` and the norms on the host's tensors, addressed by name:

- It copies no weight, except in `replace`, `lay_out_channels_last` and `begin_swap`. A weight whose dtype differs from the
  activation's is cast for one call: autograd keeps the borrowed tensor, and backward casts it once more.
- It computes no gradient of a weight. The tensors are detached views, so `requires_grad` of the host's parameters
  neither matters nor changes.
- It runs no method of the host's modules, hence none of the host's patches.

Do not call it under autocast: the dtype of the activations is that of the computation.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor

from lib_lora_train.model.architecture import incomplete
from lib_lora_train.model.ops.block_swap import BlockSwap, Swapped
from lib_lora_train.model.ops.convolution import conv2d_delta, frozen_conv2d
from lib_lora_train.model.ops.linear import LoRADelta, frozen_linear, shared_linears
from lib_lora_train.model.ops.recipes import GroupNorm, LayerNorm, Recipe, made
from lib_lora_train.model.ops.weights import Weight, borrowed


def attention(q: Tensor, k: Tensor, v: Tensor, *, heads: int, causal: bool = False) -> Tensor:
    """softmax(q kᵀ / √d) v for each head; q [B, n, heads·d], k and v [B, m, heads·d] -> [B, n, heads·d]."""
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2).flatten(-2)


class LayerAdapter(Protocol):
    """An adapter that computes the whole adapted layer.

    `weight` and `bias` are the borrowed tensors in their own dtype, which may differ from `x.dtype`: use
    `frozen_linear` and `frozen_conv2d`, which deal with that. The results have `x.dtype`.
    """

    def linear(self, x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
        """x [..., in], weight [out, in] or [out, in, 1, 1], bias [out] -> [..., out]."""

    def conv2d(self, x: Tensor, weight: Weight, bias: Tensor | None, *, stride: int, padding: int) -> Tensor:
        """x [B, in, h, w], weight [out, in, k, k], bias [out] -> [B, out, h', w']."""


@runtime_checkable
class DeltaAdapter(Protocol):
    """An adapter that adds a low-rank product to the frozen layer; layers of one input are then computed together."""

    def delta(self) -> LoRADelta | None:
        """What is added to the frozen layer; None for nothing."""


class EmbeddingAdapter(Protocol):
    """Vectors beside a frozen embedding's rows: the id -1 - k is the k-th.

    words   (word, number of its vectors), in the order of the vectors
    """

    words: Sequence[tuple[str, int]]

    def vectors(self) -> Tensor:
        """[n, C]; asked where there are words."""


@functools.cache
def _adds_delta(kind: type) -> bool:
    """Whether adapters of this class (or NoneType) are `DeltaAdapter`s; asked for each layer of each step."""
    return issubclass(kind, DeltaAdapter)


Adapter = DeltaAdapter | LayerAdapter | EmbeddingAdapter
Adapters = Mapping[str, Adapter]
NO_ADAPTERS: Adapters = MappingProxyType({})


def adapted_linear(adapter: Adapter | None, x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
    """A linear layer of x [..., in] by itself, with its adapter -> [..., out]."""
    if adapter is not None and not _adds_delta(type(adapter)):
        return adapter.linear(x, weight, bias)
    return shared_linears(x, [(weight, bias)], [None if adapter is None else adapter.delta()])[0]


def adapted_conv2d(adapter: Adapter | None, x: Tensor, weight: Weight, bias: Tensor | None, *, stride: int,
                   padding: int) -> Tensor:
    """A convolution of x [B, in, h, w] with its adapter -> [B, out, h', w']."""
    if adapter is not None and not _adds_delta(type(adapter)):
        return adapter.conv2d(x, weight, bias, stride=stride, padding=padding)
    y = frozen_conv2d(x, weight, bias, stride=stride, padding=padding)
    delta = None if adapter is None else adapter.delta()
    return y if delta is None else y + conv2d_delta(x, delta, stride=stride, padding=padding)


class Layers:
    """Borrowed tensors by local name ("input_blocks.1.0.in_layers.2.weight"), and the layers made of them."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._weights: dict[str, Weight] = {name: borrowed(tensor) for name, tensor in tensors.items()}
        self._own: dict[str, torch.device] = {}  # the devices of our copies
        self._swap: BlockSwap | None = None
        self.released = False
        """Between `release` and `rebind`, while `tensors` are at most our own copies."""
        self.tensors: Mapping[str, Weight] = MappingProxyType(self._weights)
        self._adapters = NO_ADAPTERS

    def release(self) -> None:
        """Hold none of the host's memory and nothing on its device until `rebind`; nothing can be computed meanwhile."""
        self.released = True
        for name in tuple(self._weights):
            if name in self._own:
                self._weights[name] = self._weights[name].to("cpu")
            else:
                del self._weights[name]
        if self._swap is not None:
            self._swap.release()

    def rebind(self, tensors: Mapping[str, Tensor]) -> None:
        """Compute on these tensors from now on: the same weights at their present place. What was replaced stays so."""
        for name, device in self._own.items():
            if not isinstance(weight := self._weights[name], Swapped):
                self._weights[name] = self._placed(name, weight, device)
        for name, tensor in tensors.items():
            if name not in self._own and not self._is_placed(name, tensor):
                self._weights[name] = self._placed(name, borrowed(tensor), tensor.device)
        self.released = False

    def replace(self, weights: Mapping[str, Weight]) -> None:
        """Compute with these copies (quantised, or of another memory layout) of the borrowed tensors of the same names,
        which are held no longer and which `rebind` does not bring back."""
        assert weights.keys() <= self._weights.keys(), "only weights that are there can be replaced"
        self._own.update({name: weight.device for name, weight in weights.items()})
        self._weights.update({name: self._placed(name, weight, weight.device) for name, weight in weights.items()})

    def begin_swap(self, swap: BlockSwap) -> None:
        """From now on kernels of its blocks wait on the CPU, and the rest is on its device: copies of tensors that their owner
        has elsewhere."""
        self._swap = swap
        for name, weight in tuple(self._weights.items()):
            self._weights[name] = swap.placed(name, weight)

    def end_swap(self) -> None:
        """Leave the waiting weights alone, which their owner may then move. Nothing can be computed afterwards."""
        if self._swap is not None:
            self._swap.release()

    def lay_out_channels_last(self) -> None:
        """Replace convolutions' kernels above 1x1 by copies in NHWC order, where they are not in it."""
        kernels = {name: weight for name, weight in self._weights.items()
                   if isinstance(weight, Tensor) and weight.ndim == 4 and weight.shape[2:] != (1, 1)}
        self.replace({name: kernel.contiguous(memory_format=torch.channels_last) for name, kernel in kernels.items()
                      if not kernel.is_contiguous(memory_format=torch.channels_last)})

    @property
    def copied_bytes(self) -> int:
        """Bytes of the weights that were replaced by copies."""
        return sum(self._weights[name].nbytes for name in self._own)

    @property
    def swap_bytes(self) -> int:
        """Bytes on the device for weights that wait on the CPU."""
        return 0 if self._swap is None else self._swap.device_bytes

    def adapted(self, adapters: Adapters) -> Layers:
        """The same tensors, with `adapters` by module name on their layers."""
        other = copy.copy(self)
        other._adapters = adapters
        return other

    def has(self, name: str) -> bool:
        """Whether the module `name` has a weight."""
        return f"{name}.weight" in self.tensors

    def weight(self, name: str) -> Weight:
        """The weight of the module `name`; ModelError where the checkpoint lacks it."""
        return self._tensor(f"{name}.weight")

    def bias(self, name: str) -> Tensor:
        """The borrowed bias of the module `name`; ModelError where the checkpoint lacks it."""
        return self._tensor(f"{name}.bias")

    def linear(self, name: str, source: Tensor, *, bias: bool = True, recipe: Recipe | None = None) -> Tensor:
        """x [..., in] -> [..., out]; `bias` says whether the architecture has one here.

        source: x, or what `recipe` makes it of, and then autograd keeps no x.
        """
        return self.linears([name], source, bias=bias, recipe=recipe)[0]

    def linears(self, names: Sequence[str], source: Tensor, *, bias: bool = True,
                recipe: Recipe | None = None) -> tuple[Tensor, ...]:
        """The outputs of several layers for one x, which is kept once and whose gradient is added up in one buffer.

        Where a `LayerAdapter` computes one of them, each is computed by itself.
        """
        adapters = [self._adapters.get(name) for name in names]
        frozen = [(self.weight(name), self.bias(name) if bias else None) for name in names]
        deltas = [adapter.delta() if _adds_delta(type(adapter)) else None for adapter in adapters]
        whole = [adapter is not None and not _adds_delta(type(adapter)) for adapter in adapters]
        if any(whole):
            x = source if recipe is None else made(recipe, source)
            return tuple(adapted_linear(adapter, x, *layer) for layer, adapter in zip(frozen, adapters, strict=True))
        if recipe is None and deltas == [None]:
            return (frozen_linear(source, *frozen[0]),)
        return shared_linears(source, frozen, deltas, recipe=recipe)

    def conv2d(self, name: str, x: Tensor, *, stride: int = 1, padding: int = 0) -> Tensor:
        """x [B, in, h, w] -> [B, out, h', w']."""
        return adapted_conv2d(self._adapters.get(name), x, self.weight(name), self.bias(name), stride=stride, padding=padding)

    def layer_normed(self, name: str) -> LayerNorm:
        """The layer norm `name` as a recipe for `linear` and `linears`."""
        return LayerNorm(self.weight(name), self.bias(name))

    def group_normed(self, name: str, *, eps: float, silu: bool = False, rows: bool = False) -> GroupNorm:
        """The group norm `name` as a recipe; `rows` makes [B, h·w, C] of its image."""
        return GroupNorm(self.weight(name), self.bias(name), eps, silu=silu, rows=rows)

    def group_norm(self, name: str, x: Tensor, *, eps: float, silu: bool = False) -> Tensor:
        """Thirty-two groups of x [B, C, h, w], computed in fp32 whatever x's dtype, and a SiLU after it where asked for."""
        return made(self.group_normed(name, eps=eps, silu=silu), x)

    def layer_norm(self, name: str, x: Tensor) -> Tensor:
        """Over the last dimension, computed in fp32 whatever x's dtype; x [..., C]."""
        return made(self.layer_normed(name), x)

    def embedding(self, name: str, ids: Tensor, *, dtype: torch.dtype) -> Tensor:
        """ids [...] (integers) -> [..., C] in `dtype`; only the rows that are looked up are cast. Where an `EmbeddingAdapter`
        has words, ids below zero are its vectors."""
        adapter = self._adapters.get(name)
        if adapter is None or not adapter.words:
            return F.embedding(ids, self.weight(name)).to(dtype)
        rows = F.embedding(ids.clamp(min=0), self.weight(name)).to(dtype)
        own = F.embedding((-1 - ids).clamp(min=0), adapter.vectors().to(dtype))
        return torch.where((ids < 0).unsqueeze(-1), own, rows)

    def _is_placed(self, name: str, tensor: Tensor) -> bool:
        """Whether what is held in the place of the owner's tensor stands for it where that lies now."""
        weight = self._weights.get(name)
        if self._swap is None or weight is None:
            return False
        return not isinstance(weight, Swapped) or weight.values.data_ptr() == tensor.data_ptr()

    def _placed(self, name: str, weight: Weight, device: torch.device) -> Weight:
        """The weight on `device`, or where block swapping wants it."""
        return weight.to(device) if self._swap is None else self._swap.placed(name, weight)

    def _tensor(self, name: str) -> Weight:
        try:
            return self.tensors[name]
        except KeyError:
            raise incomplete(name) from None
