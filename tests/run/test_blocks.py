"""Ranks, alphas and learning rates of single layers: blocks, LoRA+, rsLoRA."""

from __future__ import annotations

import contextlib
import gzip
import json
from collections import Counter
from pathlib import Path

import pytest
import torch

from lib_lora_train import events
from lib_lora_train.adapters.network import AdapterNetwork
from lib_lora_train.errors import SettingError
from lib_lora_train.model.family import FAMILIES, SD1, SDXL
from lib_lora_train.run.blocks import rate_weights
from lib_lora_train.run.network import InitialWeights, build_network
from lib_lora_train.run.selection import check_family, select
from lib_lora_train.settings import NetworkSettings, Settings, ignored, parse
from tests.adapters import full_size
from tests.training import small_run

DATA = Path(__file__).parents[1] / "adapters" / "data"
KEYS = [json.loads(gzip.decompress((DATA / name).read_bytes()))
        for name in ("kohya_keys_rank8.json.gz", "kohya_keys_conv_rank4.json.gz")]
# Layers in each block, and weights: of sd-scripts' own get_block_index and parse_block_lr_kwargs (48d368fa).
IN_BLOCKS = {
    "sd1": {1: 15, 2: 15, 3: 1, 4: 16, 5: 15, 6: 1, 7: 16, 8: 15, 9: 1, 10: 3, 11: 3, 12: 18, 13: 4, 14: 4, 15: 5, 16: 16,
            17: 16, 18: 17, 19: 16, 20: 16, 21: 17, 22: 16, 23: 16, 24: 16},
    "sdxl": {2: 3, 3: 3, 4: 1, 5: 26, 6: 25, 7: 1, 8: 106, 9: 105, 10: 3, 11: 102, 12: 3, 13: 106, 14: 106, 15: 107, 16: 26,
             17: 26, 18: 27, 19: 4, 20: 4, 21: 4}}
WEIGHTS = [
    (SD1, {"down_lr_weight": "cosine+.25", "mid_lr_weight": "0.5", "up_lr_weight": "0.1,0.2,0,1"},
     [1.25, 1.2398, 1.2095, 1.1596, 1.0913, 1.0057, 0.9049, 0.7906, 0.6654, 0.5317, 0.3923, 0.25, 0.5, 0.1, 0.2,
      0, *[1.0] * 9]),
    (SDXL, {"down_lr_weight": "sine", "up_lr_weight": "reverse_linear+0.5", "block_lr_zero_threshold": 0.6},
     [1.0, 0, 0, 0, 0, 0.7071, 0.8315, 0.9239, 0.9808, 1.0, 1.0, 1.0, 1.0, 1.5, 1.375, 1.25, 1.125, 1.0, 0.875, 0.75, 0.625, 0,
      1.0]),
    (SDXL, {"up_lr_weight": "linear", "mid_lr_weight": "0,1,2"},
     [*[1.0] * 10, 0, 1.0, 2.0, 0, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0, 1.0])]


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_each_layer_is_in_the_block_that_sd_scripts_counts_it_in(family: str) -> None:
    keys = [key for part in KEYS for key, *_ in part[family] if key.startswith("lora_unet_")]
    assert Counter(map(FAMILIES[family].block_index, keys)) == IN_BLOCKS[family]


@pytest.mark.parametrize(("family", "values", "expected"), WEIGHTS)
def test_the_rates_of_blocks_are_those_of_sd_scripts(family, values, expected) -> None:
    assert rate_weights(NetworkSettings(**values), family) == pytest.approx(expected, abs=1e-4)
    assert rate_weights(NetworkSettings(), family) is None


def numbers(values: dict[int, float], *, count: int, usual: float) -> str:
    return ",".join(f"{values.get(index, usual):g}" for index in range(count))


def test_each_block_has_its_rank_and_alpha_and_one_of_rank_or_rate_0_is_left_out() -> None:
    chosen = parse({
        "network_dim": 8, "conv_dim": 4, "block_dims": numbers({1: 2, 24: 0}, count=25, usual=16),
        "block_alphas": numbers({2: 5}, count=25, usual=1), "conv_block_dims": numbers({1: 3}, count=25, usual=6),
        "conv_block_alphas": numbers({}, count=25, usual=2), "down_lr_weight": "1,1,0,1",
        "network_train_unet_only": False}).network
    selected = select(chosen, full_size.model("sd1"), family=SD1)
    targets = {target.key: target for target in selected.targets}
    sizes = {index: {selected.sizes[key] for key in targets if key.startswith("lora_unet_")
                     and SD1.block_index(key) == index and not targets[key].kernel} for index in range(25)}
    assert sizes[1] == {(2, 1.0)} and sizes[12] == {(16, 1.0)} and not sizes[24]
    assert not any(SD1.block_index(key) == 2 for key in targets if key.startswith("lora_unet_"))  # its rate is 0
    assert {selected.sizes[key] for key in targets if key.startswith("lora_te_")} == {(8, 8.0)}
    convolutions = {SD1.block_index(key): selected.sizes[key] for key in targets if targets[key].kernel}
    assert convolutions[1] == (3, 2.0) and convolutions[12] == (6, 2.0)


