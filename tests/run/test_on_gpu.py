"""A run on a GPU (a pretended one) goes to its end, with each tensor where it is computed with, and learns what a run on the
CPU learns. The host keeps its model on the CPU, as the Forges, --medvram and the command line do."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lib_lora_train import events
from lib_lora_train.dataset.progress import ShouldStop
from lib_lora_train.host import placement
from lib_lora_train.host.port import LeasedModel, never
from lib_lora_train.host.standalone import StandaloneHost
from lib_lora_train.run import job
from tests.conftest import MakeImage
from tests.jobs import run_settings
from tests.model.checkpoint_files import write_shallow
from tests.pretended_gpu import CPU, GPU, pretended_gpu
from tests.run.short_runs import flat, short_run, transparent_images
from tests.run.test_hand_over import BusyHost

CASES: dict[str, dict[str, object]] = {
    "plain": {}, "convolutions": {"conv_dim": 2}, "dropout": {"network_dropout": 0.2, "module_dropout": 0.3},
    "checkpointed": {"gradient_checkpointing": True}, "offloaded": {"cpu_offload_checkpointing": True},
    "text encoders": {"network_train_unet_only": False, "text_encoder_lr": 0.5},
    "word": {"train_trigger_embedding": True, "embedding_lr": 0.1}, "dop": {"preservation": "dop"},
    "dco": {"preservation": "dco", "dco_beta": 10.0}, "masks": {"alpha_mask": True, "masked_prior_preservation_weight": 0.5},
    "huber": {"loss_type": "huber"}, "noise": {"multires_noise_iterations": 3, "ip_noise_gamma": 0.1},
    "DoRA": {"dora_wd": True}, "LoHa": {"network_module": "LoHa"}, "LoKr": {"network_module": "LoKr"},
    "OFT": {"network_module": "OFT", "learning_rate": 0.01}, "int8": {"base_weights": "int8"},
    "int8 NHWC": {"base_weights": "int8", "channels_last": "on"}, "NHWC": {"channels_last": "on", "conv_dim": 2},
    "ema": {"ema_decay": 0.9}, "norms": {"scale_weight_norms": 0.01}, "encoded anew": {"color_aug": True},
    "shuffled": {"shuffle_caption": True}, "samples": {"sample_images": True, "sample_at_first": True,
                                                         "sample_every_n_steps": 1, "sample_prompts": "a cat --w 64 --h 64"},
    "swapped": {"blocks_to_swap": 4, "memory_plan": "manual"},
    "swapped int8": {"blocks_to_swap": 4, "memory_plan": "manual", "base_weights": "int8"}}

SELECTED = [("text encoders", "no"), ("DoRA", "no"), ("encoded anew", "no"), ("samples", "bf16"), ("swapped int8", "bf16"),
            ("offloaded", "no")]
ALL = [(case, precision) for case in CASES for precision in ("no", "bf16", "fp16")]
"""Of fp16 a CPU computes nothing before torch 2.2 or so."""


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_shallow(tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture
def images(make_image: MakeImage) -> Path:
    return transparent_images(make_image, 3)


class BusyGpu(BusyHost):
    """Others want its model before each piece of work, and have all of it on the GPU meanwhile."""

    def __init__(self, checkpoint: Path, folder: Path) -> None:
        super().__init__(checkpoint, folder)
        self._device, self._placed = GPU, dict[str, torch.device]()

    @contextlib.contextmanager
    def lease(self, *, stop: ShouldStop = never) -> Iterator[LeasedModel]:
        with super().lease(stop=stop) as leased:
            for name, device in (("offload_parts", CPU), ("reload_parts", GPU)):
                setattr(leased, name, functools.partial(self._put, getattr(leased, name), device))
            yield leased

    def _put(self, put: Callable[[frozenset[str]], Mapping[str, torch.Tensor]], device: torch.device,
             parts: frozenset[str]) -> Mapping[str, torch.Tensor]:
        self._placed.update(dict.fromkeys(parts, device))
        return put(parts)

    def yield_model(self, leased: LeasedModel, stop: ShouldStop) -> Mapping[str, torch.Tensor] | None:
        super().yield_model(leased, stop)
        placement.move(leased.tensors.values(), GPU)
        for part, device in self._placed.items():
            placement.move(placement.tensors_of(leased.tensors, {part}), device)
        return leased.tensors


def run(images: Path, checkpoint: Path, folder: Path, device: torch.device, *, busy: bool = False, **changes: object):
    seen: list[events.Event] = []
    host = BusyGpu(checkpoint, folder) if busy else StandaloneHost(
        checkpoint, lora_folder=folder / "loras", runs_folder=folder / "runs", device=device)
    record = folder / "runs" / "one"
    record.mkdir(parents=True)
    settings = short_run(images, **{"validation": True, "mixed_precision": "no", **changes})
    finished = run_settings(settings, host, report=seen.append, stop=lambda: "", folder=record)
    warned = [event.message for event in seen if isinstance(event, events.Warned)]
    return load_file(finished.path), warned, [event for event in seen if isinstance(event, (events.Measured, events.Sampled))]


@pytest.mark.parametrize(("case", "precision"), ALL if os.environ.get("FULL_MATRIX") else SELECTED)
def test_what_is_learnt_on_a_gpu_is_what_is_learnt_on_the_cpu(
        case: str, precision: str, images: Path, checkpoints: dict[str, Path], tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch) -> None:
    there, noted, measured = run(images, checkpoints["sd1"], tmp_path / "cpu", CPU, **CASES[case])
    monkeypatch.setattr(job, "matrix_rate", lambda *_, **given: 1e12)  # of a GPU, which a CPU takes minutes to measure in fp16
    with pretended_gpu(monkeypatch):
        found, warned, looked = run(images, checkpoints["sd1"], tmp_path / "gpu", GPU, **CASES[case], mixed_precision=precision)
    assert found.keys() == there.keys()
    assert not [text for text in warned if "could not be measured" in text or "not measured" in text or "left out" in text]
    assert len(looked) == len(measured)
    whole, other = flat(there), flat(found)
    assert (whole - other).norm() < (1e-3 if precision == "no" else 0.2) * whole.norm()


@pytest.mark.parametrize("case", ["swapped", "swapped int8", "int8 NHWC", "samples"])
def test_so_it_is_where_others_have_the_model_before_each_step(case: str, images: Path, checkpoints: dict[str, Path],
                                                               tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there, _, measured = run(images, checkpoints["sd1"], tmp_path / "cpu", CPU, **CASES[case])
    with pretended_gpu(monkeypatch, free=0):
        found, _, looked = run(images, checkpoints["sd1"], tmp_path / "gpu", GPU, busy=True, **CASES[case])
    assert len(looked) == len(measured)
    whole, other = flat(there), flat(found)
    assert (whole - other).norm() < 1e-3 * whole.norm()


@pytest.mark.parametrize("network", [{"network_module": "LoHa"}, {"dora_wd": True}], ids=["LoHa", "DoRA"])
def test_layers_of_text_encoders_that_are_not_trained_go_on_with_the_encoders_off_the_gpu(
        network: dict[str, object], images: Path, checkpoints: dict[str, Path], tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch) -> None:
    run(images, checkpoints["sd1"], tmp_path / "first", CPU, network_train_unet_only=False, **network)
    first = tmp_path / "first" / "loras" / "zzk.safetensors"
    with pretended_gpu(monkeypatch):
        _, warned, looked = run(images, checkpoints["sd1"], tmp_path / "gpu", GPU, network_weights=str(first))
    assert looked and not [text for text in warned if "measured" in text]
