"""Latents are those of the right pixels, computed once or anew, and what cannot be encoded is named."""

from __future__ import annotations

import random
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from lib_lora_train.dataset.augment import scale_and_crop, variants_of
from lib_lora_train.errors import DatasetError, Interrupted, TrainingError
from lib_lora_train.inputs import latent_encoder
from lib_lora_train.inputs.latents import CachedLatents, FreshLatents
from lib_lora_train.inputs.vae_batches import automatic_batch

from .conftest import FakeVAE, augmented, drawn, expected_mean


def rngs(count: int, seed: int = 0) -> list[random.Random]:
    return [random.Random(seed + i) for i in range(count)]


def pixels_of(path: Path) -> np.ndarray:
    return np.array(Image.open(path).convert("RGB"))


@pytest.mark.parametrize("kind", [CachedLatents, FreshLatents])
@pytest.mark.parametrize("vae_batch_size", [1, 2, 3])
def test_latents_are_those_of_each_picture(make_dataset, vae: FakeVAE, kind, vae_batch_size: int) -> None:
    dataset, placements = make_dataset({"a.png": (64, 64), "b.png": (80, 48), "c.png": (64, 64), "d.png": (64, 64)})
    source = kind.build(vae, dataset, placements, vae_batch_size=vae_batch_size)
    for indices in ([0, 2, 3, 0], [1]):
        latents = drawn(source, indices, rngs(len(indices)))
        expected = torch.stack([expected_mean(pixels_of(dataset.examples[i].path)) for i in indices])
        assert torch.allclose(latents.mean, expected, atol=1e-5)
        assert torch.equal(latents.std, torch.full_like(expected, 0.5))
        assert latents.flipped == (False,) * len(indices)


def test_pictures_are_encoded_once_and_never_across_buckets(make_dataset, vae: FakeVAE) -> None:
    dataset, placements = make_dataset({"a.png": (64, 64), "b.png": (80, 48), "c.png": (64, 64), "d.png": (64, 64)})
    source = CachedLatents.build(vae, dataset, placements, vae_batch_size=2)
    assert sorted(tuple(shape) for shape in vae.batches) == [(1, 3, 48, 80), (1, 3, 64, 64), (2, 3, 64, 64)]
    drawn(source, [0, 2], rngs(2))
    assert len(vae.batches) == 3


@pytest.mark.parametrize("kind", [CachedLatents, FreshLatents])
def test_mirrored_latents_are_those_of_the_mirrored_picture(make_dataset, vae: FakeVAE, kind) -> None:
    # The fake's fourth channel is not symmetric: mirroring the latents instead of the pixels would show.
    dataset, placements = make_dataset({"a.png": (64, 64)})
    source = kind.build(vae, augmented(dataset, flip_aug=True), placements)
    image = pixels_of(dataset.examples[0].path)
    seen = set()
    for seed in range(20):
        latents = drawn(source, [0], rngs(1, seed))
        expected = expected_mean(image[:, ::-1] if latents.flipped[0] else image)
        assert torch.allclose(latents.mean[0], expected, atol=1e-5)
        seen.add(latents.flipped[0])
    assert seen == {False, True}


def test_turned_latents_are_those_of_the_turned_picture_and_every_view_is_met(make_dataset, vae: FakeVAE) -> None:
    dataset, placements = make_dataset({"a.png": (96, 80), "b.png": (64, 64)})
    turned = augmented(dataset, rotate_aug_degrees=25, rotate_aug_variants=3, flip_aug=True)
    source = CachedLatents.build(vae, turned, placements, seed=5, vae_batch_size=4)
    assert sum(shape[0] for shape in vae.batches) == 2 * 3 * 2
    for index, example in enumerate(dataset.examples):
        image, seen = Image.open(example.path), set()
        for seed in range(60):
            visit = source.prepare(index, random.Random(seed))
            view = scale_and_crop(image, placements[index], degrees=visit.degrees)
            expected = expected_mean(np.array(ImageOps.mirror(view) if visit.flipped else view))
            assert torch.allclose(source.finish([index], [visit.latents])[0, 0], expected, atol=1e-5)
            seen.add((visit.degrees, visit.flipped))
        assert seen == {(view.degrees, view.flipped) for view in variants_of(
            turned.examples[0].subset.dataset, seed=5, name=example.path.name)}