@pytest.mark.parametrize(("values", "expected"), [
    ({"conv_dim": 4}, (4, 2.0)), ({"conv_dim": 4, "conv_alpha": 1}, (4, 1.0)),
    ({"network_targets": "attention and convolutions"}, (8, 4.0))])
def test_convolutions_have_their_own_rank_and_alpha_or_the_strength_of_all(values: dict, expected: tuple) -> None:
    chosen = parse({"network_dim": 8, "network_alpha": 4, **values}).network
    selected = select(chosen, full_size.model("sd1"), family=SD1)
    assert {selected.sizes[target.key] for target in selected.targets if target.kernel} == {expected}


@pytest.mark.parametrize("values", [
    {"block_dims": "1,2,3"}, {"block_dims": numbers({}, count=23, usual=4)}, {"block_dims": numbers({}, count=25, usual=1.5)},
    {"block_alphas": "a"}, {"down_lr_weight": "cosinus"}, {"mid_lr_weight": "1,2,3"}, {"up_lr_weight": "-1"}])
def test_numbers_that_fit_no_block_are_refused_before_the_start_by_name(values: dict[str, str]) -> None:
    with pytest.raises(SettingError, match=next(iter(values))):
        check_family(parse(values).network, "sd1")
    check_family(parse(values).network, "")  # nobody knows how many blocks the model has


def groups_of(**values: object) -> dict[str, tuple[int, float]]:
    network, _ = built({"network_train_unet_only": False, **values})
    return {group["name"]: (len(group["params"]), group["lr"]) for group in network.parameter_groups(1e-3, 1e-4)}


