"""The disk cache is used only where nothing changed, and never fails a run."""

from __future__ import annotations

import dataclasses
import errno
import os
import random
from pathlib import Path

import pytest
import torch
from PIL import Image

from lib_lora_train.dataset.augment import Variant
from lib_lora_train.dataset.buckets import Buckets
from lib_lora_train.inputs import latent_files as disk_module
from lib_lora_train.inputs.latent_files import CACHE_FOLDER, LatentDisk
from lib_lora_train.inputs.latents import CachedLatents

from .conftest import FakeVAE, augmented, drawn

FLIPPED = Variant(flipped=True)


def encoded(dataset, placements, *, disk: LatentDisk, flip_aug: bool = False) -> tuple[int, CachedLatents]:
    """(images that the VAE had to encode, the source)."""
    vae = FakeVAE()
    source = CachedLatents.build(vae, augmented(dataset, flip_aug=flip_aug), placements, disk=disk)
    return sum(shape[0] for shape in vae.batches), source


def mean(source: CachedLatents, index: int = 0) -> torch.Tensor:
    return drawn(source, [index], [random.Random(0)]).mean


def test_a_second_run_reads_the_same_latents_and_encodes_nothing(make_dataset, tmp_path: Path) -> None:
    dataset, placements = make_dataset({"a.png": (64, 64), "b.png": (80, 48)})
    first_count, first = encoded(dataset, placements, disk=LatentDisk(vae_fingerprint="v"))
    second_count, second = encoded(dataset, placements, disk=LatentDisk(vae_fingerprint="v"))
    assert (first_count, second_count) == (2, 0)
    assert all(torch.equal(mean(first, i), mean(second, i)) for i in (0, 1))
    files = sorted(p.name for p in (tmp_path / CACHE_FOLDER).iterdir())
    assert len(files) == 2 and all(name.endswith(".safetensors") for name in files)


def test_two_vaes_keep_their_latents_beside_each_other(make_dataset, tmp_path: Path) -> None:
    """Two runs at the same time, and one after the other, whether their latents have room in memory or not."""
    dataset, placements = make_dataset({"a.png": (64, 64)})
    built = {name: CachedLatents.build(FakeVAE(), dataset, placements, disk=LatentDisk(vae_fingerprint=name), max_bytes=0)
             for name in ("one", "other")}
    assert torch.equal(mean(built["one"]), mean(built["other"])) and len(list((tmp_path / CACHE_FOLDER).iterdir())) == 2
    assert [encoded(dataset, placements, disk=LatentDisk(vae_fingerprint=name))[0] for name in built] == [0, 0]


def test_a_picture_with_the_longest_name_is_kept_too(make_dataset, tmp_path: Path) -> None:
    names = ["ü" * 120 + ".png", "ü" * 120 + "b.png"]  # 244 and 245 bytes of at most 255; alike at first
    dataset, placements = make_dataset({name: (64, 64) for name in names})
    assert encoded(dataset, placements, disk=LatentDisk(vae_fingerprint="v"))[0] == 2
    count, source = encoded(dataset, placements, disk=LatentDisk(vae_fingerprint="v"))
    assert count == 0 and not torch.equal(mean(source, 0), mean(source, 1)) and not source.dataset.problems
    assert all(len(os.fsencode(path.name)) < 143 for path in (tmp_path / CACHE_FOLDER).iterdir())


def test_a_touched_but_unchanged_picture_is_still_valid(make_dataset) -> None:
    dataset, placements = make_dataset({"a.png": (64, 64)})
    encoded(dataset, placements, disk=LatentDisk(vae_fingerprint="v"))
    os.utime(dataset.examples[0].path, (1, 1))
    assert encoded(dataset, placements, disk=LatentDisk(vae_fingerprint="v"))[0] == 0