def test_cached_and_fresh_latents_mirror_the_same_visits(make_dataset, vae: FakeVAE) -> None:
    dataset, placements = make_dataset({"a.png": (70, 64)})
    cached = CachedLatents.build(vae, augmented(dataset, flip_aug=True), placements)
    fresh = FreshLatents.build(vae, augmented(dataset, flip_aug=True), placements)
    for seed in range(10):
        one, other = drawn(cached, [0], rngs(1, seed)), drawn(fresh, [0], rngs(1, seed))
        assert one.flipped == other.flipped
        assert torch.equal(one.mean, other.mean)


def test_a_random_crop_shows_other_parts_and_follows_its_generator(make_dataset, vae: FakeVAE) -> None:
    dataset, placements = make_dataset({"a.png": (120, 100)})
    assert placements[0].slack != (0, 0)
    source = FreshLatents.build(vae, augmented(dataset, random_crop=True), placements)
    draws = [drawn(source, [0], rngs(1, seed)).mean for seed in range(6)]
    assert len({tuple(d.flatten().tolist()) for d in draws}) > 2
    assert torch.equal(drawn(source, [0], rngs(1, 3)).mean, draws[3])


def test_colour_changes_are_small_and_follow_their_generator(make_dataset, vae: FakeVAE) -> None:
    dataset, placements = make_dataset({"a.png": (64, 64)})
    plain = drawn(CachedLatents.build(vae, dataset, placements), [0], rngs(1)).mean
    source = FreshLatents.build(vae, augmented(dataset, color_aug=True), placements)
    draws = [drawn(source, [0], rngs(1, seed)).mean for seed in range(20)]
    assert 1 < len({tuple(d.flatten().tolist()) for d in draws}) <= 20
    assert max(float((d - plain).abs().max()) for d in draws) < 0.3
    assert torch.equal(drawn(source, [0], rngs(1, 5)).mean, draws[5])


@pytest.mark.parametrize("kind", [CachedLatents, FreshLatents])
def test_a_picture_that_does_not_decode_is_dropped_and_named_and_the_rest_keeps_its_latents(
    make_dataset, vae: FakeVAE, kind,
) -> None:
    dataset, placements = make_dataset({"a.jpg": (64, 64), "cut.jpg": (64, 64), "c.png": (80, 48)})
    cut = dataset.examples[1].path
    cut.write_bytes(cut.read_bytes()[:700])
    source = kind.build(vae, dataset, placements)
    assert [e.path.name for e in source.dataset.examples] == ["a.jpg", "c.png"]
    assert source.placements == (placements[0], placements[2])
    (problem,) = source.dataset.problems
    assert problem.skipped and problem.path == cut and "cut.jpg" in problem.text
    expected = expected_mean(pixels_of(dataset.examples[2].path))
    assert torch.allclose(drawn(source, [1], rngs(1)).mean[0], expected, atol=1e-5)


@pytest.mark.parametrize("kind", [CachedLatents, FreshLatents])
def test_a_dataset_of_which_nothing_decodes_is_refused(make_dataset, vae: FakeVAE, kind) -> None:
    dataset, placements = make_dataset({"a.jpg": (64, 64), "reg.png": (64, 64)}, regularisation=("reg.png",))
    dataset.examples[0].path.write_bytes(b"\xff\xd8")
    with pytest.raises(DatasetError, match=r"No picture.*a\.jpg"):
        kind.build(vae, dataset, placements)


@pytest.mark.parametrize("kind", [CachedLatents, FreshLatents])
def test_a_picture_that_changed_after_the_scan_is_dropped(make_dataset, vae: FakeVAE, kind) -> None:
    dataset, placements = make_dataset({"a.png": (64, 64), "b.png": (64, 64)})
    Image.new("RGB", (32, 64)).save(dataset.examples[0].path)
    source = kind.build(vae, dataset, placements)
    assert [e.path.name for e in source.dataset.examples] == ["b.png"]
    assert "changed" in source.dataset.problems[0].text


def test_a_picture_that_vanishes_during_training_is_named(make_dataset, vae: FakeVAE) -> None:
    dataset, placements = make_dataset({"a.png": (64, 64)})
    source = FreshLatents.build(vae, augmented(dataset, color_aug=True), placements)
    dataset.examples[0].path.unlink()
    with pytest.raises(DatasetError, match=r"a\.png.*gone"):
        drawn(source, [0], rngs(1))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", [0, 1])
