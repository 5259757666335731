from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path

import pytest
import torch

from lib_lora_train.adapters.lora import LoRA, LoRALayer
from lib_lora_train.adapters.network import AdapterNetwork
from lib_lora_train.adapters.targets import DEFAULT_PRESET, PRESETS, Target, find_targets, of_keys, of_preset
from lib_lora_train.errors import ModelError, SettingError
from lib_lora_train.model.family import FAMILIES
from lib_lora_train.run.selection import select, targets_of_file
from lib_lora_train.settings import DECLARATIONS, NetworkSettings
from tests.adapters import full_size

DATA = Path(__file__).parent / "data"
# [key, shape of lora_down, shape of lora_up] of every layer that sd-scripts' own networks.lora makes (rank 8), and of those
# that it makes besides with conv_dim=4.
KOHYA = json.loads(gzip.decompress((DATA / "kohya_keys_rank8.json.gz").read_bytes()))
KOHYA_CONV = json.loads(gzip.decompress((DATA / "kohya_keys_conv_rank4.json.gz").read_bytes()))


@pytest.mark.parametrize(("family", "layers"), [("sd1", 264), ("sd2", 330), ("sdxl", 986)])
def test_a_full_size_model_gets_exactly_the_layers_that_sd_scripts_makes(family: str, layers: int) -> None:
    targets = find_targets(full_size.model(family), family=FAMILIES[family])
    ours = {target.key: [
        [8, target.in_features, 1, 1] if target.as_conv else [8, target.in_features],
        [target.out_features, 8, 1, 1] if target.as_conv else [target.out_features, 8]] for target in targets}
    assert ours == {key: [down, up] for key, down, up in KOHYA[family]}
    assert len(targets) == layers


def test_the_tensors_of_the_file_have_the_keys_and_shapes_of_sd_scripts() -> None:
    network = AdapterNetwork.build(find_targets(full_size.model("sd1"), family=FAMILIES["sd1"]), rank=8, alpha=4, seed=0)
    expected = {}
    for key, down, up in KOHYA["sd1"]:
        expected |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up, f"{key}.alpha": []}
    assert {key: list(tensor.shape) for key, tensor in network.state_dict().items()} == expected


@pytest.mark.parametrize(("family", "layers"), [("sd1", 86), ("sd2", 86), ("sdxl", 66)])
def test_with_convolutions_it_gets_exactly_the_layers_that_sd_scripts_makes_with_conv_dim(family: str, layers: int) -> None:
    components = full_size.model(family)
    chosen = NetworkSettings(network_dim=8, conv_dim=4, network_train_unet_only=False)
    selected = select(chosen, components, family=FAMILIES[family])
    with torch.device("meta"):
        network = AdapterNetwork.build(selected.targets, rank=8, alpha=4, seed=0, sizes=selected.sizes, kind=Shapes())
    ours = {key: list(tensor.shape) for key, tensor in network.state_dict().items() if not key.endswith("alpha")}
    expected = {}
    for key, down, up in [*KOHYA[family], *KOHYA_CONV[family]]:
        expected |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up}
    assert ours == expected and len(KOHYA_CONV[family]) == layers


class Shapes(LoRA):
    """LoRA of zeros: nothing is drawn for shapes on the meta device."""

    def build(self, target: Target, *, rank: int, alpha: float, generator: torch.Generator) -> LoRALayer:
        return LoRALayer(torch.empty(rank, target.in_features, *target.kernel), torch.empty(target.out_features, rank),
                         alpha=alpha, as_conv=target.as_conv)


def numbers(family: str, preset: str, *, rank: int) -> int:
    targets = find_targets(full_size.model(family), family=FAMILIES[family], text_encoder=False, chosen=of_preset(preset))
    return sum(LoRA().cost(target, rank=rank) for target in targets)


def test_the_presets_are_the_layers_that_they_are_named_after() -> None:
    setting = DECLARATIONS["network_targets"]
    assert tuple(PRESETS) == setting.choices and setting.default == DEFAULT_PRESET
    # The first LoRAs: q, k, v and out of both attentions of SD1 at rank 4, 797,184 numbers, which is 3.19 MB in fp32
    # (diffusers' pytorch_lora_weights.bin of 3.29 MB, https://huggingface.co/blog/lora).
    assert numbers("sd1", "attention", rank=4) == 797_184
    # attn2 alone: 24 C + 6144 numbers of each of 16 layers, whose C are 5 x 320, 5 x 640 and 6 x 1280.
    assert numbers("sd1", "cross-attention", rank=4) == 24 * (5 * 320 + 5 * 640 + 6 * 1280) + 16 * 6144
    assert numbers("sd1", "text encoder", rank=4) == 0 < numbers("sd1", DEFAULT_PRESET, rank=4)


