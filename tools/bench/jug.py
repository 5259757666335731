"""The benchmark's second subject: one solid thing, a jug with orange bands, from twelve sides. It is rendered here, since no
package holds photographs of one thing from several sides that may be passed on.

A distance field is followed from the eye until it touches (sphere tracing: https://iquilezles.org/articles/raymarchingdf/).
Units are the jug's: its belly has a radius of 0.62.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from PIL import Image

SIDE, LARGER = 128, 2
VIEWS = tuple((30.0 * number, (12.0, 28.0, 48.0)[number % 3]) for number in range(12))
"""Turned about the upright axis, and seen from so far above: degrees."""
GLAZE, BAND, WHITE = np.array([0.13, 0.52, 0.49]), np.array([0.96, 0.53, 0.16]), np.array([1.0, 1.0, 1.0])
LIGHT = np.array([-0.45, 0.75, 0.48])
_STEPS, _NEAR, _FAR = 70, 1e-3, 6.0


def draw(folder: Path) -> Path:
    """Twelve PNG images of 128 × 128 pixels on white with captions, into `folder`, which it returns."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, (turned, above) in enumerate(VIEWS):
        name = f"{number + 1:02}-{turned:.0f}-degrees"
        image = Image.fromarray((255 * view(turned, above)).round().astype(np.uint8))
        image.resize((SIDE, SIDE), Image.Resampling.LANCZOS).save(folder / f"{name}.png")
        seen = "from above" if above > 40 else "from the left" if 0 < turned < 180 else "from the right" if turned > 180 else ""
        (folder / f"{name}.txt").write_text(f"{seen or 'from the front'}\n", encoding="utf-8")
    return folder


def view(turned: float, above: float) -> np.ndarray:
    """[256, 256, 3] in [0, 1]: the jug on white."""
    a, b = math.radians(turned), math.radians(above)
    ahead = -np.array([math.sin(a) * math.cos(b), math.sin(b), math.cos(a) * math.cos(b)])
    right = np.array([math.cos(a), 0.0, -math.sin(a)])
    up = np.cross(right, ahead)
    across = np.linspace(-1.15, 1.15, SIDE * LARGER)
    x, y = np.meshgrid(across, -across)
    points = x[..., None] * right + y[..., None] * up - 3.0 * ahead
    gone = np.zeros(x.shape)
    for _ in range(_STEPS):
        gone += np.where(gone < _FAR, distance(points + gone[..., None] * ahead), 0.0)
    touched = points + gone[..., None] * ahead
    normals = np.stack([distance(touched + step) - distance(touched - step) for step in _NEAR * np.eye(3)], -1)
    normals /= np.linalg.norm(normals, axis=-1, keepdims=True) + 1e-9
    light = LIGHT[0] * right + LIGHT[1] * np.array([0.0, 1.0, 0.0]) - LIGHT[2] * ahead
    lit = np.clip(normals @ light / np.linalg.norm(light), 0, 1)
    banded = (np.abs(touched[..., 1] + 0.22) < 0.09) | (np.abs(touched[..., 1] - 0.12) < 0.05)
    colour = np.where(banded[..., None], BAND, GLAZE) * (0.45 + 0.65 * lit[..., None]) + 0.35 * (lit ** 24)[..., None]
    return np.where((gone < _FAR)[..., None], colour.clip(0, 1), WHITE)


def distance(points: np.ndarray) -> np.ndarray:
    """How far points [..., 3] are outside of the jug, [...]."""
    x, y, z = np.moveaxis(points, -1, 0)
    around = np.hypot(x, z)
    belly = np.hypot(around, 0.9 * (y + 0.2)) - 0.62
    neck = np.maximum(around - 0.27 - 0.1 * np.clip(y - 0.4, 0, 1), np.abs(y - 0.5) - 0.28)
    hollow = np.maximum(around - 0.21, 0.55 - y)
    spout = np.hypot(np.hypot(x + 0.33, z), y - 0.72) - 0.13
    handle = np.hypot(np.hypot(x - 0.5, y - 0.32) - 0.34, z) - 0.075
    foot = np.maximum(around - 0.4, np.abs(y + 0.82) - 0.06)
    solid = np.minimum.reduce([belly, neck, spout, handle, foot])
    return 0.8 * np.maximum(solid, -hollow)
