"""The disk cache is used only where nothing changed, and never fails a run."""

from __future__ import annotations

import dataclasses
import os
import random
from pathlib import Path

import pytest
import torch
from PIL import Image

from lib_lora_train.cache import disk as disk_module
from lib_lora_train.cache.disk import CACHE_FOLDER, LatentDisk, tensor_fingerprint
from lib_lora_train.cache.latents import CachedLatents
from lib_lora_train.dataset.buckets import Buckets

from .conftest import FakeVAE


def encoded(dataset, placements, *, disk: LatentDisk, flip_aug: bool = False) -> tuple[int, CachedLatents]:
    """(pictures that the VAE had to encode, the source)."""
    vae = FakeVAE()
    source = CachedLatents.build(vae, dataset, placements, disk=disk, flip_aug=flip_aug)
    return sum(shape[0] for shape in vae.batches), source


def mean(source: CachedLatents, index: int = 0) -> torch.Tensor:
    return source.get([index], [random.Random(0)]).mean


@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_second_run_reads_the_same_latents_and_encodes_nothing(make_dataset, tmp_path: Path, elsewhere: bool) -> None:
    dataset, placements = make_dataset({"a.png": (64, 64), "b.png": (80, 48)})
    folder = tmp_path / "somewhere" / "else" if elsewhere else None
    first_count, first = encoded(dataset, placements, disk=LatentDisk(vae_fingerprint="v", folder=folder))
    second_count, second = encoded(dataset, placements, disk=LatentDisk(vae_fingerprint="v", folder=folder))
    assert (first_count, second_count) == (2, 0)
    assert all(torch.equal(mean(first, i), mean(second, i)) for i in (0, 1))
    files = sorted(p.name for p in (folder or tmp_path / CACHE_FOLDER).iterdir())
    assert len(files) == 2 and all(name.endswith(".safetensors") for name in files)


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
        disk.store(dataset.examples[0].path, placements[0], flipped=False, latents=(nan, nan.clone()))
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


def test_a_folder_that_cannot_be_written_is_one_warning_and_no_failure(make_dataset, tmp_path: Path) -> None:
    dataset, placements = make_dataset({"a.png": (64, 64), "b.png": (64, 64)})
    (tmp_path / "file").write_text("in the way")
    count, source = encoded(dataset, placements, disk=LatentDisk(vae_fingerprint="v", folder=tmp_path / "file"))
    assert count == 2
    (problem,) = source.dataset.problems
    assert not problem.skipped and "cannot be kept on disk" in problem.text


def test_pictures_of_one_name_from_two_folders_do_not_share_a_file(make_dataset, tmp_path: Path) -> None:
    dataset, placements = make_dataset({"a.png": (64, 64)})
    other = tmp_path / "other"
    other.mkdir()
    Image.new("RGB", (64, 64)).save(other / "a.png")
    both = dataclasses.replace(dataset, examples=(
        dataset.examples[0], dataclasses.replace(dataset.examples[0], path=other / "a.png")))
    encoded(both, placements * 2, disk=LatentDisk(vae_fingerprint="v", folder=tmp_path / "cache"))
    assert encoded(both, placements * 2, disk=LatentDisk(vae_fingerprint="v", folder=tmp_path / "cache"))[0] == 0


def test_a_fingerprint_tells_tensors_apart_by_name_shape_dtype_and_content() -> None:
    base = {"a": torch.arange(6.0), "b": torch.tensor(1.0)}
    same = {"b": torch.tensor(1.0), "a": torch.arange(6.0)}
    assert tensor_fingerprint(base) == tensor_fingerprint(same)
    others = [
        {"a": torch.arange(6.0), "c": torch.tensor(1.0)},
        {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(1.0)},
        {"a": torch.arange(6.0).to(torch.bfloat16), "b": torch.tensor(1.0)},
        {"a": torch.arange(6.0), "b": torch.tensor(1.0000001)}, {"a": torch.arange(6.0)}]
    assert len({tensor_fingerprint(t) for t in [base, *others]}) == 6


LATER = 10**18 * 4  # nanoseconds since 1970, in 2096: every stamp is old by then


