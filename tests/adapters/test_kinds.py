"""Every kind of network computes what LyCORIS' own modules compute, and trains, is saved and goes on on every family."""

from __future__ import annotations

import functools
import itertools
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from lib_lora_train.adapters import file
from lib_lora_train.adapters.base import AdapterKind, merged
from lib_lora_train.adapters.dropout import DropoutRates
from lib_lora_train.adapters.lokr import LoKr, split
from lib_lora_train.adapters.network import ADAPTERS, AdapterNetwork, kind_of
from lib_lora_train.adapters.oft import OFT
from lib_lora_train.adapters.stack import Stack, stacked
from lib_lora_train.adapters.targets import Target
from lib_lora_train.errors import LoraFileError, SettingError
from lib_lora_train.model.ops.composed import composed_conv2d, composed_linear
from lib_lora_train.model.ops.convolution import frozen_conv2d
from lib_lora_train.model.ops.layers import adapted_conv2d, adapted_linear
from lib_lora_train.model.ops.linear import frozen_linear
from lib_lora_train.run.selection import chosen_kind, select
from lib_lora_train.settings import parse
from tests.training import small_run

# Made with LyCORIS 3.2.0.post2: for each case the layer, an input, the module's tensors as in its file, its output, and the
# gradients of Σ y·grad_y. Its DoRA is that of inputs (wd_on_output=False).
with safe_open(Path(__file__).parent / "data" / "lycoris.safetensors", "pt") as opened:
    LYCORIS = {name: opened.get_tensor(name) for name in opened.keys()}
    SPLITS = json.loads(opened.metadata()["splits"])
CASES = sorted({name.partition("/")[0] for name in LYCORIS})


def of(case: str, part: str) -> dict[str, Tensor]:
    start = f"{case}/{part}"
    return {name.removeprefix(start): tensor for name, tensor in LYCORIS.items() if name.startswith(start)}


def target_of(case: str) -> Target:
    weight = LYCORIS[f"{case}/weight"]
    return Target("unet", "it", "lora_unet_it", weight.shape[1], weight.shape[0], as_conv=False, kernel=tuple(weight.shape[2:]))


def loaded(case: str):
    names = of(case, "file:")
    return kind_of(f"lora_unet_it.{name}" for name in names).load(target_of(case), names)


