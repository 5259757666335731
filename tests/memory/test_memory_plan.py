"""Which way of making steps is taken, for how much memory there is."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from lib_lora_train.memory.budget import attention_kernel, budget_of, chunks_of, largest, shapes_of
from lib_lora_train.memory.dry_run import Scene, Unit, Way, layers_for, rehearse
from lib_lora_train.memory.tracker import Attention, Ledger

from lib_lora_train.errors import Interrupted
from lib_lora_train.inputs.vae_batches import encoding_bytes
from lib_lora_train.memory import plan as plan_module
from lib_lora_train.memory.plan import (
    CONTEXT,
    FRAGMENTS,
    GIGABYTE,
    WORKSPACES,
    MemoryPlan,
    Wishes,
    choose,
    chosen_units,
)
from lib_lora_train.model.family import detect
from lib_lora_train.model.sd.components import vae_tensors
from lib_lora_train.model.sd.vae import VAE
from lib_lora_train.settings import parse
from lib_lora_train.training.cuda_graph import MOST_SHAPES
from tools.bench.host import RandomHost

CPU = torch.device("cpu")
MEGABYTE = 1 << 20
PLAIN = Wishes(channels_last="off")


@functools.cache
def shapes(family: str, small: bool = True) -> Mapping[str, torch.Tensor]:
    return RandomHost(family, folder=Path(), device=CPU, dtype=torch.float16, small=small).outline().tensors


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


def test_a_plan_fits_wherever_the_least_of_all_ways_does_and_else_is_that_way_and_says_what_is_missing():
    # The least: one picture, all of it twice, activations and the lender's model off the card, eight bits.
    way = Way(1, recompute=frozenset(ladder()[0].units), offload=True, base="int8", aside=frozenset({"unet", "vae", "text"}))
    outcome = rehearse(shapes("sd1"), detect(shapes("sd1")), scene("sd1", 256), way)
    moving = outcome.peak["activations"] + outcome.peak["working"]
    least = sum(outcome.peak.values()) + int(FRAGMENTS * moving) + CONTEXT + WORKSPACES
    budgets = [made.budget for made in ladder()]
    assert min(budgets) < least < max(budgets)
    for made in ladder():
        assert bool(made.missing) == (made.budget < least) == ("more than there is" in made.warning)
        assert made.bytes <= made.budget if made.budget >= least else (made.way, made.bytes) == (way, least)


def work(made: MemoryPlan, images: int = 4) -> float:
    """Of so many pictures: operations, a kernel counted as some."""
    return -(-images // made.way.batch) * (made.operations + 2e8 * made.kernels)


def test_nothing_is_given_up_where_there_is_room_and_no_more_than_it_takes():
    first, *rest = ladder()
    assert first.way.recompute == frozenset() and first.way.batch == 4 and not first.way.offload and not first.way.base
    assert "nothing has to be given up" in first.text and not first.missing
    fitting = [made for made in rest if not made.missing]
    assert fitting[0].way != first.way
    amounts = [work(made) for made in (first, *fitting)]
    assert amounts == sorted(amounts)


def test_of_the_ways_that_fit_the_one_with_the_least_work_is_taken():
    whole = [plan(None, batch=batch, wishes=dataclasses.replace(PLAIN, plan=False, recompute=recompute))
             for batch in (4, 2, 1) for recompute in (False, True)]
    for made in ladder():
        rivals = [other for other in whole if other.bytes <= made.budget]
        assert all(work(made) <= work(other) for other in rivals)
        assert not rivals or not made.way.offload and not made.way.base


def test_what_is_said_to_be_done_twice_is_what_is_done_beside_the_step_as_it_is():
    free = plan(None)
    some = plan((free.bytes - free.predicted["activations"] / 5) / MEGABYTE)
    every = plan(None, wishes=dataclasses.replace(PLAIN, recompute=True))
    for made in (some, every):
        assert made.operations - made.again == pytest.approx(free.operations)
    assert 0 < some.again < every.again and some.way.recompute
    share = round(100 * (some.operations / free.operations - 1))
    assert f" {max(1, share)} % of a step's work is done twice" in some.text


def test_weights_are_touched_last_and_that_is_said():
    seen_base = False
    for made in ladder():
        assert not (seen_base and not made.way.base), "once it takes eight bits it takes them below too"
        seen_base = seen_base or bool(made.way.base)
        if made.way.base:
            assert "unet" in made.way.aside
            assert made.missing or "a little off" in made.warning
    smallest = plan(None, wishes=dataclasses.replace(PLAIN, plan=False, recompute=True, offload=True)).bytes
    assert all(bool(made.way.base) == (made.budget < smallest) for made in ladder())


def test_a_run_that_goes_on_in_eight_bits_is_told_so_and_no_more():
    tensors = shapes("sd1")
    made = choose(tensors, detect(tensors), scene("sd1", 256), batch=1, wishes=PLAIN, budget=100 * GIGABYTE, remembered="int8")
    assert made.way.base == "int8" and "goes on" in made.warning and "a little off" not in made.warning
    assert not dataclasses.replace(made, asked=dataclasses.replace(PLAIN, base="int8")).warning


def test_what_is_lacking_is_never_told_as_nothing():
    made = dataclasses.replace(plan(None), budget=plan(None).bytes - MEGABYTE)
    assert "0.1 more than there is" in made.warning and "memory_plan" not in made.warning
    by_hand = dataclasses.replace(made, asked=dataclasses.replace(PLAIN, plan=False))
    assert "memory_plan = auto" in by_hand.warning


def test_each_shape_that_is_recorded_is_counted_as_far_as_recordings_are_kept():
    tensors = shapes("sd1")

    def recordings(**changes: object) -> int:
        planned = dataclasses.replace(scene("sd1", 256), **changes)
        return choose(tensors, detect(tensors), planned, batch=1, wishes=PLAIN).predicted.get("recordings", 0)
    one = recordings()
    assert one > 1e6 and recordings(shapes=5) == 5 * one and recordings(shapes=100) == MOST_SHAPES * one
    assert recordings(encoded=1) == 0  # such steps are not recorded


def test_pictures_that_are_encoded_in_front_of_each_step_have_room():
    tensors = shapes("sd1")
    plain, encoding = (choose(tensors, detect(tensors), dataclasses.replace(scene("sd1", 256), encoded=encoded), batch=1,
                              wishes=PLAIN) for encoded in (0, 2))
    moving = sum(plain.predicted[kind] for kind in ("activations", "working"))
    assert moving + encoding.predicted["encoding"] == 2 * encoding_bytes((256, 256)) > moving


def test_the_vae_takes_what_is_assumed_of_it():
    """Its own pass over shapes, followed by the ledger, which is compared with a real allocator elsewhere."""
    tensors = shapes("sd1", small=False)
    ledger = Ledger("cuda")
    vae = VAE(vae_tensors(tensors), detect(tensors).vae)
    with ledger, Attention(ledger, "fused"):
        vae.encode(torch.empty(1, 3, 512, 512, device="meta"))
    assert 0.6 < sum(ledger.peak.values()) / encoding_bytes((512, 512)) < 1


def test_before_the_first_step_all_of_the_model_is_lent_and_a_picture_is_encoded_without_the_unet():
    tensors = shapes("sd1", False)
    lent = sum(2 * t.numel() for t in tensors.values())
    vae = sum(2 * t.numel() for t in vae_tensors(tensors).values())
    small, large = (plan(None, small=False, side=side) for side in (256, 1024))
    assert small.before - lent == large.before - vae - encoding_bytes((1024, 1024)) > CONTEXT
    tight = dataclasses.replace(large, budget=large.bytes, before=large.bytes + 1)
    assert "Before the first step" in tight.warning and not tight.missing
    assert not dataclasses.replace(tight, before=large.bytes).warning


def test_where_nothing_fits_only_a_few_ways_are_looked_at(monkeypatch):
    looked = []
    monkeypatch.setattr(plan_module, "_OUTCOMES", {})
    monkeypatch.setattr(plan_module, "rehearse", lambda *given: looked.append(given[-1]) or rehearse(*given))
    assert plan(1, batch=8, side=64).missing and len(looked) <= 4


def test_a_search_ends_when_it_is_told_to(monkeypatch):
    monkeypatch.setattr(plan_module, "_OUTCOMES", {})
    monkeypatch.setattr(plan_module, "rehearse", None)
    with pytest.raises(Interrupted):
        choose(shapes("sd1"), detect(shapes("sd1")), scene("sd1", 256), batch=1, wishes=PLAIN, should_stop=lambda: True)


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
    assert chosen_units(units, 350) == ({block}, 500)
    assert chosen_units(units, 300) == ({f"{block}.ff"}, 300)
    for wanted in (1, 100, 301, 450, 500, 9999):
        chosen, _ = chosen_units(units, wanted)
        assert not (block in chosen and len(chosen) > 1), "nothing is recomputed inside what is recomputed"


def test_a_step_is_rehearsed_once(monkeypatch):
    plan(100_000)
    monkeypatch.setattr(plan_module, "rehearse", None)
    assert plan(90_000).way == plan(100_000).way


@pytest.mark.parametrize("family, side, batch, budget", [("sd1", 512, 1, 4), ("sdxl", 1024, 1, 8)])
def test_the_published_models_train_within_their_targets_on_paper(family, side, batch, budget):
    made = plan(budget * 1024, family=family, side=side, batch=batch, small=False, wishes=Wishes())
    assert not made.missing and max(made.bytes, made.before) <= budget * GIGABYTE and not made.warning
    assert not made.way.base and not made.way.offload and made.way.batch == batch
    assert made.predicted["UNet"] == sum(
        2 * t.numel() for name, t in shapes(family, False).items() if name.startswith("model.diffusion_model."))


def test_budgets_attention_and_buckets():
    assert budget_of(0, CPU, ours=0) is None and budget_of(6, CPU, ours=0) == 6 * GIGABYTE
    assert attention_kernel(CPU, torch.float32) == "fused" and attention_kernel(torch.device("mps"), torch.float16) == "math"
    buckets = [((512, 512), 3), ((768, 512), 1), ((448, 576), 9)]
    assert largest(buckets) == (768, 512)
    assert [shapes_of(buckets, batch) for batch in (1, 2, 3)] == [3, 5, 3]


@pytest.mark.parametrize("caption, chunks", [
    ("", 1), ("a red fox", 1), ("fox, " * 20, 1), ("fox, " * 40, 2), ("word " * 250, 5)])
def test_long_captions_are_told_by_their_words(caption, chunks):
    assert chunks_of(["short", caption]) == chunks


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_budget_on_a_card_is_no_more_than_there_is():
    device = torch.device("cuda")
    _, total = torch.cuda.mem_get_info(device)
    assert budget_of(10_000, device, ours=0) == budget_of(0, device, ours=0) <= total + plan_module.CONTEXT
    assert budget_of(1, device, ours=0) == GIGABYTE


def test_every_wish_is_a_setting():
    names = {field.name for field in dataclasses.fields(Wishes)}
    assert names == {"plan", "recompute", "offload", "base", "channels_last", "cuda_graphs"}
    assert Wishes.of(parse({}).memory) == Wishes()
