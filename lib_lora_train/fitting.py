"""How a run's steps fit into the memory of its device: the plan for the lent model, and what it wants done to the weights."""

from __future__ import annotations

import dataclasses

import torch

from lib_lora_train.errors import translated
from lib_lora_train.host.port import Borrowed, Host
from lib_lora_train.model.frozen import FrozenModel
from lib_lora_train.model.quantised import quantised
from lib_lora_train.network.network import LoRANetwork
from lib_lora_train.preparation import Preparation
from lib_lora_train.settings import Settings
from lib_lora_train.training.memory_plan import (
    MemoryPlan,
    Wishes,
    attention_kernel,
    budget_of,
    choose,
    chunks_of,
    largest,
)
from lib_lora_train.training.rehearsal import Base, Scene, Way, layers_of


def memory_plan(settings: Settings, preparation: Preparation, model: FrozenModel, borrowed: Borrowed, network: LoRANetwork,
                aside: frozenset[str], *, dtype: torch.dtype, base: Base) -> MemoryPlan:
    """How the steps are made so that they fit into the memory there is; `base` is what a run that goes on has computed on."""
    width, height = largest(preparation.plan.buckets)
    scene = Scene(
        width, height, dtype, layers_of(network), device_type=model.device.type,
        chunks=chunks_of(example.caption for example in preparation.dataset.examples),
        attention=attention_kernel(model.device, dtype), min_snr_gamma=settings.loss.min_snr_gamma,
        text_recomputed=settings.memory.gradient_checkpointing)
    ours = [t for t in (*borrowed.tensors.values(), *network.parameters()) if t.device.type == model.device.type]
    budget = budget_of(settings.memory.memory_budget, model.device, ours=sum(t.numel() * t.element_size() for t in ours))
    wishes = Wishes.of(settings.memory)
    return choose(borrowed.tensors, model.architecture, scene, batch=settings.optimizer.train_batch_size,
                  wishes=dataclasses.replace(wishes, base=wishes.base or base), budget=budget, aside=aside)


def lay_out(model: FrozenModel, host: Host, way: Way) -> None:
    """Put our own copies of the UNet's weights in the place of the lender's, where the plan says so."""
    if not way.base:
        if way.channels_last:
            model.unet.layers.lay_out_channels_last()
        return
    with translated("holding the model in eight bits"):
        if "unet" in way.aside:
            model.take(host.set_aside({"unet"}))
        model.unet.layers.replace(dict(quantised(model.unet.tensors, way.base, device=model.device,
                                                 channels_last=way.channels_last)))
