"""Latents keep their numbers wherever they wait, the memory keeps to its bound, and the temporary file is gone at the end."""

from __future__ import annotations

import random
import tempfile
from pathlib import Path

import pytest
import torch

from lib_lora_train.inputs import latent_store as store_module
from lib_lora_train.inputs.latent_files import LatentDisk
from lib_lora_train.inputs.latent_store import LatentStore
from lib_lora_train.inputs.latents import CachedLatents

from .conftest import FakeVAE, augmented, drawn

ONE = 2 * 2 * 4 * 8 * 8 * 4  # bytes of an image of 64² and its mirror image: mean and deviation, 4 channels of fp32


def latents(seed: int) -> torch.Tensor:
    return torch.randn(2, 2, 4, 8, 8, generator=torch.Generator().manual_seed(seed))


def draws(source: CachedLatents, count: int) -> list[torch.Tensor]:
    return [part for index in range(count) for seed in range(6)
            for part in vars(drawn(source, [index], [random.Random(seed)])).values() if isinstance(part, torch.Tensor)]


def test_what_the_memory_has_no_room_for_comes_back_the_same_in_any_order(tmp_path: Path) -> None:
    store = LatentStore(max_bytes=3 * ONE + 1, folder=tmp_path)
    for number in range(10):
        store.put(number, latents(number))
    assert [store.bytes_on_disk(number) for number in range(10)] == [0] * 3 + [ONE // 2] * 7
    for number in random.Random(0).sample(range(10), 10):
        for flipped in (True, False):
            assert torch.equal(store.load(number, variant=int(flipped)), latents(number)[int(flipped)])
    assert not store.failure
    store.close()


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("budget", [0, 2 * ONE + 5, 10**9])
def test_a_source_gives_the_same_wherever_its_latents_lie(make_dataset, cached: bool, budget: int) -> None:
    dataset, placements = make_dataset({f"{n}.png": (64, 64) for n in range(5)})
    plain = CachedLatents.build(FakeVAE(), augmented(dataset, flip_aug=True), placements, threads=0)
    expected = draws(plain, 5)
    for _ in range(2):  # with the disk cache: written, then found
        source = CachedLatents.build(FakeVAE(), augmented(dataset, flip_aug=True), placements, max_bytes=budget,
                                     disk=LatentDisk(vae_fingerprint="v") if cached else None)
        assert [source.size_of([index]) == 0 for index in range(5)] == [budget >= ONE * (index + 1) for index in range(5)]
        assert all(torch.equal(one, other) for one, other in zip(expected, draws(source, 5), strict=True))
        source.close()


def test_the_temporary_file_is_only_made_where_it_is_needed_and_gone_afterwards(make_dataset, monkeypatch) -> None:
    session = []
    original = tempfile.TemporaryFile
    monkeypatch.setattr(store_module.tempfile, "TemporaryFile",
                        lambda dir, buffering: session.append(original(dir=dir, buffering=buffering)) or session[-1])
    dataset, placements = make_dataset({f"{n}.png": (64, 64) for n in range(3)})
    CachedLatents.build(FakeVAE(), dataset, placements).close()
    assert session == []
    CachedLatents.build(FakeVAE(), dataset, placements, max_bytes=0).close()

    class Broken(FakeVAE):
        def encode(self, pixels):
            if len(self.batches) == 2:
                raise KeyboardInterrupt
            return super().encode(pixels)
    with pytest.raises(KeyboardInterrupt):
        CachedLatents.build(Broken(), dataset, placements, max_bytes=0)
    assert len(session) == 2 and all(file.closed for file in session)


def test_its_file_lies_in_the_folder_that_was_named_and_leaves_nothing_there(make_dataset, tmp_path: Path) -> None:
    dataset, placements = make_dataset({"a.png": (64, 64)})
    before = sorted(tmp_path.iterdir())
    for folder in (tmp_path, tmp_path / "that is not there"):
        source = CachedLatents.build(FakeVAE(), dataset, placements, max_bytes=0, folder=folder)
        assert source.size_of([0]) > 0 and len(draws(source, 1)) == 12
        source.close()
    assert sorted(tmp_path.iterdir()) == before


def test_where_nothing_can_be_written_all_stays_in_memory_and_the_user_is_told(make_dataset, monkeypatch) -> None:
    def refuse(dir, buffering):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(store_module.tempfile, "TemporaryFile", refuse)
    dataset, placements = make_dataset({f"{n}.png": (64, 64) for n in range(3)})
    source = CachedLatents.build(FakeVAE(), dataset, placements, max_bytes=0)
    (problem,) = source.dataset.problems
    assert "stay in memory" in problem.text and "No space left" in problem.text and not problem.skipped
    assert source.size_of([0, 1, 2]) == 0 and len(draws(source, 3)) == 36
