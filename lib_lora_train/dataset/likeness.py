"""How alike two images are, and how sharp one is. numpy and Pillow only.

Likeness is a perceptual hash's idea without its last step. pHash (Zauner, "Implementation and benchmarking of perceptual
image hash functions", 2010) keeps the signs of the low frequencies of an image made small; where a drawing is symmetric
those frequencies are zero and their signs are chance, so here the numbers themselves are kept. Rescaling, compression and a
little light change them hardly; another pose or another colour does. Parts of an image are compared too, so that one cut
by up to an eighth of a side, a mirrored one and the two views of a stereo pair are found.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lib_lora_train.dataset.progress import ShouldStop
from lib_lora_train.errors import Interrupted

Thumbnail = NDArray[np.uint8]  # [16, 16, 3]
Cuts = tuple[tuple[float, float], ...]  # shares of a side that are cut off before and behind

NEAR = 0.975
"""From this likeness on two images are near-duplicates. Photographs and emoji scaled by 0.5 to 2, saved as JPEG of quality
60, made brighter or darker by a tenth, or cut by 10 to 20 pixels of 160 stay above it, of finely textured photographs nine of
ten. What it pairs among 3786 different emoji are shades, mirror images and the man and woman of one figure, and some flags."""

BLURRED = 0.42
"""Below this sharpness an image is blurred by itself: an edge takes about three pixels of the training size. Photographs
measure 1 to 4, drawings 1.2 to 3.4, images enlarged twice 0.5 to 1.2, four times 0.2 to 0.4."""
SOFTER_THAN_OTHERS = 0.3  # of the folder's median, where that also is below …
SOFT = 0.7

_SIDE = 16
_FAINT = 1.0  # levels of contrast: below, an image counts as blank
_MOST_DIFFERENCE = 60.0  # levels (0…255) of mean and contrast together: a black heart is like a white one but for this
_ROWS = 64  # images that are compared with all others at once
_WHOLE: Cuts = ((0, 0),)
# Up to an eighth of a side is looked for: 20 pixels of 160.
_CUTS: Cuts = tuple(itertools.product((0, 0.04, 0.08, 0.12), repeat=2))
_COARSE_CUTS: Cuts = tuple(itertools.product((0, 0.1), repeat=2))
_SIDEWAYS: Cuts = ((0, 0), (0.06, 0), (0, 0.06))
_LOOSELY = 0.9  # the likeness at 4×4 cells from which on a closer look is worth its time
_TILE = 32


def thumbnail(image: Image.Image) -> Thumbnail:
    """What likeness is computed from: the upright RGB image averaged to 16×16, uint8 [16, 16, 3]."""
    return np.asarray(image.resize((_SIDE, _SIDE), Image.Resampling.BOX), dtype=np.uint8)


def near_duplicates(thumbnails: Sequence[Thumbnail], *, should_stop: ShouldStop | None = None) -> list[tuple[int, ...]]:
    """Groups of two and more indices whose images are alike, cut and mirrored too, directly or through others of the group.

    Parts of each image are compared with every other one, whole or a little less at one side, so that two views of one scene
    are found: sixteen parts of 4×4 cells, and for the few pairs that are near, 256 of 8×8. 10,000 images take ten seconds.
    Raises Interrupted when `should_stop()` says so.
    """
    if len(thumbnails) < 2:
        return []
    images = np.stack(list(thumbnails))
    group = np.arange(len(images))  # the smallest index of each image's group
    coarse, fine = _parts(images, _WHOLE, _WHOLE, cells=4)[:, 0], _parts(images, _WHOLE, _SIDEWAYS, cells=8)
    levels = np.stack([images.mean(axis=(1, 2, 3)), images.std(axis=(1, 2, 3))], axis=1)
    for start in range(0, len(images), _ROWS):
        if should_stop is not None and should_stop():
            raise Interrupted("The search for near-duplicates was stopped")
        block = images[start:start + _ROWS]
        for views, cuts in ((block, _COARSE_CUTS), (block[:, :, ::-1], _WHOLE)):  # as it is, and mirrored
            near = _likeness(_parts(views, cuts, cuts, cells=4), coarse).max(axis=1) >= _LOOSELY
            for row in np.flatnonzero(near.any(axis=1)):
                first, others = start + row, np.flatnonzero(near[row])
                others = others[group[others] != group[first]]
                others = others[((levels[others] - levels[first]) ** 2).sum(axis=1) <= _MOST_DIFFERENCE ** 2]
                if len(others):
                    parts = _parts(views[row:row + 1], _CUTS, _CUTS, cells=8)
                    alike = np.max([_likeness(parts, fine[others, shift]) for shift in range(len(_SIDEWAYS))], axis=(0, 1, 2))
                    joined = np.unique(group[[first, *others[alike >= NEAR]]])
                    group[np.isin(group, joined)] = joined[0]
    return [tuple(np.flatnonzero(group == smallest).tolist()) for smallest, count in zip(*np.unique(group, return_counts=True),
                                                                                        strict=True) if count > 1]


def _parts(images: Thumbnail, rows: Cuts, columns: Cuts, *, cells: int) -> NDArray[np.float32]:
    """[n, 16, 16, 3] → [n, rows × columns, 3 × cells²]: images cut at top and bottom, left and right, without brightness and
    contrast, of length 1 (less where there is next to no contrast)."""
    down, across = _averaging(rows, cells), _averaging(columns, cells)
    parts = down @ images.transpose(0, 3, 1, 2).astype(np.float32) @ across.T
    parts = parts.reshape(-1, 3, len(rows), cells, len(columns), cells).transpose(0, 2, 4, 1, 3, 5)
    parts = parts.reshape(len(images), len(rows) * len(columns), -1)
    parts -= parts.mean(axis=2, keepdims=True)
    return parts / np.maximum(np.sqrt((parts ** 2).sum(axis=2, keepdims=True)), np.float32(_FAINT * parts.shape[2] ** 0.5))


def _likeness(parts: NDArray[np.float32], others: NDArray[np.float32]) -> NDArray[np.float32]:
    """[n, k, d], [m, d] → [n, k, m]: 1 - |a - b|² / 2, which is ab for vectors of length 1, and 1 of two blank images."""
    flat = parts.reshape(-1, parts.shape[2])
    lengths = 2 - (flat ** 2).sum(axis=1)[:, None] - (others ** 2).sum(axis=1)
    return (flat @ others.T + lengths / 2).reshape(*parts.shape[:2], -1)


def _averaging(cuts: Cuts, cells: int) -> NDArray[np.float32]:
    """[cuts × cells, 16]: the matrix that averages what a cut leaves of 16 samples into so many cells."""
    edges = np.array([np.linspace(before, 1 - after, cells + 1) for before, after in cuts]) * _SIDE
    sample = np.arange(_SIDE)
    shares = np.clip(np.minimum(edges[:, 1:, None], sample + 1) - np.maximum(edges[:, :-1, None], sample), 0, None)
    return (shares / shares.sum(axis=2, keepdims=True)).reshape(-1, _SIDE).astype(np.float32)


def sharpness(image: Image.Image, *, pixels: int) -> float:
    """How sharp the image's edges are at `pixels` (width × height, the training size): 2 a hard edge, below 0.42 blurred.

    The variance of the Laplacian (Pech-Pacheco et al., "Diatom autofocusing in brightfield microscopy", ICPR 2000), divided
    by that of the gradient. The plain variance counts how many edges there are and how strong, so a flat drawing looks
    blurred; the quotient knows only their width: for an edge smoothed by a Gaussian σ it falls as 1/(2σ²). It is taken in
    tiles, and the answer is the one below which three quarters of the contrast lie, so that a sharp subject before a soft
    background is sharp. Larger images are made smaller first, smaller ones stay as they are. Grain and
    the shake of a camera in one direction go unseen. 0 for an image without contrast.
    """
    scale = min(1.0, (pixels / (image.width * image.height)) ** 0.5)
    size = max(8, round(image.width * scale)), max(8, round(image.height * scale))
    grey = np.asarray(image.convert("L").resize(size, Image.Resampling.LANCZOS) if size != image.size
                      else image.convert("L"), dtype=np.float32)
    centre = grey[1:-1, 1:-1]
    right, below = grey[1:-1, 2:], grey[2:, 1:-1]
    laplacian = _tiles((grey[1:-1, :-2] + right + grey[:-2, 1:-1] + below - 4 * centre) ** 2)
    gradient = _tiles((right - centre) ** 2 + (below - centre) ** 2)
    telling = gradient > 3.0  # mean square of levels a pixel: an edge of 10 levels in a tile; slopes below are rounding
    if not telling.any():
        return 0.0
    # What rounding to whole levels adds by itself, 1/12 a pixel: 4² + 4 and 2 + 2 times. Soft slopes would drown in it.
    weight = gradient[telling] - 4 / 12
    quotient = np.maximum(laplacian[telling] - 20 / 12, 0.0) / weight
    order = np.argsort(quotient)
    share = np.cumsum(weight[order]) / weight.sum()
    return float(quotient[order][min(np.searchsorted(share, 0.75), len(order) - 1)])


def is_blurred(value: float, *, median: float) -> bool:
    """Whether an image of sharpness `value` is worth a look, by itself or beside a folder of that median."""
    return value < BLURRED or value < min(SOFT, SOFTER_THAN_OTHERS * median)


def _tiles(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Means over tiles of 32×32 (smaller in small images), flat."""
    side = max(2, min(_TILE, min(values.shape) // 4))
    rows, columns = values.shape[0] // side, values.shape[1] // side
    return values[:rows * side, :columns * side].reshape(rows, side, columns, side).mean(axis=(1, 3)).ravel()
