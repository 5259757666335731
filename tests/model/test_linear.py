"""Several layers of one input at once: the same numbers as written out, and nothing kept that was not promised."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lib_lora_train.model.ops.linear import LoRADelta, frozen_linear, shared_linears
from lib_lora_train.model.ops.recipes import GELU, GatedGELU, GroupNorm, LayerNorm, Recipe, group_norm_nhwc, made
from tests.model.plain_lora import draws, lora, nhwc


def written_out(x: Tensor, weight: Tensor, bias: Tensor | None, low: LoRADelta | None) -> Tensor:
    return F.linear(x, weight, bias) if low is None else lora(x, weight, bias, low.down, low.up, low.scale)


class Kept:
    """What autograd saves meanwhile; `test_keeping.py` looks for what functions keep beside that."""

    def __enter__(self) -> list[Tensor]:
        self.tensors: list[Tensor] = []
        self._hooks = torch.autograd.graph.saved_tensors_hooks(lambda saved: self.tensors.append(saved) or saved, lambda s: s)
        self._hooks.__enter__()
        return self.tensors

    def __exit__(self, *failure: object) -> None:
        self._hooks.__exit__(*failure)


# --- the products -----------------------------------------------------------------------------------------------------

def three_layers(seed: int = 1) -> tuple[Tensor, list[tuple[Tensor, Tensor | None]], list[Tensor]]:
    """x, three frozen layers, and factors of ranks 2 and 3 for the first and the last."""
    x, w1, w2, w3, b1, b3, a1, u1, a3, u3 = draws(
        seed, (2, 5, 6), (4, 6), (3, 6), (7, 6), (4,), (7,), (2, 6), (4, 2), (3, 6), (7, 3))
    return x, [(w1, b1), (w2, None), (w3, b3)], [a1, u1, a3, u3]


def deltas(factors: list[Tensor]) -> list[LoRADelta | None]:
    a1, u1, a3, u3 = factors
    return [LoRADelta(a1, u1, 0.5), None, LoRADelta(a3, u3, 2.0)]


def test_the_gradients_of_layers_that_share_an_input_are_right() -> None:
    x, frozen, factors = three_layers()
    given = [tensor.requires_grad_() for tensor in (x, *factors)]
    assert torch.autograd.gradcheck(lambda x, *factors: shared_linears(x, frozen, deltas(list(factors))), given)


def test_layers_that_share_an_input_equal_the_written_out_formula() -> None:
    x, frozen, factors = three_layers()
    ours = shared_linears(x, frozen, deltas(factors))
    for y, (weight, bias), low in zip(ours, frozen, deltas(factors), strict=True):
        assert torch.allclose(y, written_out(x, weight, bias, low), rtol=1e-12)


@pytest.mark.parametrize("wanted", [(True, False), (False, True)])
def test_a_factor_that_is_frozen_gets_no_gradient_and_the_other_the_right_one(wanted: tuple[bool, bool]) -> None:
    x, weight, down, up = draws(2, (4, 6), (5, 6), (2, 6), (5, 2))
    down.requires_grad_(wanted[0])
    up.requires_grad_(wanted[1])
    low = LoRADelta(down, up, 0.5)
    shared_linears(x, [(weight, None)], [low])[0].square().sum().backward()
    given, expected = (down, up)[wanted[1]], written_out(x, weight, None, low).square().sum()
    assert (down.grad is None, up.grad is None) == (not wanted[0], not wanted[1])
    assert torch.allclose(given.grad, torch.autograd.grad(expected, given)[0])


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("computed", [torch.float32, torch.bfloat16])
def test_every_dtype_of_weights_and_activations_is_near_the_exact_numbers(stored: torch.dtype, computed: torch.dtype) -> None:
    x, weight, bias, down, up, direction = draws(3, (2, 9, 32), (24, 32), (24,), (4, 32), (24, 4), (2, 9, 24))
    x, weight, bias = x.to(computed), weight.to(stored), bias.to(stored)
    down, up = down.float(), up.float()
    exact = [t.double().requires_grad_() for t in (x, down, up)]
    expected = written_out(exact[0], weight.double(), bias.double(), LoRADelta(*exact[1:], 0.5))
    ours = [t.requires_grad_() for t in (x, down, up)]
    y = shared_linears(x, [(weight, bias)], [LoRADelta(down, up, 0.5)])[0]
    assert y.dtype == computed
    found = torch.autograd.grad(y, ours, direction.to(computed))
    right = torch.autograd.grad(expected, exact, direction.to(computed).double())
    bound = 1e-5 if computed == torch.float32 else 3e-2
    for a, b in zip((y, *found), (expected, *right), strict=True):
        assert (a.double() - b).abs().max() <= bound * b.abs().max()
    assert [gradient.dtype for gradient in found] == [computed, torch.float32, torch.float32]


def test_working_copies_are_used_by_activations_of_their_dtype_only() -> None:
    x, weight, down, up, twin_down, twin_up = draws(4, (3, 6), (5, 6), (2, 6), (5, 2), (2, 6), (5, 2), dtype=torch.float32)
    low = LoRADelta(down, up, 1.0, (twin_down.bfloat16(), twin_up.bfloat16()))
    assert torch.allclose(shared_linears(x, [(weight, None)], [low])[0], written_out(x, weight, None, low), atol=1e-5)
    half = shared_linears(x.bfloat16(), [(weight, None)], [low])[0].float()
    twin = written_out(x, weight, None, LoRADelta(twin_down, twin_up, 1.0))
    assert F.cosine_similarity(half.flatten(), twin.flatten(), dim=0) > 0.999


# --- what is kept -----------------------------------------------------------------------------------------------------

def test_trained_layers_keep_their_input_once_and_the_narrow_product() -> None:
    x, frozen, factors = three_layers()
    source = x.clone().requires_grad_()
    for factor in factors:
        factor.requires_grad_()
    with Kept() as kept:
        shared_linears(source, frozen, deltas(factors))
    assert sorted(tuple(tensor.shape) for tensor in kept) == [(2, 5, 6), (10, 5)]  # ranks 2 and 3, side by side
    assert any(tensor.data_ptr() == source.data_ptr() for tensor in kept)


@pytest.mark.parametrize("stored", [torch.float64, torch.float32])
def test_frozen_layers_keep_no_activation(stored: torch.dtype) -> None:
    x, frozen, _ = three_layers()
    cast = [(weight.to(stored), bias) for weight, bias in frozen]
    x.requires_grad_()
    with Kept() as kept:
        y = shared_linears(x, cast, [None, None, None])
        z = frozen_linear(x, *cast[0])
    weights = {weight.data_ptr() for weight, _ in cast}
    assert all(tensor.data_ptr() in weights for tensor in kept)
    (sum(part.sum() for part in y) + z.sum()).backward()
    expected = sum(weight.double().sum(dim=0) for weight, _ in cast) + cast[0][0].double().sum(dim=0)
    assert torch.allclose(x.grad, expected.expand_as(x), rtol=1e-6)


class OnDemand:
    """A weight that becomes dense when it is asked to, and counts how often."""

    def __init__(self, weight: Tensor) -> None:
        self.weight, self.asked = weight, 0
        self.shape, self.device, self.nbytes = weight.shape, weight.device, weight.numel()

    def dense(self, dtype: torch.dtype) -> Tensor:
        self.asked += 1
        return self.weight.to(dtype, copy=True)


def test_a_weight_that_is_dense_on_demand_is_made_for_each_product_and_never_kept() -> None:
    x, weight, down, up = draws(5, (4, 6), (5, 6), (2, 6), (5, 2))
    stored = OnDemand(weight)
    x.requires_grad_()
    with Kept() as kept:
        y = shared_linears(x, [(stored, None)], [LoRADelta(down, up.requires_grad_(), 1.0)])[0]
        plain = frozen_linear(x, stored, None)
    assert stored.asked == 2 and not any(tensor.shape == weight.shape for tensor in kept)
    assert torch.allclose(plain, F.linear(x, weight))
    torch.autograd.grad(y.sum(), x)
    assert stored.asked == 3


# --- recipes ----------------------------------------------------------------------------------------------------------

SCALE, SHIFT = draws(6, (64,), (64,))
RECIPES: dict[str, tuple[Recipe, tuple[int, ...]]] = {
    "layer norm": (LayerNorm(SCALE, SHIFT), (2, 3, 64)),
    "group norm": (GroupNorm(SCALE, SHIFT, 1e-5), (2, 64, 2, 3)),
    "group norm, silu": (GroupNorm(SCALE, SHIFT, 1e-5, silu=True), (2, 64, 2, 3)),
    "group norm, rows": (GroupNorm(SCALE, SHIFT, 1e-6, rows=True), (2, 64, 2, 3)),
    "gated gelu": (GatedGELU(), (2, 3, 8)),
    "gelu": (GELU(quick=False), (2, 5)),
    "quick gelu": (GELU(quick=True), (2, 5)),
}


def by_torch(name: str, x: Tensor) -> Tensor:
    """The same in plain operations."""
    scale, shift = SCALE.to(x.dtype), SHIFT.to(x.dtype)
    if name == "layer norm":
        return F.layer_norm(x, (64,), scale, shift)
    if name.startswith("group norm"):
        y = F.group_norm(x.contiguous(), 32, scale, shift, 1e-6 if "rows" in name else 1e-5)
        return F.silu(y) if "silu" in name else y.flatten(2).transpose(1, 2) if "rows" in name else y
    if name == "gated gelu":
        return x[..., :4] * F.gelu(x[..., 4:])
    return F.gelu(x) if name == "gelu" else x * torch.sigmoid(1.702 * x)


@pytest.mark.parametrize("order", [torch.Tensor.contiguous, nhwc], ids=["NCHW", "NHWC"])
@pytest.mark.parametrize("name", RECIPES)
def test_recipes_equal_plain_operations_and_keep_their_source_alone(name: str, order: object) -> None:
    recipe, shape = RECIPES[name]
    (x,) = draws(7, shape)
    x = (order(x) if x.ndim == 4 else x).requires_grad_()
    with Kept() as kept:
        y = made(recipe, x)
    assert [tensor.data_ptr() for tensor in kept] == [x.data_ptr()]
    expected = by_torch(name, x)
    direction = draws(8, tuple(y.shape))[0]
    assert torch.allclose(y, expected, rtol=1e-10)
    assert torch.allclose(*(torch.autograd.grad(result, x, direction)[0] for result in (y, expected)), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", RECIPES)
def test_backward_does_not_finish_an_input_that_nobody_reads(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    recipe, shape = RECIPES[name]
    x, expected = draws(7, shape)[0].requires_grad_(), by_torch(name, draws(7, shape)[0])
    weight, down, up, direction = draws(9, (5, expected.shape[-1]), (2, expected.shape[-1]), (5, 2), (*expected.shape[:-1], 5))
    low = LoRADelta(down, up.requires_grad_(), 0.5)
    results = made(recipe, x) @ weight.t(), shared_linears(x, [(weight, None)], [low], recipe=recipe)[0]
    monkeypatch.delattr(type(recipe), "finish")
    found = [torch.autograd.grad(y, x, direction, retain_graph=True)[0] for y in results]
    plain = by_torch(name, x)
    for ours, exact in zip(found, (plain @ weight.t(), written_out(plain, weight, None, low)), strict=True):
        assert torch.allclose(ours, torch.autograd.grad(exact, x, direction, retain_graph=True)[0], rtol=1e-8, atol=1e-10)
    right = torch.autograd.grad(written_out(plain, weight, None, low), up, direction)[0]
    assert torch.allclose(torch.autograd.grad(results[1], up, direction)[0], right, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_of_half_precision_activations_are_near_the_exact_ones(name: str) -> None:
    recipe, shape = RECIPES[name]
    x = draws(7, shape, dtype=torch.bfloat16)[0].requires_grad_()
    exact = x.detach().double().requires_grad_()
    y, expected = made(recipe, x), by_torch(name, exact)
    direction = draws(8, tuple(y.shape), dtype=torch.bfloat16)[0]
    assert y.dtype == torch.bfloat16
    (found,), (right,) = torch.autograd.grad(y, x, direction), torch.autograd.grad(expected, exact, direction.double())
    for a, b in ((y, expected), (found, right)):
        assert (a.double() - b).abs().max() <= 3e-2 * b.abs().max()


def test_the_norm_that_torch_lacks_on_gpus_in_nhwc_order_equals_torchs() -> None:
    x = nhwc(draws(7, RECIPES["group norm"][1])[0])
    normed, mean, rstd = group_norm_nhwc(x, SCALE, SHIFT, 1e-5, 32)
    expected = torch.native_group_norm(x.contiguous(), SCALE, SHIFT, 2, 64, 6, 32, 1e-5)
    for a, b in zip((normed, mean, rstd), expected, strict=True):
        assert torch.allclose(a, b, rtol=1e-10)


@pytest.mark.parametrize("name", ["layer norm", "group norm, rows", "gated gelu"])
def test_a_layer_keeps_what_its_input_was_made_of(name: str) -> None:
    recipe, shape = RECIPES[name]
    source = draws(7, shape)[0].requires_grad_()
    width = by_torch(name, source).shape[-1]
    weight, down, up = draws(9, (5, width), (2, width), (5, 2))
    low = LoRADelta(down.requires_grad_(), up.requires_grad_(), 0.5)
    with Kept() as kept:
        y = shared_linears(source, [(weight, None)], [low], recipe=recipe)[0]
    assert sorted(tensor.numel() for tensor in kept) == sorted([source.numel(), y.numel() // 5 * 2])
    expected = written_out(by_torch(name, source), weight, None, low)
    assert torch.allclose(y, expected, rtol=1e-10)
    for ours, theirs in zip(*(torch.autograd.grad(result.square().sum(), (source, down, up)) for result in (y, expected)),
                            strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-8, atol=1e-10)
