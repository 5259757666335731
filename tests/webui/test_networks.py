"""Each kind of network that is trained here is loaded by the WebUI's own Lora extension, and changes the model as here."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lib_lora_train.adapters import file
from lib_lora_train.adapters.base import merged
from lib_lora_train.adapters.network import AdapterNetwork
from lib_lora_train.adapters.targets import PRESETS
from lib_lora_train.model import frozen
from lib_lora_train.run.selection import select
from lib_lora_train.settings import parse
from tests.adapters.test_kinds import VALUES
from tests.model import small_checkpoints

FAMILIES = ("sd1", "sd2", "sdxl")
CASES = {**VALUES, **{preset: {"network_targets": preset} for preset in PRESETS}}
HALVES = ("LoRA", "LoHa", "LoKr", "DoRA", "OFT")  # of which a file at weight 0.5 is compared too


def cases_of(family: str) -> dict[str, dict[str, object]]:
    return {name: values for name, values in CASES.items() if family == "sdxl" or not name.startswith("B-LoRA")}


def clip(heads: int = 4) -> dict[str, object]:
    config = small_checkpoints.clip_config(heads=heads).to_dict()
    return {name: config[name] for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                                            "num_attention_heads", "projection_dim", "hidden_act")}


def openclip(width: int, heads: int) -> dict[str, object]:
    return {"context_length": 77, "vocab_size": small_checkpoints.VOCABULARY, "width": width, "heads": heads, "layers": 3,
            "output_dim": small_checkpoints.POOLED}


def unet_arguments(family: str) -> dict[str, object]:
    """As `small_checkpoints.ldm_unet` makes it."""
    sdxl = family == "sdxl"
    shared = {"in_channels": 4, "out_channels": 4, "model_channels": 32, "num_res_blocks": 2,
              "attention_resolutions": [4, 2] if sdxl else [4, 2, 1], "channel_mult": [1, 2, 4] if sdxl else [1, 2, 4, 4],
              "use_spatial_transformer": True, "transformer_depth": 1, "context_dim": small_checkpoints.CONTEXT[family],
              "legacy": False, "use_linear_in_transformer": family != "sd1", "use_checkpoint": False}
    heads = {"num_heads": 8} if family == "sd1" else {"num_head_channels": 16}
    vector = small_checkpoints.POOLED + small_checkpoints.SIZES
    return shared | heads | ({"num_classes": "sequential", "adm_in_channels": vector} if sdxl else {"image_size": 32})


TEXT = {"sd1": [("clip", clip())], "sd2": [("openclip", openclip(48, 4))],
        "sdxl": [("clip", clip()), ("openclip", openclip(32, 2))]}


@functools.cache
def tensors(family: str) -> dict[str, Tensor]:
    return {name: tensor.detach() for name, tensor in small_checkpoints.checkpoint(family).items()}


def model_on(family: str, lent: dict[str, Tensor]) -> frozen.FrozenModel:
    return frozen.build(lent, hints=small_checkpoints.HINTS[family], tokenizers=small_checkpoints.tokenizers(family))


def inputs_of(family: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(7)
    found = {"x": torch.randn(2, 4, 16, 24, generator=generator), "t": torch.tensor([40, 800]),
             "context": torch.randn(2, 77, small_checkpoints.CONTEXT[family], generator=generator)}
    if family == "sdxl":
        found["y"] = torch.randn(2, small_checkpoints.POOLED + small_checkpoints.SIZES, generator=generator)
    return found


def file_name(family: str, name: str) -> str:
    return f"{family}-{name.replace(' ', '_')}.safetensors"


def learnt(family: str, name: str) -> AdapterNetwork:
    """A network with random numbers in the place of a training's."""
    model = model_on(family, tensors(family))
    chosen = parse({"network_dim": 4, "network_alpha": 2, "network_train_unet_only": False, **cases_of(family)[name]}).network
    selected = select(chosen, model.components, family=model.architecture.family)
    network = AdapterNetwork.build(selected.targets, rank=4, alpha=2, seed=1, sizes=selected.sizes, kind=selected.kind)
    network.begin_at(model.components, network.layers)
    with torch.no_grad():
        for number, parameter in enumerate(network.parameters()):
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)))
    return network


@pytest.fixture(scope="module")
def webui_says(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the WebUI's extension makes of a file of each case."""
    folder, cases = tmp_path_factory.mktemp("networks"), {}
    for family in FAMILIES:
        save_file({name: tensor.clone().contiguous() for name, tensor in tensors(family).items()},
                  folder / f"{family}.safetensors")
        save_file(inputs_of(family), folder / f"{family}-inputs.safetensors")
        files = []
        for name in cases_of(family):
            file.save(folder / file_name(family, name), learnt(family, name).state_dict(), {}, dtype=torch.float32)
            files.append((file_name(family, name), 1.0))
        for name in HALVES:
            half = file_name(family, f"{name} half")
            (folder / half).write_bytes((folder / file_name(family, name)).read_bytes())
            files.append((half, 0.5))
        cases[family] = {"unet": unet_arguments(family), "text": TEXT[family], "files": files}
    (folder / "cases.json").write_text(json.dumps(cases))
    root = Path(os.environ["WEBUI_ROOT"])
    done = subprocess.run(
        [os.environ.get("WEBUI_PYTHON", sys.executable), Path(__file__).with_name("lora_extension.py"), folder],
        capture_output=True, text=True, timeout=600, env={
            **os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1",
            "PYTHONPATH": str(root / "repositories" / "stable-diffusion-stability-ai")})
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.parametrize(("family", "name"), [(family, name) for family in FAMILIES for name in cases_of(family)])
def test_a_file_is_loaded_without_an_unmatched_key_and_predicts_what_it_predicts_here(
        webui_says: Path, family: str, name: str) -> None:
    compare(webui_says, family, name, 1.0, file_name(family, name))


@pytest.mark.parametrize(("family", "name"), [(family, name) for family in FAMILIES for name in HALVES])
def test_at_half_the_weight_it_predicts_the_same_too(webui_says: Path, family: str, name: str) -> None:
    compare(webui_says, family, name, 0.5, file_name(family, f"{name} half"))


@torch.no_grad()
def compare(folder: Path, family: str, name: str, multiplier: float, path: str) -> None:
    assert json.loads((folder / "found.json").read_text())[path]["unmatched"] == []
    theirs, network = load_file(folder / f"{path}.result.safetensors"), learnt(family, name)
    lent = {key: tensor.clone() for key, tensor in tensors(family).items()}
    model, inputs = model_on(family, lent), inputs_of(family)
    network.set_multiplier(multiplier)

    def predicted(adapters: dict) -> Tensor:
        return model.unet(inputs["x"], inputs["t"], inputs["context"], inputs.get("y"), adapters=adapters.get("unet", {}))

    ours, base = predicted(network.adapters()), predicted({})
    assert (ours - theirs["prediction"]).norm() <= 1e-3 * theirs["prediction"].norm()
    assert name == "text encoder" or (ours - base).norm() > 0.01 * base.norm()
    before = {key: tensor.clone() for key, tensor in lent.items()}
    for target in network.targets:
        if target.component != "unet":  # q, k and v are views of one tensor where the checkpoint has one
            weight = model.components[target.component][f"{target.module}.weight"]
            weight.copy_(merged(network.layers[target.key], weight))
    changed = [key for key in lent if not torch.equal(lent[key], before[key])]
    assert changed
    for key in changed:
        assert (lent[key] - theirs[key]).norm() <= 1e-4 * (lent[key] - before[key]).norm(), key