def test_lora_plus_trains_the_second_matrices_faster_and_leaves_everything_else() -> None:
    (_, (unet, _)), (_, (text, _)) = plain = tuple(groups_of().items())
    assert [name for name, _ in plain] == ["unet", "text_encoder"]
    assert groups_of(loraplus_lr_ratio=16) == {
        "unet": (unet // 2, 1e-3), "unet × 16": (unet // 2, 1e-3 * 16), "text_encoder": (text // 2, 1e-4),
        "text_encoder × 16": (text // 2, 1e-4 * 16)}
    assert set(groups_of(loraplus_lr_ratio=16, loraplus_unet_lr_ratio=4)) == {
        "unet", "unet × 4", "text_encoder", "text_encoder × 16"}
    assert set(groups_of(loraplus_text_encoder_lr_ratio=2)) == {"unet", "text_encoder", "text_encoder × 2"}
    assert groups_of(loraplus_lr_ratio=16, dora_wd=True)["unet × 16"][0] == unet // 2  # but not the magnitudes
    rates = groups_of(up_lr_weight="0.5,0.25", down_lr_weight="0,0,2")
    assert {rate for name, (_, rate) in rates.items() if name.startswith("unet")} <= {1e-3, 1e-3 * 2, 1e-3 / 2, 1e-3 / 4}
    assert len(rates) > 2 and sum(count for name, (count, _) in rates.items() if name.startswith("unet")) < unet


@pytest.mark.parametrize(("kind", "rank"), [({}, 4), ({"network_module": "LoHa"}, 9)])
def test_rs_lora_writes_alpha_so_that_alpha_over_rank_is_alpha_over_its_root(kind: dict, rank: int) -> None:
    # arXiv 2312.03732, eq. 4: γ = alpha / √r; every loader computes alpha / r.
    chosen = parse({"network_dim": rank, "network_alpha": 3, "rs_lora": True, **kind}).network
    selected = select(chosen, full_size.model("sd1"), family=SD1)
    assert all(alpha / rank == pytest.approx(3 / rank ** 0.5) for rank, alpha in selected.sizes.values())


def test_convolutions_have_the_strength_of_the_other_layers_with_rs_lora_too() -> None:
    for rs_lora, root in ((False, 1.0), (True, 0.5)):
        chosen = parse({"network_dim": 16, "network_alpha": 8, "conv_dim": 4, "rs_lora": rs_lora}).network
        sizes = select(chosen, full_size.model("sd1"), family=SD1).sizes.values()
        assert {rank for rank, _ in sizes} == {16, 4}
        assert all(alpha / rank == pytest.approx(8 / 16 ** root) for rank, alpha in sizes)


@pytest.mark.parametrize(("values", "name"), [
    ({"factor": 4}, "factor"), ({"rs_lora": True, "network_module": "OFT"}, "rs_lora"),
    ({"network_module": "LoHa", "loraplus_lr_ratio": 4}, "loraplus_lr_ratio"),
    ({"conv_block_alphas": "1"}, "conv_block_alphas"),
    ({"network_targets": "text encoder", "network_train_unet_only": False, "block_dims": "1"}, "block_dims"),
    ({"loraplus_text_encoder_lr_ratio": 4}, "loraplus_text_encoder_lr_ratio"),
    ({"block_lr_zero_threshold": 0.1}, "block_lr_zero_threshold"),
    ({"network_weights": "a.safetensors", "block_alphas": "1"}, "block_alphas")])
def test_what_has_no_effect_beside_the_kind_or_the_layers_is_named(values: dict[str, object], name: str) -> None:
    assert [note for note in ignored(parse(values)) if f"({name})" in note]
    assert not ignored(Settings())


@pytest.mark.parametrize("values", [
    {"network_module": "LoHa", "network_dropout": 0.1}, {"dora_wd": True, "rank_dropout": 0.1},
    {"network_module": "OFT", "scale_weight_norms": 1}, {"network_targets": "text encoder"}])
def test_what_does_not_go_together_is_refused_with_another_choice(values: dict[str, object]) -> None:
    with pytest.raises(SettingError) as refusal:
        parse(values)
    assert refusal.value.remedy


def built(values: dict[str, object], tensors: dict[str, torch.Tensor] | None = None, *,
          state: object = None) -> tuple[AdapterNetwork, list[str]]:
    """The network of a run that begins with these weights, and what was said of it."""
    told: list[events.Event] = []
    network = build_network(parse({"network_dim": 2, **values}), small_run.model("sd1"), InitialWeights(tensors, "a", state),
                            report=told.append)
    return network, [event.message for event in told]


CONTINUED = {"network_weights": "a.safetensors"}


@pytest.mark.parametrize(("kind", "values", "refused"), [
    ({"network_module": "LoHa"}, {"network_dropout": 0.1}, True), ({"dora_wd": True}, {"rank_dropout": 0.1}, True),
    ({"network_module": "OFT"}, {"scale_weight_norms": 1}, True), ({}, {"network_dropout": 0.1}, False),
    ({}, {"down_lr_weight": "zeros", "mid_lr_weight": "0", "up_lr_weight": "zeros"}, True)])
def test_a_continued_network_is_held_to_what_its_kind_can(kind: dict, values: dict, refused: bool) -> None:
    tensors = built(kind)[0].state_dict()
    with pytest.raises(SettingError) if refused else contextlib.nullcontext():
        built({**CONTINUED, **values}, tensors)


def test_lora_plus_of_a_continued_network_without_pairs_is_told() -> None:
    loha, lora = (built(kind)[0].state_dict() for kind in ({"network_module": "LoHa"}, {}))
    assert "(loraplus_lr_ratio)" in "".join(built({**CONTINUED, "loraplus_lr_ratio": 4}, loha)[1])
    assert not built({**CONTINUED, "loraplus_lr_ratio": 4}, lora)[1]


def test_a_network_whose_layers_all_have_a_rate_of_0_is_refused() -> None:
    with pytest.raises(SettingError):
        built({"network_targets": "text encoder", "network_train_unet_only": False, "text_encoder_lr": 0})


@pytest.mark.parametrize("kind", [
    {}, {"factor": 4, "full_matrix": True}, {"factor": 2, "dora_wd": True, "conv_dim": 2}], ids=str)
def test_a_continued_lokr_cuts_layers_as_its_file_does(kind: dict) -> None:
    begun, _ = built({"network_module": "LoKr", "network_dim": 1, **kind})
    assert built(CONTINUED, begun.state_dict())[0].kind == begun.kind


def test_a_resumed_network_is_of_the_kind_of_the_settings() -> None:
    chosen = {"network_module": "LoKr", "factor": 4, "full_matrix": True}
    begun, _ = built(chosen)
    resumed, _ = built(chosen, begun.state_dict(), state="a state")
    assert resumed.kind == begun.kind and resumed.arguments() == begun.arguments()


def test_the_first_group_of_a_part_has_its_name_also_where_blocks_are_frozen() -> None:
    tensors = built({})[0].state_dict()
    network, _ = built({**CONTINUED, "down_lr_weight": "zeros"}, tensors)
    assert [group["name"] for group in network.parameter_groups(1e-3, 0)] == ["unet"]
