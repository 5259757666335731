"""Masks: found where people keep them, and laid over the latents of the very pixels they were painted on."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torch.nn.functional import interpolate

from lib_lora_train.dataset.masks import masks_of, white_share
from lib_lora_train.errors import DatasetError
from lib_lora_train.inputs.batches import Batches
from lib_lora_train.inputs.latent_files import LatentDisk
from lib_lora_train.inputs.latents import CachedLatents, FreshLatents
from lib_lora_train.inputs.masks import Masks
from lib_lora_train.run.planning import plan_dataset
from lib_lora_train.settings import parse
from lib_lora_train.settings.dataset_config import SubsetSettings, subsets_of
from lib_lora_train.settings.loss import MaskSettings

from .conftest import FakeVAE, augmented, epoch_of, same


def paint(image: Path, mask: Path, *, follows: bool = False) -> Path:
    """A mask of the image's size, left half white; or (`follows`) white where the image's red is above a half."""
    mask.parent.mkdir(exist_ok=True)
    pixels = np.array(Image.open(image).convert("RGB"))
    white = np.zeros(pixels.shape[:2], np.uint8)
    white[:, :white.shape[1] // 2] = 255
    Image.fromarray(pixels[:, :, 0] if follows else white).save(mask)
    return mask


def masks(dataset, placements, paths, *, unmasked_weight=0.0, prior_weight=0.0, threads=0, told=None) -> Masks:
    """`paths` are masks by their images' paths, or as `masks_of` has them."""
    paths = paths | {example.masked: paths[example.path] for example in dataset.examples if example.path in paths}
    return Masks(dataset, placements, paths, factor=8, unmasked_weight=unmasked_weight, prior_weight=prior_weight,
                 threads=threads, warn=[].append if told is None else told.append)


def chosen(dataset, **options):
    """The dataset with these settings of masks for all of it."""
    subset = SubsetSettings(masks=MaskSettings(**{"masked_loss": True, **options}))
    return dataclasses.replace(dataset, examples=tuple(dataclasses.replace(e, subset=subset) for e in dataset.examples))


def found(dataset, may_read=None, **options) -> dict[str, str]:
    paths = masks_of(chosen(dataset, **options), may_read=may_read)
    return {image.name: mask.relative_to(dataset.folder).as_posix() for (image, _), mask in paths.items()}


def test_masks_of_the_studio_of_onetrainer_and_of_kohya_are_found(make_dataset, tmp_path):
    dataset, _ = make_dataset({f"{name}.png": (64, 64) for name in "abcdef"}, regularisation=("f.png",))
    for image, mask in {"a": "masks/a.png", "b": "b-masklabel.png", "c": "mask/c.png", "d": "cond/d.jpg",
                        "f": "masks/f.png"}.items():
        paint(tmp_path / f"{image}.png", tmp_path / mask)
    alpha = Image.open(tmp_path / "e.png").convert("RGBA")
    alpha.putalpha(Image.new("L", (64, 64), 128))
    alpha.save(tmp_path / "e.png")
    ours = {"a.png": "masks/a.png", "b.png": "b-masklabel.png", "c.png": "mask/c.png"}
    assert found(dataset) == ours
    assert found(dataset, conditioning_data_dir=str(tmp_path / "cond")) == {**ours, "d.png": "cond/d.jpg"}
    assert found(dataset, conditioning_data_dir="cond") == {**ours, "d.png": "cond/d.jpg"}
    assert found(dataset, alpha_mask=True) == {**ours, "e.png": "e.png"}
    assert found(dataset, masked_loss=False, alpha_mask=True) == {"e.png": "e.png"}
    assert found(dataset, masked_loss=False) == {}
    assert found(dataset, may_read=lambda path: path.name != "a.png") == {n: m for n, m in ours.items() if n != "a.png"}
    with pytest.raises(DatasetError, match="gone"):
        found(dataset, conditioning_data_dir=str(tmp_path / "gone"))
    with pytest.raises(DatasetError, match="allowed"):
        found(dataset, conditioning_data_dir="cond", may_read=lambda path: path.name != "cond")
    assert white_share(masks_of(chosen(dataset, alpha_mask=True))) == pytest.approx((3 * 0.5 + 128 / 255) / 4, abs=0.01)


def weights(dataset, placements, source, paths, seed: int = 0, **options) -> tuple[dict[str, torch.Tensor], torch.Tensor, bool]:
    """(mask and prior, the latents' mean, whether it is mirrored) of a visit to the first image."""
    visit = source.prepare(0, random.Random(seed))
    mean = source.finish([0], [visit.latents])[0, 0]
    return masks(dataset, placements, paths, **options).weights([0], [visit]), mean, visit.flipped