def test_a_latent_that_is_not_finite_is_refused_with_the_pictures_name(
    make_dataset, bad: float, where: int,
) -> None:
    class Broken(FakeVAE):
        def encode(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            result = super().encode(pixels)
            result[where][-1, 2, 3, 3] = bad  # only the last image of the batch, and one number of it
            return result

    dataset, placements = make_dataset({"a.png": (64, 64), "b.png": (64, 64)})
    with pytest.raises(TrainingError, match=r"b\.png"):
        CachedLatents.build(Broken(), dataset, placements, vae_batch_size=2)
    fresh = FreshLatents.build(Broken(), dataset, placements, vae_batch_size=2)
    with pytest.raises(TrainingError, match=r"b\.png"):
        drawn(fresh, [0, 1], rngs(2))


@pytest.mark.parametrize("kind", [CachedLatents, FreshLatents])
def test_progress_is_told_and_a_stop_is_heard_between_pictures(make_dataset, vae: FakeVAE, kind) -> None:
    dataset, placements = make_dataset({"a.png": (64, 64), "b.png": (80, 48), "c.png": (64, 64)})
    seen: list[tuple[int, int]] = []
    kind.build(vae, dataset, placements, on_progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 3), (2, 3), (3, 3)]
    with pytest.raises(Interrupted):
        kind.build(vae, dataset, placements, should_stop=lambda: True)


@pytest.mark.parametrize("error", [torch.cuda.OutOfMemoryError("CUDA out of memory."), MemoryError(),
                                   RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")])
def test_where_the_memory_does_not_suffice_fewer_pictures_are_encoded_at_once(make_dataset, vae: FakeVAE, error) -> None:
    class Narrow(FakeVAE):
        def encode(self, pixels):
            if len(pixels) > 3:
                raise error
            return super().encode(pixels)
    dataset, placements = make_dataset({f"{number}.png": (64, 64) for number in range(11)})
    narrow = Narrow()
    source = CachedLatents.build(narrow, dataset, placements, vae_batch_size=8)
    assert [shape[0] for shape in narrow.batches] == [2, 2, 2, 2, 2, 1]
    told = [problem.text for problem in source.dataset.problems]
    assert len(told) == 2 and "8 pictures at once" in told[0] and "goes on with 2" in told[1]
    plain = CachedLatents.build(vae, dataset, placements)
    for index in range(11):
        assert torch.equal(drawn(source, [index], [random.Random(0)]).mean, drawn(plain, [index], [random.Random(0)]).mean)


def test_that_fewer_are_encoded_at_once_is_told_during_the_training_too(make_dataset) -> None:
    class Narrow(FakeVAE):
        def encode(self, pixels):
            if len(pixels) > 2:
                raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
            return super().encode(pixels)
    dataset, placements = make_dataset({f"{number}.png": (64, 64) for number in range(4)})
    told: list[str] = []
    source = FreshLatents.build(Narrow(), dataset, placements, vae_batch_size=4, warn=told.append)
    for _ in range(2):
        assert drawn(source, range(4), rngs(4)).mean.shape[0] == 4
    assert len(told) == 1 and "goes on with 2" in told[0]


def test_a_picture_that_alone_is_too_much_ends_the_run(make_dataset) -> None:
    class Full(FakeVAE):
        def encode(self, pixels):
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
    dataset, placements = make_dataset({"a.png": (64, 64), "b.png": (64, 64)})
    with pytest.raises(RuntimeError, match="out of memory"):
        CachedLatents.build(Full(), dataset, placements, vae_batch_size=2)


MANY = {f"{number}.png": [(64, 64), (80, 48), (70, 64), (120, 100)][number % 4] for number in range(14)}


def ours() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("lora-train-prefetch")]


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("vae_batch_size", [0, 1, 3])
def test_threads_change_nothing_to_the_last_bit(make_dataset, threads: int, vae_batch_size: int) -> None:
    dataset, placements = make_dataset(MANY)
    damaged = dataset.examples[5].path
    damaged.write_bytes(damaged.read_bytes()[:300])
    told, results, batches = [], [], []
    for count in (0, threads):
        vae, seen = FakeVAE(), []
        source = CachedLatents.build(vae, augmented(dataset, flip_aug=True), placements, threads=count,
                                     vae_batch_size=vae_batch_size,
                                     on_progress=lambda done, total, seen=seen: seen.append((done, total)))
        results.append([drawn(source, [index], rngs(1, seed)).mean for index in range(13) for seed in range(5)])
        told.append((seen, source.dataset, source.placements))
        batches.append(vae.batches)
    assert told[0] == told[1] and batches[0] == batches[1]
    assert told[0][0][-1] == (14, 14) and len(told[0][1].examples) == 13
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))
    assert ours() == []


