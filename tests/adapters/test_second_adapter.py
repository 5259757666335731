"""A second kind of adapter plugs into container, file and optimizer: the one below is all that it takes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lib_lora_train.adapters import file
from lib_lora_train.adapters.base import AdapterKind, WorkingCopy
from lib_lora_train.adapters.network import ADAPTERS, AdapterNetwork
from lib_lora_train.adapters.targets import Target, find_targets
from lib_lora_train.errors import LoraFileError
from lib_lora_train.model import frozen
from lib_lora_train.model.ops.convolution import frozen_conv2d
from lib_lora_train.model.ops.linear import frozen_linear
from lib_lora_train.model.ops.weights import Weight
from tests.model.small_checkpoints import HINTS, checkpoint, tokenizers


class Scale(nn.Module):
    """Each output times a trained number (IA³, Liu et al. 2022, arXiv 2205.05638)."""

    rank, alpha, multiplier = 1, 1.0, 1.0

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def linear(self, x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
        return frozen_linear(x, weight, bias) * (1 + self.multiplier * self.weight).to(x.dtype)

    def conv2d(self, x: Tensor, weight: Weight, bias: Tensor | None, *, stride: int, padding: int) -> Tensor:
        y = frozen_conv2d(x, weight, bias, stride=stride, padding=padding)
        return y * (1 + self.multiplier * self.weight).to(x.dtype)[:, None, None]

    def use_working_copies(self, copy: WorkingCopy) -> None:
        """It casts instead."""

    def tensors(self) -> dict[str, Tensor]:
        return {"weight": self.weight.detach()}


class Scales:
    network_module, tensor_names = "lycoris.kohya.ia3", ("weight",)

    def build(self, target: Target, *, rank: int, alpha: float, generator: torch.Generator) -> Scale:
        return Scale(torch.zeros(target.out_features))

    def load(self, target: Target, tensors: Mapping[str, Tensor]) -> Scale:
        if tensors["weight"].shape != (target.out_features,):
            raise LoraFileError(f"{target.key} has another width")
        return Scale(tensors["weight"].float().clone())

    def cost(self, target: Target, *, rank: int) -> int:
        return target.out_features


@pytest.fixture
def kind(monkeypatch: pytest.MonkeyPatch) -> AdapterKind:
    monkeypatch.setitem(ADAPTERS, Scales.network_module, Scales())
    return ADAPTERS["lycoris.kohya.ia3"]


def with_convolutions(targets: tuple[Target, ...], unet: Mapping[str, Weight]) -> tuple[Target, ...]:
    """Two of the UNet's convolutions too: a 3x3 one and a 1x1 one, as LoCon has them."""
    modules = {"input_blocks.1.0.in_layers.2": "lora_unet_down_blocks_0_resnets_0_conv1",
               "output_blocks.0.0.skip_connection": "lora_unet_up_blocks_0_resnets_0_conv_shortcut"}
    return (*targets, *(Target("unet", module, key, *reversed(unet[f"{module}.weight"].shape[:2]), as_conv=False,
                               kernel=tuple(unet[f"{module}.weight"].shape[2:])) for module, key in modules.items()))


@pytest.mark.parametrize("flat", [False, True])
def test_it_trains_is_saved_and_loaded(tmp_path: Path, kind: AdapterKind, flat: bool) -> None:
    model = frozen.build(checkpoint("sd1"), hints=HINTS["sd1"], tokenizers=tokenizers("sd1"))
    found = find_targets(model.components, family=model.architecture.family, text_encoder=False)
    targets = with_convolutions(found, model.unet.tensors)
    network = AdapterNetwork.build(targets, rank=1, alpha=1, seed=0, kind=kind)
    generator = torch.Generator().manual_seed(0)
    x, goal, context = (torch.randn(size, generator=generator) for size in ((1, 4, 8, 8), (1, 4, 8, 8), (1, 77, 48)))

    def loss(adapters: AdapterNetwork) -> Tensor:
        predicted = model.unet(x, torch.tensor([500]), context, adapters=adapters.adapters()["unet"])
        return (predicted - goal).square().mean()

    with torch.no_grad():
        assert torch.equal(loss(network), (model.unet(x, torch.tensor([500]), context) - goal).square().mean())
    weights = [group.parameter for group in network.flatten(1e-3, 0).groups] if flat else network.parameters()
    optimizer = torch.optim.AdamW(weights, lr=1e-2)
    losses = []
    for _ in range(2):
        losses.append(loss(network))
        losses[-1].backward()
        assert all(parameter.grad.any() for parameter in network.parameters())
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
    with torch.no_grad():
        losses.append(loss(network))
        assert losses[2] < losses[1] < losses[0]
        path = tmp_path / "scales.safetensors"
        file.save(path, network.state_dict(), {"ss_output_name": "scales"}, dtype=torch.float32)
        again = AdapterNetwork.continued(targets, file.load(path).tensors, seed=0, kind=kind)
        assert torch.equal(loss(again), losses[2]) and again.fresh == ()
        again.set_multiplier(0)
        assert torch.equal(loss(again), losses[0])


def test_its_cost_and_the_errors_of_its_files_are_its_own(kind: AdapterKind) -> None:
    target = Target("unet", "it", "lora_unet_it", 3, 5, as_conv=False)
    assert kind.cost(target, rank=9) == 5
    for tensors in ({"lora_unet_it.weight": torch.zeros(4)}, {"lora_unet_it.lora_up.weight": torch.zeros(5, 3)}):
        with pytest.raises(LoraFileError):
            AdapterNetwork.continued([target], tensors, seed=0, kind=kind)
