from __future__ import annotations

import hashlib
import json
import math
import os
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch

from lib_lora_train.__main__ import main
from lib_lora_train.adapters.file import SAVE_PRECISIONS, inspect, load, read_metadata, save
from lib_lora_train.adapters.network import AdapterNetwork
from lib_lora_train.errors import LoraFileError, OutputError, TrainingError


def tensors(*, size: int = 16) -> dict[str, torch.Tensor]:
    key = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k"
    generator = torch.Generator().manual_seed(0)
    return {f"{key}.lora_down.weight": torch.randn(4, size, generator=generator),
            f"{key}.lora_up.weight": torch.randn(size, 4, generator=generator),
            f"{key}.alpha": torch.tensor(2.0)}


METADATA = {"ss_output_name": "mine", "ss_network_dim": "4", "ss_v2": "False", "modelspec.title": "mine"}


def saved(folder: Path, *, size: int = 16, dtype: torch.dtype = torch.float16) -> Path:
    path = folder / "mine.safetensors"
    save(path, tensors(size=size), METADATA, dtype=dtype)
    return path


@pytest.mark.parametrize("dtype", SAVE_PRECISIONS.values())
def test_safetensors_alone_reads_back_what_was_saved(tmp_path: Path, dtype: torch.dtype) -> None:
    path = saved(tmp_path, dtype=dtype)
    expected = {key: tensor.to(dtype) for key, tensor in tensors().items()}
    read = safetensors.torch.load_file(path)
    assert read.keys() == expected.keys()
    for key in expected:
        assert read[key].dtype == dtype and read[key].shape == expected[key].shape
        assert torch.equal(read[key], expected[key])


def test_the_hashes_follow_from_the_bytes(tmp_path: Path) -> None:
    path = saved(tmp_path, size=90_000)                       # beyond 1 MiB, where the legacy hash looks
    with safetensors.safe_open(path, "pt") as file:
        metadata = file.metadata()
    data = path.read_bytes()
    header_length = int.from_bytes(data[:8], "little")
    assert metadata["sshs_model_hash"] == hashlib.sha256(data[8 + header_length:]).hexdigest()

    training_only = {key: value for key, value in metadata.items() if key.startswith("ss_")}
    alone = safetensors.torch.save(safetensors.torch.load_file(path), training_only)
    assert len(alone) > 0x100000
    assert metadata["sshs_legacy_hash"] == hashlib.sha256(alone[0x100000:0x110000]).hexdigest()[:8]


def test_modelspecs_hash_is_that_of_all_behind_the_header(tmp_path: Path) -> None:
    path = tmp_path / "mine.safetensors"
    save(path, tensors(), {**METADATA, "modelspec.sai_model_spec": "1.0.1"}, dtype=torch.float16)
    data = path.read_bytes()
    behind = data[8 + int.from_bytes(data[:8], "little"):]
    assert read_metadata(path)["modelspec.hash_sha256"] == "0x" + hashlib.sha256(behind).hexdigest()
    assert inspect(path).hash_ok


def test_a_file_saved_elsewhere_with_other_metadata_keeps_its_model_hash(tmp_path: Path) -> None:
    path, copy = saved(tmp_path), tmp_path / "copy.safetensors"
    safetensors.torch.save_file(
        safetensors.torch.load_file(path), copy, {**read_metadata(path), "modelspec.title": "another title"})
    assert copy.read_bytes() != path.read_bytes()
    assert inspect(copy).hash_ok is True
    assert inspect(copy).model_hash == inspect(path).model_hash
    altered = {**tensors(), "extra": torch.zeros(3)}
    safetensors.torch.save_file(altered, copy, read_metadata(path))
    assert inspect(copy).hash_ok is False


def test_metadata_survives_the_file(tmp_path: Path) -> None:
    path = saved(tmp_path)
    assert METADATA.items() <= read_metadata(path).items()
    assert read_metadata(path) == load(path).metadata
    plain = tmp_path / "plain.safetensors"
    safetensors.torch.save_file(tensors(), plain)
    assert read_metadata(plain) == load(plain).metadata == {}


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_failure_while_writing_leaves_the_old_file_and_nothing_else(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str) -> None:
    path = saved(tmp_path)
    before = path.read_bytes()

    def fails(*_: object) -> None:
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(os, failing, fails)
    with pytest.raises(OutputError):
        save(path, tensors(size=32), METADATA, dtype=torch.float32)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_an_interruption_while_writing_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt
    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        saved(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_what_is_not_finished_never_looks_like_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[Path, Path]] = []
    replace = os.replace

    def spying(source: Path, target: Path) -> None:
        seen.append((Path(source), Path(target)))
        replace(source, target)
    monkeypatch.setattr(os, "replace", spying)
    path = saved(tmp_path)
    [(source, target)] = seen
    assert target == path and source.parent == path.parent
    assert source.suffix not in (".safetensors", ".pt", ".ckpt")


