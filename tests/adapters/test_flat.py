"""All weights in one buffer: the layers see nothing of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from lib_lora_train.adapters.network import AdapterNetwork
from lib_lora_train.adapters.targets import find_targets
from lib_lora_train.model import frozen
from lib_lora_train.model.ops.layers import adapted_linear
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


class Ops(TorchDispatchMode):
    """The names of the operations whose result is as large as a weight of `shapes`."""

    def __init__(self, shapes: set[torch.Size]) -> None:
        super().__init__()
        self.names, self._shapes = list[str](), shapes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if isinstance(result, torch.Tensor) and result.shape in self._shapes and name not in ("t", "view", "detach"):
            self.names.append(name)
        return result


def test_in_half_precision_backward_takes_one_kernel_a_weight_and_all_casts_are_one() -> None:
    network = learnt(small_targets())
    layers = [layer for layer in network.layers.values() if layer.down.ndim == 2]
    weights = network.flatten(1e-3, 1e-4, dtype=torch.bfloat16)
    shapes = {side.shape for layer in layers for side in (layer.down, layer.up)}
    for layer in layers:
        x = torch.randn(7, layer.down.shape[1], dtype=torch.bfloat16, requires_grad=True)
        weight = torch.randn(layer.up.shape[0], layer.down.shape[1], dtype=torch.bfloat16)
        y = adapted_linear(layer, x, weight, None)
        with Ops(shapes) as ops:
            y.sum().backward()
        assert ops.names == ["addmm_", "addmm_"]
        expected = [side.detach().bfloat16().requires_grad_() for side in (layer.down, layer.up)]
        (F.linear(x.detach(), weight) + F.linear(F.linear(x.detach(), expected[0]), expected[1]) * layer.scale).sum().backward()
        assert not layer.down.grad.any() and not layer.up.grad.any()
        weights.collect()
        for weight, copy in zip((layer.down, layer.up), expected, strict=True):
            torch.testing.assert_close(weight.grad, copy.grad.float(), rtol=0.02, atol=0.02 * float(copy.grad.abs().max()))
        weights.clear()


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
