"""How alike a generated image and a real one are, patch by patch, in the diffusion model's own features (`resemblance.py`).

Aggregated as Masked Subject Consistency does (arXiv 2605.22469): each patch of the reference is compared with all of the
generated image, its best match counts, and the patches of the subject count most. So the subject may be elsewhere, and the
background may be another one. The paper's features are SigLIP 2's; these need nothing but the model that is loaded.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

_CELLS, _ROWS = 8, 1024  # rows that are compared at once: all of them may take a gigabyte
_GROUND_SHARE = 0.8  # of the image's border has one colour where the background is plain
_GROUND_DISTANCE = 24  # of 255 in any colour, within which it is one


def subject_weights(image: Image.Image, patches: int, *, mask: Image.Image | None = None) -> Tensor:
    """[patches] fp32, 0…1: how much of each patch of an RGB image is its subject, row by row.

    The `mask` (white is the subject) says it; without one it is what differs from a background of one colour, and where there
    is none either, or nothing is left, all patches count alike.
    """
    shown = _foreground(image) if mask is None else mask.convert("L")
    shown = shown.resize(grid_of(image.size, patches), Image.Resampling.BOX)
    weights = torch.from_numpy(np.array(shown, dtype=np.float32)).flatten() / 255
    return weights if weights.sum() > 0.5 else torch.ones(patches)


def grid_of(size: tuple[int, int], patches: int) -> tuple[int, int]:
    """How many of the patches of an image of that (width, height) are beside each other, and how many above each other."""
    across = max(1, round(math.sqrt(patches * size[0] / size[1])))
    return across, patches // across


def likeness(reference: Tensor, weights: Tensor, generated: Tensor) -> float:
    """-1…1: the mean over the patches of `reference` [n, C], by `weights` [n], of the best cosine among `generated` [m, C]."""
    others = F.normalize(generated, dim=1).T
    best = torch.cat([(rows @ others).amax(dim=1) for rows in F.normalize(reference, dim=1).split(_ROWS)])
    weights = weights.to(best)
    return float((best * weights).sum() / weights.sum())


def layout_of(features: Tensor, size: tuple[int, int]) -> Tensor:
    """[64, C]: the features [n, C] of an image of that (width, height) averaged in 8×8 cells, each at its place."""
    across, down = grid_of(size, len(features))
    cells = F.adaptive_avg_pool2d(features.T.reshape(1, -1, down, across), _CELLS)
    return cells.flatten(2)[0].T


def layout_distance(layout: Tensor, other: Tensor) -> float:
    """0…2: how far two images are apart with each cell at its place (`layout_of`); 0 is the same."""
    return max(0.0, 1 - float(F.cosine_similarity(layout.flatten(), other.flatten(), dim=0)))


def _foreground(image: Image.Image) -> Image.Image:
    """White where the image differs from the one colour of its border; all white where that has several."""
    pixels = np.asarray(image.convert("RGB"), dtype=np.int16)
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    ground = np.median(border, axis=0)
    if (np.abs(border - ground).max(axis=1) <= _GROUND_DISTANCE).mean() < _GROUND_SHARE:
        return Image.new("L", image.size, 255)
    return Image.fromarray(np.where(np.abs(pixels - ground).max(axis=2) > _GROUND_DISTANCE, 255, 0).astype(np.uint8))