def test_a_mask_is_averaged_over_the_pixels_of_a_latent_as_in_sd_scripts(make_dataset, vae: FakeVAE, tmp_path):
    """apply_masked_loss: interpolate(mask, size of the latents, mode="area"), times the loss."""
    dataset, placements = make_dataset({"a.png": (64, 64)})
    source = CachedLatents.build(vae, dataset, placements)
    path = paint(tmp_path / "a.png", tmp_path / "masks" / "a.png", follows=True)
    grey = torch.from_numpy(np.array(Image.open(path))).float()[None, None] / 255
    expected = interpolate(grey, size=(8, 8), mode="area")
    own = weights(dataset, placements, source, {tmp_path / "a.png": path})[0]
    assert own.keys() == {"mask"} and own["mask"].shape == (1, 1, 8, 8)
    torch.testing.assert_close(own["mask"], expected, atol=1 / 500, rtol=0)


def test_outside_the_mask_the_weight_is_exactly_what_was_chosen(make_dataset, vae: FakeVAE, tmp_path):
    dataset, placements = make_dataset({"a.png": (64, 64)})
    source = CachedLatents.build(vae, dataset, placements)
    paths = {tmp_path / "a.png": paint(tmp_path / "a.png", tmp_path / "masks" / "a.png")}
    own = weights(dataset, placements, source, paths, unmasked_weight=0.1, prior_weight=0.5)[0]
    assert own["mask"][..., :4].unique().tolist() == [1.0]
    assert own["mask"][..., 4:].unique().tolist() == [pytest.approx(0.1)]
    assert own["prior"][..., :4].unique().tolist() == [0.0] and own["prior"][..., 4:].unique().tolist() == [0.5]


@pytest.mark.parametrize("kind, options", [
    (CachedLatents, {"flip_aug": True}), (FreshLatents, {"flip_aug": True, "color_aug": True}),
    (FreshLatents, {"flip_aug": True, "random_crop": True}),
    (CachedLatents, {"flip_aug": True, "rotate_aug_degrees": 30}),
    (FreshLatents, {"rotate_aug_degrees": 30, "random_crop": True})], ids=["cached", "colour", "crop", "turned", "turned crop"])
def test_a_mask_is_cropped_scaled_turned_and_mirrored_as_its_picture(make_dataset, vae: FakeVAE, tmp_path, kind, options):
    """The mask is the picture's own red: whatever is done to the picture, the latents' red says what the mask must be."""
    dataset, placements = make_dataset({"a.png": (120, 100)})
    assert placements[0].resized != placements[0].original
    path = tmp_path / "a.png"
    # Smooth, so that the kernels of the scaling do not matter.
    red = Image.fromarray(np.random.default_rng(0).integers(0, 256, (5, 6), dtype=np.uint8)).resize((120, 100))
    Image.merge("RGB", (red, red, red)).save(path)
    mask = paint(path, tmp_path / "masks" / "a.png", follows=True)
    source, seen = kind.build(vae, augmented(dataset, **options), placements), set()
    for seed in range(12):
        own, mean, flipped = weights(dataset, placements, source, {path: mask}, seed)
        colour = 0.1 if "color_aug" in options else 0.02
        torch.testing.assert_close(own["mask"][0, 0], mean[0] / 2 + 0.5, atol=colour, rtol=0)
        seen.add((flipped, tuple(own["mask"].flatten().tolist())))
    assert len(seen) > (1 if options.keys() <= {"flip_aug", "color_aug"} else 2)


def test_transparency_as_mask_is_what_is_there_of_a_picture(make_dataset, vae: FakeVAE, tmp_path):
    dataset, placements = make_dataset({"a.png": (64, 64)})
    path, half = tmp_path / "a.png", Image.new("L", (64, 64), 0)
    half.paste(255, (0, 0, 64, 32))
    image = Image.open(path).convert("RGBA")
    image.putalpha(half)
    image.save(path)
    own = weights(dataset, placements, CachedLatents.build(vae, dataset, placements), {path: path})[0]
    assert own["mask"][0, 0, :4].unique().tolist() == [1.0] and own["mask"][0, 0, 4:].unique().tolist() == [0.0]


def test_a_mask_of_another_size_is_scaled_to_its_picture(make_dataset, vae: FakeVAE, tmp_path):
    dataset, placements = make_dataset({"a.png": (64, 64)})
    mask = paint(tmp_path / "a.png", tmp_path / "masks" / "a.png")
    Image.open(mask).resize((32, 32), Image.Resampling.NEAREST).save(mask)
    own = weights(dataset, placements, CachedLatents.build(vae, dataset, placements), {tmp_path / "a.png": mask})[0]
    assert own["mask"][0, 0, 0, :3].tolist() == [1.0] * 3 and own["mask"][0, 0, 0, 5:].tolist() == [0.0] * 3


