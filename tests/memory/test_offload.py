"""Activations in the CPU's memory between forward and backward."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lib_lora_train.memory.step_config import offloaded


def gradients(layers: nn.Sequential, device: torch.device, *, checkpointed: bool) -> list[Tensor]:
    x = torch.linspace(-1, 1, 64 * 64, device=device).view(64, 64)
    for layer in layers:
        x = checkpoint(layer, x, use_reentrant=False, preserve_rng_state=False) if checkpointed else layer(x)
    layers.zero_grad()
    x.square().sum().backward()
    return [parameter.grad.clone() for parameter in layers.parameters()]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a CUDA device"))])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_gradients_are_the_same_also_after_an_error(device, checkpointed):
    torch.manual_seed(0)
    layers = nn.Sequential(*(nn.Sequential(nn.Linear(64, 64), nn.GELU()) for _ in range(3))).to(device)
    expected = gradients(layers, torch.device(device), checkpointed=checkpointed)
    with pytest.raises(ZeroDivisionError), offloaded():
        layers(torch.ones(1, 64, device=device)).sum() / (1 / 0)
    with offloaded():
        found = gradients(layers, torch.device(device), checkpointed=checkpointed)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_no_pinned_memory_is_asked_for_which_torch_would_keep_after_the_run(monkeypatch):
    asked, empty = [], torch.empty
    # With a GPU torch's save_on_cpu would pin what it is told to pin.
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "empty", lambda *size, pin_memory=False, **options: (
        asked.append(pin_memory), empty(*size, **options))[1])
    x = torch.ones(64, 64, requires_grad=True)
    with offloaded():
        x.exp().sin().sum().backward()
    assert not any(asked) and x.grad is not None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_nothing_that_autograd_keeps_stays_on_the_gpu():
    x = torch.ones(1024, 1024, device="cuda", requires_grad=True)
    before = torch.cuda.memory_allocated()
    with offloaded():
        result = x.exp().sin().exp()
        assert torch.cuda.memory_allocated() - before <= result.nbytes
        result.sum().backward()
