"""Activations kept off the device: the same gradients, and what stays where."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from lib_lora_train.memory.offload import offloaded
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

from lib_lora_train.adapters.network import AdapterNetwork
from lib_lora_train.adapters.targets import find_targets
from lib_lora_train.memory import offload
from lib_lora_train.model import frozen
from tests.model.small_checkpoints import HINTS, tokenizers
from tests.model.small_checkpoints import checkpoint as small_checkpoint

CPU = torch.device("cpu")
DEVICES = [pytest.param("cpu"), pytest.param("cuda", marks=pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a CUDA device"))]


def layers(device: str) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*[layer for _ in range(6) for layer in (nn.Linear(64, 64), nn.SiLU(), nn.LayerNorm(64))]).to(device)


def gradients(model: nn.Sequential, run: Callable[[nn.Sequential, Tensor], Tensor], device: str) -> list[Tensor]:
    x = torch.randn(32, 64, generator=torch.Generator().manual_seed(1)).to(device)
    model.zero_grad()
    run(model, x).square().sum().backward()
    return [parameter.grad.clone() for parameter in model.parameters()]


def by_units(model: nn.Sequential, x: Tensor) -> Tensor:
    for start in range(0, len(model), 3):
        x = checkpoint(model[start:start + 3], x, use_reentrant=False, preserve_rng_state=False)
    return x


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("window", [0, 20_000, 1 << 30])
@pytest.mark.parametrize("run", [lambda model, x: model(x), by_units], ids=["kept", "recomputed"])
def test_gradients_are_the_same_wherever_activations_wait(run, window, device):
    model = layers(device)
    expected = gradients(model, run, device)
    for _ in range(3):  # memory that was given back is used again
        with offloaded(torch.device(device), smallest=1, window=window) as traffic:
            got = gradients(model, run, device)
        assert traffic.bytes_out > 0
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_of_recomputed_units_only_the_inputs_go_out():
    model = layers("cpu")
    with offloaded(CPU, smallest=1) as traffic:
        gradients(model, by_units, "cpu")
    # Six units of 32 x 64 numbers each, and the end of the sum of squares.
    assert traffic.bytes_out == 7 * 32 * 64 * 4


def test_weights_small_tensors_and_what_is_spared_stay():
    weight, frozen_weight = nn.Parameter(torch.randn(64, 64)), torch.randn(64, 64)
    x = torch.randn(64, 64)
    with offloaded(CPU, spared=[frozen_weight], smallest=64 * 64 * 4) as traffic:
        (frozen_weight.t() @ (weight @ x)).sum().backward()
    # x, for the gradient of the weight, is the only one that is neither.
    assert traffic.bytes_out == x.numel() * 4
    with offloaded(CPU, smallest=64 * 64 * 4 + 1) as traffic:
        (weight @ x).sum().backward()
    assert traffic.bytes_out == 0


def test_on_the_device_nothing_is_left_of_what_waits_elsewhere():
    x = torch.randn(64, 64, requires_grad=True)
    with offloaded(CPU, smallest=1, window=0) as traffic:
        hidden = x.exp()
        storage = StorageWeakRef(hidden.untyped_storage())
        result = hidden.sin()
        del hidden
        assert storage.expired(), "autograd or the window still holds it"
        result.sum().backward()
    assert traffic.bytes_out >= 64 * 64 * 4
    assert torch.allclose(x.grad, x.exp().cos() * x.exp())


def test_a_tensor_that_is_saved_twice_in_a_row_goes_out_once():
    a, b = nn.Parameter(torch.randn(8, 64)), nn.Parameter(torch.randn(8, 64))
    x = torch.randn(32, 64)
    with offloaded(CPU, smallest=1) as traffic:
        ((x @ a.t()) + (x @ b.t())).sum().backward()
    assert traffic.bytes_out == x.numel() * 4
    assert torch.allclose(a.grad, x.sum(0).expand(8, 64), atol=1e-4) and torch.allclose(b.grad, a.grad)


@pytest.mark.parametrize("make", [
    lambda x: x[:, ::2], lambda x: x.t(), lambda x: x.view(2, 8, 4, 32).permute(0, 3, 1, 2), lambda x: x[3:5]],
    ids=["gaps", "turned", "permuted", "rows"])
def test_strides_come_back_where_they_can(make):
    x = torch.randn(64, 32, requires_grad=True)
    make(x).exp().sum().backward()
    expected, x.grad = x.grad, None
    with offloaded(CPU, smallest=1, window=0):
        make(x).exp().sum().backward()
    assert torch.equal(x.grad, expected)


def test_after_an_error_the_next_step_is_right():
    model = layers("cpu")
    expected = gradients(model, by_units, "cpu")
    with pytest.raises(RuntimeError, match="on purpose"), offloaded(CPU, smallest=1):
        by_units(model, torch.randn(32, 64))
        raise RuntimeError("on purpose")
    with offloaded(CPU, smallest=1):
        got = gradients(model, by_units, "cpu")
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("units", ["none", "all"])
@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_a_lora_gets_the_same_gradients(family, units):
    model = frozen.build(small_checkpoint(family), hints=HINTS[family], tokenizers=tokenizers(family))
    network = AdapterNetwork.build(find_targets(model.components, family=model.architecture.family, text_encoder=False), rank=2, alpha=2.0, seed=0)
    for layer in network.layers.values():
        nn.init.normal_(layer.up, std=0.1)
    config, generator = model.architecture.unet, torch.Generator().manual_seed(0)
    x, context = torch.randn(1, 4, 8, 8, generator=generator), torch.randn(1, 77, config.context_dim, generator=generator)
    y = None if config.adm_channels is None else torch.randn(1, config.adm_channels, generator=generator)

    def grads() -> list[Tensor]:
        for parameter in network.parameters():
            parameter.grad = None
        model.unet(x, torch.tensor([500]), context, y, adapters=network.adapters()["unet"],
                   checkpointed=model.unet.checkpointable if units == "all" else ()).square().sum().backward()
        return [parameter.grad for parameter in network.parameters()]

    expected = grads()
    with offloaded(CPU, spared=model.unet.tensors.values(), smallest=1, window=1 << 14) as traffic:
        got = grads()
    assert traffic.bytes_out > 0
    # What lay with gaps comes back without, and sums in other orders: some gradients here are nothing but rounding.
    largest = max(grad.abs().max() for grad in expected)
    assert all((a - b).abs().max() < 1e-5 * largest for a, b in zip(got, expected, strict=True))


def test_on_the_meta_device_nothing_is_copied():
    x = torch.randn(64, 64, device="meta", requires_grad=True)
    with offloaded(torch.device("meta"), smallest=1, window=0) as traffic:
        x.exp().sin().sum().backward()
    assert traffic.bytes_out >= 2 * 64 * 64 * 4 and x.grad.shape == x.shape


def test_without_room_for_pinned_memory_ordinary_memory_serves(monkeypatch):
    streams = offload._Streams.__new__(offload._Streams)
    streams._pin = True

    def refuse(*_: object, **options: object) -> Tensor:
        if options.get("pin_memory"):
            raise RuntimeError("no more memory can be pinned")
        return torch.zeros(2, 3)
    monkeypatch.setattr(torch, "empty_strided", refuse)
    assert streams._pinned(torch.Size((2, 3)), (3, 1), torch.float32).shape == (2, 3) and streams._pin is False