@pytest.mark.parametrize("threads", [0, 2])
def test_a_damaged_mask_is_named_and_its_picture_learnt_whole(make_dataset, vae: FakeVAE, tmp_path, threads):
    dataset, placements = make_dataset({"a.png": (64, 64), "b.png": (64, 64)})
    paths = {tmp_path / f"{n}.png": paint(tmp_path / f"{n}.png", tmp_path / "masks" / f"{n}.png") for n in "ab"}
    (tmp_path / "masks" / "b.png").write_bytes(b"\x89PNG")
    source, told = CachedLatents.build(vae, dataset, placements), []
    visits = [source.prepare(index, random.Random(0)) for index in (0, 1)]
    own = masks(dataset, placements, paths, threads=threads, told=told).weights([0, 1], visits)["mask"]
    assert own[0].mean() == 0.5 and own[1].unique().tolist() == [1.0]
    assert len(told) == 1 and "b.png" in told[0]


def test_batches_carry_masks_over_repeats_and_epochs_and_nothing_else_changes(make_dataset, vae: FakeVAE, tmp_path):
    """Also with latents from the disk, which know no mask."""
    dataset, placements = make_dataset({"a.png": (64, 64), "b.png": (64, 64)}, repeats=3)
    paths = {tmp_path / "a.png": paint(tmp_path / "a.png", tmp_path / "masks" / "a.png")}
    for _ in range(2):  # the second time from the disk
        source = CachedLatents.build(vae, augmented(dataset, flip_aug=True), placements, disk=LatentDisk(vae_fingerprint="v"))
        plain = Batches(source, train_batch_size=2, seed=1)
        masked = Batches(source, train_batch_size=2, seed=1, masks=masks(dataset, placements, paths, prior_weight=1.0))
        seen = 0
        for epoch in (1, 2):
            for one, other in zip(epoch_of(plain, epoch), epoch_of(masked, epoch), strict=True):
                assert same(one, other.rows(slice(None)).extended({})) is False and other["mask"].shape == (2, 1, 8, 8)
                assert all(torch.equal(one[name], other[name]) for name in one.tensors)
                assert torch.equal(other["prior"], 1 - other["mask"])
                means = [mask.mean().item() for mask in other["mask"]]
                expected = [0.5 if "a.png" in caption else 1.0 for caption in other.captions]
                assert means == expected
                seen += means.count(0.5)
        assert seen == 6
        assert "mask" not in masked.fixed(0)  # what is measured is the whole picture
    assert len(vae.batches) == 2 * 2


def test_each_folder_of_a_dataset_config_has_masks_of_its_own(tmp_path):
    text = """
        [general]
        alpha_mask = true
        [[datasets]]
        [[datasets.subsets]]
        image_dir = "a"
        conditioning_data_dir = "a_masks"
        [[datasets.subsets]]
        image_dir = "b"
        alpha_mask = false
        """
    one, other = subsets_of(parse({"train_data_dir": str(tmp_path), "dataset_config": text, "masked_loss": True}))
    assert one.masks == MaskSettings(masked_loss=True, alpha_mask=True, conditioning_data_dir="a_masks")
    assert other.masks == MaskSettings(masked_loss=True)


def test_a_folder_that_is_named_twice_has_the_masks_of_each_naming(vae: FakeVAE, tmp_path):
    (tmp_path / "a").mkdir()
    Image.new("RGB", (64, 64)).save(tmp_path / "a" / "x.png")
    left = paint(tmp_path / "a" / "x.png", tmp_path / "left" / "x.png")
    (tmp_path / "right").mkdir()
    ImageOps.invert(Image.open(left)).save(tmp_path / "right" / "x.png")
    subset = '[[datasets]]\n[[datasets.subsets]]\nimage_dir = "a"\nconditioning_data_dir = "{}"\n'
    settings = parse({"train_data_dir": str(tmp_path), "resolution": "64", "min_bucket_reso": 64, "masked_loss": True,
                      "dataset_config": subset.format("left") + subset.format("right")})
    plan = plan_dataset(settings, family="", allowed=None)
    source = CachedLatents.build(vae, plan.dataset, plan.placements)
    visits = [source.prepare(index, random.Random(0)) for index in (0, 1)]
    own = masks(plan.dataset, plan.placements, plan.masks).weights([0, 1], visits)["mask"]
    assert "1 of 1 picture with a mask" in plan.summary
    assert torch.equal(own[0], 1 - own[1]) and own[0].mean() == 0.5
