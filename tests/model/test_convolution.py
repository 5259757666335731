"""Frozen convolutions give torch's numbers whichever way they are computed, in either order of memory."""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lib_lora_train.model.ops import convolution, winograd
from lib_lora_train.model.ops.convolution import frozen_conv2d
from lib_lora_train.model.ops.layers import Layers
from tests.model import plain_lora
from tests.model.plain_lora import nhwc

ORDERS = {"NCHW": torch.Tensor.contiguous, "NHWC": nhwc}
draws = functools.partial(plain_lora.draws, 1, dtype=torch.float32)


@pytest.mark.parametrize("way", ["columns", "winograd", "x reordered", "torch"])
@pytest.mark.parametrize("kernels", ORDERS)
@pytest.mark.parametrize("images", ORDERS)
@pytest.mark.parametrize("images_at_once, stride, padding, size", [
    (1, 1, 1, 3), (3, 1, 1, 3), (2, 2, 1, 3), (1, 2, 0, 3), (2, 1, 0, 1)])
def test_every_way_gives_torchs_numbers_in_the_order_of_image_or_kernel(
        monkeypatch: pytest.MonkeyPatch, way: str, kernels: str, images: str, images_at_once: int, stride: int, padding: int,
        size: int) -> None:
    monkeypatch.setattr(convolution, "COLUMNS_FROM", 0 if way == "columns" else 2 ** 40)
    monkeypatch.setattr(convolution, "WINOGRAD_FROM", 0 if way == "winograd" else 2 ** 40)
    monkeypatch.setattr(convolution, "WINOGRAD_CHANNELS", 0)
    monkeypatch.setattr(convolution, "reordering_x_is_cheaper", lambda *_: way == "x reordered")
    x, weight, bias = draws((images_at_once, 6, 10, 8), (10, 6, size, size), (10,))
    x, weight = ORDERS[images](x).requires_grad_(), ORDERS[kernels](weight)
    expected = F.conv2d(x, weight, bias, stride=stride, padding=padding)
    ours = frozen_conv2d(x, weight, bias, stride=stride, padding=padding)
    assert torch.allclose(ours, expected, atol=1e-5)
    direction = ORDERS[images](draws(tuple(ours.shape))[0])
    (found,), (right,) = (torch.autograd.grad(y, x, direction) for y in (ours, expected))
    assert torch.allclose(found, right, atol=1e-5)
    turned = images == "NHWC" or kernels == "NHWC" and size > 1  # a 1x1 kernel has no order
    assert ours.is_contiguous(memory_format=torch.channels_last if turned else torch.contiguous_format)
    assert found.is_contiguous(memory_format=torch.channels_last if images == "NHWC" else torch.contiguous_format)


class Copies(TorchDispatchMode):
    """Counts the copies that a block makes of images."""

    made = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.made += function in (torch.ops.aten.clone.default, torch.ops.aten.copy_.default) and args[0].ndim == 4
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("stride", [1, 2])
def test_the_gradient_of_an_nhwc_image_is_made_in_that_order_without_a_copy(stride: int) -> None:
    x, weight = draws((1, 8, 7, 12), (6, 8, 3, 3))
    x = nhwc(x).requires_grad_()
    y = frozen_conv2d(x, weight, None, stride=stride, padding=1)
    direction = nhwc(torch.ones(y.shape))
    with Copies() as copies:
        (gradient,) = torch.autograd.grad(y, x, direction)
    assert copies.made == 0 and gradient.is_contiguous(memory_format=torch.channels_last)


def test_wide_kernels_meet_few_pixels_as_columns_and_others_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    unfolded = []
    fold = F.unfold
    monkeypatch.setattr(convolution.F, "unfold", lambda x, *rest, **named: unfolded.append(x.shape) or fold(x, *rest, **named))
    for width, side in ((1280, 8), (1280, 24), (320, 8)):
        kernel = torch.zeros(width, width, 3, 3)
        frozen_conv2d(nhwc(torch.zeros(1, width, side, side)), kernel, None, stride=1, padding=1)
    assert unfolded == [(1, 1280, 8, 8)]


