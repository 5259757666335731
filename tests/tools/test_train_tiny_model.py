"""The graph that the demo's model was trained with gives every weight the gradient that ldm gives it."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch

from lib_lora_train.model.family import SD1
from lib_lora_train.model.sd.detection import unet_config
from lib_lora_train.model.sd.unet import UNet
from tests.model.small_checkpoints import CONTEXT, HINTS, ldm_unet, randomised, relative_error

GRAPH = Path(__file__).resolve().parents[2] / "tools" / "train_tiny_model" / "graph.py"


@pytest.fixture(scope="module")
def graph() -> ModuleType:
    spec = importlib.util.spec_from_file_location("train_tiny_model_graph", GRAPH)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("plain", [False, True])
def test_every_weight_has_ldms_gradient(graph: ModuleType, plain: bool) -> None:
    theirs = randomised(ldm_unet("sd1"))
    weights = {name: tensor.detach().clone().requires_grad_() for name, tensor in theirs.named_parameters()}
    config = unet_config(dict(weights), family=SD1, hints=HINTS["sd1"])
    ours = graph.TrainedUNet(UNet({}, config), weights)
    generator = torch.Generator().manual_seed(3)
    x, context = torch.randn(2, 4, 8, 16, generator=generator), torch.randn(2, 77, CONTEXT["sd1"], generator=generator)
    steps = torch.tensor([20, 700])
    expected = theirs.requires_grad_(True)(x, steps, context=[context])
    if plain:
        with graph.plain_attention():
            generated = ours(x, steps, context)
    else:
        generated = ours(x, steps, context)
    assert relative_error(generated.detach(), expected.detach()) <= 1e-5
    (generated - x).square().mean().backward()
    (expected - x).square().mean().backward()
    exact = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    # A bias before a norm with one channel a group has no gradient but rounding.
    noise = 1e-6 * max(gradient.abs().max().item() for gradient in exact.values())
    for name, gradient in exact.items():
        assert (weights[name].grad - gradient).abs().max() <= 1e-4 * gradient.abs().max() + noise, name
