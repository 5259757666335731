"""Every kind of network on every family in every precision: a whole run of three steps, saved, cut off and gone on with.

The suite runs a selection in which each kind meets each family and, of the eight-bit weights one, each precision, and goes on
with one run of each kind; with FULL_MATRIX=1 all of them are run:

    FULL_MATRIX=1 python -m pytest tests/run/test_network_matrix.py
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from lib_lora_train import events
from lib_lora_train.host.standalone import StandaloneHost
from lib_lora_train.run import job
from lib_lora_train.settings import Settings, parse
from tests.adapters.test_kinds import VALUES
from tests.conftest import MakeImage
from tests.jobs import run_settings
from tests.model.checkpoint_files import write_shallow

FULL = bool(os.environ.get("FULL_MATRIX"))
FAMILIES = ("sd1", "sd2", "sdxl")
PRECISIONS = {
    "fp32": ({"mixed_precision": "no"}, torch.float32), "bf16": ({"mixed_precision": "bf16"}, torch.bfloat16),
    "fp16": ({}, torch.float16), "int8": ({"mixed_precision": "no", "base_weights": "int8"}, torch.float32),
    "fp8": ({"mixed_precision": "bf16", "base_weights": "fp8"}, torch.bfloat16)}
ALL = [(kind, family, precision) for kind in VALUES for family in FAMILIES for precision in PRECISIONS]
SELECTED = [
    (kind, FAMILIES[(row + column) % 3], precision)
    for row, kind in enumerate(kind for kind in VALUES if not kind.endswith(" LoKr"))
    for column, precision in enumerate(("fp32", "bf16", ("int8", "fp8")[row % 2], "fp16"))]

# What a layer has in files of sd-scripts and LyCORIS, beside alpha. A LoKr's second matrix is whole or a product.
TENSORS = {
    "LoRA": [{"lora_down.weight", "lora_up.weight"}], "LoHa": [{"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}],
    "LoKr": [{"lokr_w1", "lokr_w2"}, {"lokr_w1", "lokr_w2_a", "lokr_w2_b"}], "OFT": [{"oft_blocks"}]}
COMPONENTS = {"sd1": {"lora_unet", "lora_te"}, "sd2": {"lora_unet", "lora_te"}, "sdxl": {"lora_unet", "lora_te1", "lora_te2"}}
CONVOLUTIONS = {"sd1": "_resnets_0_conv1", "sd2": "_resnets_0_conv1", "sdxl": "_in_layers_2"}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_shallow(tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture
def images(make_image: MakeImage) -> Path:
    return make_image("images/0.png", size=(64, 64), caption="zzk, a red cat").parent


def computes_fp16() -> bool:
    try:
        return bool((torch.ones(2, 2, dtype=torch.float16) @ torch.ones(2, 2, dtype=torch.float16)).all())
    except RuntimeError:
        return False


def chosen(images: Path, **changes: object) -> Settings:
    return parse({
        "train_data_dir": str(images), "output_name": "zzk", "resolution": "64", "min_bucket_reso": 64, "num_repeats": 1,
        "max_train_steps": 3, "save_every_n_steps": 2, "network_dim": 4, "network_alpha": 2, "save_precision": "float",
        "network_train_unet_only": False, "sample_images": False, "validation": False, "save_every_n_epochs": 0,
        "overwrite": True, **changes})


def check_keys(tensors: Mapping[str, torch.Tensor], *, kind: str, family: str) -> None:
    """The file has the layers of the family's parts, convolutions where they were asked for, and the kind's tensors of each."""
    layers: dict[str, set[str]] = {}
    for name in tensors:
        layer, _, tensor = name.partition(".")
        layers.setdefault(layer, set()).add(tensor)
    values = VALUES[kind]
    besides = {"alpha", *(["dora_scale"] if values.get("dora_wd") else [])}
    assert {tuple(sorted(found)) for found in layers.values()} <= {
        tuple(sorted(names | besides)) for names in TENSORS[str(values.get("network_module", "LoRA"))]}
    assert {"_".join(layer.split("_")[:2]) for layer in layers} == COMPONENTS[family]
    assert any(CONVOLUTIONS[family] in layer for layer in layers) == ("conv_dim" in values)


@pytest.mark.parametrize(("kind", "family", "precision"), ALL if FULL else SELECTED)
def test_a_run_trains_and_saves_and_one_that_was_cut_off_ends_in_the_same_bytes(
        kind: str, family: str, precision: str, images: Path, tmp_path: Path, checkpoints: dict[str, Path],
        monkeypatch: pytest.MonkeyPatch) -> None:
    changes, dtype = PRECISIONS[precision]
    if precision == "fp16":
        if not computes_fp16():
            pytest.skip("this torch multiplies no fp16 matrices on a CPU")
        monkeypatch.setattr(job, "compute_dtype", lambda *args, **given: dtype)  # which refuses it there
    host = StandaloneHost(checkpoints[family], lora_folder=tmp_path / "loras", runs_folder=tmp_path / "runs")
    folder, cut_off, losses = tmp_path / "runs/whole", tmp_path / "runs/cut-off", list[float]()

    def report(event: events.Event) -> None:
        if isinstance(event, events.Step):
            losses.append(event.loss)
            if event.step == 3 and not cut_off.exists():  # as a power cut leaves it, saved after the second step
                shutil.copytree(folder, cut_off)

    def trained(into: Path, **more: object) -> dict[str, torch.Tensor]:
        settings = chosen(images, **VALUES[kind], **changes, **more)
        finished = run_settings(settings, host, report=report, stop=lambda: "", folder=into)
        assert finished.outcome == "done"
        return load_file(finished.path)

    tensors = trained(folder)
    assert len(losses) == 3 and all(map(math.isfinite, losses))
    check_keys(tensors, kind=kind, family=family)
    earlier = load_file(host.lora_folder / "zzk-step00000002.safetensors")
    assert all(tensor.isfinite().all() for tensor in tensors.values())
    moved = {name.partition(".")[0] for name in tensors if not torch.equal(earlier[name], tensors[name])}
    # SDXL reads CLIP-L's last hidden layer but one: the layer after it is in the file and has no effect.
    unread = "lora_te1_text_model_encoder_layers_1_" if family == "sdxl" else "none"
    assert moved == {layer for layer in (name.partition(".")[0] for name in tensors) if not layer.startswith(unread)}
    with safe_open(cut_off / "state.safetensors", "pt") as state:
        said = json.loads(state.metadata()["lora_train_state"])
    assert (said["computed_in"], said["base"]) == (str(dtype).removeprefix("torch."), changes.get("base_weights", ""))

    if FULL or precision == "bf16":
        resumed = trained(cut_off, resume=str(cut_off))
        assert losses[3:] == losses[2:3]
        assert resumed.keys() == tensors.keys() and all(torch.equal(resumed[name], tensors[name]) for name in tensors)