def test_weights_that_are_not_numbers_never_replace_a_file(tmp_path: Path) -> None:
    path = saved(tmp_path)
    before = path.read_bytes()
    for value in (float("nan"), 1e6):                         # 1e6 is beyond fp16
        broken = {key: torch.full_like(tensor, value) for key, tensor in tensors().items()}
        with pytest.raises(TrainingError):
            save(path, broken, METADATA, dtype=torch.float16)
    assert path.read_bytes() == before


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_inspecting_a_lora_tells_which_tensors_hold_values_that_are_no_numbers(tmp_path: Path, value: float, capsys) -> None:
    path = saved(tmp_path)
    assert inspect(path).not_finite == ()
    broken = safetensors.torch.load_file(path)
    name = next(key for key in broken if key.endswith("lora_up.weight"))
    broken[name][3, 2] = value
    safetensors.torch.save_file(broken, path)
    assert inspect(path).not_finite == (name,)
    assert main(["inspect", str(path)]) == 0
    assert ["not_finite", "1"] in [line.split()[:2] for line in capsys.readouterr().out.splitlines()]


def test_the_alias_must_be_the_name_of_the_file(tmp_path: Path) -> None:
    with pytest.raises(AssertionError):
        save(tmp_path / "other.safetensors", tensors(), METADATA, dtype=torch.float16)


def test_a_folder_that_vanished_is_made_again(tmp_path: Path) -> None:
    assert saved(tmp_path / "vanished").is_file()


def test_a_folder_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file stands where the folder should", encoding="utf-8")
    with pytest.raises(OutputError):
        saved(tmp_path / "taken")


def bad_header(header: object) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text


@pytest.mark.parametrize(("data", "told"), [
    (None, "no such file"),
    (b"", "not a safetensors file"),
    (b"\x89PNG\r\n\x1a\n" * 4, "not a safetensors file"),
    (b"PK\x03\x04" + bytes(60), "pickled"),
    (b"\x80\x02}q\x00." + bytes(60), "pickled"),
    (b"\xff\xff\x00\x00\x00\x00\x00\x00{" + bytes(20), "damaged"),
    (b"\x05\x00\x00\x00\x00\x00\x00\x00{xxxx", "damaged"),
    (bad_header([1, 2, 3]) + bytes(8), "not a safetensors file"),
    (bad_header({"a": {"dtype": "F32"}}), "damaged"),
    (bad_header({"a": {"dtype": "Q7", "shape": [1], "data_offsets": [0, 4]}}) + bytes(4), "damaged"),
])
def test_files_that_cannot_be_read_are_refused_with_the_reason(tmp_path: Path, data: bytes | None, told: str) -> None:
    path = tmp_path / "bad.safetensors"
    if data is not None:
        path.write_bytes(data)
    for read in (load, read_metadata):
        with pytest.raises(LoraFileError) as refusal:
            read(path)
        assert told in str(refusal.value)


def test_a_truncated_file_is_refused_however_much_is_missing(tmp_path: Path) -> None:
    data = saved(tmp_path).read_bytes()
    path = tmp_path / "part.safetensors"
    for length in (4, 9, 100, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:length])
        for read in (load, read_metadata, inspect):
            with pytest.raises(LoraFileError):
                read(path)


def test_reading_keeps_no_file_open(tmp_path: Path) -> None:
    path = saved(tmp_path)
    kept = load(path)
    path.write_bytes(b"")                                     # would change a mapped tensor under our hands
    expected = {key: tensor.half() for key, tensor in tensors().items()}
    assert all(torch.equal(kept.tensors[key], expected[key]) for key in expected)


