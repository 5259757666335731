"""Several LoRAs at once are the model with all of their deltas in its weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lib_lora_train.adapters import file
from lib_lora_train.adapters.stack import LoraTag, WeightedLora, find_lora, load_stack, split_tags, stacked
from lib_lora_train.adapters.targets import Target, find_targets
from lib_lora_train.errors import HostError, LoraFileError
from lib_lora_train.host.lease import lease_for
from lib_lora_train.host.port import RenderRequest
from lib_lora_train.host.standalone import StandaloneHost
from lib_lora_train.model import frozen
from lib_lora_train.model.family import FAMILIES
from lib_lora_train.model.frozen import FrozenModel
from lib_lora_train.model.sampler import SampleRequest, sample_batch, to_image
from lib_lora_train.settings import Settings
from tests.adapters import full_size

REQUEST = SampleRequest("red cat", width=64, height=64, steps=3, cfg_scale=3.0, seed=7)
PREFIXES = {"unet": "model.diffusion_model.", "te": "cond_stage_model.transformer."}


@pytest.fixture(scope="module")
def model(tiny_file: Path) -> FrozenModel:
    host = StandaloneHost(tiny_file, lora_folder=tiny_file.parent, runs_folder=tiny_file.parent)
    with host.lease() as leased:
        return frozen.build(leased.tensors, hints=leased.hints, tokenizers=leased.tokenizers)


def targets_of(model: FrozenModel) -> tuple[Target, ...]:
    return find_targets(model.components, family=model.architecture.family)


def write(path: Path, targets: tuple[Target, ...], *, rank: int, alpha: float, seed: int) -> dict[str, Tensor]:
    """A LoRA file of kohya's keys with random numbers; returns {checkpoint name of a layer: ΔW at weight 1}."""
    generator, tensors, deltas = torch.Generator().manual_seed(seed), {}, {}
    for target in targets:
        down = torch.randn(rank, target.in_features, generator=generator) / target.in_features ** 0.5
        up = torch.randn(target.out_features, rank, generator=generator) / 8
        as_conv = (..., None, None) if target.as_conv else ...
        tensors |= {f"{target.key}.lora_down.weight": down[as_conv], f"{target.key}.lora_up.weight": up[as_conv],
                    f"{target.key}.alpha": torch.tensor(alpha)}
        deltas[f"{PREFIXES[target.component]}{target.module}.weight"] = up @ down * (alpha / rank)
    file.save(path, tensors, {}, dtype=torch.float32)
    return deltas


def merged(tiny_file: Path, deltas: Mapping[str, Tensor]) -> FrozenModel:
    """The model with `deltas` added into its weights."""
    host = StandaloneHost(tiny_file, lora_folder=tiny_file.parent, runs_folder=tiny_file.parent)
    with host.lease() as leased:
        tensors = {name: tensor + deltas[name].reshape(tensor.shape) if name in deltas else tensor
                   for name, tensor in leased.tensors.items()}
        return frozen.build(tensors, hints=leased.hints, tokenizers=leased.tokenizers)


def test_two_loras_sample_what_the_sum_of_their_deltas_samples(tiny_file: Path, model: FrozenModel, tmp_path: Path) -> None:
    targets = targets_of(model)
    style = write(tmp_path / "style.safetensors", targets, rank=3, alpha=1.5, seed=1)
    subject = write(tmp_path / "subject.safetensors", targets[::2], rank=2, alpha=2.0, seed=2)
    stack = load_stack(model, [WeightedLora(tmp_path / "style.safetensors", 0.3, -0.7),
                               WeightedLora(tmp_path / "subject.safetensors", 1.0, 0.5)])
    weights = {"model.": (-0.7, 0.5), "cond_s": (0.3, 1.0)}
    together = {name: weights[name[:6]][0] * delta + weights[name[:6]][1] * subject.get(name, torch.zeros_like(delta))
                for name, delta in style.items()}
    found, expected = sample_batch(model, [REQUEST], adapters=stack), sample_batch(merged(tiny_file, together), [REQUEST])
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()
    without = sample_batch(model, [REQUEST])
    for part in ("unet", "te"):  # each of them matters
        assert (sample_batch(model, [REQUEST], adapters={part: stack[part]}) - without).abs().max() > 1e-2
    assert (sample_batch(model, [REQUEST], adapters=stacked([stack])) - found).abs().max() == 0