def computed(adapter, case: str, x: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    weight, bias = (LYCORIS[f"{case}/{name}"].to(dtype) for name in ("weight", "bias"))
    if weight.ndim == 4:
        return adapted_conv2d(adapter, x, weight, bias, stride=1, padding=1)
    return adapted_linear(adapter, x, weight, bias)


@pytest.mark.parametrize("case", CASES)
def test_a_layer_computes_and_learns_what_lycoris_computes_and_learns(case: str) -> None:
    layer, x = loaded(case), LYCORIS[f"{case}/x"].clone().requires_grad_()
    y = computed(layer, case, x)
    y.backward(LYCORIS[f"{case}/grad_y"])
    torch.testing.assert_close(y, LYCORIS[f"{case}/y"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(x.grad, LYCORIS[f"{case}/grad_x"], rtol=1e-4, atol=2e-5)
    with torch.no_grad():  # the gradients under the names that the tensors have in the file
        for parameter in layer.parameters():
            parameter.copy_(parameter.grad)
    grads = layer.tensors()
    for name, expected in of(case, "grad:").items():
        torch.testing.assert_close(grads[name], expected, rtol=1e-4, atol=5e-5)


@pytest.mark.parametrize("case", CASES)
def test_what_is_loaded_is_saved_and_merged_as_it_was(case: str) -> None:
    layer, x, weight = loaded(case), LYCORIS[f"{case}/x"], LYCORIS[f"{case}/weight"]
    saved = layer.tensors()
    assert saved.keys() == of(case, "file:").keys()
    assert all(torch.equal(saved[name], tensor) for name, tensor in of(case, "file:").items())
    for multiplier in (1.0, 0.5):
        layer.multiplier = multiplier
        difference = merged(layer, weight) - weight
        expected = computed(None, case, x) + (torch.conv2d(x, difference, padding=1) if x.ndim == 4 else x @ difference.T)
        with torch.no_grad():
            torch.testing.assert_close(computed(layer, case, x), expected, rtol=1e-4, atol=1e-5)
    layer.multiplier = 0.0
    frozen = frozen_conv2d(x, weight, LYCORIS[f"{case}/bias"], stride=1, padding=1) if x.ndim == 4 else \
        frozen_linear(x, weight, LYCORIS[f"{case}/bias"])
    assert torch.equal(computed(layer, case, x), frozen)


@pytest.mark.parametrize("case", CASES)
def test_activations_in_half_precision_train_fp32_weights(case: str) -> None:
    layer, x = loaded(case), LYCORIS[f"{case}/x"].bfloat16().requires_grad_()
    y = computed(layer, case, x, torch.bfloat16)
    y.backward(LYCORIS[f"{case}/grad_y"].bfloat16())
    assert y.dtype == x.grad.dtype == torch.bfloat16
    assert (y.float() - LYCORIS[f"{case}/y"]).norm() < 0.02 * LYCORIS[f"{case}/y"].norm()
    assert all(parameter.grad.dtype == torch.float32 for parameter in layer.parameters())


@pytest.mark.parametrize("dims", [(4,), (2, 3)])
def test_a_composed_weight_is_differentiated_as_autograd_does(dims: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(size, generator=generator, dtype=torch.float64, requires_grad=True) for size in ((4, 2), (2, 3)))
    x = torch.randn(*dims, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *all_: composed_linear(all_[0], torch.matmul, all_[1:]), (x, a, b))
    image = torch.randn(1, 3, 5, 5, generator=generator, dtype=torch.float64, requires_grad=True)

    def kernel(*factors: Tensor) -> Tensor:
        return (factors[0] @ factors[1])[:, :, None, None].expand(-1, -1, 3, 3)

    assert torch.autograd.gradcheck(
        lambda *all_: composed_conv2d(all_[0], kernel, all_[1:], stride=2, padding=1), (image, a, b))


def test_a_lokr_splits_each_layer_as_lycoris_does() -> None:
    assert {text: list(split(*map(int, text.split(",")))) for text in SPLITS} == SPLITS


def test_an_ofts_rank_is_its_number_of_blocks_or_the_next_smaller_that_divides_the_outputs() -> None:
    target = Target("unet", "it", "lora_unet_it", 8, 320, as_conv=False)
    assert [OFT().build(target, rank=rank, alpha=0, generator=None).rank for rank in (4, 16, 7, 1000)] == [4, 16, 5, 320]


KINDS = [("LoRA", {}), ("LoCon", {"conv_dim": 2, "conv_alpha": 1}), ("LoHa", {"network_module": "LoHa", "conv_dim": 2}),
         ("LoKr", {"network_module": "LoKr", "factor": 4, "conv_dim": 2}),
         ("whole LoKr", {"network_module": "LoKr", "full_matrix": True}), ("OFT", {"network_module": "OFT", "conv_dim": 2}),
         ("DoRA", {"dora_wd": True, "conv_dim": 2}), ("DoRA of LoKr", {"dora_wd": True, "network_module": "LoKr"})]
VALUES = dict(KINDS)
# Each kind on one family: families differ in names and shapes, which the layers' tests and those in a WebUI cover.
EACH = list(zip(VALUES, itertools.cycle(["sd1", "sdxl", "sd2"]), strict=False))


def network_of(name: str, family: str, **changes: object) -> AdapterNetwork:
    model, chosen = small_run.model(family), parse({"network_dim": 4, "network_alpha": 2, **VALUES[name], **changes}).network
    selected = select(chosen, model.components, family=model.architecture.family)
    network = AdapterNetwork.build(selected.targets, rank=4, alpha=2, seed=1, sizes=selected.sizes, kind=selected.kind)
    network.begin_at(model.components, network.layers)
    return network


def predicted(family: str, adapters: Stack, *, dtype: torch.dtype = torch.float32) -> Tensor:
    model, generator = small_run.model(family), torch.Generator().manual_seed(3)
    config = model.architecture.unet
    x, context = (torch.randn(size, generator=generator).to(dtype) for size in ((1, 4, 8, 8), (1, 77, config.context_dim)))
    y = None if config.adm_channels is None else torch.randn(1, config.adm_channels, generator=generator).to(dtype)
    return model.unet(x, torch.tensor([500]), context, y, adapters=adapters.get("unet", {})).float()


@functools.cache
def base(family: str) -> Tensor:
    with torch.no_grad():
        return predicted(family, {})


def gradients(name: str, family: str, dtype: torch.dtype, **dropout: float) -> dict[str, Tensor]:
    """Of every weight, computed in `dtype` on the copies that a training uses."""
    network = network_of(name, family)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    network.dropout, network.dropout_keys.keys = DropoutRates(**dropout), torch.tensor([[1, 2]])
    flat = network.flatten(1e-3, 0.0, dtype=dtype)
    predicted(family, network.training_adapters(), dtype=dtype).square().sum().backward()
    flat.collect()
    return {f"{key}.{weight}": parameter.grad.clone() for key, layer in network.layers.items()
            for weight, parameter in layer.named_parameters()}


@pytest.mark.parametrize(("name", "family", "dropout"), [
    *((name, family, {}) for name, family in EACH), ("LoCon", "sd1", {"numbers": 0.3}), ("LoCon", "sd1", {"rank": 0.3}),
    ("DoRA", "sd1", {"module": 0.1})])
def test_in_half_precision_every_weight_of_every_kind_has_the_gradient_that_it_has_in_fp32(name: str, family: str, dropout):
    exact, rounded = (gradients(name, family, dtype, **dropout) for dtype in (torch.float32, torch.bfloat16))
    assert all(bool(rounded[weight].any()) == bool(grad.any()) for weight, grad in exact.items())
    whole, other = (torch.cat([grad.flatten() for grad in grads.values()]) for grads in (exact, rounded))
    assert torch.cosine_similarity(whole, other, dim=0) > 0.98 and 0.95 < other.norm() / whole.norm() < 1.05


@pytest.mark.parametrize(("name", "family"), EACH)
def test_every_kind_trains_is_saved_and_goes_on(name: str, family: str, tmp_path: Path) -> None:
    network = network_of(name, family)
    flat = network.flatten(1e-3, 0.0)
    optimizer = torch.optim.AdamW([group.parameter for group in flat.groups], lr=1e-4 if name == "OFT" else 3e-3)
    losses = []
    for step in range(3):
        found = predicted(family, network.adapters())
        if not step:
            torch.testing.assert_close(found, base(family), rtol=1e-4, atol=1e-5)
        loss = (found - base(family)).sub(1).square().mean()
        loss.backward()
        optimizer.step()
        flat.gradient.zero_()
        losses.append(float(loss))
    assert losses[2] < losses[1] < losses[0]
    with torch.no_grad():
        learnt = predicted(family, network.adapters())
        path = tmp_path / "it.safetensors"
        file.save(path, network.state_dict(), {"ss_output_name": "it"}, dtype=torch.float32)
        again = AdapterNetwork.continued(network.targets, file.load(path).tensors, seed=0)
        assert again.kind.network_module == network.kind.network_module and again.usual_size == network.usual_size
        torch.testing.assert_close(predicted(family, again.adapters()), learnt, rtol=0, atol=1e-5)
        again.set_multiplier(0)
        assert torch.equal(predicted(family, again.adapters()), base(family))
        assert file.inspect(path).kind != "unknown"


@pytest.mark.parametrize("name", ["LoHa", "DoRA", "OFT"])
def test_several_kinds_in_one_prompt_are_each_applied_to_the_weight_with_those_before(name: str) -> None:
    first, second = network_of("LoRA", "sd1"), network_of(name, "sd1")
    with torch.no_grad():
        for number, parameter in enumerate((*first.parameters(), *second.parameters())):
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)))
        first.set_multiplier(0.7)
        model = small_run.tensors("sd1")
        for network in (first, second):
            for target in network.targets:
                key = f"model.diffusion_model.{target.module}.weight"
                model[key] = merged(network.layers[target.key], model[key])
        expected = small_run.built("sd1", model)
        found = predicted("sd1", stacked([first.adapters(), second.adapters()]))
        generator = torch.Generator().manual_seed(3)
        x, context = (torch.randn(size, generator=generator) for size in (
            (1, 4, 8, 8), (1, 77, expected.architecture.unet.context_dim)))
        torch.testing.assert_close(found, expected.unet(x, torch.tensor([500]), context), rtol=1e-4, atol=1e-4)


