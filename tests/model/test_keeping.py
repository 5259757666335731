"""Memory that forward may not hold on to, followed to its end: whoever held it, and however, would be noticed.

Hooks on what autograd saves do not see an attribute of an autograd function, which keeps as much.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from lib_lora_train.model.ops import convolution, linear
from lib_lora_train.model.ops.convolution import frozen_conv2d
from lib_lora_train.model.ops.linear import LoRADelta, frozen_linear, shared_linears
from lib_lora_train.model.ops.quantised import quantise
from lib_lora_train.model.ops.weights import Weight, dense
from tests.model.plain_lora import draws, nhwc


class OnArray(torch.autograd.Function):
    """A tensor copied into an array."""

    @staticmethod
    def forward(ctx: object, tensor: Tensor, storages: Storages) -> Tensor:
        array = tensor.detach().numpy().copy(order="K")
        storages.arrays.append(weakref.ref(array))
        return torch.from_numpy(array)

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class Storages:
    """Knows which tensors' memory is still there: it belongs to arrays, which any view of the tensor keeps alive."""

    def __init__(self) -> None:
        self.arrays: list[weakref.ref[np.ndarray]] = []

    def watch(self, tensor: Tensor) -> Tensor:
        """A copy of it whose memory is followed; gradients go on to the tensor itself."""
        return OnArray.apply(tensor, self)

    @property
    def alive(self) -> int:
        return sum(array() is not None for array in self.arrays)


@pytest.fixture
def storages(monkeypatch: pytest.MonkeyPatch) -> Storages:
    """All that is made of weights is among them."""
    found = Storages()

    def watched(weight: Weight, dtype: torch.dtype) -> Tensor:
        made = dense(weight, dtype)
        return made if made is weight else found.watch(made)

    for module in (linear, convolution):
        monkeypatch.setattr(module, "dense", watched)
    return found


def several(x: Tensor, weight: Weight) -> Tensor:
    return sum(shared_linears(x, [(weight, None)] * 2, [None] * 2))


def trained(x: Tensor, weight: Weight) -> Tensor:
    """Of the factors only B is trained, for which x is not needed."""
    down, up = draws(2, (2, 8), (8, 2), dtype=torch.float32)
    return shared_linears(x, [(weight, None)], [LoRADelta(down, up.requires_grad_(), 0.5)])[0]


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
    assert len(storages.arrays) > (stored != "fp32") and storages.alive == 0
    assert torch.autograd.grad(y.sum(), source)[0].any()  # the graph was there all the time
