"""Batches made ahead are those made in turn, bit for bit; nothing is left behind, whatever happens."""

from __future__ import annotations

import itertools
import threading

import pytest
import torch

from lib_lora_train.errors import DatasetError
from lib_lora_train.inputs.batches import Batches
from lib_lora_train.inputs.latent_files import LatentDisk
from lib_lora_train.inputs.latents import CachedLatents, FreshLatents
from lib_lora_train.inputs.prefetcher import Prefetcher

from .conftest import FakeVAE, augmented, epoch_of, same

SIZES = {"a.png": (64, 64), "b.png": (80, 48), "c.png": (70, 64), "d.png": (48, 80), "e.png": (64, 64), "f.png": (100, 80)}


def ours() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("lora-train-prefetch")]


KINDS = ["in memory", "in a temporary file", "in the disk cache", "encoded anew"]


def source(kind: str, vae: FakeVAE, dataset, placements):
    captions = {"shuffle_caption": True, "caption_tag_dropout_rate": 0.3, "caption_dropout_rate": 0.2}
    if kind == "encoded anew":
        return FreshLatents.build(
            vae, augmented(dataset, flip_aug=True, color_aug=True, random_crop=True, **captions), placements)
    disk = LatentDisk(vae_fingerprint="v") if kind == "in the disk cache" else None
    return CachedLatents.build(vae, augmented(dataset, flip_aug=True, **captions), placements, disk=disk,
                               max_bytes=1 << 30 if kind == "in memory" else 0)


def batches(kind: str, vae: FakeVAE, dataset, placements) -> Batches:
    return Batches(source(kind, vae, dataset, placements), train_batch_size=2, seed=7)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("threads", [0, 1, 3])
def test_the_batches_of_several_epochs_are_those_made_in_turn(make_dataset, vae: FakeVAE, kind: str, threads: int) -> None:
    dataset, placements = make_dataset(SIZES, repeats=2)
    plain = batches("encoded anew" if kind == "encoded anew" else "in memory", FakeVAE(), dataset, placements)
    expected = [batch for epoch in (1, 2, 3) for batch in epoch_of(plain, epoch)]
    with Prefetcher(batches(kind, vae, dataset, placements), last_epoch=3, threads=threads) as feeder:
        got = [next(feeder.epoch(1))]
        assert len(ours()) == (threads if kind != "in memory" else 0)
        got += [batch for epoch in (1, 2, 3) for batch in feeder.epoch(epoch, 1 if epoch == 1 else 0)]
    assert len(expected) == len(got) and all(same(one, other) for one, other in zip(expected, got, strict=True))
    assert ours() == []


def test_a_run_may_begin_anywhere_and_leave_an_epoch_early(make_dataset, vae: FakeVAE) -> None:
    dataset, placements = make_dataset(SIZES, repeats=2)
    plain = batches("encoded anew", FakeVAE(), dataset, placements)
    with Prefetcher(batches("encoded anew", vae, dataset, placements), last_epoch=9, threads=2) as feeder:
        for epoch, start, count in ((2, 3, 2), (3, 0, 1), (2, 3, 4), (9, 5, 99)):
            expected = list(epoch_of(plain, epoch, start))[:count]
            got = list(itertools.islice(feeder.epoch(epoch, start), count))
            assert len(got) == len(expected) > 0 and all(map(same, expected, got))


def test_nothing_is_prepared_beyond_the_last_epoch(make_dataset, vae: FakeVAE, monkeypatch) -> None:
    dataset, placements = make_dataset(SIZES)
    made = batches("encoded anew", vae, dataset, placements)
    prepared, original = [], made.prepare
    monkeypatch.setattr(made, "prepare", lambda epoch, position, indices: prepared.append((epoch, position)) or original(
        epoch, position, indices=indices))
    with Prefetcher(made, last_epoch=2, threads=3) as feeder:
        got = sum(1 for epoch in (1, 2) for _ in feeder.epoch(epoch))
    assert got == 2 * len(made) and sorted(prepared) == [(epoch, at) for epoch in (1, 2) for at in range(len(made))]


@pytest.mark.parametrize("threads", [0, 2])
def test_the_model_is_only_touched_by_who_asks_for_the_batch(make_dataset, threads: int) -> None:
    class Watched(FakeVAE):
        def encode(self, pixels: torch.Tensor):
            users.append(threading.current_thread())
            return super().encode(pixels)

    users: list[threading.Thread] = []
    dataset, placements = make_dataset(SIZES)
    with Prefetcher(batches("encoded anew", Watched(), dataset, placements), last_epoch=1, threads=threads) as feeder:
        running = feeder.epoch(1)
        for count in (1, 2):
            next(running)
            assert users == [threading.main_thread()] * count  # and nobody has asked it for what comes after
        running.close()


def test_a_picture_that_vanishes_is_named_when_its_turn_comes(make_dataset, vae: FakeVAE) -> None:
    dataset, placements = make_dataset(SIZES)
    made = batches("encoded anew", vae, dataset, placements)
    order = made.order(1)
    gone = dataset.examples[order[3][0]].path
    gone.unlink()
    with Prefetcher(made, last_epoch=1, threads=2) as feeder:
        running, good = feeder.epoch(1), []
        with pytest.raises(DatasetError, match=f"{gone.name}.*gone"):
            for batch in running:
                good.append(batch.captions)
    assert len(good) == 3 and ours() == []


def test_who_stops_in_the_middle_leaves_no_thread(make_dataset, vae: FakeVAE) -> None:
    dataset, placements = make_dataset(SIZES, repeats=20)
    with pytest.raises(KeyboardInterrupt), \
            Prefetcher(batches("encoded anew", vae, dataset, placements), last_epoch=5, threads=3) as feeder:
        for number, _ in enumerate(feeder.epoch(1)):
            if number == 3:
                raise KeyboardInterrupt
    assert ours() == []


def test_no_more_batches_wait_than_the_bytes_allow(make_dataset, vae: FakeVAE, monkeypatch) -> None:
    dataset, placements = make_dataset({f"{name}.png": (64, 64) for name in "abcdefgh"}, repeats=3)
    made = batches("encoded anew", vae, dataset, placements)
    lock, waiting, most, original, finish = threading.Lock(), [0], [0], made.prepare, made.finish

    def prepare(epoch, position, *, indices):
        with lock:
            waiting[0] += 1
            most[0] = max(most[0], waiting[0])
        return original(epoch, position, indices=indices)

    def finished(prepared):
        with lock:
            waiting[0] -= 1
        return finish(prepared)
    monkeypatch.setattr(made, "prepare", prepare)
    monkeypatch.setattr(made, "finish", finished)
    with Prefetcher(made, last_epoch=1, threads=3, most_bytes=1) as feeder:
        assert sum(1 for _ in feeder.epoch(1)) == 12
    # One at a time; the one that was just taken is counted until it is finished.
    assert most[0] <= 2
