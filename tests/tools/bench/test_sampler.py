"""What the benchmark samples and measures with: a LoRA at a weight, images that depend on their position alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lib_lora_train.adapters import file
from lib_lora_train.adapters.network import AdapterNetwork
from lib_lora_train.adapters.targets import find_targets
from lib_lora_train.host.standalone import StandaloneHost
from lib_lora_train.model import frozen
from tools.bench import sampler as sampler_module
from tools.bench.sampler import LOSS_TIMESTEPS, Sampler


@pytest.fixture(scope="module")
def sampler(tiny_file: Path) -> Sampler:
    return Sampler(StandaloneHost(tiny_file, lora_folder=tiny_file.parent, runs_folder=tiny_file.parent), steps=2)


@pytest.fixture(scope="module")
def lora(tiny_file: Path) -> Path:
    """A LoRA file for UNet and text encoder that changes much."""
    host = StandaloneHost(tiny_file, lora_folder=tiny_file.parent, runs_folder=tiny_file.parent)
    with host.lease() as leased:
        model = frozen.build(leased.tensors, hints=leased.hints, tokenizers=leased.tokenizers)
    targets = find_targets(model.components, family=model.architecture.family)
    network = AdapterNetwork.build(targets, rank=2, alpha=2, seed=0)
    generator = torch.Generator().manual_seed(3)
    tensors = {key: torch.randn(tensor.shape, generator=generator) * 0.3 if key.endswith("lora_up.weight") else tensor
               for key, tensor in network.state_dict().items()}
    path = tiny_file.parent / "strong.safetensors"
    file.save(path, tensors, {}, dtype=torch.float32)
    return path


def test_a_lora_at_weight_0_samples_the_base_models_images_bit_for_bit(sampler, lora):
    base = sampler.sample(["red cat", "blue"])
    assert base.shape == (2, 3, 128, 128) and base.min() >= 0 and base.max() <= 1
    assert torch.equal(sampler.sample(["red cat", "blue"], sampler.lora(lora, weight=0.0)), base)
    assert (sampler.sample(["red cat", "blue"], sampler.lora(lora, weight=1.0)) - base).abs().max() > 0.01


def test_half_the_weight_is_half_the_alpha(sampler, lora, tmp_path):
    tensors = {key: tensor / 2 if key.endswith(".alpha") else tensor for key, tensor in file.load(lora).tensors.items()}
    file.save(tmp_path / "half.safetensors", tensors, {}, dtype=torch.float32)
    by_weight = sampler.sample(["red cat"], sampler.lora(lora, weight=0.5))
    by_alpha = sampler.sample(["red cat"], sampler.lora(tmp_path / "half.safetensors", weight=1.0))
    assert torch.allclose(by_weight, by_alpha, atol=1e-5)


def test_an_image_depends_on_its_prompt_and_its_position_alone(sampler, monkeypatch):
    monkeypatch.setattr(sampler_module, "TOGETHER", 2)
    many = sampler.sample(["red cat"] * 3)  # more than are sampled together
    assert torch.allclose(many[:1], sampler.sample(["red cat"]), atol=1e-4)
    assert (many[0] - many[2]).abs().max() > 0.01  # another position, another noise


def test_the_held_out_loss_follows_the_lora_and_nothing_else(sampler, lora):
    pixels, captions = torch.rand(2, 3, 128, 128, generator=torch.Generator().manual_seed(1)), ["red", "cat"]
    base = sampler.held_out_loss(pixels, captions)
    assert tuple(base) == LOSS_TIMESTEPS
    assert base == sampler.held_out_loss(pixels, captions, sampler.lora(lora, weight=0.0))
    adapted = sampler.held_out_loss(pixels, captions, sampler.lora(lora, weight=1.0))
    assert all(adapted[t] != base[t] for t in base)
