"""A fake VAE whose answers can be computed by hand, and small datasets on disk."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from lib_lora_train.dataset.buckets import Buckets, Placement
from lib_lora_train.dataset.examples import Dataset, Example
from lib_lora_train.inputs.batch import Batch
from lib_lora_train.inputs.batches import Batches
from lib_lora_train.inputs.latents import LatentSource
from lib_lora_train.settings import parse
from lib_lora_train.settings.dataset_config import SubsetSettings

torch.set_num_threads(1)

# 64² in steps of 8 is a small copy of 512² in steps of 64: the same 17 shapes.
BUCKETS = Buckets((64, 64), enable_bucket=True, min_bucket_reso=32, max_bucket_reso=128, bucket_reso_steps=8,
                  bucket_no_upscale=False)


class FakeVAE:
    """mean: the average of each 8×8 block in R, G, B, and how far left it lies; std: a constant. Counts its calls."""

    def __init__(self) -> None:
        self.batches: list[torch.Size] = []

    def encode(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        assert pixels.dtype == torch.float32 and not torch.is_grad_enabled()
        self.batches.append(pixels.shape)
        blocks = F.avg_pool2d(pixels, 8)
        ramp = torch.linspace(0, 1, blocks.shape[-1]).expand_as(blocks[:, :1])
        mean = torch.cat([blocks, ramp], dim=1)
        return mean, torch.full_like(mean, 0.5)


def expected_mean(pixels: np.ndarray) -> torch.Tensor:
    """What FakeVAE says of an 8-bit image [H, W, 3], with numpy and without our code."""
    height, width = pixels.shape[:2]
    blocks = (pixels.astype(np.float64) / 127.5 - 1).reshape(height // 8, 8, width // 8, 8, 3).mean((1, 3))
    ramp = np.broadcast_to(np.linspace(0, 1, width // 8), (1, height // 8, width // 8))
    return torch.from_numpy(np.concatenate([blocks.transpose(2, 0, 1), ramp])).float()


def drawn(source: LatentSource, indices: Sequence[int], rngs: Sequence[random.Random]) -> SimpleNamespace:
    """What visits get, in one go: mean, std [B, 4, h, w], and which of them are mirrored."""
    visits = [source.prepare(*visit) for visit in zip(indices, rngs, strict=True)]
    latents = source.finish(indices, [visit.latents for visit in visits])
    return SimpleNamespace(mean=latents[:, 0], std=latents[:, 1], flipped=tuple(visit.flipped for visit in visits))


def epoch_of(batches: Batches, epoch: int, start: int = 0) -> Iterator[Batch]:
    """The batches of an epoch made in turn, without a `Prefetcher`."""
    for position, indices in list(enumerate(batches.order(epoch)))[start:]:
        yield batches.finish(batches.prepare(epoch, position, indices=indices))


MakeDataset = Callable[..., tuple[Dataset, tuple[Placement, ...]]]


@pytest.fixture
def make_dataset(tmp_path: Path) -> MakeDataset:
    """make_dataset({"a.png": (64, 64), …}, repeats=2) -> (dataset, placements); noise, different for each name."""

    def make(sizes: dict[str, tuple[int, int]], *, repeats: int = 1, regularisation: tuple[str, ...] = (),
             ) -> tuple[Dataset, tuple[Placement, ...]]:
        examples = []
        for name, (width, height) in sizes.items():
            rng = np.random.default_rng(sum(name.encode()))
            Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(tmp_path / name)
            examples.append(Example(tmp_path / name, f"caption of {name}, tag one, tag two", repeats, tmp_path.name,
                                    width, height, name in regularisation))
        dataset = Dataset(tmp_path, "plain", tuple(examples))
        return dataset, tuple(BUCKETS.assign(e.width, e.height) for e in examples)

    return make


def augmented(dataset: Dataset, **changes: object) -> Dataset:
    """The dataset with these settings of images and captions."""
    settings = parse(changes)
    subset = SubsetSettings(settings.dataset, settings.captions)
    return replace(dataset, examples=tuple(replace(example, subset=subset) for example in dataset.examples))


@pytest.fixture
def vae() -> FakeVAE:
    return FakeVAE()


def same(one: Batch, other: Batch) -> bool:
    """Whether two batches are equal, bit for bit."""
    return one.captions == other.captions and one.tensors.keys() == other.tensors.keys() and all(
        torch.equal(tensor, other[name]) for name, tensor in one.tensors.items())
