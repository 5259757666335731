"""`bench cache`: images per second on their way to latents, a second start, and the memory that many images take.

The images are made here: JPEGs, one and a half times as wide and high as they are trained, twenty different ones in many
copies that differ in their last bytes, so that each has its own fingerprint. Every figure is measured without threads and
with them, twice in turn, and the better of each is printed. The files have just been written: the system holds them in
memory. "Without a VAE" means one that answers at once: what is left is reading, decoding, scaling and keeping.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import io
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image

from lib_lora_train.dataset.buckets import Buckets, Placement
from lib_lora_train.dataset.examples import Dataset, Example
from lib_lora_train.dataset.prefetch import reading_threads
from lib_lora_train.errors import SettingError, translated
from lib_lora_train.inputs.batches import Batches
from lib_lora_train.inputs.latent_files import CACHE_FOLDER, LatentDisk, MeanAndStd
from lib_lora_train.inputs.latents import CachedLatents, FreshLatents
from lib_lora_train.inputs.prefetcher import Prefetcher
from lib_lora_train.inputs.vae_batches import Encoder, automatic_batch
from lib_lora_train.model.sd.detection import vae_config
from lib_lora_train.model.sd.vae import VAE
from lib_lora_train.settings import resolution_of
from lib_lora_train.settings.areas import DatasetSettings
from lib_lora_train.settings.dataset_config import SubsetSettings
from tools import checkpoint_shapes as shapes
from tools.bench.report import grid, machine_text, write_report
from tools.bench.stopwatch import shortest
from tools.bench.training import Say

IMAGES = 10_000
BOUND = 256 << 20  # bytes of latents that stay in memory while it is measured; a run keeps 2 GiB
MOST_TIMED = 500  # images that the rates are measured with
MOST_ENCODED = {"cpu": 4, "cuda": 200}  # and those with the VAE
_DIFFERENT = 20
_PUBLISHED_CHANNELS, _NARROW_CHANNELS = 128, 32


@dataclasses.dataclass(frozen=True)
class Rate:
    """Images per second of one kind of work, without threads and with them."""

    name: str
    images: int
    without: float
    with_threads: float


@dataclasses.dataclass(frozen=True)
class Grown:
    """What one pass over so many images took: bytes of memory beyond those before it (None where the system does not
    tell), of latents on disk, and seconds; and a second start's seconds."""

    images: int
    latents: int
    memory: int | None
    seconds: float
    memory_second: int | None
    seconds_second: float


