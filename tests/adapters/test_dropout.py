"""What is left out in training is kohya's, at random but the same again, however a step is cut."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lib_lora_train.adapters.dropout import DropoutKeys, DropoutRates, DroppedLayer
from lib_lora_train.adapters.lora import LoRALayer
from lib_lora_train.adapters.oft import OFTLayer
from lib_lora_train.model.ops.layers import Adapter, adapted_linear

RANK, ROWS, PIXELS = 8, 4, 50


def draws(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


LAYER = LoRALayer(draws(RANK, 12), draws(20, RANK, seed=1), alpha=4)
X, WEIGHT, BIAS = draws(ROWS, PIXELS, 12, seed=2), draws(20, 12, seed=3), draws(20, seed=4)
KEYS = torch.tensor([[row * 7919 + 5, 99] for row in range(ROWS)])


def computed(rates: DropoutRates, x: Tensor = X, keys: Tensor | None = KEYS, *, layer: Adapter = LAYER,
             number: int = 3) -> Tensor:
    holder = DropoutKeys()
    holder.keys = keys
    return DroppedLayer(layer, rates, holder, number=number).linear(x, WEIGHT, BIAS)


def between(y: Tensor) -> Tensor:
    """The numbers [B, n, r] between A and B that an output was made of, beside those of nothing left out."""
    change = (y - F.linear(X, WEIGHT, BIAS)) / LAYER.scale
    solved = torch.linalg.lstsq(LAYER.up.detach(), change.detach().flatten(0, 1).T).solution.T.view(ROWS, PIXELS, RANK)
    return solved / F.linear(X, LAYER.down.detach())


def test_without_keys_and_at_rate_0_nothing_is_left_out() -> None:
    whole = adapted_linear(LAYER, X, WEIGHT, BIAS)
    assert torch.equal(computed(DropoutRates(0.5, 0.5, 0.5), keys=None), whole)
    torch.testing.assert_close(computed(DropoutRates()), whole)
    assert not DropoutRates() and DropoutRates(module=0.1)


def test_dropout_leaves_out_single_numbers_and_scales_the_others_as_torch_does() -> None:
    factors = between(computed(DropoutRates(numbers=0.25)))
    kept = factors > 0.5
    torch.testing.assert_close(factors[kept], torch.full_like(factors[kept], 1 / 0.75), rtol=1e-2, atol=1e-2)
    assert factors[~kept].abs().max() < 1e-2
    assert (~kept).float().mean() == pytest.approx(0.25, abs=0.03)  # of 1600 numbers: three deviations
    assert kept.any(dim=1).all() and (~kept).any(dim=1).all()  # no rank as a whole


def test_rank_dropout_leaves_out_ranks_of_each_image_and_scales_as_sd_scripts_does() -> None:
    # sd-scripts (networks/lora.py): a mask [B, r], and the scale times 1 / (1 - rank_dropout).
    factors = between(computed(DropoutRates(rank=0.5)))
    kept = factors > 1
    assert torch.equal(kept, kept[:, :1].expand_as(kept)) and len({tuple(row) for row in kept[:, 0].tolist()}) > 1
    torch.testing.assert_close(factors[kept], torch.full_like(factors[kept], 2.0), rtol=1e-2, atol=1e-2)


def test_module_dropout_leaves_out_whole_layers_of_a_step_whatever_their_kind() -> None:
    turned = OFTLayer(draws(4, 5, 5, seed=7) * 0.1, alpha=0)
    frozen = F.linear(X, WEIGHT, BIAS)
    for layer in (LAYER, turned):
        whole, left_out = adapted_linear(layer, X, WEIGHT, BIAS), 0
        for number in range(200):
            y = computed(DropoutRates(module=0.3), layer=layer, number=number)
            assert torch.equal(y, frozen) or torch.allclose(y, whole)
            left_out += torch.equal(y, frozen)
        assert left_out / 200 == pytest.approx(0.3, abs=0.1)


def test_a_batch_that_is_cut_leaves_out_the_same_and_another_step_or_layer_something_else() -> None:
    rates = DropoutRates(0.3, 0.3, 0.3)
    together = computed(rates)
    assert torch.equal(together, computed(rates))
    torch.testing.assert_close(torch.cat([computed(rates, X[:1], KEYS[:1]), computed(rates, X[1:], KEYS[1:])]), together)
    masked = DropoutRates(0.3, 0.3)
    assert not torch.equal(computed(masked), computed(masked, keys=KEYS + 1))
    assert not torch.equal(computed(masked), computed(masked, number=4))
    chunks = computed(masked, X.view(2 * ROWS, PIXELS // 2, 12))  # the chunks of a caption are one image's
    torch.testing.assert_close(chunks.view(ROWS, PIXELS, 20), computed(masked))


def test_a_convolution_leaves_out_as_a_linear_layer_over_its_pixels_does() -> None:
    holder = DropoutKeys()
    holder.keys = KEYS
    down = LAYER.down.detach()[:, :, None, None]
    convolution = DroppedLayer(LoRALayer(down, LAYER.up.detach(), alpha=4), DropoutRates(rank=0.5), holder, number=3)
    image = X.transpose(1, 2).unflatten(2, (5, 10))
    y = convolution.conv2d(image, WEIGHT[:, :, None, None], BIAS, stride=1, padding=0)
    torch.testing.assert_close(y.flatten(2).transpose(1, 2), computed(DropoutRates(rank=0.5)), rtol=1e-4, atol=1e-4)


def test_no_random_state_is_touched() -> None:
    before = torch.get_rng_state()
    computed(DropoutRates(0.5, 0.5, 0.5))
    assert torch.equal(torch.get_rng_state(), before)
