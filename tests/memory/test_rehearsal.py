"""A step rehearsed on shapes takes the memory that it takes in earnest."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping

import pytest
import torch
from lib_lora_train.memory.dry_run import META, Outcome, Scene, Way, layers_for, layers_of, rehearse
from lib_lora_train.training.device_step import Work
from lib_lora_train.training.optimizer import Stepper
from lib_lora_train.training.step import StepInputs, StepOptions
from torch import Tensor

from lib_lora_train.adapters.network import AdapterNetwork
from lib_lora_train.memory.plan import units_of
from lib_lora_train.model import frozen
from lib_lora_train.model.family import detect
from lib_lora_train.model.frozen import FrozenModel
from lib_lora_train.model.ops.layers import Layers
from lib_lora_train.model.ops.quantised import quantised
from lib_lora_train.model.sd.components import unet_tensors
from lib_lora_train.training.condition import TrainedText
from lib_lora_train.training.precision import LossScaler
from tests.model.small_checkpoints import SmallTokenizer
from tools.bench.true_size import true_size_shapes, true_size_tensors

SIDE = 256
CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def shapes(family: str, *, small: bool = True, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return {name: torch.empty(shape, dtype=dtype, device=META) for name, shape in true_size_shapes(family, small=small).items()}


def units(family: str, which: str) -> frozenset[str]:
    every = units_of(detect(shapes(family)))
    attentions = frozenset(unit for unit in every if unit.endswith(("attn1", "attn2")))
    blocks = frozenset(unit for unit in every if unit.rpartition(".")[0] not in every)
    return {"": frozenset(), "attention": attentions, "every block": blocks}[which]


def scene(tensors: Mapping[str, Tensor], *, text: bool = False, device: str = "cpu", dtype: torch.dtype = torch.float32,
          side: int = SIDE) -> Scene:
    return Scene(side, side, dtype, layers_for(tensors, detect(tensors), rank=8, text_encoder=text), device_type=device)


@functools.lru_cache(maxsize=1)
def real(family: str, device: torch.device) -> Mapping[str, Tensor]:
    """Random weights of these shapes. They are only lent: no step changes them."""
    return true_size_tensors(family, dtype=torch.float32 if device.type == "cpu" else torch.float16, device=device, small=True)


def furnish(layers: Layers, way: Way, device: torch.device) -> None:
    """The UNet's copies, if it has any."""
    if way.base:
        layers.replace(dict(quantised(layers.tensors, way.base, device=device)))
    elif way.channels_last:
        layers.lay_out_channels_last()


