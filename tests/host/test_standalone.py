"""The stand-alone host holds its checkpoint as the WebUI holds its model: a second run reads and copies nothing of it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save, save_file

from lib_lora_train.adapters import file
from lib_lora_train.errors import HostError, Interrupted, LoraFileError, ModelError, SettingError, UserError
from lib_lora_train.host.lease import frozen_model
from lib_lora_train.host.port import RenderRequest
from lib_lora_train.host.standalone import StandaloneHost, describe_file
from lib_lora_train.model import frozen
from lib_lora_train.model.sampler import SampleRequest, sample_batch, to_image
from lib_lora_train.run import job
from lib_lora_train.run.model_checks import ignored_by
from lib_lora_train.settings import parse
from tests.jobs import run_settings
from tools import tiny_checkpoint


@pytest.fixture
def own(tmp_path: Path) -> StandaloneHost:
    """A host with a checkpoint of its own, which the test may take away."""
    checkpoint = tiny_checkpoint.write(tmp_path / "models", size=tiny_checkpoint.SHALLOW)
    return StandaloneHost(checkpoint, lora_folder=tmp_path / "loras", runs_folder=tmp_path / "runs")


def run(host: StandaloneHost, images: Path, folder: Path) -> None:
    folder.mkdir(parents=True)
    settings = parse({"train_data_dir": str(images), "output_name": "zzk", "resolution": "64", "min_bucket_reso": 64,
                      "max_train_steps": 2, "network_dim": 2, "sample_images": False, "validation": False,
                      "cache_latents_to_disk": True, "overwrite": True})
    assert run_settings(settings, host, report=lambda _: None, stop=lambda: "", folder=folder).outcome == "done"


def test_a_file_that_contradicts_its_yaml_is_trained_as_the_yaml_says_and_told(own: StandaloneHost) -> None:
    path = own.checkpoint_file
    save_file({**load_file(path), "ztsnr": torch.tensor([])}, path, {"modelspec.prediction_type": "v"})
    notes = {}
    for said in ("auto", "on"):
        settings = parse({"v_parameterization": said})
        with own.lease() as leased:
            model = frozen_model(leased, settings)
        notes[said] = [note for note in ignored_by(model, settings) if "file says that it predicts v" in note]
        assert model.schedule.prediction_type == ("v_prediction" if said == "on" else "epsilon")
        assert model.architecture.zero_terminal_snr
    assert len(notes["auto"]) == 1 and "v_parameterization" in notes["auto"][0] and notes["on"] == []


def test_a_file_that_predicts_what_is_not_known_is_told(own: StandaloneHost) -> None:
    path = own.checkpoint_file
    save_file(load_file(path), path, {"modelspec.prediction_type": "rectified-flow"})
    with own.lease() as leased:
        model = frozen_model(leased, parse({}))
    assert model.schedule.prediction_type == "epsilon"
    assert any("predicts rectified_flow, which is not known" in note for note in ignored_by(model, parse({})))


@pytest.mark.parametrize(("data", "word"), [
    (b"", "empty"), (b"PK\x03\x04" + bytes(26) + b"archive/data.pklFB", "pickled"), (b"\x80\x02}q\x00.", "pickled"),
    (b"PK\x03\x04" + bytes(26) + b"readme.txt", "zip"), (b"\n<!DOCTYPE html><html>", "web page"),
    (b'{"error": "Unauthorized"}', "JSON"), (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "Git LFS"),
    (b"GGUF\x03\0\0\0", "GGUF"), (b"\xff\0\0\0\0\0\0\0{", "its end is missing"),
    (save({"x": torch.ones(9)})[:-1], "its end is missing"), (save({"x": torch.ones(9)}) + b"\0", "1 byte too many"),
    (b"\x02\0\0\0\0\0\0\0{]", "its header"), (bytes(100), "not a safetensors file")])
def test_what_is_called_safetensors_and_is_none_is_named(tmp_path: Path, data: bytes, word: str) -> None:
    (tmp_path / "model.safetensors").write_bytes(data)
    for read in (describe_file, file.inspect):
        with pytest.raises(UserError) as refusal:
            read(tmp_path / "model.safetensors")
        assert word in str(refusal.value) and "Header" not in str(refusal.value)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_fp8_is_called_by_its_name(own: StandaloneHost, dtype: torch.dtype) -> None:
    path = own.checkpoint_file
    stored = load_file(path)
    save_file({name: stored[name].to(dtype) if name.startswith("model.") else stored[name] for name in stored}, path)
    with pytest.raises(ModelError, match=str(dtype).removeprefix("torch.")) as refusal:
        describe_file(path)
    assert "fp8" in str(refusal.value)


@pytest.mark.parametrize("name", ["x" * 5000 + ".safetensors", "a/../none.safetensors", "nul\0.safetensors",
                                  "folder.safetensors"])
def test_a_path_that_leads_to_no_file_is_a_sentence(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder.safetensors").mkdir()
    with pytest.raises(ModelError, match="does not exist" if "none" in name else "cannot be read"):
        describe_file(tmp_path / name)


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
    (RenderRequest("a", sampler="DDIM"), HostError), (RenderRequest("a <lora:b:1>"), LoraFileError),
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