class InstantVAE:
    """Answers at once with numbers of the right shape."""

    def encode(self, pixels: torch.Tensor) -> MeanAndStd:
        """Zeros and ones."""
        count, _, height, width = pixels.shape
        return torch.zeros(count, 4, height // 8, width // 8), torch.ones(count, 4, height // 8, width // 8)


def run_cache(*, images: int = IMAGES, size: str = "512", output: Path, say: Say,
              device: torch.device | str | None = None) -> str:
    """Measure, write `cache.md` and `cache.json` into `output`, and return the table. What is made meanwhile is removed.

    The VAE has the published size on a GPU and a quarter of its width on a CPU, and random weights.
    Raises SettingError for a size there is none of, OutputError where the disk refuses.
    """
    width, height = resolution_of(size, default=512)
    if images < 1:
        raise SettingError(f"--pictures {images} is not possible", why="there must be at least one")
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    threads, folder = reading_threads(), output / f"cache-{os.getpid()}"
    with translated("measuring the cache"):
        try:
            say(f"Making {images} pictures …")
            dataset, placements = make_dataset(folder, images=images, size=(width, height))
            rates = _rates(dataset, placements, threads=threads, device=device, say=say)
            grown = [_grown(dataset, placements, count, threads=threads, say=say)
                     for count in dict.fromkeys((max(1, images // 10), images))]
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        text = table(rates, grown, size=f"{width}×{height}", threads=threads, device=device)
        figures = {"size": [width, height], "threads": threads, "bound": BOUND, "machine": machine_text(device),
                   "rates": [dataclasses.asdict(rate) for rate in rates], "grown": [dataclasses.asdict(one) for one in grown]}
    return write_report(output, "cache", text, figures)


def make_dataset(folder: Path, *, images: int, size: tuple[int, int]) -> tuple[Dataset, tuple[Placement, ...]]:
    """JPEGs half as large again as `size` (width, height), whose files were last changed an hour ago."""
    folder.mkdir(parents=True)
    across, down = (side * 3 // 2 for side in size)
    generator, files = torch.Generator().manual_seed(0), []
    for _ in range(min(_DIFFERENT, images)):
        coarse = torch.randint(0, 256, (max(1, down // 24), max(1, across // 24), 3), generator=generator, dtype=torch.uint8)
        file = io.BytesIO()
        Image.fromarray(coarse.numpy()).resize((across, down), Image.Resampling.BICUBIC).save(file, "JPEG", quality=92)
        files.append(file.getvalue())
    examples, past = [], time.time() - 3600
    for number in range(images):
        path = folder / f"{number:06}.jpg"
        path.write_bytes(files[number % len(files)] + number.to_bytes(8, "big"))  # after the image's end: nobody reads it
        os.utime(path, (past, past))
        examples.append(Example(path, f"picture {number}", 1, folder.name, across, down))
    buckets = Buckets(size, enable_bucket=False, min_bucket_reso=min(size), max_bucket_reso=max(size), bucket_reso_steps=8,
                      bucket_no_upscale=False)
    return Dataset(folder, "plain", tuple(examples)), tuple(buckets.assign(across, down) for _ in examples)


def random_vae(channels: int, device: torch.device) -> VAE:
    """An autoencoder of the published structure; its published width is 128 channels."""
    generator = torch.Generator().manual_seed(0)
    tensors = {name: shapes.scaled(f"first_stage_model.{name}", torch.randn(shape, generator=generator)).to(device)
               for name, shape in shapes.vae(channels=channels, multipliers=(1, 2, 4, 4), blocks=2)}
    return VAE(tensors, vae_config(tensors))


def resident_bytes() -> int | None:
    """Memory of this process that is not swapped out; None where the system does not tell."""
    statm = Path("/proc/self/statm")
    if not statm.is_file():
        return None
    return int(statm.read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")


def table(rates: list[Rate], grown: list[Grown], *, size: str, threads: int, device: torch.device) -> str:
    """All figures as Markdown."""
    lines = [(rate.name, f"{rate.images:,}", f"{rate.without:.1f}", f"{rate.with_threads:.1f}",
              f"{rate.with_threads / rate.without:.2f}") for rate in rates]

    def mebibytes(count: int | None) -> str:
        return "?" if count is None else f"{count / (1 << 20):,.0f}"
    growth = [(f"{one.images:,}", mebibytes(one.latents), mebibytes(one.memory), f"{one.seconds:.1f}",
               mebibytes(one.memory_second), f"{one.seconds_second:.2f}") for one in grown]
    return "\n".join([
        f"Pictures trained at {size}, read from JPEGs half as large again; {threads} threads beside the one that encodes. "
        f"{machine_text(device)}.", "",
        grid(("pictures per second", "measured with", "no threads", f"{threads} threads", "ratio"), lines), "",
        f"Memory with at most {BOUND >> 20} MiB of latents in it (a run keeps 2048), the others in a temporary file; without a "
        "VAE:", "",
        grid(("pictures", "latents MiB", "memory MiB", "seconds", "second start: MiB", "seconds"), growth), ""])


def _rates(dataset: Dataset, placements: tuple[Placement, ...], *, threads: int, device: torch.device, say: Say
           ) -> list[Rate]:
    few = min(len(dataset.examples), MOST_TIMED)
    shortened = dataclasses.replace(dataset, examples=dataset.examples[:few]), placements[:few]
    chosen = SubsetSettings(DatasetSettings(flip_aug=True, color_aug=True, random_crop=True))
    varied = dataclasses.replace(dataset, examples=tuple(
        dataclasses.replace(example, subset=chosen) for example in shortened[0].examples))
    fewest = min(few, MOST_ENCODED.get(device.type, MOST_ENCODED["cpu"]))
    fewest_data = dataclasses.replace(dataset, examples=dataset.examples[:fewest]), placements[:fewest]
    channels = _PUBLISHED_CHANNELS if device.type == "cuda" else _NARROW_CHANNELS
    vae = random_vae(channels, device)
    batch = automatic_batch(device, placements[0].bucket)
    vae.encode(torch.zeros(batch, 3, *reversed(placements[0].bucket), device=device))  # the first time takes longer
    cache = dataset.folder / CACHE_FOLDER

    def anew() -> None:
        shutil.rmtree(cache, ignore_errors=True)

    def touched() -> None:
        for example in shortened[0].examples:
            os.utime(example.path, (known := example.path.stat().st_mtime - 1, known))

    def encoded(data: tuple[Dataset, tuple[Placement, ...]], use: Encoder, disk: bool, where: torch.device
                ) -> Callable[[int], None]:
        return lambda count: CachedLatents.build(
            use, *data, threads=count, vae_batch_size=0, device=where,
            disk=LatentDisk(vae_fingerprint="bench", now=_later) if disk else None).close()

    def epoch(count: int) -> None:
        source = FreshLatents(InstantVAE(), varied, shortened[1], vae_batch_size=0, device=torch.device("cpu"))
        with Prefetcher(Batches(source, train_batch_size=4, seed=0), last_epoch=1, threads=count) as prefetcher:
            for _ in prefetcher.epoch(1):
                pass

    cpu, instant = torch.device("cpu"), InstantVAE()
    kinds: tuple[tuple[str, int, Callable[[int], None], Callable[[], None]], ...] = (
        ("decoded and scaled, without a VAE", few, encoded(shortened, instant, False, cpu), anew),
        (f"encoded by a VAE of {channels} channels, batch {batch}", fewest, encoded(fewest_data, vae, False, device), anew),
        ("written to the disk cache, without a VAE", few, encoded(shortened, instant, True, cpu), anew),
        ("found in the disk cache", few, encoded(shortened, instant, True, cpu), lambda: None),
        ("found there, the pictures' times changed", few, encoded(shortened, instant, True, cpu), touched),
        ("decoded and varied at each visit, without a VAE", few, epoch, anew))
    rates = []
    for name, count, function, before in kinds:
        say(f"{name} …")
        times: dict[int, list[float]] = {0: [], threads: []}
        for used in (0, threads, threads, 0):
            before()
            times[used].append(shortest(functools.partial(function, used)))
        rates.append(Rate(name, count, count / min(times[0]), count / min(times[threads])))
    anew()
    return rates


def _grown(dataset: Dataset, placements: tuple[Placement, ...], count: int, *, threads: int, say: Say) -> Grown:
    say(f"{count} pictures, with at most {BOUND >> 20} MiB of latents in memory …")
    data = dataclasses.replace(dataset, examples=dataset.examples[:count]), placements[:count]
    cache = dataset.folder / CACHE_FOLDER
    shutil.rmtree(cache, ignore_errors=True)
    figures: list[tuple[int | None, float]] = []
    for _ in ("first", "again"):
        gc.collect()
        before = resident_bytes()
        most = [before or 0]

        def look(done: int, total: int, most: list[int] = most) -> None:
            if done % 20 == 0 or done == total:
                most[0] = max(most[0], resident_bytes() or 0)
        seconds = shortest(lambda look=look: CachedLatents.build(
            InstantVAE(), *data, threads=threads, max_bytes=BOUND, on_progress=look,
            disk=LatentDisk(vae_fingerprint="bench", now=_later)).close())
        figures.append((None if before is None else most[0] - before, seconds))
    latents = sum(file.stat().st_size for file in cache.iterdir())
    return Grown(count, latents, *figures[0], *figures[1])


def _later() -> int:
    # The images were made a moment ago, and their stamps would be too young to be trusted.
    return time.time_ns() + 10**10
