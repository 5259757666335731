"""What is learnt in half precision, with which nearly every GPU trains, is what is learnt in fp32: each setting that changes
the computation in a run of its own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lib_lora_train import events
from lib_lora_train.host.standalone import StandaloneHost
from lib_lora_train.run import job
from tests.conftest import MakeImage
from tests.jobs import run_settings
from tests.model.checkpoint_files import write_shallow
from tests.run.short_runs import flat, short_run, transparent_images
from tests.run.test_network_matrix import computes_fp16

HALF = [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.skipif(
    not computes_fp16(), reason="this torch multiplies no fp16 matrices on a CPU"))]
CASES: dict[str, dict[str, object]] = {
    "convolutions": {"conv_dim": 2}, "dropout": {"network_dropout": 0.2}, "rank dropout": {"rank_dropout": 0.3},
    "module dropout": {"module_dropout": 0.3, "conv_dim": 2}, "checkpointed": {"gradient_checkpointing": True},
    "text encoders": {"network_train_unet_only": False, "text_encoder_lr": 0.5},
    "word": {"train_trigger_embedding": True, "embedding_lr": 0.1}, "pyramid noise": {"multires_noise_iterations": 3},
    "huber": {"loss_type": "huber"}, "debiased": {"debiased_estimation_loss": True}, "dop": {"preservation": "dop"},
    "dco": {"preservation": "dco", "dco_beta": 10.0}, "LoRA+": {"loraplus_lr_ratio": 4.0},
    "masks": {"alpha_mask": True, "masked_prior_preservation_weight": 0.5}}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shallow(tmp_path_factory.mktemp("checkpoints"))["sd1"]


@pytest.fixture
def images(make_image: MakeImage) -> Path:
    return transparent_images(make_image, 2)


def learnt(images: Path, checkpoint: Path, folder: Path, **changes: object) -> tuple[dict[str, torch.Tensor], list[float]]:
    """What was zero at the beginning and the vectors of the word, and the losses of the steps."""
    losses: list[float] = []

    def report(event: events.Event) -> None:
        if isinstance(event, events.Step):
            losses.append(event.loss)

    host = StandaloneHost(checkpoint, lora_folder=folder, runs_folder=folder / "runs")
    finished = run_settings(short_run(images, **changes), host, report=report, stop=lambda: "")
    return {name: tensor for name, tensor in load_file(finished.path).items()
            if name.endswith("lora_up.weight") or "emb" in name}, losses


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("case", CASES)
def test_what_is_learnt_is_what_is_learnt_in_fp32(case: str, dtype: torch.dtype, images: Path, checkpoint: Path, tmp_path: Path,
                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    exact, losses = learnt(images, checkpoint, tmp_path / "exact", **CASES[case])
    monkeypatch.setattr(job, "compute_dtype", lambda *args, **given: dtype)  # which refuses fp16 without a GPU
    rounded, others = learnt(images, checkpoint, tmp_path / "rounded", **CASES[case])
    assert others == pytest.approx(losses, rel=0.03)
    assert exact.keys() == rounded.keys()
    assert [name for name in exact if bool(exact[name].any()) != bool(rounded[name].any())] == []
    whole, other = flat(exact), flat(rounded)
    assert torch.cosine_similarity(whole, other, dim=0) > 0.98 and 0.9 < other.norm() / whole.norm() < 1.1