def test_a_changed_picture_of_the_same_size_and_time_is_encoded_anew(make_dataset) -> None:
    dataset, placements = make_dataset({"a.bmp": (64, 64)})
    path = dataset.examples[0].path
    before = path.stat()
    encoded(dataset, placements, disk=LatentDisk(vae_fingerprint="v"))
    Image.new("RGB", (64, 64), (9, 9, 9)).save(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size
    count, source = encoded(dataset, placements, disk=LatentDisk(vae_fingerprint="v"))
    assert count == 1
    assert torch.allclose(mean(source)[0, :3], torch.full((3, 8, 8), 9 / 127.5 - 1), atol=1e-5)
    assert encoded(dataset, placements, disk=LatentDisk(vae_fingerprint="v"))[0] == 0


def test_another_vae_resolution_or_crop_is_encoded_anew(make_dataset) -> None:
    dataset, placements = make_dataset({"a.png": (80, 64)})
    encoded(dataset, placements, disk=LatentDisk(vae_fingerprint="v"))
    assert encoded(dataset, placements, disk=LatentDisk(vae_fingerprint="another"))[0] == 1
    larger = Buckets((96, 96), enable_bucket=True, min_bucket_reso=32, max_bucket_reso=128, bucket_reso_steps=8,
                     bucket_no_upscale=False).assign(80, 64)
    assert encoded(dataset, (larger,), disk=LatentDisk(vae_fingerprint="another"))[0] == 1
    moved = dataclasses.replace(placements[0], crop=(0, 0))
    assert moved != placements[0]
    assert encoded(dataset, (moved,), disk=LatentDisk(vae_fingerprint="another"))[0] == 1


def test_turned_latents_are_kept_beside_the_others_and_found_again_with_the_same_seed(make_dataset) -> None:
    dataset, placements = make_dataset({"a.png": (64, 64)})
    encoded(dataset, placements, disk=LatentDisk(vae_fingerprint="v"))
    turned = augmented(dataset, rotate_aug_degrees=10, rotate_aug_variants=3)
    for seed, count in ((1, 3), (1, 0), (2, 3), (1, 0)):
        vae = FakeVAE()
        CachedLatents.build(vae, turned, placements, disk=LatentDisk(vae_fingerprint="v"), seed=seed)
        assert sum(shape[0] for shape in vae.batches) == count
    assert encoded(dataset, placements, disk=LatentDisk(vae_fingerprint="v"))[0] == 0


def test_mirrored_latents_are_kept_beside_the_others(make_dataset) -> None:
    dataset, placements = make_dataset({"a.png": (64, 64)})
    encoded(dataset, placements, disk=LatentDisk(vae_fingerprint="v"))
    assert encoded(dataset, placements, disk=LatentDisk(vae_fingerprint="v"), flip_aug=True)[0] == 2
    assert encoded(dataset, placements, disk=LatentDisk(vae_fingerprint="v"), flip_aug=True)[0] == 0


@pytest.mark.parametrize("damage", ["empty", "cut", "text", "folder", "nan"])
def test_a_damaged_cache_file_is_computed_again(make_dataset, tmp_path: Path, damage: str) -> None:
    dataset, placements = make_dataset({"a.png": (64, 64)})
    disk = LatentDisk(vae_fingerprint="v")
    _, first = encoded(dataset, placements, disk=disk)
    (file,) = (tmp_path / CACHE_FOLDER).iterdir()
    if damage == "nan":
        nan = torch.full((4, 8, 8), float("nan"))
        disk.store(dataset.examples[0].path, placements[0], latents=(nan, nan.clone()))
    elif damage == "folder":
        file.unlink()
        file.mkdir()
    else:
        data = file.read_bytes()
        file.write_bytes({"empty": b"", "cut": data[:-100], "text": b"hello, this is no safetensors file"}[damage])
    count, second = encoded(dataset, placements, disk=LatentDisk(vae_fingerprint="v"))
    assert count == 1
    assert torch.equal(mean(first), mean(second))
    assert not list((tmp_path / CACHE_FOLDER).glob("*.tmp"))


def test_a_folder_that_cannot_be_written_is_one_warning_and_no_failure(make_dataset, monkeypatch) -> None:
    dataset, placements = make_dataset({"a.png": (64, 64), "b.png": (64, 64)})
    def refuse(folder: Path, **options: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")
    monkeypatch.setattr(disk_module.Path, "mkdir", refuse)
    count, source = encoded(dataset, placements, disk=LatentDisk(vae_fingerprint="v"))
    assert count == 2
    (problem,) = source.dataset.problems
    assert not problem.skipped and problem.text.startswith("2 encoded pictures cannot be kept on disk")


def test_a_folder_that_cannot_be_written_costs_no_other_folder(make_dataset, tmp_path: Path) -> None:
    dataset, placements = make_dataset({"a.png": (64, 64), "b.png": (64, 64)})
    (tmp_path / "other").mkdir()
    moved = dataset.examples[0].path.rename(tmp_path / "other" / "a.png")
    (moved.parent / CACHE_FOLDER).write_text("in the way")
    dataset = dataclasses.replace(dataset, examples=(
        dataclasses.replace(dataset.examples[0], path=moved), dataset.examples[1]))
    assert len(encoded(dataset, placements, disk=LatentDisk(vae_fingerprint="v"))[1].dataset.problems) == 1
    assert encoded(dataset, placements, disk=LatentDisk(vae_fingerprint="v"))[0] == 1


def test_a_file_that_is_held_costs_that_picture_alone(make_dataset, monkeypatch) -> None:
    dataset, placements = make_dataset({"a.png": (64, 64), "b.png": (64, 64)})
    original = disk_module.replace

    def held(temporary: Path, path: Path) -> None:
        if path.name.startswith("a.png"):
            raise PermissionError(errno.EACCES, "being used by another process")
        original(temporary, path)
    monkeypatch.setattr(disk_module, "replace", held)
    _, source = encoded(dataset, placements, disk=LatentDisk(vae_fingerprint="v"))
    (problem,) = source.dataset.problems
    assert problem.text.startswith("1 encoded picture ") and "another process" in problem.text
    assert encoded(dataset, placements, disk=LatentDisk(vae_fingerprint="v"))[0] == 1


def test_a_file_that_cannot_be_read_now_is_encoded(make_dataset, monkeypatch) -> None:
    dataset, placements = make_dataset({"a.png": (64, 64)})
    _, first = encoded(dataset, placements, disk=LatentDisk(vae_fingerprint="v"))

    def refuse(path: Path) -> bytes:
        raise PermissionError(errno.EACCES, "being used by another process")
    monkeypatch.setattr(Path, "read_bytes", refuse)
    count, second = encoded(dataset, placements, disk=LatentDisk(vae_fingerprint="v"))
    assert count == 1 and torch.equal(mean(first), mean(second))


LATER = 10**18 * 4  # nanoseconds since 1970, in 2096: every stamp is old by then


def disk_at(now: int = LATER) -> LatentDisk:
    return LatentDisk(vae_fingerprint="v", now=lambda: now)


@pytest.fixture
def reads(monkeypatch) -> list[str]:
    """The names of the images that are read for the cache's sake."""
    read, original = [], disk_module.sha256_of
    monkeypatch.setattr(disk_module, "sha256_of", lambda image: read.append(image.name) or original(image))
    return read


def test_pictures_that_did_not_change_are_not_read_to_know_it(make_dataset, reads: list[str]) -> None:
    dataset, placements = make_dataset({"a.png": (64, 64), "b.png": (80, 48)})
    assert encoded(dataset, placements, disk=disk_at(), flip_aug=True)[0] == 4
    reads.clear()
    assert encoded(dataset, placements, disk=disk_at(), flip_aug=True)[0] == 0
    assert reads == []


def test_a_touched_picture_is_read_once_and_then_known_again(make_dataset, reads: list[str]) -> None:
    dataset, placements = make_dataset({"a.png": (64, 64), "b.png": (80, 48)})
    encoded(dataset, placements, disk=disk_at())
    os.utime(dataset.examples[1].path, (1, 1))
    for expected in (["b.png"], []):
        reads.clear()
        assert encoded(dataset, placements, disk=disk_at())[0] == 0
        assert reads == expected


def test_a_stamp_as_young_as_the_coarsest_clock_is_not_trusted(make_dataset, reads: list[str]) -> None:
    """A change within the same tick of the clock could not be seen."""
    dataset, placements = make_dataset({"a.png": (64, 64)})
    known = dataset.examples[0].path.stat()
    changed = max(known.st_mtime_ns, known.st_ctime_ns)
    for now, read in ((changed + 10**9, True), (changed + 10**9, True), (changed + 3 * 10**9, True), (changed, False)):
        reads.clear()
        encoded(dataset, placements, disk=disk_at(now))
        assert bool(reads) == read


def test_a_stamp_is_as_old_as_when_it_was_taken(make_dataset, reads: list[str]) -> None:
    """The image was read right after it was written; that encoding took long makes its stamp no better."""
    dataset, placements = make_dataset({"a.png": (64, 64)})
    known = dataset.examples[0].path.stat()
    times = iter([max(known.st_mtime_ns, known.st_ctime_ns) + 10**9])
    encoded(dataset, placements, disk=LatentDisk(vae_fingerprint="v", now=lambda: next(times, LATER)))
    reads.clear()
    assert encoded(dataset, placements, disk=disk_at())[0] == 0
    assert reads == ["a.png"]


@pytest.mark.parametrize("budget", [0, 1 << 30])
def test_a_picture_that_changes_while_it_is_encoded_is_not_found_again(make_dataset, budget: int) -> None:
    dataset, placements = make_dataset({"a.png": (64, 64)})
    path = dataset.examples[0].path

    class Slow(FakeVAE):
        def encode(self, pixels):
            Image.new("RGB", (64, 64), (9, 9, 9)).save(path)
            return super().encode(pixels)
    CachedLatents.build(Slow(), dataset, placements, disk=disk_at(), max_bytes=budget).close()
    count, source = encoded(dataset, placements, disk=disk_at())
    assert count == 1
    assert torch.allclose(mean(source)[0, :3], torch.full((3, 8, 8), 9 / 127.5 - 1), atol=1e-5)


@pytest.mark.parametrize("budget", [0, 1 << 30])
def test_a_file_with_a_hole_of_zeros_is_computed_again(make_dataset, tmp_path: Path, budget: int) -> None:
    """What a power cut may leave: the right length, the right header, finite numbers. Found before the training begins."""
    dataset, placements = make_dataset({"a.png": (64, 64)})
    _, first = encoded(dataset, placements, disk=disk_at())
    (file,) = (tmp_path / CACHE_FOLDER).iterdir()
    data = file.read_bytes()
    file.write_bytes(data[:-512] + bytes(512))
    vae = FakeVAE()
    second = CachedLatents.build(vae, dataset, placements, disk=disk_at(), max_bytes=budget)
    assert len(vae.batches) == 1 and torch.equal(mean(first), mean(second))


def test_what_another_process_left_half_written_long_ago_is_removed(make_dataset, tmp_path: Path) -> None:
    folder = tmp_path / CACHE_FOLDER
    folder.mkdir()
    for name, age in (("old.tmp", 7200), ("young.tmp", 60)):
        (folder / name).write_bytes(b"half")
        os.utime(folder / name, (LATER / 1e9 - age,) * 2)
    dataset, placements = make_dataset({"a.png": (64, 64)})
    encoded(dataset, placements, disk=disk_at())
    left = sorted(path.name for path in folder.iterdir())
    assert len(left) == 2 and left[0].startswith("a.png.64x64.") and left[1] == "young.tmp"


@pytest.mark.parametrize("damage", ["cut", "header", "length", "text", "nested", "shape", "another VAE"])
def test_what_is_not_whole_is_not_found(make_dataset, tmp_path: Path, damage: str) -> None:
    dataset, placements = make_dataset({"a.png": (64, 64)})
    encoded(dataset, placements, disk=disk_at())
    question = dataset.examples[0].path, placements[0]
    assert disk_at().load(*question) is not None and disk_at().load(*question, variant=FLIPPED) is None
    (file,) = (tmp_path / CACHE_FOLDER).iterdir()
    data = file.read_bytes()
    nested = b"[" * 200_000
    file.write_bytes({"cut": data[:-1], "header": data[:30], "length": b"\xff" * 8 + data[8:], "text": b"hello",
                      "nested": len(nested).to_bytes(8, "little") + nested}.get(damage, data))
    if damage == "shape":
        wrong = torch.zeros(4, 8, 9), torch.ones(4, 8, 9)
        assert disk_at().store(*question, latents=wrong) is None
    disk = LatentDisk(vae_fingerprint="w" if damage == "another VAE" else "v")
    assert disk.load(*question) is None


def test_reading_writes_nothing_once_the_training_runs(make_dataset, tmp_path: Path) -> None:
    """Several threads may read one image's file at the same time."""
    dataset, placements = make_dataset({"a.png": (64, 64)})
    encoded(dataset, placements, disk=disk_at())
    os.utime(dataset.examples[0].path, (1, 1))
    (file,) = (tmp_path / CACHE_FOLDER).iterdir()
    before = file.read_bytes()
    assert disk_at().load(dataset.examples[0].path, placements[0]) is not None
    assert file.read_bytes() == before
    assert disk_at().load(dataset.examples[0].path, placements[0], renew=True) is not None
    assert file.read_bytes() != before
