"""One LoRA layer, computed beside a frozen one as the model's `Layers` computes it."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from lib_lora_train.adapters.lora import LoRA, LoRALayer
from lib_lora_train.adapters.targets import Target
from lib_lora_train.model.ops.layers import Layers


def target(shape: tuple[int, ...]) -> Target:
    """A layer whose frozen weight has this shape."""
    return Target("unet", "it", "lora_unet_it", shape[1], shape[0], as_conv=False, kernel=shape[2:])


def layer_with_weights(*, inputs: int = 12, outputs: int = 20, rank: int = 4, alpha: float = 3.0) -> LoRALayer:
    generator = torch.Generator().manual_seed(7)
    layer = LoRA().build(target((outputs, inputs)), rank=rank, alpha=alpha, generator=generator)
    with torch.no_grad():
        layer.up.normal_(generator=generator)
    return layer


def computed(layer: LoRALayer, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    tensors = {"it.weight": weight} | ({} if bias is None else {"it.bias": bias})
    return Layers(tensors).adapted({"it": layer}).linear("it", x, bias=bias is not None)


def merged(layer: LoRALayer, weight: torch.Tensor) -> torch.Tensor:
    """W + alpha/r · B A, the weight that the WebUI computes with (arXiv 2106.09685, eq. 3), in fp64."""
    return weight + 3.0 / 4 * (layer.up.detach().double() @ layer.down.detach().double()).reshape(weight.shape)


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b).abs().max() / b.abs().max())


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.float16])
def test_a_linear_layer_equals_the_merged_weight(weight_dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    layer, x = layer_with_weights(), torch.randn(2, 5, 12, generator=generator)
    weight = torch.randn(20, 12, generator=generator).to(weight_dtype)
    bias = torch.randn(20, generator=generator).to(weight_dtype)
    expected = F.linear(x.double(), merged(layer, weight.double()), bias.double())
    assert relative(computed(layer, x, weight, bias), expected) < 1e-6


def test_a_1x1_convolution_is_computed_over_the_pixels_and_equals_the_merged_weight() -> None:
    generator = torch.Generator().manual_seed(2)
    layer, x = layer_with_weights(), torch.randn(2, 12, 6, 5, generator=generator)
    weight = torch.randn(20, 12, 1, 1, generator=generator)
    expected = F.conv2d(x.double(), merged(layer, weight.double()))
    assert relative(computed(layer, x.permute(0, 2, 3, 1), weight).permute(0, 3, 1, 2), expected) < 1e-6


@pytest.mark.parametrize(("kernel", "stride"), [(1, 1), (3, 1), (3, 2)])
def test_a_convolution_and_its_gradients_equal_the_merged_kernel(kernel: int, stride: int) -> None:
    generator = torch.Generator().manual_seed(5)
    shape = (20, 12, kernel, kernel)
    layer = LoRA().build(target(shape if kernel > 1 else shape[:2]), rank=4, alpha=3.0, generator=generator)
    with torch.no_grad():
        layer.up.normal_(generator=generator)
    x, weight, bias = (torch.randn(size, generator=generator) for size in ((2, 12, 6, 8), shape, (20,)))
    x.requires_grad_()
    layers = Layers({"it.weight": weight, "it.bias": bias}).adapted({"it": layer})
    y = layers.conv2d("it", x, stride=stride, padding=kernel // 2)
    exact = [tensor.detach().double().requires_grad_() for tensor in (x, layer.down, layer.up)]
    kernels = weight.double() + 3.0 / 4 * torch.einsum("or,r...->o...", exact[2], exact[1]).reshape(shape)
    expected = F.conv2d(exact[0], kernels, bias.double(), stride=stride, padding=kernel // 2)
    assert relative(y, expected) < 1e-5
    found = torch.autograd.grad(y.square().sum(), (x, layer.down, layer.up))
    right = torch.autograd.grad(expected.square().sum(), exact)
    assert all(relative(a, b) < 1e-5 for a, b in zip(found, right, strict=True))


@pytest.mark.parametrize("shape", [(8, 400), (8, 40, 3, 3)])
def test_the_cost_is_the_number_of_weights_and_a_product_and_a_sum_with_each(shape: tuple[int, ...]) -> None:
    layer = LoRA().build(target(shape), rank=16, alpha=1, generator=torch.Generator())
    weights = sum(weight.numel() for weight in layer.parameters())
    assert LoRA().cost(target(shape), rank=16) == weights


class Doubled:
    """An adapter that computes the whole layer."""

    def linear(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return 2 * F.linear(x, weight, bias)


def test_layers_of_one_input_may_be_frozen_trained_or_somebody_elses() -> None:
    generator = torch.Generator().manual_seed(4)
    layer, x = layer_with_weights(), torch.randn(5, 12, generator=generator)
    q, k, v = torch.randn(3, 20, 12, generator=generator)
    layers = Layers({"q.weight": q, "k.weight": k, "v.weight": v}).adapted({"q": layer, "v": Doubled()})
    expected = F.linear(x.double(), merged(layer, q.double())), F.linear(x, k), F.linear(x, 2 * v)
    for ours, right in zip(layers.linears(["q", "k", "v"], x, bias=False), expected, strict=True):
        assert relative(ours, right) < 1e-6


def test_gradients_equal_those_of_the_merged_weight() -> None:
    generator = torch.Generator().manual_seed(3)
    layer, x, weight = layer_with_weights(), torch.randn(9, 12, generator=generator), torch.randn(20, 12)
    computed(layer, x, weight).square().sum().backward()
    a, b = (side.detach().double().requires_grad_() for side in (layer.down, layer.up))
    F.linear(x.double(), weight.double() + 3.0 / 4 * b @ a).square().sum().backward()
    assert relative(layer.down.grad, a.grad) < 1e-5
    assert relative(layer.up.grad, b.grad) < 1e-5


def test_a_new_layer_changes_nothing_and_starts_within_kaimings_bound() -> None:
    layer = LoRA().build(target((8, 400)), rank=16, alpha=1, generator=torch.Generator().manual_seed(0))
    reference = torch.empty(16, 400)
    torch.nn.init.kaiming_uniform_(reference, a=math.sqrt(5))
    assert not layer.up.any()
    assert float(layer.down.abs().max()) == pytest.approx(float(reference.abs().max()), rel=1e-2)
    assert float(layer.down.std()) == pytest.approx(float(reference.std()), rel=0.05)
    assert layer.down.dtype == layer.up.dtype == torch.float32


def test_weight_zero_is_bit_for_bit_the_frozen_layer() -> None:
    layer, x, weight = layer_with_weights(), torch.randn(3, 12), torch.randn(20, 12)
    layer.multiplier = 0.0
    assert torch.equal(computed(layer, x, weight), F.linear(x, weight))


def test_half_precision_activations_train_fp32_weights() -> None:
    layer, x = layer_with_weights(), torch.randn(3, 12, dtype=torch.bfloat16)
    result = computed(layer, x, torch.randn(20, 12, dtype=torch.bfloat16))
    result.float().sum().backward()
    assert result.dtype == torch.bfloat16
    assert layer.down.grad.dtype == layer.up.grad.dtype == torch.float32