def prepared(family: str, way: Way, planned: Scene, device: torch.device) -> tuple[FrozenModel, Work, StepInputs]:
    """A real model of these shapes with random weights, and a step's work on it."""
    model = frozen.build(real(family, device), tokenizers=[SmallTokenizer()] * (2 if family == "sdxl" else 1))
    furnish(model.unet.layers, way, device)
    network = AdapterNetwork.build([layer.target for layer in planned.layers], rank=8, alpha=1.0, seed=0).to(device)
    weights = network.flatten(1e-4, 1e-4, dtype=planned.dtype)
    stepper = Stepper(weights, weight_decay=0.0, max_grad_norm=1.0)
    text = planned.text_trained
    condition = TrainedText(model.text, clip_skip=1, adapters=network.adapters(), checkpointing=planned.text_recomputed,
                            dtype=planned.dtype) if text else _Given()
    work = Work(model, adapters=network.adapters()["unet"], condition=condition, stepper=stepper,
                scaler=LossScaler(device, enabled=planned.dtype == torch.float16),
                options=StepOptions(dtype=planned.dtype, min_snr_gamma=5.0, recompute=way.recompute, offload=way.offload))
    config, batch = model.architecture.unet, way.batch
    latents = [torch.randn(batch, 4, planned.height // 8, planned.width // 8, device=device) for _ in range(4)]
    pooled = [torch.randn(batch, config.adm_channels - 1536, device=device)] if config.adm_channels else []
    prepared_text = tuple(torch.ones(batch, 1, 77, dtype=torch.long, device=device) for _ in model.text.encoders) if text else (
        torch.randn(batch, 77, config.context_dim, device=device), *pooled)
    return model, work, StepInputs(
        *latents, timesteps=torch.full((batch,), 500, device=device), share=torch.ones(batch, device=device),
        sizes=torch.ones(batch, 6, device=device), text=prepared_text)


class _Given:
    """The text as it was prepared."""

    def prepare(self, captions):
        raise AssertionError

    def encode(self, given):
        from lib_lora_train.model.sd.text import Conditioning
        return Conditioning(given[0], given[1] if len(given) > 1 else None)


def allocated(work: Work, inputs: StepInputs) -> int:
    """The highest sum of what the allocator gives out during a step."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work.gradients(inputs)
        work.finish()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns() if hasattr(event, "start_ns") else event.start_us()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def moving(outcome: Outcome) -> int:
    """Bytes of the peak that come and go within a step."""
    return outcome.peak.get("activations", 0) + outcome.peak.get("working", 0)


@pytest.mark.parametrize("family, way, text", [
    ("sd1", Way(1), False),
    ("sd1", Way(1, recompute=units("sd1", "attention")), False),
    ("sd1", Way(1, recompute=units("sd1", "every block")), False),
    ("sd1", Way(1, base="int8"), False),
    ("sd1", Way(1, channels_last=True), False),
    ("sd1", Way(1), True),
], ids=["sd1", "attention", "every block", "int8", "channels last", "text encoder"])
def test_what_is_rehearsed_is_what_the_allocator_gives_out(family, way, text):
    tensors = shapes(family)
    planned = scene(tensors, text=text, side=SIDE)
    _, work, inputs = prepared(family, way, planned, torch.device("cpu"))
    assert moving(rehearse(tensors, detect(tensors), planned, way)) == pytest.approx(allocated(work, inputs), rel=0.1)


def test_weights_and_copies_are_counted_to_the_byte():
    tensors = shapes("sd1")
    architecture, planned = detect(tensors), scene(shapes("sd1"))
    by_part = {kind: sum(t.numel() * 4 for name, t in tensors.items() if name.startswith(prefix)) for kind, prefix in (
        ("UNet", "model.diffusion_model."), ("VAE", "first_stage_model."), ("text encoders", "cond_stage_model."))}
    for way in (Way(1), Way(1, channels_last=True), Way(1, base="int8")):
        outcome = rehearse(tensors, architecture, planned, way)
        assert {kind: outcome.peak[kind] for kind in by_part} == by_part
        layers = Layers(unet_tensors(real("sd1", torch.device("cpu"))))
        furnish(layers, way, torch.device("cpu"))
        assert outcome.peak.get("copies", 0) == layers.copied_bytes
        assert bool(layers.copied_bytes) == (way != Way(1))
    aside = rehearse(tensors, architecture, planned, Way(1, aside=frozenset({"vae", "text"})))
    plain = rehearse(tensors, architecture, planned, Way(1))
    assert sum(aside.peak.values()) == sum(plain.peak.values()) - by_part["VAE"] - by_part["text encoders"]


def test_recomputing_keeps_less_and_computes_more_and_offloading_keeps_less_still():
    tensors = shapes("sd1", dtype=torch.float16)
    planned = scene(tensors, device="cuda", dtype=torch.float16, side=1024)
    ways = [Way(1, recompute=units("sd1", which)) for which in ("", "attention", "every block")]
    ways.append(dataclasses.replace(ways[-1], offload=True))
    outcomes = [rehearse(tensors, detect(tensors), planned, way) for way in ways]
    kept = [outcome.kept["activations"] for outcome in outcomes]
    assert kept == sorted(kept, reverse=True) and len(set(kept)) == 4
    operations = [outcome.operations for outcome in outcomes]
    assert operations[0] < operations[1] < operations[2] == operations[3] < 1.5 * operations[0]


def test_the_layers_of_a_network_are_those_that_were_planned():
    tensors = shapes("sd1")
    layers = layers_for(tensors, detect(tensors), rank=8, text_encoder=True)
    network = AdapterNetwork.build([layer.target for layer in layers], rank=8, alpha=1.0, seed=0)
    assert layers_of(network) == layers
    network.freeze({"te"})
    assert {layer.trained for layer in layers_of(network) if layer.target.component == "te"} == {False}


@CUDA
@pytest.mark.parametrize("which, offload, base", [("", False, ""), ("every block", False, ""), ("every block", True, ""),
                                                 ("", True, ""), ("", False, "int8")])
def test_on_a_card_a_step_takes_what_was_rehearsed(which, offload, base):
    device = torch.device("cuda")
    way = Way(2, recompute=units("sd1", which), offload=offload, base=base)
    tensors = shapes("sd1", dtype=torch.float16)
    planned = scene(tensors, device="cuda", dtype=torch.float16, side=512)
    _, work, inputs = prepared("sd1", way, planned, device)
    for _ in range(2):  # the first step chooses kernels
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work.gradients(inputs)
        torch.cuda.synchronize(device)
        peak = torch.cuda.max_memory_allocated(device) - before
        work.finish()
    assert moving(rehearse(tensors, detect(tensors), planned, way)) == pytest.approx(peak, rel=0.1)
