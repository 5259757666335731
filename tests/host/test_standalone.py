"""The stand-alone host holds its checkpoint as the WebUI holds its model: a second run reads and copies nothing of it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from lib_lora_train.errors import HostError, Interrupted, SettingError
from lib_lora_train.host.port import RenderRequest
from lib_lora_train.host.standalone import StandaloneHost
from lib_lora_train.model import frozen
from lib_lora_train.model.sampler import SampleRequest, sample_batch, to_image
from lib_lora_train.run import job
from lib_lora_train.settings import parse
from tests.jobs import run_settings
from tools import tiny_checkpoint


@pytest.fixture
def own(tmp_path: Path) -> StandaloneHost:
    """A host with a checkpoint of its own, which the test may take away."""
    return StandaloneHost(tiny_checkpoint.write(tmp_path / "models"), lora_folder=tmp_path / "loras",
                          runs_folder=tmp_path / "runs")


def run(host: StandaloneHost, images: Path, folder: Path) -> None:
    folder.mkdir(parents=True)
    settings = parse({"train_data_dir": str(images), "output_name": "zzk", "resolution": "64", "min_bucket_reso": 64,
                      "max_train_steps": 2, "network_dim": 2, "cache_latents_to_disk": True, "overwrite": True})
    assert run_settings(settings, host, report=lambda _: None, stop=lambda: "", folder=folder).outcome == "done"


@pytest.mark.skipif(sys.platform == "win32", reason="Windows keeps files that are in use where they are")
def test_a_second_run_needs_no_file_of_the_checkpoint(own: StandaloneHost, images: Path, tmp_path: Path) -> None:
    run(own, images, tmp_path / "runs" / "first")
    (tmp_path / "models").rename(tmp_path / "elsewhere")
    assert own.checkpoint() is not None and own.outline() is not None
    run(own, images, tmp_path / "runs" / "second")


def test_before_the_first_lease_only_the_header_is_read(own: StandaloneHost, monkeypatch: pytest.MonkeyPatch) -> None:
    from lib_lora_train.host import standalone

    monkeypatch.setattr(standalone, "load_file", lambda *arguments, device: pytest.fail("the weights were read"))
    checkpoint, outline = own.checkpoint(), own.outline()
    assert checkpoint is not None and checkpoint.family == "sd1"
    assert outline is not None and all(tensor.is_meta for tensor in outline.tensors.values())


def test_what_is_trained_on_is_the_hosts_memory_to_the_last_byte(
        own: StandaloneHost, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copied: list[int] = []
    original = job.train
    with own.lease() as leased:
        memory = {tensor.untyped_storage().data_ptr() for tensor in leased.tensors.values()}

    def watched(model, *arguments, **named):
        steps = original(model, *arguments, **named)
        used: list[torch.Tensor] = [t for part in (*model.components.values(), model.vae.tensors) for t in part.values()]
        copied.append(sum(t.nbytes for t in used if t.untyped_storage().data_ptr() not in memory))
        copied.append(model.unet.layers.copied_bytes + model.vae.layers.copied_bytes)
        return steps
    monkeypatch.setattr(job, "train", watched)
    run(own, images, tmp_path / "runs" / "first")
    assert copied == [0, 0]


def test_it_renders_what_its_sampler_samples_from_consecutive_seeds(host: StandaloneHost) -> None:
    rendered = host.render(RenderRequest("red", width=128, height=64, steps=2, seed=3, count=2))
    with host.lease() as leased:
        model = frozen.build(leased.tensors, hints=leased.hints, tokenizers=leased.tokenizers)
    for seed, image in zip((3, 4), rendered, strict=True):
        request = SampleRequest("red", width=128, height=64, steps=2, seed=seed)
        assert image.tobytes() == to_image(model, sample_batch(model, [request])).tobytes()
    assert rendered[0].size == (128, 64) and rendered[0].tobytes() != rendered[1].tobytes()


@pytest.mark.parametrize(("request_", "error"), [
    (RenderRequest("a", sampler="DDIM"), HostError), (RenderRequest("a <lora:b:1>"), HostError),
    (RenderRequest("a", width=100), SettingError)], ids=["sampler", "LoRA", "size"])
def test_what_it_cannot_render_is_refused(host: StandaloneHost, request_: RenderRequest, error: type[Exception]) -> None:
    with pytest.raises(error):
        host.render(request_)
    with host.lease():
        pass


def test_a_rendering_ends_within_a_step_and_needs_a_free_model(host: StandaloneHost) -> None:
    with pytest.raises(Interrupted):
        host.render(RenderRequest("a", width=64, height=64, steps=10_000), stop=lambda: True)
    with host.lease(), pytest.raises(HostError):
        host.render(RenderRequest("a", width=64, height=64))
