"""Which way of making steps is taken, for how much memory there is."""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch

from lib_lora_train.bench.true_size import true_size_shapes
from lib_lora_train.model.family import detect
from lib_lora_train.settings import parse
from lib_lora_train.training import memory_plan
from lib_lora_train.training.memory_plan import (
    GIGABYTE,
    MemoryPlan,
    Wishes,
    attention_kernel,
    budget_of,
    choose,
    chosen_units,
    chunks_of,
    largest,
    units_of,
)
from lib_lora_train.training.rehearsal import Scene, Unit, layers_for

CPU = torch.device("cpu")
MEGABYTE = 1 << 20
PLAIN = Wishes(channels_last="off")


@functools.cache
def shapes(family: str, small: bool = True) -> dict[str, torch.Tensor]:
    return {name: torch.empty(shape, dtype=torch.float16, device="meta")
            for name, shape in true_size_shapes(family, small=small).items()}


@functools.cache
def scene(family: str, side: int, small: bool = True, device: str = "cuda", rank: int = 16) -> Scene:
    tensors = shapes(family, small)
    layers = layers_for(tensors, detect(tensors), rank=rank, text_encoder=False)
    return Scene(side, side, torch.float16 if device == "cuda" else torch.float32, layers, device_type=device)


def plan(budget: float | None, *, family: str = "sd1", side: int = 256, small: bool = True, batch: int = 1,
         device: str = "cuda", wishes: Wishes = PLAIN) -> MemoryPlan:
    """For a budget in MiB, with text encoders and VAE set aside."""
    tensors = shapes(family, small)
    return choose(tensors, detect(tensors), scene(family, side, small, device), batch=batch, wishes=wishes,
                  budget=None if budget is None else int(budget * MEGABYTE),
                  aside=frozenset({"vae", "text"}) if device == "cuda" else frozenset())


@functools.cache
def ladder() -> tuple[MemoryPlan, ...]:
    """The same run for ever less memory."""
    free = plan(100_000, batch=4).bytes / MEGABYTE
    return tuple(plan(free * share, batch=4) for share in (1.0, 0.85, 0.72, 0.66, 0.5))


def test_a_plan_stays_within_its_budget_or_says_what_is_missing():
    for made in ladder():
        assert made.bytes <= made.budget or made.missing == made.bytes - made.budget > 0
        assert bool(made.missing) == ("more than there is" in made.warning)
    assert not ladder()[0].missing and ladder()[-1].missing


def test_nothing_is_given_up_where_there_is_room_and_no_more_than_it_takes():
    first, *rest = ladder()
    assert first.way.recompute == frozenset() and first.way.batch == 4 and not first.way.offload and not first.way.base
    assert "nothing has to be given up" in first.text and not first.warning
    fitting = [made for made in rest if not made.missing]
    assert fitting[0].way.recompute and set(fitting[0].way.recompute) < set(fitting[0].units) | _inner(fitting[0])
    work = [made.operations * made.passes for made in (first, *fitting)]
    assert work == sorted(work)


def _inner(made: MemoryPlan) -> set[str]:
    return {unit for unit in units_of(detect(shapes("sd1"))) if unit.rpartition(".")[0] in made.units}


def test_weights_are_touched_last_and_that_is_said():
    seen_base = False
    for made in ladder():
        assert not (seen_base and not made.way.base), "once it takes eight bits it takes them below too"
        seen_base = seen_base or bool(made.way.base)
        if made.way.base:
            assert "unet" in made.way.aside
            assert made.missing or "a little off" in made.warning
    batches = [made.way.batch for made in ladder() if not made.way.base]
    assert batches == sorted(batches, reverse=True)


def test_a_smaller_batch_comes_before_eight_bits():
    tried = [name for name, _ in ladder()[-1].tried]
    assert tried.index(next(name for name in tried if name.startswith("batch 1,"))) < tried.index(
        next(name for name in tried if "int8" in name))


def test_what_is_ticked_is_done_and_nothing_else_where_the_plan_is_manual():
    manual = Wishes.of(parse({"memory_plan": "manual", "base_weights": "int8", "channels_last": "off"}).memory)
    made = plan(1, wishes=manual)
    assert (made.way.base, made.way.recompute, made.way.offload, made.way.batch) == ("int8", frozenset(), False, 1)
    assert made.missing and "a little off" not in made.warning  # he knows: he chose it
    ticked = Wishes.of(parse({"gradient_checkpointing": True, "cpu_offload_checkpointing": True, "channels_last": "on"}).memory)
    made = plan(None, wishes=ticked)
    assert made.way.recompute == frozenset(made.units) and made.way.offload and made.way.channels_last
    assert plan(100_000, wishes=ticked).way == made.way


