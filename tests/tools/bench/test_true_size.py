"""Random checkpoints of the published sizes."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lib_lora_train.errors import SettingError
from lib_lora_train.model.frozen import build
from lib_lora_train.model.sd.components import text_tensors, unet_tensors
from tools.bench.true_size import FAMILIES, true_size_checkpoint, true_size_shapes, true_size_tensors

_SPEC = importlib.util.spec_from_file_location("full_size", Path(__file__).parents[2] / "adapters" / "full_size.py")
assert _SPEC and _SPEC.loader
full_size = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(full_size)

# Parameters as diffusers' and transformers' classes count them for the published models (OpenCLIP's with its
# `logit_scale`, and all of its layers).
UNET = {"sd1": 859_520_964, "sd2": 865_910_724, "sdxl": 2_567_463_684}
VAE = 83_653_863
TEXT = {"sd1": {"cond_stage_model.": 123_060_480}, "sd2": {"cond_stage_model.": 354_032_641},
        "sdxl": {"conditioner.embedders.0.": 123_060_480, "conditioner.embedders.1.": 694_659_841}}
TEXT_COMPONENTS = {"sd1": ("te",), "sd2": ("te",), "sdxl": ("te1", "te2")}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_true_size_checkpoint_has_as_many_weights_as_the_published_one(family: str) -> None:
    expected = {"model.diffusion_model.": UNET[family], "first_stage_model.": VAE, **TEXT[family]}
    found = {prefix: sum(math.prod(shape) for name, shape in true_size_shapes(family).items() if name.startswith(prefix))
             for prefix in expected}
    assert found == expected
    assert sum(found.values()) == sum(map(math.prod, true_size_shapes(family).values()))


@pytest.mark.parametrize("family", FAMILIES)
def test_its_shapes_are_those_of_the_published_architecture(family: str) -> None:
    made = {name: torch.empty(shape, device="meta") for name, shape in true_size_shapes(family).items()}
    parts = {"unet": unet_tensors(made)}
    for component, prefix in zip(TEXT_COMPONENTS[family], TEXT[family], strict=True):
        parts[component] = text_tensors(made, prefix)
    for component, published in full_size.model(family).items():
        for name, tensor in published.items():
            assert parts[component][name].shape == tensor.shape, f"{component} {name}"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_small_one_is_the_same_structure_narrower(family: str) -> None:
    full, small = true_size_shapes(family), true_size_shapes(family, small=True)
    assert full.keys() == small.keys()
    assert all(len(full[name]) == len(small[name]) for name in full)
    assert sum(map(math.prod, small.values())) < sum(map(math.prod, full.values())) / 10


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_is_built_on_it_and_its_activations_stay_of_ordinary_size(family: str) -> None:
    model = build(true_size_tensors(family, dtype=torch.float32, small=True))
    assert model.architecture.family.name == family
    config, generator = model.architecture.unet, torch.Generator().manual_seed(0)
    y = None if config.adm_channels is None else torch.randn(1, config.adm_channels, generator=generator)
    with torch.no_grad():
        prediction = model.unet(torch.randn(1, 4, 16, 16, generator=generator), torch.tensor([500]),
                                torch.randn(1, 77, config.context_dim, generator=generator), y)
        mean, std = model.vae.encode(torch.rand(1, 3, 64, 64, generator=generator) * 2 - 1)
    assert 0.05 < prediction.std() < 20
    assert 0.1 < mean.std() * model.architecture.latent_scale < 10 and std.mean() < 0.2


def test_the_file_holds_what_the_memory_would(tmp_path: Path) -> None:
    path = true_size_checkpoint("sd1", tmp_path, dtype=torch.float16, small=True)
    expected = true_size_tensors("sd1", dtype=torch.float16, small=True)
    read = load_file(path)
    assert read.keys() == expected.keys()
    assert all(torch.equal(read[name], tensor) for name, tensor in expected.items())
    assert [file.name for file in tmp_path.iterdir()] == ["sd1-small-fp16.safetensors"]


def test_a_file_that_is_there_is_kept_and_another_ones_is_not(tmp_path: Path) -> None:
    path = true_size_checkpoint("sd1", tmp_path, dtype=torch.float16, small=True)
    written = path.stat().st_mtime_ns
    assert true_size_checkpoint("sd1", tmp_path, dtype=torch.float16, small=True).stat().st_mtime_ns == written
    with path.open("r+b") as file:
        file.seek(100)
        file.write(b"?")
    assert true_size_checkpoint("sd1", tmp_path, dtype=torch.float16, small=True).stat().st_mtime_ns != written


def test_an_unknown_family_is_refused() -> None:
    with pytest.raises(SettingError, match="sd3"):
        true_size_shapes("sd3")
