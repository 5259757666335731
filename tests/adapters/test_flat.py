"""All weights in one buffer: the layers see nothing of it."""

from __future__ import annotations

import pytest
import torch

from lib_lora_train.adapters.network import AdapterNetwork
from lib_lora_train.adapters.targets import find_targets
from lib_lora_train.model import frozen
from tests.adapters.test_network import equal, learnt, small_targets
from tests.model import small_checkpoints


def test_weights_and_gradients_are_views_of_one_buffer_each_and_keep_their_values() -> None:
    network = learnt(small_targets())
    before = {key: tensor.clone() for key, tensor in network.state_dict().items()}
    parameters = network.parameters()
    weights = network.flatten(1e-3, 1e-4)
    assert equal(network.state_dict(), before) and network.parameters() == parameters
    assert [(group.name, group.rate) for group in weights.groups] == [("unet", 1e-3), ("text_encoder", 1e-4)]
    assert sum(len(group.members) for group in weights.groups) == len(parameters) == len(weights.shapes)
    weights.values.fill_(2.0)
    weights.gradient.fill_(3.0)
    for parameter in parameters:
        assert (parameter == 2).all() and (parameter.grad == 3).all()
        for view, whole in ((parameter, weights.values), (parameter.grad, weights.gradient)):
            assert (view.data_ptr() - whole.data_ptr()) % 256 == 0
    for group in weights.groups:
        assert (group.parameter == 2).all() and (group.parameter.grad == 3).all()


def test_backward_adds_to_the_buffer_and_nothing_between_the_weights_is_touched() -> None:
    network = learnt(small_targets())
    parameters = network.parameters()
    weights = network.flatten(1e-3, 1e-4)
    for _ in range(2):
        sum((number + 1) * parameter.sum() for number, parameter in enumerate(parameters)).backward()
    assert all((parameter.grad == 2 * (number + 1)).all() for number, parameter in enumerate(parameters))
    expected = sum(2 * (number + 1) * parameter.numel() for number, parameter in enumerate(parameters))
    assert weights.gradient.double().sum() == expected


def test_copies_to_compute_with_follow_the_weights_by_one_copy() -> None:
    network = learnt(small_targets())
    weights = network.flatten(1e-3, 1e-4, dtype=torch.bfloat16)

    def follow() -> bool:
        return all(torch.equal(copy, weight.detach().bfloat16()) and copy.dtype == torch.bfloat16
                   for layer in network.layers.values()
                   for copy, weight in zip(layer.delta().working, (layer.down, layer.up), strict=True))
    assert follow()
    weights.values.mul_(1.5)
    assert not follow()
    weights.refresh()
    assert follow()
    network.flatten(1e-3, 1e-4)
    assert all(layer.delta().working is None for layer in network.layers.values())


def test_what_is_frozen_stays_out_of_the_buffer_and_keeps_its_number() -> None:
    network = learnt(small_targets())
    network.freeze_below("te", ["text_model.encoder.layers.1"])
    weights = network.flatten(1e-3, 1e-4)
    numbers = [number for group in weights.groups for number, _, _ in group.members]
    ordered = [parameter for group in network.parameter_groups(1e-3, 1e-4) for parameter in group["params"]]
    frozen = [number for number, parameter in enumerate(ordered) if not parameter.requires_grad]
    assert frozen and not set(frozen) & set(numbers) and sorted(frozen + numbers) == list(range(len(weights.shapes)))
    names = {target.module for target in network.targets if not network.layers[target.key].down.requires_grad}
    assert names and all(name.startswith("text_model.encoder.layers.1.") for name in names)
    assert [group.name for group in network.flatten(1e-3, 0).groups] == ["unet"]


@pytest.mark.parametrize("family, skip, expected", [
    ("sd1", 1, {"te": 0}), ("sd1", 2, {"te": 1}), ("sdxl", 1, {"te1": 1, "te2": 0})])
def test_the_layers_that_clip_skip_leaves_out_are_those_that_get_no_gradient(family, skip, expected) -> None:
    lent = {name: tensor.detach() for name, tensor in small_checkpoints.checkpoint(family).items()}
    model = frozen.build(lent, hints=small_checkpoints.HINTS[family], tokenizers=small_checkpoints.tokenizers(family))
    targets = find_targets(model.components, family=model.architecture.family, text_encoder=True)
    network = AdapterNetwork.build(targets, rank=2, alpha=2, seed=0)
    told = model.text.encode([model.text.tokenize("a cat")], clip_skip=skip, adapters={
        name: layers for name, layers in network.adapters().items() if name != "unet"})
    (told.context.sum() + (0 if told.pooled is None else told.pooled.sum())).backward()
    unused = model.text.unused_layers(skip)
    assert {component: len(layers) for component, layers in unused.items()} == expected
    for target in network.targets:
        if target.component != "unet":
            idle = target.module.startswith(tuple(f"{layer}." for layer in unused[target.component]))
            assert (network.layers[target.key].up.grad is None) == idle, target.module
