"""Memory that is followed without being taken."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from lib_lora_train.memory.tracker import Attention, Ledger

from tools.bench.memory import _Booked

META = torch.device("meta")


def test_what_is_dropped_no_longer_counts_and_a_view_never_does():
    with Ledger("cpu") as ledger:
        a = torch.empty(1000, device=META)            # 4000 bytes
        b = a * 2                                     # 8000
        del a
        c = b + 1                                     # 8000: the first is gone
        d = c.view(10, 100)[2:5].t()
        assert sum(ledger.live().values()) == 8000
        del b, c
        assert sum(ledger.live().values()) == 4000    # held by its view
        del d
        e = torch.empty(10, device=META)
        assert ledger.live() == {"activations": 40} and sum(ledger.peak.values()) == 8000
        del e


def test_what_autograd_keeps_counts_until_backward_has_passed():
    with Ledger("cpu") as ledger:
        x = torch.empty(1000, device=META, requires_grad=True)
        y = x.exp().exp()                             # both results are kept
        assert ledger.live() == {"activations": 12000}
        y.sum().backward()
        del y
        assert ledger.live() == {"activations": 8000}  # x and its gradient


def test_what_is_written_into_a_tensor_takes_nothing():
    with Ledger("cpu") as ledger:
        a, b = torch.empty(1000, device=META), torch.empty(1000, device=META)
        a.mul_(b).add_(1)
        torch.mul(a, b, out=b)
        torch.ops.aten.gelu_backward.grad_input(a, b, grad_input=a)
        assert sum(ledger.peak.values()) == 8000 and ledger.live() == {"activations": 8000}


def test_what_was_there_has_its_own_kind_and_stays():
    weight = torch.empty(1000, device=META)
    with Ledger("cpu") as ledger:
        ledger.enter("weights", [weight, weight.view(10, 100)])
        torch.empty(500, device=META)
        assert ledger.peak == {"weights": 4000, "activations": 2000, "working": 0}
        ledger.work(10_000)
        assert ledger.peak == {"weights": 4000, "activations": 0, "working": 10_000}


@pytest.mark.parametrize("causal", [False, True])
def test_fused_attention_keeps_no_map_and_the_plain_one_does(causal):
    batch, heads, n, width = 2, 4, 256, 32
    rows, the_map = batch * heads * n * width * 4, batch * heads * n * n * 4
    kept = {}
    for kernel in ("fused", "math"):
        ledger = Ledger("cuda")
        with ledger, Attention(ledger, kernel):
            q, k, v = (torch.empty(batch, heads, n, width, device=META, requires_grad=True) for _ in range(3))
            result = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
            kept[kernel] = ledger.live()["activations"]
            assert result.shape == q.shape
            result.sum().backward()
            assert q.grad.shape == q.shape
    assert kept["fused"] == 4 * rows + batch * heads * n * 4   # q, k, v, the result, and a number for each row
    assert kept["math"] >= 4 * rows + the_map


def test_operations_are_those_of_products_and_convolutions():
    with Ledger("cpu") as ledger:
        torch.empty(7, 5, device=META) @ torch.empty(5, 3, device=META)
        assert ledger.operations == 2 * 7 * 5 * 3
        F.conv2d(torch.empty(2, 6, 8, 8, device=META), torch.empty(4, 6, 3, 3, device=META), padding=1)
        assert ledger.operations == 2 * 7 * 5 * 3 + 2 * (2 * 4 * 8 * 8) * (6 * 3 * 3)


def test_it_sees_as_much_as_the_allocator_gives_out():
    """A few layers, forward and backward, counted on shapes and by torch's own profiler."""
    def work(device: torch.device) -> None:
        x = torch.zeros(64, 256, device=device)
        weights = [torch.zeros(256, 256, device=device, requires_grad=True) for _ in range(4)]
        for weight in weights:
            x = F.silu(F.layer_norm(x @ weight, (256,)))
        x.square().sum().backward()
    with Ledger("cpu") as ledger:
        work(META)
    with _Booked() as booked:
        booked.between(1)
        work(torch.device("cpu"))
    assert sum(ledger.peak.values()) == pytest.approx(booked.peak, rel=0.02)
