"""Other programs read our files and change the prediction as the trainer does: LyCORIS, diffusers and sd-scripts."""

from __future__ import annotations

import copy
import functools
import os
from collections.abc import Mapping
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from transformers import CLIPTextModel

from lib_lora_train.adapters import file
from lib_lora_train.adapters.network import ADAPTERS, AdapterNetwork
from lib_lora_train.adapters.targets import DEFAULT_PRESET, WITH_CONVOLUTIONS, find_targets, of_preset
from lib_lora_train.model.architecture import TextConfig
from lib_lora_train.model.family import FAMILIES
from lib_lora_train.model.sd.components import text_tensors
from lib_lora_train.model.sd.text_encoder import TextEncoder
from lib_lora_train.model.sd.unet import UNet
from tests.model.small_checkpoints import (
    CONTEXT,
    POOLED,
    clip_config,
    diffusers_unet,
    ldm_names_of_unet,
    randomised,
    relative_error,
)
from tests.model.test_unet import SIZES, unet_of, vector
from tests.model.test_unet import inputs as unet_inputs

SD_SCRIPTS = os.environ.get("SD_SCRIPTS_ROOT")
"""A checkout of kohya-ss/sd-scripts, which is no package; tried with its commit 48d368fa."""
needs_sd_scripts = pytest.mark.skipif(not SD_SCRIPTS, reason="SD_SCRIPTS_ROOT names no checkout of kohya-ss/sd-scripts")


@functools.cache
def made() -> tuple[nn.Module, nn.Module]:
    """diffusers' UNet and transformers' text encoder."""
    return randomised(diffusers_unet("sd1")), randomised(CLIPTextModel(clip_config()))


@functools.cache
def ours() -> tuple[UNet, TextEncoder]:
    """The same model as ours."""
    unet, text = (module.state_dict() for module in made())
    config = TextConfig(component="te", prefix="", openclip=False, skip=1, layers=3, width=CONTEXT["sd1"], heads=4,
                        activation="quick_gelu", positions=77, projection=POOLED)
    named = {f"cond_stage_model.transformer.{name}": tensor for name, tensor in text.items()}
    return unet_of(ldm_names_of_unet(unet), "sd1"), TextEncoder(text_tensors(named, "cond_stage_model."), config)


def components() -> dict[str, Mapping[str, Tensor]]:
    return dict(zip(("unet", "te"), (module.tensors for module in ours()), strict=True))


def learnt(path: Path, name: str, model: Mapping[str, Mapping[str, Tensor]], *, family: str = "sd1",
           preset: str = WITH_CONVOLUTIONS) -> AdapterNetwork:
    """A network of this kind with random weights, which is saved at `path`."""
    # LyCORIS finds an OFT's blocks again where they are at least as many as each is large. This bound is reached.
    rank, alpha = (32, 1e-3) if name == "OFT" else (4, 2.0)
    targets = find_targets(model, family=FAMILIES[family], text_encoder="te" in model, chosen=of_preset(preset))
    network = AdapterNetwork.build(targets, rank=rank, alpha=alpha, seed=1, kind=ADAPTERS[name])
    network.begin_at(model, network.layers)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    file.save(path, network.state_dict(), {"ss_output_name": path.stem}, dtype=torch.float32)
    return network


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    """Latents, timesteps and tokens."""
    generator = torch.Generator().manual_seed(3)
    x, tokens = torch.randn(1, 4, 8, 8, generator=generator), torch.randint(0, 500, (1, 77), generator=generator)
    return x, torch.tensor([500]), tokens


@torch.no_grad()
def predicted(network: AdapterNetwork | None) -> Tensor:
    (unet, text), adapters, (x, t, tokens) = ours(), network.adapters() if network else {}, inputs()
    return unet(x, t, text(tokens, adapters=adapters.get("te", {}))[0], adapters=adapters.get("unet", {}))


@functools.cache
def base() -> Tensor:
    return predicted(None)


@torch.no_grad()
def expect_the_same(network: AdapterNetwork, unet: nn.Module, text: nn.Module) -> None:
    """Both change the prediction, and to the same one."""
    x, t, tokens = inputs()
    compare(unet(x, t, text(tokens).last_hidden_state).sample, predicted(network), base())


def compare(found: Tensor, expected: Tensor, without: Tensor) -> None:
    assert relative_error(without, expected) > 0.04
    assert relative_error(found, expected) <= 1e-3


