"""Memory that forward may not hold on to, followed to its end: whoever held it, and however, would be noticed.

Hooks on what autograd saves do not see an attribute of an autograd function, which keeps as much.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from lib_lora_train.model.ops import convolution, linear
from lib_lora_train.model.ops.convolution import frozen_conv2d
from lib_lora_train.model.ops.linear import LowRank, frozen_linear, shared_linears
from lib_lora_train.model.ops.quantised import quantise
from lib_lora_train.model.ops.weights import Weight, dense
from tests.model.written_out import draws, nhwc


class Storages:
    """Weak references to the memory of tensors, which views of them hold as well."""

    def __init__(self) -> None:
        self._references: list[int] = []

    def watch(self, tensor: Tensor) -> Tensor:
        self._references.append(tensor.untyped_storage()._weak_ref())
        return tensor

    def __len__(self) -> int:
        return len(self._references)

    @property
    def alive(self) -> int:
        return sum(not torch.UntypedStorage._expired(reference) for reference in self._references)

    def close(self) -> None:
        for reference in self._references:
            torch.UntypedStorage._free_weak_ref(reference)


@pytest.fixture
def storages(monkeypatch: pytest.MonkeyPatch) -> Iterator[Storages]:
    """All that is made of weights is among them."""
    found = Storages()

    def watched(weight: Weight, dtype: torch.dtype) -> Tensor:
        made = dense(weight, dtype)
        return made if made is weight else found.watch(made)

    for module in (linear, convolution):
        monkeypatch.setattr(module, "dense", watched)
    yield found
    found.close()


def several(x: Tensor, weight: Weight) -> Tensor:
    return sum(shared_linears(x, [(weight, None)] * 2, [None] * 2))


def trained(x: Tensor, weight: Weight) -> Tensor:
    """Of the factors only B is trained, for which x is not needed."""
    down, up = draws(2, (2, 8), (8, 2), dtype=torch.float32)
    return shared_linears(x, [(weight, None)], [LowRank(down, up.requires_grad_(), 0.5)])[0]


def convolved(x: Tensor, weight: Weight) -> Tensor:
    return frozen_conv2d(x, weight, None, stride=1, padding=weight.shape[2] // 2)


# way: function, shape of x, shape of the weight
WAYS: dict[str, tuple[Callable[[Tensor, Weight], Tensor], tuple[int, ...], tuple[int, ...]]] = {
    "linear": (lambda x, weight: frozen_linear(x, weight, None), (3, 8), (8, 8)),
    "linears": (several, (3, 8), (8, 8)),
    "low rank": (trained, (3, 8), (8, 8)),
    "1x1": (lambda x, weight: convolved(nhwc(x), weight), (2, 8, 4, 6), (8, 8, 1, 1)),
    "3x3": (convolved, (2, 8, 4, 6), (8, 8, 3, 3)),
    "3x3, columns": (convolved, (2, 8, 4, 6), (8, 8, 3, 3)),
    "3x3, winograd": (lambda x, weight: convolved(nhwc(x), weight), (2, 8, 4, 6), (8, 8, 3, 3)),
}


@pytest.mark.parametrize("stored", ["fp32", "fp16", "int8"])
@pytest.mark.parametrize("way", WAYS)
def test_neither_the_input_nor_what_is_made_of_a_weight_outlives_forward(
        monkeypatch: pytest.MonkeyPatch, storages: Storages, way: str, stored: str) -> None:
    monkeypatch.setattr(convolution, "COLUMNS_FROM", 0 if "columns" in way else 2 ** 40)
    monkeypatch.setattr(convolution, "WINOGRAD_FROM", 0 if "winograd" in way else 2 ** 40)
    monkeypatch.setattr(convolution, "WINOGRAD_CHANNELS", 0)
    function, shape, kernel = WAYS[way]
    source, weight = draws(1, shape, kernel, dtype=torch.float32)
    if stored != "fp32":
        weight = weight.half() if stored == "fp16" else quantise(weight, "int8")
    source.requires_grad_()
    y = function(storages.watch(source * 1), weight)
    assert len(storages) > (stored != "fp32") and storages.alive == 0
    assert torch.autograd.grad(y.sum(), source)[0].any()  # the graph was there all the time


@pytest.mark.parametrize("what", ["input", "weight", "a view of the weight"])
@pytest.mark.parametrize("way, function, module", [
    ("linears", linear._SharedInput, linear), ("3x3", convolution._FrozenConv2d, convolution)])
def test_what_a_function_keeps_as_an_attribute_is_noticed(
        monkeypatch: pytest.MonkeyPatch, storages: Storages, way: str, function: type[torch.autograd.Function],
        module: object, what: str) -> None:
    forward, (compute, shape, kernel) = function.forward, WAYS[way]
    source, weight = draws(1, shape, kernel, dtype=torch.float32)
    weight = weight.half()

    def keeping(ctx: object, x: Tensor, *rest: object) -> object:
        ctx.mine = x if what == "input" else module.dense(weight, x.dtype)
        if "view" in what:
            ctx.mine = ctx.mine[1:]
        return forward(ctx, x, *rest)

    monkeypatch.setattr(function, "forward", staticmethod(keeping))
    y = compute(storages.watch(source.requires_grad_() * 1), weight)
    assert storages.alive == 1
    del y
    assert storages.alive == 0
