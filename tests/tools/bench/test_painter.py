"""What the yardstick paints and measures with: a LoRA at a weight, pictures that depend on their place alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lib_lora_train.adapters import file
from lib_lora_train.adapters.network import LoRANetwork
from lib_lora_train.adapters.targets import find_targets
from lib_lora_train.host.standalone import StandaloneHost
from lib_lora_train.model import frozen
from tools.bench.real_images import RealPictures, load
from tools.bench.sampler import LOSS_TIMESTEPS, Painter
from tools.bench.yardstick import loss_bands, shown_by_vae


@pytest.fixture(scope="module")
def painter(tiny_file: Path) -> Painter:
    return Painter(StandaloneHost(tiny_file, lora_folder=tiny_file.parent, runs_folder=tiny_file.parent), steps=2)


@pytest.fixture(scope="module")
def lora(tiny_file: Path) -> Path:
    """A LoRA file for UNet and text encoder that changes much."""
    host = StandaloneHost(tiny_file, lora_folder=tiny_file.parent, runs_folder=tiny_file.parent)
    with host.lease() as lent:
        model = frozen.build(lent.tensors, hints=lent.hints, tokenizers=lent.tokenizers)
    network = LoRANetwork.build(find_targets(model.components, family="sd1", text_encoder=True), rank=2, alpha=2, seed=0)
    generator = torch.Generator().manual_seed(3)
    tensors = {key: torch.randn(tensor.shape, generator=generator) * 0.3 if key.endswith("lora_up.weight") else tensor
               for key, tensor in network.state_dict().items()}
    path = tiny_file.parent / "strong.safetensors"
    file.save(path, tensors, {}, dtype=torch.float32)
    return path


def test_a_lora_at_weight_0_paints_the_base_models_pictures_bit_for_bit(painter, lora):
    base = painter.sample(["red cat", "blue"])
    assert base.shape == (2, 3, 128, 128) and base.min() >= 0 and base.max() <= 1
    assert torch.equal(painter.sample(["red cat", "blue"], painter.lora(lora, weight=0.0)), base)
    assert (painter.sample(["red cat", "blue"], painter.lora(lora, weight=1.0)) - base).abs().max() > 0.01


def test_half_the_weight_is_half_the_alpha(painter, lora, tmp_path):
    tensors = {key: tensor / 2 if key.endswith(".alpha") else tensor for key, tensor in file.load(lora).tensors.items()}
    file.save(tmp_path / "half.safetensors", tensors, {}, dtype=torch.float32)
    by_weight = painter.sample(["red cat"], painter.lora(lora, weight=0.5))
    by_alpha = painter.sample(["red cat"], painter.lora(tmp_path / "half.safetensors", weight=1.0))
    assert torch.allclose(by_weight, by_alpha, atol=1e-5)


def test_a_picture_depends_on_its_prompt_and_its_place_alone(painter):
    many = painter.sample(["red cat"] * 17)  # more than are painted together
    assert torch.allclose(many[:1], painter.sample(["red cat"]), atol=1e-4)
    assert (many[0] - many[16]).abs().max() > 0.01  # another place, another noise


def test_the_held_out_loss_follows_the_lora_and_nothing_else(painter, lora):
    pixels, captions = torch.rand(3, 3, 128, 128, generator=torch.Generator().manual_seed(1)), ["red", "blue", "cat"]
    base = painter.held_out_loss(pixels, captions)
    assert tuple(base) == LOSS_TIMESTEPS and base == painter.held_out_loss(pixels, captions)
    assert base == painter.held_out_loss(pixels, captions, painter.lora(lora, weight=0.0))
    bands = loss_bands(painter, pixels, captions, painter.lora(lora, weight=1.0))
    assert [band.timesteps for band in bands] == ["0-199", "200-399", "400-599", "600-799", "800-999"]
    assert [band.base for band in bands] == pytest.approx([(base[t] + base[t + 100]) / 2 for t in LOSS_TIMESTEPS[::2]])
    assert all(band.lora != band.base for band in bands)


def test_real_pictures_are_shown_alike_from_the_disk_and_anew(painter, tmp_path):
    real = load()
    few = RealPictures(real.words[:2], real.splits[:2], {hand: pixels[:2] for hand, pixels in real.pixels.items()})
    anew = shown_by_vae(painter, few, kept=tmp_path)
    file, = tmp_path.iterdir()
    read = shown_by_vae(painter, few, kept=tmp_path)
    assert list(tmp_path.iterdir()) == [file]
    for hand, pixels in anew.items():
        assert torch.equal(read[hand], pixels)
        assert (pixels - painter.through_vae(few.pixels[hand])).abs().max() <= 0.5 / 255 + 1e-6
    other = RealPictures(real.words[2:4], real.splits[2:4], {hand: pixels[2:4] for hand, pixels in real.pixels.items()})
    assert not torch.equal(shown_by_vae(painter, other, kept=tmp_path)["noto"], read["noto"])
