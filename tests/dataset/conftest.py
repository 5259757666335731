"""Small pictures on disk, made by the tests themselves."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

MakePicture = Callable[..., Path]


@pytest.fixture
def make_picture(tmp_path: Path) -> MakePicture:
    """make_picture("a/b.png", size=(64, 48), caption=None) -> path; smooth, different for each name."""

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