@pytest.mark.parametrize("kind", [CachedLatents, FreshLatents])
def test_a_picture_that_the_memory_did_not_suffice_for_is_tried_once_more(make_dataset, monkeypatch, kind) -> None:
    dataset, placements = make_dataset(MANY)
    original, large, enormous = latent_encoder.read_image, dataset.examples[3].path, dataset.examples[6].path

    def read_image(path: Path) -> Image.Image:
        if path == enormous or path == large and threading.current_thread() is not threading.main_thread():
            raise DatasetError(f"The picture {path} cannot be used", why="not enough memory") from MemoryError()
        return original(path)
    plain = CachedLatents.build(FakeVAE(), dataset, placements)
    monkeypatch.setattr(latent_encoder, "read_image", read_image)
    seen: list[tuple[int, int]] = []
    source = kind.build(FakeVAE(), dataset, placements, threads=2, on_progress=lambda *progress: seen.append(progress))
    assert [example.path for example in source.dataset.examples] == [
        example.path for example in dataset.examples if example.path != enormous]
    assert [problem.path for problem in source.dataset.problems] == [enormous] and seen[-1] == (14, 14)
    assert torch.equal(drawn(source, [3], rngs(1)).mean, drawn(plain, [3], rngs(1)).mean)


@pytest.mark.parametrize("kind", [CachedLatents, FreshLatents])
@pytest.mark.parametrize("end", ["stop", "pause", "error of the VAE", "Ctrl+C"])
def test_no_thread_outlives_a_pass_that_ends_early(make_dataset, kind, end: str) -> None:
    class Failing(FakeVAE):
        def encode(self, pixels: torch.Tensor):
            if len(self.batches) == 3 and end in ("error of the VAE", "Ctrl+C"):
                raise RuntimeError("no more") if end == "error of the VAE" else KeyboardInterrupt
            return super().encode(pixels)

    def progress(done: int, total: int) -> None:
        alive.append(len(ours()))
        if done == 5 and end == "pause":
            raise Interrupted("stopped while others had the model")

    alive: list[int] = []
    dataset, placements = make_dataset(MANY)

    def build():
        return kind.build(Failing(), dataset, placements, threads=3, on_progress=progress,
                          should_stop=lambda: end == "stop" and len(alive) == 5)
    if kind is FreshLatents and end in ("error of the VAE", "Ctrl+C"):
        build()  # it asks the VAE for nothing before the training
    else:
        with pytest.raises(BaseException, match="no more|stopped|^$"):
            build()
    assert max(alive) == 3 and ours() == []


def test_pictures_wait_as_bytes_within_a_bound(make_dataset, monkeypatch) -> None:
    """What is decoded and not yet encoded, counted as it comes and goes."""
    lock, waiting, most = threading.Lock(), [0], [0]
    original = latent_encoder.to_samples

    def counted(image: Image.Image) -> torch.Tensor:
        samples = original(image)
        assert samples.dtype == torch.uint8
        with lock:
            waiting[0] += 1
            most[0] = max(most[0], waiting[0])
        return samples

    class Counting(FakeVAE):
        def encode(self, pixels: torch.Tensor):
            with lock:
                waiting[0] -= len(pixels)
            return super().encode(pixels)
    monkeypatch.setattr(latent_encoder, "to_samples", counted)
    dataset, placements = make_dataset({f"{number}.png": (64, 64) for number in range(60)})
    CachedLatents.build(Counting(), dataset, placements, threads=2)
    assert waiting == [0]
    assert most[0] <= 2 * 4 + 1  # four a thread, and the one that is being encoded


def test_the_automatic_batch_is_one_without_a_card(make_dataset, vae: FakeVAE) -> None:
    dataset, placements = make_dataset({f"{number}.png": (64, 64) for number in range(3)})
    CachedLatents.build(vae, dataset, placements, vae_batch_size=0)
    assert [shape[0] for shape in vae.batches] == [1, 1, 1]


@pytest.mark.parametrize("free, size, expected", [
    (80 << 30, (256, 256), 8), (80 << 30, (512, 512), 2), (80 << 30, (1024, 1024), 1), (4 << 30, (512, 512), 2),
    (2 << 30, (512, 512), 1), (1 << 30, (256, 256), 2), (0, (512, 512), 1)])
