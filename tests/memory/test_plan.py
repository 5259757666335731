"""Which rung of the ladder is taken, for how much memory there is."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from lib_lora_train.errors import Interrupted
from lib_lora_train.inputs.vae_batches import encoding_bytes
from lib_lora_train.memory import plan as plan_module
from lib_lora_train.memory.device import attention_kernel, budget_of, matrix_rate, seconds_per_step
from lib_lora_train.memory.estimate import Workload
from lib_lora_train.memory.plan import CONTEXT, GIGABYTE, WORKSPACES, MemoryPlan, installed_bytes, ladder, plan_memory
from lib_lora_train.memory.step_config import StepConfig
from lib_lora_train.model.family import detect
from lib_lora_train.model.ops.quantised import quantised
from lib_lora_train.model.sd.unet import UNet, swappable
from lib_lora_train.run.memory import chunks_in_longest, layers_for
from lib_lora_train.settings import parse
from tools.bench.host import RandomHost

CPU = torch.device("cpu")
MEGABYTE = 1 << 20


@functools.cache
def shapes(family: str, small: bool = True) -> Mapping[str, torch.Tensor]:
    return RandomHost(family, folder=Path(), device=CPU, dtype=torch.float16, small=small).outline().tensors


def plan(budget: float | None, *, family: str = "sd1", side: int = 256, small: bool = True, batch: int = 1,
         device: str = "cuda", resumed_base_dtype: str = "", encoded: int = 0, references: int = 0, repeats: int = 1,
         **settings: object) -> MemoryPlan:
    """For a budget in MiB, with text encoders and VAE on the CPU."""
    tensors = shapes(family, small)
    workload = Workload(side, side, torch.float16 if device == "cuda" else torch.float32,
                        layers_for(tensors, detect(tensors), rank=16, text_encoder=False), device_type=device, encoded=encoded)
    return plan_memory(tensors, detect(tensors), workload, batch=batch, memory=parse(settings).memory,
                       budget=None if budget is None else int(budget * MEGABYTE), resumed_base_dtype=resumed_base_dtype,
                       parts_on_cpu=frozenset({"vae", "text"}) if device == "cuda" else frozenset(),
                       references=references, repeats=repeats)


def test_rungs_take_ever_less_memory_and_touch_the_weights_last():
    blocks = sorted(plan(None).blocks)
    rungs = list(ladder(StepConfig(4), blocks, cuda=True))
    assert rungs[0] == StepConfig(4)
    assert rungs[len(blocks)] == StepConfig(4, checkpointed=frozenset(blocks))
    assert [rung.microbatch for rung in rungs[len(blocks):len(blocks) + 4]] == [4, 2, 1, 1]
    assert rungs[len(blocks) + 3].offload and not rungs[len(blocks) + 3].base_dtype
    on_int8 = rungs[len(blocks) + 4:]
    assert [dataclasses.replace(rung, base_dtype="", parts_on_cpu=frozenset()) for rung in on_int8] == rungs[:len(on_int8)]
    assert all(rung.base_dtype == "int8" and rung.parts_on_cpu == {"unet"} for rung in on_int8)
    on_cpu = list(ladder(StepConfig(4), blocks, cuda=False))
    assert on_cpu == rungs[:len(blocks) + 3]


def test_the_first_rung_that_fits_is_taken_and_the_last_where_none_does():
    free = plan(100_000, batch=4)
    assert free.config == StepConfig(4, parts_on_cpu=frozenset({"vae", "text"}))
    assert "nothing has to be given up" in free.text and not free.missing and not free.warning
    given_up = []
    for share in (1.0, 0.95, 0.85, 0.75, 0.68, 0.63, 0.5):
        made = plan(free.bytes / MEGABYTE * share, batch=4)
        config = made.config
        given_up.append((config.base_dtype, config.offload, -config.microbatch, len(config.checkpointed)))
        assert made.bytes <= made.budget or config == StepConfig(
            1, checkpointed=made.blocks, offload=True, base_dtype="int8", parts_on_cpu=frozenset({"unet", "vae", "text"}))
        assert bool(made.missing) == (made.bytes > made.budget) == ("more than there is" in made.warning)
    assert given_up[0] < given_up[1] < given_up[2] and made.missing
    bases = [base for base, *_ in given_up]
    assert bases == sorted(bases) and bases[0] == "" and bases[-1] == "int8"


@pytest.mark.parametrize("device_type, steps", [("cuda", 5), ("cpu", 4)])
def test_out_of_memory_steps_down_to_the_end(device_type, steps):
    config, seen = StepConfig(8), []
    while (config := config.step_down(largest=5, blocks={"a", "b"}, device_type=device_type)) is not None:
        seen.append(config)
    assert [one.microbatch for one in seen[:3]] == [3, 2, 1]
    assert seen[3] == StepConfig(1, checkpointed=frozenset({"a", "b"}))
    assert len(seen) == steps and (steps == 4 or seen[4] == dataclasses.replace(seen[3], offload=True))
    assert StepConfig(1, frozenset({"a"})).step_down(largest=1, blocks={"a", "a.ff"}, device_type="cpu") is None
    assert StepConfig(1, base_dtype="fp8").step_down(largest=1, blocks={"a"}, device_type="cpu").base_dtype == "fp8"


def test_what_the_first_step_took_takes_the_place_of_what_was_predicted():
    made = plan(4096)
    measured = made.corrected(3 * GIGABYTE)
    assert measured.bytes == 3 * GIGABYTE + CONTEXT and measured.config == made.config and not measured.missing
    assert "3.4 of 4.0 GB" in measured.text and "measured" in measured.text
    assert made.corrected(4 * GIGABYTE).missing


def test_what_is_told_of_means_and_of_what_is_missing():
    free = plan(None)
    assert "about" in free.text and free.text.endswith("GB of memory")
    some = plan((free.bytes - free.predicted["activations"] / 5) / MEGABYTE)
    share = round(100 * some.checkpointed_flops / free.flops)
    assert some.flops - some.checkpointed_flops == pytest.approx(free.flops)
    assert f" {max(1, share)} % of a step's work" in some.text
    held = plan((free.bytes - free.predicted["activations"] / 5) / MEGABYTE, references=1, repeats=2)
    assert held.config == some.config and held.bytes == some.bytes and f" {max(1, share)} % of a step's work" in held.text
    assert 2 * some.flops < held.flops < 2.5 * some.flops  # one more step, and one forward, a third of a step
    assert f"{round(100 * (held.flops / some.flops - 1))} % is computed beside it" in held.text
    every = plan(None, gradient_checkpointing=True)
    assert "every block is computed twice" in every.text and every.config.checkpointed == every.blocks
    short = dataclasses.replace(free, budget=free.bytes - MEGABYTE)
    assert "0.1 more than there is" in short.warning and "memory_plan" not in short.warning
    by_hand = dataclasses.replace(short, settings=parse({"memory_plan": "manual"}).memory)
    assert "Memory plan (memory_plan) = auto" in by_hand.warning


def test_more_memory_than_the_machine_has_is_told_where_there_is_no_gpu(monkeypatch):
    needed, on_gpu = plan(None, device="cpu"), plan(20000)
    if (linux := Path("/proc/meminfo")).is_file():
        assert installed_bytes() == 1024 * int(linux.read_text().split()[1])  # "MemTotal: … kB"
    assert needed.warning == ""
    monkeypatch.setattr(plan_module, "installed_bytes", lambda: 1 * MEGABYTE)
    assert "this machine has 0.0" in needed.warning and on_gpu.warning == ""
    monkeypatch.setattr(plan_module, "installed_bytes", lambda: 0)
    assert needed.warning == ""


def test_int8_is_said_where_the_user_did_not_ask_for_it():
    tight = plan(CONTEXT / MEGABYTE)
    assert tight.config.base_dtype == "int8" and "a little off" in tight.warning
    resumed = plan(100_000, resumed_base_dtype="int8")
    assert resumed.config.base_dtype == "int8" and "goes on" in resumed.warning and "a little off" not in resumed.warning
    assert not plan(100_000, base_weights="int8").warning


def test_what_is_chosen_is_done_and_nothing_else_where_the_plan_is_manual():
    made = plan(1, memory_plan="manual", base_weights="int8")
    assert made.config == StepConfig(1, base_dtype="int8", parts_on_cpu=frozenset({"unet", "vae", "text"})) and made.missing
    wished = {"gradient_checkpointing": True, "cpu_offload_checkpointing": True, "channels_last": "on"}
    made = plan(None, **wished)
    assert made.config.checkpointed == made.blocks and made.config.offload and made.config.channels_last
    assert plan(100_000, **wished).config == made.config
    assert not plan(100_000).config.channels_last


def test_on_a_cpu_nothing_is_offloaded_nor_held_twice():
    made = plan(1, device="cpu", cpu_offload_checkpointing=True)
    assert made.missing and made.config == StepConfig(1, checkpointed=made.blocks)
    unplanned = plan(None, device="cpu")
    assert unplanned.config == StepConfig(1) and not unplanned.missing and unplanned.text.endswith("GB of memory")


def test_weights_and_copies_are_counted_to_the_byte():
    tensors, free = shapes("sd1"), plan(None)
    size = {kind: sum(2 * t.numel() for name, t in tensors.items() if name.startswith(prefix)) for kind, prefix in (
        ("UNet", "model.diffusion_model."), ("VAE", "first_stage_model."), ("text encoders", "cond_stage_model."))}
    assert free.predicted["UNet"] == size["UNet"] and not {"VAE", "text encoders", "copies"} & free.predicted.keys()
    assert {kind: plan(None, device="cpu").predicted[kind] for kind in size} == size
    unet = {name.removeprefix("model.diffusion_model."): torch.zeros(t.shape, dtype=t.dtype) for name, t in tensors.items()
            if name.startswith("model.diffusion_model.")}
    layers = UNet(unet, detect(tensors).unet).layers
    layers.lay_out_channels_last()
    assert plan(None, channels_last="on").predicted["copies"] == layers.copied_bytes
    copies = sum(weight.nbytes for _, weight in quantised(unet, "int8", device=CPU))
    assert plan(None, device="cpu", base_weights="int8").predicted["copies"] == copies
    assert "UNet" not in plan(None, base_weights="int8").predicted  # on a GPU the host's own lie on the CPU then


def test_images_that_are_encoded_in_front_of_each_step_have_room():
    plain, encoding = plan(None), plan(None, encoded=2)
    moving = sum(plain.predicted[kind] for kind in ("activations", "working"))
    assert moving + encoding.predicted["encoding"] == 2 * encoding_bytes((256, 256)) > moving


def test_before_the_first_step_the_part_that_encodes_counts_and_not_the_sum_of_all():
    tensors = shapes("sd1", False)
    vae, text = (sum(2 * t.numel() for name, t in tensors.items() if name.startswith(prefix))
                 for prefix in ("first_stage_model.", "cond_stage_model."))
    small, large = (plan(None, small=False, side=side) for side in (256, 1024))
    rest = large.before - vae - encoding_bytes((1024, 1024))
    # Of a small image the VAE makes less than the text encoder of 32 captions, a layer of which has 77 x 768 numbers each.
    assert small.before - text - rest > 32 * 77 * 768 * 4 and rest > CONTEXT
    on_cpu = plan(None, small=False, side=256, device="cpu")
    assert on_cpu.before - rest + CONTEXT + WORKSPACES == (
        sum(2 * t.numel() for t in tensors.values()) + encoding_bytes((256, 256)))
    tight = dataclasses.replace(large, budget=large.bytes, before=large.bytes + 1)
    assert "Before the first step" in tight.warning and not tight.missing
    assert not dataclasses.replace(tight, before=large.bytes).warning


def test_planning_ends_when_it_is_told_to():
    tensors = shapes("sd1")
    with pytest.raises(Interrupted):
        plan_memory(tensors, detect(tensors), Workload(256, 256, torch.float16, ()), batch=1, memory=parse({}).memory,
                    should_stop=lambda: True)


@pytest.mark.parametrize("family, side, budget", [("sd1", 512, 4), ("sdxl", 1024, 8)])
def test_the_published_models_train_within_their_targets_on_paper(family, side, budget):
    made = plan(budget * 1024, family=family, side=side, small=False)
    assert not made.missing and max(made.bytes, made.before) <= budget * GIGABYTE and not made.warning
    assert not made.config.base_dtype and not made.config.offload


def test_sdxl_starts_and_trains_in_six_gigabytes_on_paper():
    made = plan(6 * 1024, family="sdxl", side=1024, small=False)
    assert not made.missing and made.before <= made.budget and "Before the first step" not in made.warning
    assert made.config.base_dtype == "int8"  # fp16 weights alone are 4.8 GB


def test_budgets_and_attention():
    assert budget_of(0, CPU, ours=0) is None and budget_of(6, CPU, ours=0) == 6 * GIGABYTE
    assert attention_kernel(CPU, torch.float32) == "fused" and attention_kernel(torch.device("mps"), torch.float16) == "math"


def test_attention_keeps_the_whole_map_on_rocm_and_on_gpus_without_another_kernel(monkeypatch):
    card = torch.device("cuda")
    for capability, hip, expected in (((8, 6), None, "fused"), ((10, 3), "5.7", "math"), ((5, 0), None, "math")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, known=capability: known)
        monkeypatch.setattr(torch.version, "hip", hip)
        assert attention_kernel(card, torch.float16) == expected


@pytest.mark.parametrize("caption, chunks", [
    ("", 1), ("a red fox", 1), ("fox, " * 20, 1), ("fox, " * 40, 2), ("word " * 250, 5)])
def test_long_captions_are_told_by_their_words(caption, chunks):
    assert chunks_in_longest(["short", caption]) == chunks


def test_seconds_grow_with_flops_and_never_fall_below_the_blocks_overhead():
    def seconds(flops: float, passes: int = 1) -> float:
        return seconds_per_step(flops, blocks=40, passes=passes, device_type="cpu", rate=1e11)
    assert seconds(0) == seconds(1) > 0
    assert seconds(4e15, passes=2) == pytest.approx(4 * seconds(2e15)) and seconds(1e15) > seconds(0)


def test_a_rate_is_measured_only_while_the_device_is_idle_and_a_disturbed_figure_is_not_kept():
    def rate(*idle: bool) -> float | None:
        answers = iter(idle)  # a question more than these is an error
        return matrix_rate(CPU, torch.float64, idle=lambda: next(answers))
    assert rate(False) is None
    assert rate(True, False) is None  # others began meanwhile
    measured = rate(True, True)
    assert measured > 0 and rate() == measured


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_budget_on_a_gpu_is_no_more_than_there_is():
    device = torch.device("cuda")
    _, total = torch.cuda.mem_get_info(device)
    assert budget_of(10_000, device, ours=0) == budget_of(0, device, ours=0) <= total + CONTEXT
    assert budget_of(1, device, ours=0) == GIGABYTE


@pytest.mark.parametrize(("family", "side", "gigabytes"), [("sdxl", 1024, 6), ("sd1", 512, 3)])
def test_a_published_model_is_trained_within_the_memory_of_small_gpus_in_its_own_dtype(family, side, gigabytes):
    made = plan(1024 * gigabytes, family=family, side=side, small=False, blocks_to_swap=200)
    assert made.bytes <= made.budget and made.before <= made.budget and not made.config.base_dtype and not made.warning


def test_no_more_blocks_are_swapped_than_the_memory_asks_for_and_than_are_allowed():
    counts = []
    for gigabytes in (8, 6, 5, 4):
        made = plan(1024 * gigabytes, family="sdxl", side=1024, small=False, blocks_to_swap=200)
        counts.append(len(made.config.swapped))
        assert ("swapped" in made.text) == bool(made.config.swapped) == ("unet" in made.config.parts_on_cpu)
    assert counts == sorted(counts) and counts[0] == 0 < counts[1] and len(set(counts)) == 4
    few = plan(1024 * 6, family="sdxl", side=1024, small=False, blocks_to_swap=counts[1] - 1)
    assert len(few.config.swapped) < counts[1] and few.config.offload  # the next rung
    none = plan(1024 * 6, family="sdxl", side=1024, small=False)
    assert none.config.base_dtype == "int8" and not none.config.swapped and "blocks_to_swap" in none.warning
    assert not plan(1024 * 6, device="cpu", blocks_to_swap=200, memory_plan="manual").config.swapped


def test_by_hand_as_many_blocks_are_swapped_as_were_chosen_at_even_distances():
    made = plan(None, family="sdxl", small=False, blocks_to_swap=30, memory_plan="manual", cuda_graphs="on")
    places = [swappable(detect(shapes("sdxl", False)).unet).index(name) for name in made.config.swapped]
    assert len(places) == 30 and {b - a for a, b in zip(places, places[1:], strict=False)} == {3, 4}  # of 91
    assert "neither captured in CUDA graphs" in made.warning
