"""Damaged and random input to every reader, seeded: the small sister of `tools/fuzz_readers.py --inputs 100000`."""

from __future__ import annotations

import importlib.util
import os
import struct
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import save

from lib_lora_train.adapters import file
from lib_lora_train.errors import LoraFileError, ModelError, SettingError
from lib_lora_train.host.standalone import describe_file
from lib_lora_train.settings.toml import read_toml
from lib_lora_train.training import checkpoint

INPUTS = 1000
TOOL = Path(__file__).resolve().parents[1] / "tools" / "fuzz_readers.py"


@pytest.fixture(scope="module")
def fuzz() -> ModuleType:
    specification = importlib.util.spec_from_file_location("fuzz_readers", TOOL)
    module = importlib.util.module_from_spec(specification)
    sys.modules["fuzz_readers"] = module
    specification.loader.exec_module(module)
    return module


@pytest.mark.filterwarnings("ignore")
def test_damaged_inputs_end_in_a_value_or_a_refusal(fuzz: ModuleType, tmp_path: Path):
    tallies = fuzz.run(INPUTS, seed=6, root=tmp_path)
    assert [failure for tally in tallies.values() for failure in tally.failures] == []
    assert sum(tally.inputs for tally in tallies.values()) == INPUTS
    # Both ends are met, or the damage would be too much or none.
    assert all(tally.refusals for name, tally in tallies.items() if name not in ("folders", "dataset folders"))
    assert all(tally.values for name, tally in tallies.items())


@pytest.mark.filterwarnings("ignore")
def test_the_tool_sees_a_file_outside_a_program_and_a_foreign_error(fuzz: ModuleType, tmp_path: Path,
                                                                    monkeypatch: pytest.MonkeyPatch):
    root, outside = tmp_path / "place", tmp_path / "outside"
    root.mkdir()

    def harm(data: bytes, folder: Path) -> None:
        (folder / "inside").write_bytes(b"x")
        outside.write_bytes(b"x")
        os.system("")
        raise KeyError("foreign")

    monkeypatch.setattr(fuzz, "readers", lambda: [fuzz.Reader("bad", lambda rng: rng.randbytes(3), harm)])
    (found,) = fuzz.run(1, seed=1, root=root)["bad"].failures[:1]
    assert "KeyError" in found
    said = " ".join(fuzz.run(1, seed=1, root=root)["bad"].failures)
    assert f"open {outside}" in said and "os.system" in said and "inside" not in said.replace("outside", "")


def test_the_same_seed_makes_the_same_inputs(fuzz: ModuleType):
    def made(seed: int) -> list[bytes]:
        return [reader.make(fuzz.random.Random(f"{seed} {reader.name} {number}")) for reader in fuzz.readers()
                for number in range(3)]
    assert made(3) == made(3) != made(4)


def test_headers_and_settings_nested_beyond_reason_are_refused(tmp_path: Path):
    nested = b'{"__metadata__": ' + b"[" * 100_000
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(nested)) + nested)
    for reader in (file.load, file.read_metadata, file.inspect, checkpoint.read, checkpoint.read_metadata):
        with pytest.raises(LoraFileError):
            reader(path)
    for text in ("x = " + "[" * 5000, "x = " + "9" * 5000, "a." * 3000 + "b = 1", "x = 2021-99-99"):
        (tmp_path / "x.toml").write_text(text, encoding="utf-8")
        with pytest.raises(SettingError):
            from lib_lora_train.settings import parse
            parse(read_toml(tmp_path / "x.toml"))


@pytest.mark.parametrize("metadata", ["3", "true", "[1]", '["ab"]', '{"a": 1}', '{"a": null}', '"text"'])
def test_metadata_that_is_no_text_is_refused(tmp_path: Path, metadata: str):
    header = b'{"__metadata__": ' + metadata.encode() + b"}"
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    for reader in (file.read_metadata, file.load):
        with pytest.raises(LoraFileError, match="damaged"):
            reader(path)


@pytest.mark.parametrize("offsets", ['[0, "4"]', '["0", "4"]', "[0, [4]]", "[0]", "{}", "4", "[0, null]"])
def test_a_lora_whose_offsets_are_no_numbers_is_refused(tmp_path: Path, offsets: str):
    header = b'{"a.lora_up.weight": {"dtype": "F32", "shape": [1], "data_offsets": ' + offsets.encode() + b"}}"
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    for reader in (file.read_metadata, file.load):
        with pytest.raises(LoraFileError, match="damaged"):
            reader(path)


@pytest.mark.parametrize("block", [
    "input_blocks.x.0.weight", "input_blocks.1", "middle_block.y.weight", "output_blocks.0>in.1.w", "input_blocks.².0.w",
    "input_blocks." + "9" * 5000 + ".0.w"])
def test_a_checkpoint_with_a_block_of_an_impossible_name_is_refused(tmp_path: Path, block: str):
    path = tmp_path / "x.safetensors"
    path.write_bytes(save({f"model.diffusion_model.{name}": torch.ones(8, 4, 3, 3)
                           for name in ("input_blocks.0.0.weight", "out.2.weight", block)}))
    with pytest.raises(ModelError):
        describe_file(path)


def test_a_lora_whose_tensors_have_no_sides_can_be_looked_at(tmp_path: Path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(save({f"lora_unet_{part}.lora_{end}.weight": torch.tensor(1.0) for part in ("a", "attn2_to_k")
                           for end in ("down", "up")}))
    assert file.inspect(path).rank is None
