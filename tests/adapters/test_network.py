from __future__ import annotations

import pytest
import torch

from lib_lora_train.adapters.network import AdapterNetwork
from lib_lora_train.adapters.targets import Target, find_targets
from lib_lora_train.errors import LoraFileError
from lib_lora_train.model.family import FAMILIES
from tests.adapters import full_size


def small_targets(*, text_encoder: bool = True) -> tuple[Target, ...]:
    model = {"unet": full_size.unet(context=24, channels=32, multipliers=(1, 2), depths=(1, 1)),
             "te": full_size.text(width=24, layers=2)}
    return find_targets(model, family=FAMILIES["sd1"], text_encoder=text_encoder)


def learnt(targets: tuple[Target, ...], *, rank: int = 3, alpha: float = 1.5) -> AdapterNetwork:
    network = AdapterNetwork.build(targets, rank=rank, alpha=alpha, seed=1)
    with torch.no_grad():
        for number, parameter in enumerate(network.parameters()):
            parameter.add_(0.01 * number)
    return network


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_a_layers_start_depends_on_the_seed_and_its_key_alone() -> None:
    everything = AdapterNetwork.build(small_targets(), rank=4, alpha=4, seed=5).state_dict()
    unet_only = AdapterNetwork.build(small_targets(text_encoder=False), rank=4, alpha=4, seed=5).state_dict()
    backwards = AdapterNetwork.build(tuple(reversed(small_targets())), rank=4, alpha=4, seed=5).state_dict()
    assert all(torch.equal(everything[key], unet_only[key]) for key in unet_only)
    assert equal(everything, backwards)
    assert not equal(everything, AdapterNetwork.build(small_targets(), rank=4, alpha=4, seed=6).state_dict())
    starts = [tensor for key, tensor in everything.items() if key.endswith("to_q.lora_down.weight")]
    assert not torch.equal(starts[0], starts[1])


def test_building_leaves_the_global_random_state_alone() -> None:
    before = torch.get_rng_state()
    AdapterNetwork.build(small_targets(), rank=4, alpha=4, seed=5)
    assert torch.equal(torch.get_rng_state(), before)


def test_continuing_takes_weights_ranks_and_alphas_from_the_file() -> None:
    first = learnt(small_targets())
    again = AdapterNetwork.continued(small_targets(), first.state_dict(), seed=99)
    assert equal(first.state_dict(), again.state_dict())
    assert again.fresh == ()
    assert {(layer.rank, layer.alpha) for layer in again.layers.values()} == {(3, 1.5)}


def test_continuing_from_a_half_precision_file_trains_in_fp32() -> None:
    halves = {key: tensor.half() for key, tensor in learnt(small_targets()).state_dict().items()}
    again = AdapterNetwork.continued(small_targets(), halves, seed=0)
    assert {parameter.dtype for parameter in again.parameters()} == {torch.float32}


def test_layers_that_the_file_lacks_start_anew_with_its_rank() -> None:
    file = learnt(small_targets(text_encoder=False)).state_dict()
    network = AdapterNetwork.continued(small_targets(), file, seed=1)
    assert len(network.fresh) == 12 and all(key.startswith("lora_te_") for key in network.fresh)
    assert {network.layers[key].rank for key in network.fresh} == {3}
    assert not any(network.layers[key].up.any() for key in network.fresh)


def test_a_file_without_alpha_has_scale_one() -> None:
    file = {key: tensor for key, tensor in learnt(small_targets()).state_dict().items() if not key.endswith(".alpha")}
    network = AdapterNetwork.continued(small_targets(), file, seed=0)
    assert {layer.scale for layer in network.layers.values()} == {1.0}


def test_nothing_learnt_is_dropped_silently() -> None:
    file = learnt(small_targets()).state_dict()
    with pytest.raises(LoraFileError) as refusal:
        AdapterNetwork.continued(small_targets(text_encoder=False), file, seed=0)
    assert "lora_te_" in str(refusal.value)


def changed(**changes: torch.Tensor) -> dict[str, torch.Tensor]:
    return learnt(small_targets()).state_dict() | changes


KEY = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"


@pytest.mark.parametrize(("tensors", "told"), [
    ({}, "no LoRA layer"),
    ({"model.diffusion_model.out.2.weight": torch.zeros(2)}, "no LoRA layer"),
    ({"emb_params": torch.zeros(2)}, "no LoRA layer"),
    ({"lora_unet_input_blocks_4_1_proj_in.lora_down.weight": torch.zeros(3, 8),
      "lora_unet_input_blocks_4_1_proj_in.lora_up.weight": torch.zeros(8, 3)}, "another kind of model"),
    (changed(**{f"{KEY}.lora_down.weight": torch.zeros(3, 99)}), "does not fit"),
    (changed(**{f"{KEY}.lora_down.weight": torch.zeros(5, 32)}), "does not fit"),
    (changed(**{f"{KEY}.lora_down.weight": torch.zeros(3, 32, 3, 3)}), "does not fit"),
    (changed(**{f"{KEY}.dora_scale": torch.zeros(1, 32)}), "incomplete"),
    (changed(**{f"{KEY}.alpha": torch.tensor([2.0, 2.0])}), "damaged"),
    (changed(**{f"{KEY}.alpha": torch.tensor(0.0)}), "damaged"),
    ({f"{KEY}.lora_down.weight": torch.zeros(3, 32)}, "incomplete"),
])
def test_files_that_do_not_fit_are_refused_with_the_reason(tensors: dict, told: str) -> None:
    with pytest.raises(LoraFileError) as refusal:
        AdapterNetwork.continued(small_targets(), tensors, seed=0)
    assert told in str(refusal.value)


def test_parameter_groups_hold_each_weight_once_at_its_own_rate() -> None:
    network = AdapterNetwork.build(small_targets(), rank=2, alpha=1, seed=0)
    groups = network.parameter_groups(1e-3, 1e-4)
    assert [(group["name"], group["lr"]) for group in groups] == [("unet", 1e-3), ("text_encoder", 1e-4)]
    ids = [id(parameter) for group in groups for parameter in group["params"]]
    assert len(set(ids)) == len(ids) == 2 * len(network.layers) == len(network.parameters())
    assert [group["name"] for group in network.parameter_groups(1e-3, 0)] == ["unet"]
    unet_only = AdapterNetwork.build(small_targets(text_encoder=False), rank=2, alpha=1, seed=0)
    assert [group["name"] for group in unet_only.parameter_groups(1e-3, 1e-4)] == ["unet"]


def test_adapters_are_found_by_component_and_module() -> None:
    network = AdapterNetwork.build(small_targets(), rank=2, alpha=1, seed=0)
    adapters = network.adapters()
    assert set(adapters) == {"unet", "te"}
    layer = adapters["unet"]["input_blocks.1.1.transformer_blocks.0.attn1.to_q"]
    assert layer is network.layers[KEY]


def test_the_multiplier_reaches_every_layer_and_frozen_parts_get_no_gradient() -> None:
    network = learnt(small_targets())
    network.set_multiplier(0.5)
    assert {layer.scale for layer in network.layers.values()} == {0.5 * 1.5 / 3}
    network.freeze({"te"})
    assert not any(parameter.requires_grad for parameter in network.parameters({"te"}))
    assert all(parameter.requires_grad for parameter in network.parameters({"unet"}))
