"""Batches: every visit once, one bucket each, and exactly the same again from the same seed."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch

from lib_lora_train.dataset.examples import visits_by_bucket
from lib_lora_train.dataset.plan import plan_run
from lib_lora_train.inputs.batches import Batches
from lib_lora_train.inputs.latents import CachedLatents, FreshLatents

from .conftest import FakeVAE, augmented, epoch_of, same

SIZES = {"a.png": (64, 64), "b.png": (80, 48), "c.png": (64, 64), "d.png": (48, 80), "e.png": (64, 64)}


@pytest.mark.parametrize("batch_size", [1, 2, 4])
def test_an_epoch_visits_every_picture_as_often_as_it_is_repeated_one_bucket_a_batch(
    make_dataset, vae: FakeVAE, batch_size: int,
) -> None:
    dataset, placements = make_dataset(SIZES, repeats=3)
    batches = Batches(CachedLatents.build(vae, dataset, placements), train_batch_size=batch_size, seed=1)
    order = batches.order(0)
    assert Counter(i for batch in order for i in batch) == {i: 3 for i in range(5)}
    assert all(len({placements[i].bucket for i in batch}) == 1 and len(batch) <= batch_size for batch in order)
    planned = plan_run(visits_by_bucket(dataset.examples, placements), train_batch_size=batch_size,
                       gradient_accumulation_steps=1, max_train_epochs=1)
    assert len(order) == len(batches) == planned.batches_per_epoch == -(-9 // batch_size) + 2 * -(-3 // batch_size)


def test_epochs_and_seeds_differ_in_their_order(make_dataset, vae: FakeVAE) -> None:
    dataset, placements = make_dataset(SIZES, repeats=5)
    source = CachedLatents.build(vae, dataset, placements)
    one, other = (Batches(source, train_batch_size=2, seed=seed) for seed in (1, 2))
    assert len({one.order(0), one.order(1), other.order(0), other.order(1)}) == 4
    assert one.order(1) == one.order(1)


@pytest.mark.parametrize("fresh", [False, True])
def test_the_same_seed_gives_the_same_batches_from_any_position(make_dataset, vae: FakeVAE, fresh: bool) -> None:
    dataset, placements = make_dataset(SIZES | {"f.png": (100, 80)}, repeats=2)

    def make() -> Batches:
        captions = {"shuffle_caption": True, "caption_tag_dropout_rate": 0.3, "caption_dropout_rate": 0.2}
        views = {"flip_aug": True, "rotate_aug_degrees": 9} | ({"color_aug": True, "random_crop": True} if fresh else {})
        kind = FreshLatents if fresh else CachedLatents
        return Batches(kind.build(vae, augmented(dataset, **captions, **views), placements), train_batch_size=2, seed=7)

    whole = list(epoch_of(make(), 3))
    resumed = list(epoch_of(make(), 3, start=4))
    assert len(whole) == len(make()) and len(resumed) == len(whole) - 4
    assert all(same(one, other) for one, other in zip(whole[4:], resumed, strict=True))
    assert not all(same(one, other) for one, other in zip(whole, epoch_of(make(), 4), strict=True))


def test_batches_carry_the_sizes_that_sdxl_is_told(make_dataset, vae: FakeVAE) -> None:
    dataset, placements = make_dataset({"wide.png": (192, 108)})  # 16:9, an eighth of 1536×864; bucket 80×48
    (batch,) = epoch_of(Batches(CachedLatents.build(vae, dataset, placements), train_batch_size=1, seed=0), 0)
    # Fitted inside: 80×45, 1.5 rows above, cut to 1.
    assert batch["sizes"].tolist() == [[108, 192, 1, 0, 48, 80]] and batch["sizes"].dtype == torch.float32
    assert batch["mean"].shape == batch["std"].shape == (1, 4, 6, 10)


def test_regularisation_is_weighted_and_gets_no_trigger_word(make_dataset, vae: FakeVAE) -> None:
    dataset, placements = make_dataset({"a.png": (64, 64), "reg.png": (64, 64)}, regularisation=("reg.png",))
    batches = Batches(CachedLatents.build(vae, augmented(dataset, trigger_word="sks"), placements), train_batch_size=2, seed=0,
                      prior_loss_weight=0.25)
    (batch,) = epoch_of(batches, 0)
    by_caption = dict(zip(batch.captions, batch["loss_weight"].tolist(), strict=True))
    assert by_caption == {"sks, caption of a.png, tag one, tag two": 1.0, "caption of reg.png, tag one, tag two": 0.25}
    assert batch["loss_weight"].dtype == torch.float32


def test_captions_vary_from_visit_to_visit_and_vary_nothing_else(make_dataset, vae: FakeVAE) -> None:
    dataset, placements = make_dataset(SIZES, repeats=10)
    plain, varied = (list(epoch_of(Batches(CachedLatents.build(
        vae, augmented(dataset, flip_aug=True, shuffle_caption=shuffled), placements), train_batch_size=2, seed=0), 0))
        for shuffled in (False, True))
    assert all(torch.equal(one["mean"], other["mean"]) for one, other in zip(plain, varied, strict=True))
    captions = {caption for batch in varied for caption in batch.captions}
    orders = ("tag one, tag two", "tag two, tag one")
    assert captions == {f"caption of {name}, {tags}" for name in SIZES for tags in orders}


def test_captions_are_known_beforehand_unless_tags_vary(make_dataset, vae: FakeVAE) -> None:
    dataset, placements = make_dataset({"a.png": (64, 64), "b.png": (64, 64)}, repeats=50)
    def made(**changes: object) -> Batches:
        return Batches(CachedLatents.build(vae, augmented(dataset, **changes), placements), train_batch_size=4, seed=0)

    fixed = made(trigger_word="sks", caption_dropout_rate=0.3)
    known = fixed.fixed_captions()
    assert known is not None and len(known) == 3
    assert {caption for batch in epoch_of(fixed, 0) for caption in batch.captions} == set(known)
    assert made(shuffle_caption=True).fixed_captions() is None
    assert made(caption_tag_dropout_rate=0.1).fixed_captions() is None


@pytest.mark.parametrize(("name", "value"), [
    ("shuffle_caption", True), ("keep_tokens", 2), ("keep_tokens_separator", "|||"), ("secondary_separator", ";;;"),
    ("enable_wildcard", True), ("caption_separator", ";"), ("caption_tag_dropout_rate", 0.5), ("caption_dropout_rate", 0.5),
    ("caption_dropout_every_n_epochs", 2), ("token_warmup_step", 0.5), ("token_warmup_min", 2), ("trigger_word", "sks")])
def test_every_setting_of_captions_changes_what_is_trained(make_dataset, vae: FakeVAE, name: str, value: object) -> None:
    dataset, placements = make_dataset({"a.png": (64, 64)}, repeats=12)
    caption = "k ||| {a|b}, c;;;d, e, f ||| z"
    dataset = replace(dataset, examples=(replace(dataset.examples[0], caption=caption),))
    needed = {"keep_tokens": {"shuffle_caption": True}, "caption_separator": {"shuffle_caption": True},
              "token_warmup_min": {"token_warmup_step": 40}}.get(name, {})

    def captions(**changes: object) -> list[str]:
        source = CachedLatents.build(vae, augmented(dataset, **changes), placements)
        batches = Batches(source, train_batch_size=2, seed=3, gradient_accumulation_steps=2, steps=6)
        return [caption for epoch in (1, 2) for batch in epoch_of(batches, epoch) for caption in batch.captions]

    assert captions(**needed) != captions(**needed, **{name: value}) == captions(**needed, **{name: value})


def test_tags_warm_up_over_the_steps_of_the_run_and_not_over_its_batches(make_dataset, vae: FakeVAE) -> None:
    dataset, placements = make_dataset({"a.png": (64, 64)}, repeats=8)
    dataset = replace(dataset, examples=(replace(dataset.examples[0], caption="k, " + ", ".join("abcdefgh")),))
    source = CachedLatents.build(vae, augmented(dataset, token_warmup_step=0.5, token_warmup_min=0), placements)
    batches = Batches(source, train_batch_size=2, seed=0, gradient_accumulation_steps=2, steps=8)  # 4 batches, 2 steps an epoch
    shown = [[caption.count(",") for caption in batch.captions] for epoch in (1, 2, 3) for batch in epoch_of(batches, epoch)]
    assert shown == [[count] * 2 for count in (0, 0, 2, 2, 4, 4, 6, 6, 8, 8, 8, 8)]  # floor(step · 8 / 4)


def test_a_folders_weight_is_that_of_its_pictures_losses(make_dataset, vae: FakeVAE) -> None:
    dataset, placements = make_dataset({"a.png": (64, 64), "reg.png": (64, 64)}, regularisation=("reg.png",))
    examples = tuple(replace(example, subset=replace(example.subset, loss_weight=0.5)) for example in dataset.examples)
    source = CachedLatents.build(vae, replace(dataset, examples=examples), placements)
    (batch,) = epoch_of(Batches(source, train_batch_size=2, seed=0, prior_loss_weight=0.25), 1)
    assert sorted(batch["loss_weight"].tolist()) == [0.125, 0.5]


def test_dropped_pictures_never_appear(make_dataset, vae: FakeVAE) -> None:
    dataset, placements = make_dataset(SIZES | {"cut.jpg": (64, 64)}, repeats=2)
    cut = dataset.examples[-1].path
    cut.write_bytes(cut.read_bytes()[:700])
    source = CachedLatents.build(vae, dataset, placements)
    batches = Batches(source, train_batch_size=2, seed=0)
    assert Counter(i for batch in batches.order(0) for i in batch) == {i: 2 for i in range(5)}