def test_at_weight_zero_the_model_samples_as_without(model: FrozenModel, tmp_path: Path) -> None:
    write(tmp_path / "style.safetensors", targets_of(model), rank=3, alpha=3.0, seed=1)
    stack = load_stack(model, [WeightedLora(tmp_path / "style.safetensors", 0.0, 0.0)] * 2)
    assert torch.equal(sample_batch(model, [REQUEST], adapters=stack), sample_batch(model, [REQUEST]))


@pytest.mark.parametrize(("text", "tag"), [
    ("a", LoraTag("a", 1.0, 1.0)), ("a:0.5", LoraTag("a", 0.5, 0.5)), ("a:0.5:0.25", LoraTag("a", 0.5, 0.25)),
    ("a:te=0.5", LoraTag("a", 0.5, 0.5)), ("a:unet=0", LoraTag("a", 1.0, 0.0)), ("a:0.5:unet=2", LoraTag("a", 0.5, 2.0)),
    ("my lora v1.5:-1", LoraTag("my lora v1.5", -1.0, -1.0))])
def test_a_tag_is_read_as_the_webui_reads_it(text: str, tag: LoraTag) -> None:
    assert split_tags(f"a cat <lora:{text}>, red") == ("a cat , red", (tag,))


@pytest.mark.parametrize("text", ["a:", "a:x", "a:nan", "a:te=", "a:1:inf"])
def test_a_weight_that_is_no_number_is_refused(text: str) -> None:
    with pytest.raises(LoraFileError):
        split_tags(f"<lora:{text}>")


def test_the_host_renders_the_loras_of_its_folder(host: StandaloneHost, model: FrozenModel) -> None:
    (host.lora_folder / "styles").mkdir(parents=True)
    write(host.lora_folder / "styles" / "my style.safetensors", targets_of(model), rank=3, alpha=3.0, seed=1)

    def rendered(prompt: str) -> bytes:
        return host.render(RenderRequest(prompt, width=64, height=64, steps=2))[0].tobytes()

    lora = find_lora(LoraTag("my style", 0.5, 0.5), host.lora_folder)
    request = SampleRequest("red cat", width=64, height=64, steps=2)
    with lease_for(host, "Testing", settings=Settings(), should_stop=None) as lease:
        expected = to_image(lease.model, lease.sample(request, adapters=load_stack(lease.model, [lora]))).tobytes()
    assert rendered("red cat<lora:my style:0.5>") == rendered("<lora:my style:0.5>red cat") == expected != rendered("red cat")
    assert rendered("red cat<lora:my style:0>") == rendered("red cat")


def test_a_lora_that_cannot_be_used_is_told_and_the_model_is_free(host: StandaloneHost, tmp_path: Path) -> None:
    host.lora_folder.mkdir()
    unet = full_size.unet(context=24, channels=32, multipliers=(1, 2), depths=(1, 1))
    for name, family in (("other", "sdxl"), ("wide", "sd1")):
        found = find_targets({"unet": unet}, family=FAMILIES[family], text_encoder=False)
        write(host.lora_folder / f"{name}.safetensors", found, rank=2, alpha=2.0, seed=1)
    (host.lora_folder / "torn.safetensors").write_bytes(b"\0")
    told = {"none": "no LoRA", "../tiny": "no LoRA", "other": "SDXL", "wide": "cannot be used", "torn": "torn"}
    for name, word in told.items():
        with pytest.raises(LoraFileError) as refusal:
            host.render(RenderRequest(f"a <lora:{name}:1>", width=64, height=64, steps=1))
        assert word in str(refusal.value) and "continued" not in str(refusal.value)
    with host.lease(), pytest.raises(HostError):
        host.render(RenderRequest("a", width=64, height=64))
