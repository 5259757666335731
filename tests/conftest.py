"""What tests of several packages share: a small checkpoint, a folder of images, a host that leases it, a browser."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

# The models here are so small that a second thread costs more than it brings, above all where other tests run beside
# these. Said here, before torch is there, it holds for the programs that tests start as well.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from lib_lora_train.host.standalone import StandaloneHost
from tools import tiny_checkpoint

MakeImage = Callable[..., Path]

torch.set_num_threads(1)  # where torch was built without OpenMP

# Files of few tests that take long, or wait for a browser or another process: where several processes share the tests, these
# begin first, the longest before the others, so that none is left alone with one of them at the end.
LONG = ("test_golden.py", "test_two_processes.py", "test_studio_page.py", "test_page.py", "test_job.py",
        "test_process_group.py", "test_faults.py", "test_resume.py", "test_results_page.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))


@pytest.fixture(scope="session")
def tiny_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small SD1 checkpoint with random weights, its .yaml beside it."""
    return tiny_checkpoint.write(tmp_path_factory.mktemp("checkpoint"), size=tiny_checkpoint.SHALLOW)


@pytest.fixture
def host(tiny_file: Path, tmp_path: Path) -> StandaloneHost:
    """A host that lends `tiny_file` and keeps results below the test's own folder."""
    return StandaloneHost(tiny_file, lora_folder=tmp_path / "loras", runs_folder=tmp_path / "runs")


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Four images, three square and one wide, three of them with captions."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for index, (width, height) in enumerate([(64, 64), (64, 64), (64, 64), (192, 64)]):
        image = Image.new("RGB", (width, height), "white")
        ImageDraw.Draw(image).ellipse((8, 8, 56, 56), fill=["red", "blue", "orange", "green"][index])
        image.save(folder / f"{index}.png")
        if index < 3:
            (folder / f"{index}.txt").write_text(f"a photo, {['red', 'blue', 'orange'][index]} cat", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def browser() -> Iterator[object]:
    """A running Chromium. One a module: as long as it runs, Playwright keeps an event loop in this thread."""
    from tests.browser import launched  # where Playwright is missing, only the tests of the page are skipped

    with launched() as running:
        yield running


@pytest.fixture
def make_image(tmp_path: Path) -> MakeImage:
    """make_image("a/b.png", size=(64, 48), caption=None) -> path; smooth, different for each name."""

    def make(name: str, size: tuple[int, int] = (64, 48), caption: str | None = None) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        across, down = np.meshgrid(np.linspace(0, 255, size[0]), np.linspace(0, 255, size[1]))
        blue = np.full_like(across, sum(name.encode()) % 256)
        Image.fromarray(np.stack([across, down, blue], axis=-1).astype(np.uint8)).save(path)
        if caption is not None:
            path.with_suffix(".txt").write_text(caption, encoding="utf-8")
        return path

    return make