def test_inspect_tells_rank_alpha_components_and_kind(tmp_path: Path) -> None:
    info = inspect(saved(tmp_path, size=768))
    assert (info.family, info.kind, info.rank, info.alpha) == ("sd1", "LoRA", 4, 2.0)
    assert info.components == {"unet": 1}
    assert info.dtypes == ("float16",)
    assert info.hash_ok is True
    assert info.size == (tmp_path / "mine.safetensors").stat().st_size


@pytest.mark.parametrize(("key", "width", "metadata", "family"), [
    ("lora_unet_input_blocks_4_1_proj_in", 640, {}, "sdxl"),
    ("lora_te2_text_model_encoder_layers_0_mlp_fc1", 1280, {}, "sdxl"),
    ("lora_te_text_model_encoder_layers_0_self_attn_q_proj", 768, {}, "sd1"),
    ("lora_te_text_model_encoder_layers_0_self_attn_q_proj", 1024, {}, "sd2"),
    ("lora_te_text_model_encoder_layers_0_self_attn_q_proj", 32, {}, None),
    ("lora_te_text_model_encoder_layers_0_self_attn_q_proj", 32, {"ss_v2": "True"}, "sd2"),
    ("lora_te_text_model_encoder_layers_0_self_attn_q_proj", 32, {"ss_base_model_version": "sd_v2_v"}, "sd2"),
    ("lora_te_text_model_encoder_layers_0_self_attn_q_proj", 32, {"ss_base_model_version": "sd_v1"}, "sd1"),
    ("transformer.single_blocks.0", 32, {}, None),
])
def test_the_family_is_recognised(
        tmp_path: Path, key: str, width: int, metadata: dict[str, str], family: str | None) -> None:
    path = tmp_path / "any.safetensors"
    safetensors.torch.save_file(
        {f"{key}.lora_down.weight": torch.zeros(2, width), f"{key}.lora_up.weight": torch.zeros(8, 2)}, path, metadata)
    assert inspect(path).family == family


@pytest.mark.parametrize(("down", "kind", "component"), [
    ("base_model.model.unet.mid_block.to_q.lora_A.weight", "LoRA (PEFT)", "unet"),
    ("unet.mid_block.to_q.lora_A.default.weight", "LoRA (PEFT)", "unet"),
    ("unet.mid_block.to_q.lora.down.weight", "LoRA (diffusers)", "unet"),
    ("unet.mid_block.attn1.processor.to_q_lora.down.weight", "LoRA (diffusers)", "unet"),
    ("text_encoder.text_model.q_proj.lora_linear_layer.down.weight", "LoRA (diffusers)", "te"),
    ("text_encoder_2.text_model.q_proj.lora_linear_layer.down.weight", "LoRA (diffusers)", "te2")])
def test_loras_of_other_layouts_are_named_by_kind_and_refused_for_continuing(
        tmp_path: Path, down: str, kind: str, component: str) -> None:
    up = down.replace("lora_A", "lora_B").replace("down", "up")
    safetensors.torch.save_file({down: torch.zeros(3, 8), up: torch.zeros(8, 3)}, tmp_path / "any.safetensors")
    info = inspect(tmp_path / "any.safetensors")
    assert (info.kind, info.rank, info.components) == (kind, 3, {component: 1})
    with pytest.raises(LoraFileError) as refusal:
        AdapterNetwork.continued([], load(info.path).tensors, seed=0)
    assert kind[6:-1] in str(refusal.value) and "kohya" in str(refusal.value)


@pytest.mark.parametrize(("parts", "kind"), [
    ({"hada_w1_a": (8, 2), "hada_w1_b": (2, 8), "hada_w2_a": (8, 2), "hada_w2_b": (2, 8)}, "LoHa"),
    ({"lokr_w1": (2, 2), "lokr_w2": (4, 4)}, "LoKr"),
    ({"lora_down.weight": (2, 8), "lora_up.weight": (8, 2), "dora_scale": (1, 8)}, "DoRA"),
    ({"lora_down.weight": (2, 8, 3, 3), "lora_up.weight": (8, 2, 1, 1)}, "LoCon"),
    ({"w": (8,)}, "unknown"),
])
def test_the_kind_is_recognised(tmp_path: Path, parts: dict[str, tuple[int, ...]], kind: str) -> None:
    path = tmp_path / "any.safetensors"
    safetensors.torch.save_file({f"lora_unet_x.{part}": torch.zeros(shape) for part, shape in parts.items()}, path)
    assert inspect(path).kind == kind