def test_the_automatic_batch_follows_the_free_memory_of_a_card(monkeypatch, free: int, size, expected: int) -> None:
    """Half of it must hold the images (0.2 GB at 256², 0.8 GB at 512², 3.1 GB at 1024²), and 2 GiB."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 80 << 30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 0)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 0)
    assert automatic_batch(torch.device("cuda"), size) == expected


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_card_gives_the_latents_of_the_processor(make_dataset) -> None:
    dataset, placements = make_dataset(MANY)
    plain = CachedLatents.build(FakeVAE(), augmented(dataset, flip_aug=True), placements)
    card = CachedLatents.build(FakeVAE(), augmented(dataset, flip_aug=True), placements, device="cuda", vae_batch_size=0)
    fresh = FreshLatents.build(FakeVAE(), augmented(dataset, flip_aug=True), placements, device="cuda", vae_batch_size=0)
    for index in range(14):
        expected, one, other = (drawn(source, [index], rngs(1, index)) for source in (plain, card, fresh))
        assert one.mean.device.type == "cpu" and other.mean.device.type == "cuda"
        assert torch.allclose(one.mean, expected.mean, atol=1e-5) and torch.allclose(other.mean.cpu(), expected.mean, atol=1e-5)
        assert torch.equal(one.std, expected.std) and torch.equal(other.std.cpu(), expected.std)


class Meeting:
    """Several process groups in one process, a thread each, whose collectives meet at a barrier."""

    def __init__(self, world: int) -> None:
        self.world_size, self._barrier, self._put = world, threading.Barrier(world, timeout=60), [None] * world

    def rank(self, number: int) -> Rank:
        return Rank(self, number)

    def all(self, number: int, value: object) -> list:
        self._put[number] = value
        self._barrier.wait()
        everything = list(self._put)
        self._barrier.wait()
        return everything


class Rank:
    def __init__(self, meeting: Meeting, rank: int) -> None:
        self._meeting, self.rank, self.world_size = meeting, rank, meeting.world_size

    def all_reduce_(self, tensor: torch.Tensor) -> None:
        tensor.copy_(sum(self._meeting.all(self.rank, tensor.clone())))

    def any(self, wanted: bool) -> bool:
        return any(self._meeting.all(self.rank, wanted))

    def all_gather(self, value: object) -> list:
        return self._meeting.all(self.rank, value)


def in_ranks(world: int, work) -> list:
    meeting, results = Meeting(world), [None] * world

    def run(number: int) -> None:
        try:
            results[number] = work(meeting.rank(number))
        except Interrupted as error:
            results[number] = error
    threads = [threading.Thread(target=run, args=(number,)) for number in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


@pytest.mark.parametrize("kind", [CachedLatents, FreshLatents])
@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("options", [{}, {"max_bytes": 0}, {"vae_batch_size": 0}])
def test_ranks_share_the_work_and_all_have_everything(make_dataset, kind, world: int, options: dict) -> None:
    if kind is FreshLatents and "max_bytes" in options:
        options = {}
    dataset, placements = make_dataset(MANY)
    for number in (2, 5):
        path = dataset.examples[number].path
        path.write_bytes(path.read_bytes()[:300])
    alone = CachedLatents.build(FakeVAE(), augmented(dataset, flip_aug=True), placements)
    vaes = [FakeVAE() for _ in range(world)]
    sources = in_ranks(world, lambda group: kind.build(vaes[group.rank], augmented(dataset, flip_aug=True), placements,
                                                       threads=2,
                                                       group=group, **options))
    encoded = [sum(shape[0] for shape in vae.batches) for vae in vaes]
    assert sum(encoded) == (2 * 12 if kind is CachedLatents else 0) and max(encoded) <= 2 * 12 * 2 // world
    for source in sources:
        assert source.dataset.examples == alone.dataset.examples and source.placements == alone.placements
        assert {p.text for p in source.dataset.problems} == {p.text for p in alone.dataset.problems}
        for index in range(12):
            assert torch.equal(drawn(source, [index], rngs(1, index)).mean, drawn(alone, [index], rngs(1, index)).mean)


def test_a_stop_that_one_rank_hears_ends_all_of_them(make_dataset) -> None:
    dataset, placements = make_dataset(MANY)
    ended = in_ranks(2, lambda group: CachedLatents.build(
        FakeVAE(), dataset, placements, group=group, should_stop=lambda: group.rank == 1))
    assert all(isinstance(one, Interrupted) for one in ended) and ours() == []