def test_each_setting_of_the_network_changes_what_is_made() -> None:
    plain = {"network_dim": 4, "network_alpha": 2}
    target = Target("unet", "it", "lora_unet_it", 32, 64, as_conv=False)

    def shapes(**changes: object) -> dict[str, tuple[int, ...]]:
        kind: AdapterKind = chosen_kind(parse(plain | changes).network)
        layer = kind.build(target, rank=4, alpha=2, generator=torch.Generator().manual_seed(0))
        assert sum(parameter.numel() for parameter in layer.parameters()) == kind.cost(target, rank=4)
        return {name: tuple(tensor.shape) for name, tensor in layer.tensors().items()}

    lokr = {"network_module": "LoKr"}
    made = [shapes(), shapes(dora_wd=True), shapes(network_module="LoHa"), shapes(network_module="OFT"), shapes(**lokr),
            shapes(**lokr, factor=2), shapes(**lokr, factor=2, full_matrix=True)]
    assert len({tuple(sorted(one.items())) for one in made}) == len(made)
    with pytest.raises(SettingError):
        parse({"network_module": "OFT", "dora_wd": True})


def test_a_files_kind_is_recognised_and_others_are_refused_by_name() -> None:
    target = Target("unet", "it", "lora_unet_it", 8, 8, as_conv=False)
    for kind in ADAPTERS.values():
        names = kind.build(target, rank=2, alpha=1, generator=torch.Generator()).tensors()
        assert kind_of(f"lora_unet_it.{name}" for name in names) == kind
    for name in ("diff", "hada_t1", "lora_mid.weight", "oft_diag", "w_norm"):
        with pytest.raises(LoraFileError, match=name):
            kind_of([f"lora_unet_it.{name}"])
    assert LoKr(4) == LoKr(4) != LoKr(8)