@pytest.mark.parametrize("height, width", [(2, 2), (4, 6), (10, 34), (64, 8)])
@pytest.mark.parametrize("kernel_numbers", [1, 2 ** 24])
def test_fewer_multiplications_give_the_exact_numbers_within_rounding(
        monkeypatch: pytest.MonkeyPatch, height: int, width: int, kernel_numbers: int) -> None:
    monkeypatch.setattr(winograd, "KERNEL_BYTES", kernel_numbers * 16 * 4)  # of one channel a piece, or of all of them
    monkeypatch.setattr(winograd, "TILES_A_BAND", 40)
    x, kernel, bias, direction = draws((2, 5, height, width), (7, 5, 3, 3), (7,), (2, 7, height, width))
    exact = x.double().requires_grad_()
    expected = F.conv2d(exact, kernel.double(), bias.double(), padding=1)
    (gradient,) = torch.autograd.grad(expected, exact, direction.double())
    rows = [t.permute(0, 2, 3, 1).contiguous() for t in (x, direction)]
    found = winograd.convolved(rows[0], kernel, bias), winograd.differentiated(rows[1], kernel)
    for ours, right in zip(found, (expected, gradient), strict=True):
        assert (ours.permute(0, 3, 1, 2) - right).abs().max() <= 2e-6 * right.abs().max()


# --- copies that are asked for ----------------------------------------------------------------------------------------

def tensors() -> dict[str, Tensor]:
    wide, turned, small, matrix, bias = draws((8, 4, 3, 3), (4, 8, 3, 3), (8, 8, 1, 1), (5, 8), (8,))
    return {"wide.weight": wide, "wide.bias": bias, "turned.weight": nhwc(turned), "small.weight": small,
            "matrix.weight": matrix}


def test_nothing_is_copied_unless_it_is_asked_for() -> None:
    lent = tensors()
    layers = Layers(lent)
    assert layers.copied_bytes == 0
    assert all(layers.tensors[name].data_ptr() == tensor.data_ptr() for name, tensor in lent.items())


def test_laying_out_in_nhwc_order_copies_the_kernels_that_lie_otherwise_and_counts_them() -> None:
    lent = tensors()
    layers = Layers(lent)
    layers.lay_out_channels_last()
    assert layers.copied_bytes == 8 * 4 * 9 * 4
    copied = {name for name, tensor in layers.tensors.items() if tensor.data_ptr() != lent[name].data_ptr()}
    assert copied == {"wide.weight"} and layers.weight("wide").is_contiguous(memory_format=torch.channels_last)
    assert all(torch.equal(layers.tensors[name], tensor) for name, tensor in lent.items())
    x = draws((1, 4, 6, 6))[0]
    assert torch.allclose(layers.conv2d("wide", x, padding=1), Layers(lent).conv2d("wide", x, padding=1), atol=1e-6)


def test_what_was_replaced_stays_when_the_rest_is_let_go_and_lent_anew() -> None:
    layers, lent = Layers(tensors()), tensors()
    own = torch.ones(5, 8)
    layers.replace({"matrix.weight": own})
    layers.release()
    assert set(layers.tensors) == {"matrix.weight"} and layers.copied_bytes == own.nbytes
    layers.rebind(lent)
    assert layers.weight("matrix") is own and set(layers.tensors) == set(lent)
    assert layers.weight("wide").data_ptr() == lent["wide.weight"].data_ptr()


@dataclasses.dataclass(frozen=True)
class OnGPU:
    """A weight that says it is on a GPU, of which this machine may have none."""

    device: torch.device = torch.device("cuda", 1)
    nbytes: int = 40

    def to(self, device: torch.device | str) -> OnGPU:
        return OnGPU(torch.device(device))


def test_what_replaced_the_lenders_leaves_the_gpu_with_it_and_comes_back() -> None:
    layers, lent = Layers(tensors()), tensors()
    layers.replace({"matrix.weight": OnGPU()})
    layers.release()
    assert layers.tensors == {"matrix.weight": OnGPU(torch.device("cpu"))}
    layers.rebind(lent)
    assert layers.weight("matrix") == OnGPU() and layers.copied_bytes == 40


def test_what_is_replaced_is_no_longer_held() -> None:
    lent = tensors()
    layers = Layers(lent)
    adapted = layers.adapted({})
    layers.replace({"wide.weight": torch.zeros(8, 4, 3, 3)})
    assert not any(tensor.data_ptr() == lent["wide.weight"].data_ptr() for tensor in layers.tensors.values())
    assert adapted.weight("wide") is layers.weight("wide") and adapted.copied_bytes == layers.copied_bytes
