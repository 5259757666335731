"""Dropout, the largest weight norm and other kinds of network in the training loop."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from lib_lora_train.adapters.dropout import DropoutRates
from lib_lora_train.adapters.network import AdapterNetwork
from lib_lora_train.run.selection import chosen_kind
from lib_lora_train.settings import parse
from lib_lora_train.training.weight_norms import ScaleWeightNorms
from tests.adapters.test_network import small_targets
from tests.training import small_run
from tests.training.small_run import batch

BATCHES = [batch(number, rows=3, caption="a photo of a cat") for number in range(2)]
RATES = DropoutRates(0.2, 0.2, 0.2)


@pytest.fixture(scope="module")
def dropped() -> small_run.Result:
    return small_run.run("sd1", BATCHES, text=True, dropout=RATES, learning_rate=1e-2)


def test_dropout_is_the_same_again_in_parts_and_with_activation_checkpointing(dropped: small_run.Result) -> None:
    other = small_run.run("sd1", BATCHES, text=True, dropout=RATES, learning_rate=1e-2, microbatch=1, checkpointing=True)
    small_run.assert_equal(other, dropped)


@pytest.mark.parametrize("rates", [DropoutRates(numbers=0.5), DropoutRates(rank=0.5), DropoutRates(module=0.5)])
def test_each_of_them_changes_what_is_learnt(rates: DropoutRates) -> None:
    plain, with_it = (small_run.run("sd1", BATCHES, learning_rate=1e-2, dropout=each) for each in (None, rates))
    assert plain.losses[0] == with_it.losses[0]  # nothing is learnt yet that could be left out
    assert (plain.learnt() - with_it.learnt()).norm() > 0.1 * plain.learnt().norm()


def test_weight_norms_above_the_largest_are_scaled_down_and_told() -> None:
    largest = 0.05
    result, free = (small_run.run("sd1", BATCHES, learning_rate=3e-2, largest_norm=norm) for norm in (largest, 0.0))

    def norms(of: small_run.Result) -> torch.Tensor:
        return torch.stack([layer.product(*layer.factors).norm() for layer in of.network.layers.values()]).detach()

    assert norms(free).max() > 2 * largest
    assert norms(result).max() <= largest * (1 + 1e-4) and (norms(result) > 0.9 * largest).any()
    assert "0.05" in result.warnings[-1] and not any("norm" in text for text in free.warnings)


@pytest.mark.parametrize("values", [
    {}, {"network_module": "LoKr", "dora_wd": True}], ids=str)
def test_a_run_that_goes_on_ends_with_the_same_bits(values: dict[str, object]) -> None:
    kind = chosen_kind(parse(values).network)
    rates = RATES if not values else DropoutRates(module=0.2)
    batches, options = [batch(number) for number in range(3)], {"dropout": rates, "largest_norm": 0.05, "kind": kind}
    through = small_run.run("sd1", batches, **options)
    half = small_run.run("sd1", batches, before_step=lambda progress: progress.step < 1, **options)
    state = half.state
    kept = dataclasses.replace(state, lora={name: tensor.clone() for name, tensor in state.lora.items()})
    again = small_run.run("sd1", batches, resumed=kept, **options)
    expected, found = (result.network.state_dict() for result in (through, again))
    assert half.steps == 1 and again.steps == 3 and all(torch.equal(expected[name], found[name]) for name in expected)


@pytest.mark.parametrize("values", [{}, {"conv_dim": 2}, {"network_module": "LoHa"}, {"network_module": "LoKr"},
                                    {"dora_wd": True}], ids=str)
def test_a_layer_is_scaled_as_sd_scripts_scales_it(values: dict[str, object]) -> None:
    network = AdapterNetwork.build(small_targets(), rank=2, alpha=4, seed=0, kind=chosen_kind(parse(values).network))
    with torch.no_grad():
        for number, parameter in enumerate(network.parameters()):
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)))
    layers = [getattr(layer, "inner", layer) for layer in network.layers.values()]
    before = [layer.product(*layer.factors).detach() for layer in layers]
    largest = float(torch.stack([delta.norm() for delta in before]).median())
    ScaleWeightNorms(network, largest).after_step(None)
    for layer, delta in zip(layers, before, strict=True):
        norm = delta.norm().clamp(min=largest / 2)             # apply_max_norm_regularization
        expected = delta * (norm.clamp(max=largest) / norm)
        torch.testing.assert_close(layer.product(*layer.factors).detach(), expected, rtol=1e-3, atol=1e-5)