@pytest.mark.parametrize("name", ADAPTERS)
def test_lycoris_loads_every_kind(name: str, tmp_path: Path) -> None:
    pytest.importorskip("lycoris")
    from lycoris import kohya

    path = tmp_path / "it.safetensors"
    network, (unet, text) = learnt(path, name, components()), copy.deepcopy(made())
    if "DoRA" in name:  # create_network_from_weights takes each dora_scale for one of outputs; its trainer goes by network_args
        other = kohya.create_network(1.0, 4, 2.0, None, text, unet, **network.arguments())
        other.apply_to(text, unet, True, True)
        assert "unexpected keys" not in other.load_weights(str(path))
    else:
        other, tensors = kohya.create_network_from_weights(1.0, str(path), None, text, unet)
        assert {one.lora_name for one in (*other.unet_loras, *other.text_encoder_loras)} == set(network.layers)
        other.apply_to(text, unet, True, True)
        assert not other.load_state_dict(tensors, strict=False).unexpected_keys
    expect_the_same(network, unet, text)


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
@torch.no_grad()
def test_diffusers_loads_a_lora_with_its_convolutions(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("peft")
    lora, unets = (pytest.importorskip(f"diffusers.loaders.{name}") for name in ("lora", "unet"))
    # It asks for a newer transformers than the WebUI's, which has the loading into text encoders; into a UNet peft does it.
    for module in (lora, unets):
        monkeypatch.setattr(module, "USE_PEFT_BACKEND", True)

    path, theirs = tmp_path / "it.safetensors", randomised(diffusers_unet(family))
    unet = unet_of(ldm_names_of_unet(theirs.state_dict()), family)
    network = learnt(path, "LoRA", {"unet": unet.tensors}, family=family)
    state, alphas = lora.LoraLoaderMixin.lora_state_dict(path.parent, weight_name=path.name,
                                                             unet_config=theirs.config)
    lora.LoraLoaderMixin.load_lora_into_unet(state, alphas, theirs)

    x, t, context, pooled = unet_inputs(family)
    time_ids = torch.tensor([[*SIZES["original"], *SIZES["crop"], *SIZES["target"]]]).float().expand(2, -1)
    given = x, t, context, vector(family, pooled)
    compare(theirs(x, t, context, added_cond_kwargs=dict(text_embeds=pooled, time_ids=time_ids)).sample,
            unet(*given, adapters=network.adapters()["unet"]), unet(*given))


def sd_scripts_unet(monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    """Its own UNet, which is of one size."""
    monkeypatch.syspath_prepend(SD_SCRIPTS)
    pytest.importorskip("cv2")
    from library import original_unet

    for name, size in (("BLOCK_OUT_CHANNELS", (32, 64, 128, 128)), ("TIMESTEP_INPUT_DIM", 32), ("TIME_EMBED_DIM", 128)):
        monkeypatch.setattr(original_unet, name, size)
    unet = original_unet.UNet2DConditionModel(sample_size=64, attention_head_dim=8, cross_attention_dim=CONTEXT["sd1"])
    unet.load_state_dict(made()[0].state_dict())
    return unet.eval()


@needs_sd_scripts
def test_sd_scripts_loads_a_lora_with_its_convolutions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unet, text = sd_scripts_unet(monkeypatch), copy.deepcopy(made()[1])
    from networks import lora

    path = tmp_path / "it.safetensors"
    network = learnt(path, "LoRA", components())
    other, tensors = lora.create_network_from_weights(1.0, str(path), None, text, unet)
    other.apply_to(text, unet)
    other.load_state_dict(tensors)  # each of them, and no others
    expect_the_same(network, unet, text)


@needs_sd_scripts
def test_sd_scripts_computes_what_our_oft_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unet, text = sd_scripts_unet(monkeypatch), made()[1]
    from networks import oft

    path = tmp_path / "it.safetensors"
    network = learnt(path, "OFT", {"unet": ours()[0].tensors}, preset=DEFAULT_PRESET)
    # Its own prefix, under which the WebUI v1.10.1 does not find the layers of SD1; ours is LyCORIS'.
    tensors = {key.replace("lora_unet", "oft_unet"): tensor for key, tensor in safetensors.torch.load_file(path).items()}
    other, _ = oft.create_network_from_weights(1.0, None, None, text, unet, weights_sd=tensors)
    other.apply_to(text, unet, False, True)
    other.load_state_dict(tensors)
    expect_the_same(network, unet, text)