def test_without_a_budget_nothing_is_chosen_and_memory_is_told_all_the_same():
    made = plan(None, device="cpu")
    assert made.way.recompute == frozenset() and not made.missing and made.text.endswith("GB of memory")


def test_on_a_processor_nothing_is_kept_off_the_device_nor_held_twice():
    made = plan(1, device="cpu", wishes=Wishes())
    assert made.missing and made.way.recompute == frozenset(made.units)
    assert not made.way.offload and not made.way.base and not made.way.channels_last


def test_a_copy_that_is_only_for_speed_is_made_where_there_is_room_for_others_too():
    free = plan(100_000, wishes=Wishes())
    assert free.way.channels_last and free.predicted["copies"] > 0
    tight = plan(free.bytes / MEGABYTE, wishes=Wishes())
    assert not tight.way.channels_last and "copies" not in tight.predicted and not tight.missing


def test_units_are_chosen_by_what_they_keep_for_their_work():
    units = [Unit("a", 100, 1e12, 1), Unit("b", 100, 1e10, 1), Unit("c", 1000, 1e12, 1)]
    assert chosen_units(units, 50) == ({"b"}, 100)
    assert chosen_units(units, 150) == ({"b", "c"}, 1100)
    assert chosen_units(units, 5000)[0] == {"a", "b", "c"}


def test_a_block_replaces_what_is_inside_it():
    block = "input_blocks.1.1.transformer_blocks.0"
    inner = [Unit(f"{block}.attn1", 100, 1e9, 0), Unit(f"{block}.ff", 300, 1e9, 0)]
    units = [*inner, Unit(block, 500, 4e9, 0)]
    assert chosen_units(units, 350) == ({f"{block}.ff", block} - {f"{block}.ff"}, 500)
    assert chosen_units(units, 300) == ({f"{block}.ff"}, 300)
    for wanted in (1, 100, 301, 450, 500, 9999):
        chosen, _ = chosen_units(units, wanted)
        assert not (block in chosen and len(chosen) > 1), "nothing is recomputed inside what is recomputed"


def test_a_step_is_rehearsed_once(monkeypatch):
    plan(100_000)
    monkeypatch.setattr(memory_plan, "rehearse", None)
    assert plan(90_000).way == plan(100_000).way


@pytest.mark.parametrize("family, side, batch, budget", [("sd1", 512, 1, 4), ("sdxl", 1024, 1, 8)])
def test_the_published_models_train_within_their_targets_on_paper(family, side, batch, budget):
    made = plan(budget * 1024, family=family, side=side, batch=batch, small=False, wishes=Wishes())
    assert not made.missing and made.bytes <= budget * GIGABYTE
    assert not made.way.base and not made.way.offload and made.way.batch == batch
    assert made.predicted["UNet"] == sum(
        2 * t.numel() for name, t in shapes(family, False).items() if name.startswith("model.diffusion_model."))


def test_budgets_attention_and_buckets():
    assert budget_of(0, CPU, ours=0) is None and budget_of(6, CPU, ours=0) == 6 * GIGABYTE
    assert attention_kernel(CPU, torch.float32) == "fused" and attention_kernel(torch.device("mps"), torch.float16) == "math"
    assert largest([((512, 512), 3), ((768, 512), 1), ((448, 576), 9)]) == (768, 512)


@pytest.mark.parametrize("caption, chunks", [
    ("", 1), ("a red fox", 1), ("fox, " * 20, 1), ("fox, " * 40, 2), ("word " * 250, 5)])
def test_long_captions_are_told_by_their_words(caption, chunks):
    assert chunks_of(["short", caption]) == chunks


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_budget_on_a_card_is_no_more_than_there_is():
    device = torch.device("cuda")
    _, total = torch.cuda.mem_get_info(device)
    assert budget_of(10_000, device, ours=0) == budget_of(0, device, ours=0) <= total + memory_plan.CONTEXT
    assert budget_of(1, device, ours=0) == GIGABYTE


def test_every_wish_is_a_setting():
    names = {field.name for field in dataclasses.fields(Wishes)}
    assert names == {"plan", "recompute", "offload", "base", "channels_last", "cuda_graphs"}
    assert Wishes.of(parse({}).memory) == Wishes()
