"""A real WebUI for these tests, on the CPU, with a checkpoint made on the spot.

Set WEBUI_ROOT to a folder of AUTOMATIC1111's WebUI v1.10.1, Forge, Forge Neo or reForge as CONTRIBUTING.md brings it up, and
WEBUI_PYTHON to the Python of its environment (by default the one that runs the tests). Settings, models, LoRAs and extensions
lie in a temporary data folder. The tests of the page want Playwright and Chromium on the PATH.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.webui.installation import installed
from tests.webui.running import WebUI, fill, running

HERE = Path(__file__).parent
EVERYWHERE = ("test_hosts.py",)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not os.environ.get("WEBUI_ROOT"):
        reason, kept = "WEBUI_ROOT names no WebUI: these tests drive a real one", ()
    elif installed().knows_models_by_size:
        reason, kept = "this WebUI loads no model as small as these tests want, nor one of ldm's modules", EVERYWHERE
    else:
        return
    for item in items:
        if HERE in item.path.parents and item.path.name not in kept:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def webui(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WebUI]:
    """One WebUI for all tests, with this extension and the probe."""
    data = tmp_path_factory.mktemp("webui")
    fill(data)
    yield from running(data)


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four coloured images of 64 pixels, with captions."""
    folder = tmp_path_factory.mktemp("pictures")
    colours = np.random.default_rng(0).integers(0, 256, (4, 4, 4, 3), dtype=np.uint8)
    for number, colour in enumerate(colours):
        Image.fromarray(colour).resize((64, 64), Image.Resampling.BICUBIC).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text("a photo of zzk, red", encoding="utf-8")
    return folder