def disk_at(now: int = LATER) -> LatentDisk:
    return LatentDisk(vae_fingerprint="v", now=lambda: now)


@pytest.fixture
def reads(monkeypatch) -> list[str]:
    """The names of the pictures that are read for the cache's sake."""
    read, original = [], disk_module._digest
    monkeypatch.setattr(disk_module, "_digest", lambda picture: read.append(picture.name) or original(picture))
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


def test_a_file_from_before_there_were_stamps_is_still_valid(make_dataset, tmp_path: Path, reads: list[str]) -> None:
    from safetensors import safe_open
    from safetensors.torch import save_file
    dataset, placements = make_dataset({"a.png": (64, 64)})
    encoded(dataset, placements, disk=disk_at())
    (file,) = (tmp_path / CACHE_FOLDER).iterdir()
    with safe_open(file, "pt") as opened:
        tensors = {name: opened.get_tensor(name) for name in ("mean", "std")}
        key = opened.metadata()["lora_train_key"]
    save_file(tensors, file, metadata={"lora_train_key": key})
    for expected in (["a.png"], []):
        reads.clear()
        assert encoded(dataset, placements, disk=disk_at())[0] == 0
        assert reads == expected


@pytest.mark.parametrize("room", [0, 1 << 30])
def test_a_picture_that_changes_while_it_is_encoded_is_not_found_again(make_dataset, room: int) -> None:
    dataset, placements = make_dataset({"a.png": (64, 64)})
    path = dataset.examples[0].path

    class Slow(FakeVAE):
        def encode(self, pixels):
            Image.new("RGB", (64, 64), (9, 9, 9)).save(path)
            return super().encode(pixels)
    CachedLatents.build(Slow(), dataset, placements, disk=disk_at(), max_bytes=room).close()
    count, source = encoded(dataset, placements, disk=disk_at())
    assert count == 1
    assert torch.allclose(mean(source)[0, :3], torch.full((3, 8, 8), 9 / 127.5 - 1), atol=1e-5)


def test_a_file_with_a_hole_of_zeros_is_computed_again(make_dataset, tmp_path: Path) -> None:
    """What a power cut may leave: the right length, the right header, finite numbers."""
    dataset, placements = make_dataset({"a.png": (64, 64)})
    _, first = encoded(dataset, placements, disk=disk_at())
    (file,) = (tmp_path / CACHE_FOLDER).iterdir()
    data = file.read_bytes()
    file.write_bytes(data[:-512] + bytes(512))
    count, second = encoded(dataset, placements, disk=disk_at())
    assert count == 1 and torch.equal(mean(first), mean(second))


def test_what_another_process_left_half_written_long_ago_is_removed(make_dataset, tmp_path: Path) -> None:
    folder = tmp_path / CACHE_FOLDER
    folder.mkdir()
    for name, age in (("old.tmp", 7200), ("young.tmp", 60)):
        (folder / name).write_bytes(b"half")
        os.utime(folder / name, (LATER / 1e9 - age,) * 2)
    dataset, placements = make_dataset({"a.png": (64, 64)})
    encoded(dataset, placements, disk=disk_at())
    assert sorted(path.name for path in folder.iterdir()) == ["a.png.64x64.safetensors", "young.tmp"]


@pytest.mark.parametrize("damage", ["cut", "header", "length", "text", "another VAE"])
def test_what_is_not_whole_is_not_held(make_dataset, tmp_path: Path, damage: str) -> None:
    dataset, placements = make_dataset({"a.png": (64, 64)})
    encoded(dataset, placements, disk=disk_at())
    question = dataset.examples[0].path, placements[0]
    assert disk_at().holds(*question, flipped=False) and not disk_at().holds(*question, flipped=True)
    (file,) = (tmp_path / CACHE_FOLDER).iterdir()
    data = file.read_bytes()
    file.write_bytes({"cut": data[:-1], "header": data[:30], "length": b"\xff" * 8 + data[8:], "text": b"hello"}.get(
        damage, data))
    assert not LatentDisk(vae_fingerprint="w" if damage == "another VAE" else "v").holds(*question, flipped=False)