def test_the_b_lora_presets_are_the_blocks_of_the_paper() -> None:
    # arXiv 2403.14572: W4 and W5 are up_blocks.0.attentions.0 and .1, of 10 layers each, whose q, k, v and out are adapted.
    blocks = {"B-LoRA content": {"output_blocks_0_1"}, "B-LoRA style": {"output_blocks_1_1"},
              "B-LoRA content and style": {"output_blocks_0_1", "output_blocks_1_1"}}
    for preset, expected in blocks.items():
        targets = find_targets(full_size.model("sdxl"), family=FAMILIES["sdxl"], text_encoder=False, chosen=of_preset(preset))
        assert {target.key.removeprefix("lora_unet_").partition("_transformer")[0] for target in targets} == expected
        assert len(targets) == len(expected) * 10 * 2 * 4
    with pytest.raises(SettingError):
        select(NetworkSettings(network_targets="B-LoRA style"), full_size.model("sd1"), family=FAMILIES["sd1"])


def test_what_lycoris_adapts_besides_is_known_of_its_files_and_chosen_by_no_preset() -> None:
    # Its preset "full" has conv_in, conv_out and time_embedding.linear_1 and _2, called so in sd-scripts' UNet of SD1 and SD2.
    keys = {f"lora_unet_{name}": shape for name, shape in {
        "conv_in": (320, 4, (3, 3)), "conv_out": (4, 320, (3, 3)), "time_embedding_linear_1": (1280, 320, ()),
        "time_embedding_linear_2": (1280, 1280, ())}.items()}
    found = find_targets(full_size.model("sd1"), family=FAMILIES["sd1"], text_encoder=False, chosen=of_keys(keys))
    assert {target.key: (target.out_features, target.in_features, target.kernel) for target in found} == keys
    chosen = targets_of_file(NetworkSettings(), full_size.model("sd1"), family=FAMILIES["sd1"],
                             keys=[f"{key}.alpha" for key in keys])
    assert {target.key for target in chosen} == set(keys)
    for preset in PRESETS:
        assert not [target for target in find_targets(full_size.model("sd1"), family=FAMILIES["sd1"], chosen=of_preset(preset))
                    if target.key in keys]


@pytest.mark.parametrize(("family", "unet", "text"), [("sd1", 192, 72), ("sd2", 192, 138), ("sdxl", 722, 264)])
def test_unet_and_text_encoder_are_chosen_separately(family: str, unet: int, text: int) -> None:
    model = full_size.model(family)
    assert len(find_targets(model, family=FAMILIES[family], text_encoder=False)) == unet
    both = find_targets(model, family=FAMILIES[family])
    assert Counter(target.component == "unet" for target in both) == {True: unet, False: text}
    assert len(find_targets({"unet": model["unet"]}, family=FAMILIES[family], text_encoder=False)) == unet


def test_the_written_architecture_has_the_names_and_shapes_of_ldm() -> None:
    openaimodel = pytest.importorskip("ldm.modules.diffusionmodules.openaimodel")
    with torch.device("meta"):
        unet = openaimodel.UNetModel(
            image_size=32, in_channels=4, out_channels=4, model_channels=320, attention_resolutions=[4, 2, 1],
            num_res_blocks=2, channel_mult=[1, 2, 4, 4], num_heads=8, use_spatial_transformer=True,
            transformer_depth=1, context_dim=768, use_checkpoint=False, legacy=False)
    theirs = {name: tuple(tensor.shape) for name, tensor in unet.state_dict().items() if name.endswith(".weight")}
    assert full_size.unet(context=768) == theirs


def test_block_names_follow_the_number_of_blocks_that_the_model_has() -> None:
    shapes = full_size.unet(context=32, channels=32, multipliers=(1, 2), depths=(1, 1), blocks=3)
    keys = {target.key for target in find_targets({"unet": shapes}, family=FAMILIES["sd1"], text_encoder=False)}
    blocks = {key.split("_proj_in")[0].removeprefix("lora_unet_") for key in keys if key.endswith("_proj_in")}
    assert blocks == {
        *(f"down_blocks_{level}_attentions_{place}" for level in (0, 1) for place in range(3)),
        *(f"up_blocks_{level}_attentions_{place}" for level in (0, 1) for place in range(4)),
        "mid_block_attentions_0"}


def test_the_order_does_not_depend_on_the_order_of_the_names() -> None:
    shapes = full_size.unet(context=2048, multipliers=(1, 2, 4), depths=(0, 2, 10), linear=True)
    backwards = dict(reversed(list(shapes.items())))
    forth = find_targets({"unet": shapes}, family=FAMILIES["sdxl"], text_encoder=False)
    assert forth == find_targets({"unet": backwards}, family=FAMILIES["sdxl"], text_encoder=False)
    assert [target.module for target in forth if target.module.endswith("proj_in")][:3] == [
        "input_blocks.4.1.proj_in", "input_blocks.5.1.proj_in", "input_blocks.7.1.proj_in"]


@pytest.mark.parametrize("components", [{}, {"unet": {}}, {"unet": {"transformer.x.weight": (8, 8)}}])
def test_a_model_without_known_layers_is_refused(components: dict) -> None:
    with pytest.raises(ModelError):
        find_targets(components, family=FAMILIES["sd1"], text_encoder=False)


def test_a_model_without_a_text_encoder_is_refused_where_that_is_trained() -> None:
    with pytest.raises(ModelError, match="text encoder"):
        find_targets({"unet": full_size.model("sd1")["unet"]}, family=FAMILIES["sd1"])
