"""Four numbers about a generated image, asked of the model without LoRA. They are never merged into one.

likeness           to the nearest of the images that were not trained on, patch by patch (`likeness.py`), in fine features
                   without what all references have in common
prompt following   the caption check's cosine on what was generated (`caption_check.py`), and how many of the prompt's tags a WD
                   tagger finds in it, where one is installed
drift              how far an image whose prompt does not call what was learnt is from the base model's image of the same seed
copy risk          how much nearer the image is to an image that was trained than to one that was not: the ratio of the two
                   distances, above 1 where a trained one is nearer

Each is worth something beside the base model's own images only, which are the zero line.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageOps
from torch import Tensor

from lib_lora_train.dataset.augment import to_tensor
from lib_lora_train.dataset.buckets import Placement
from lib_lora_train.dataset.captions import split_tags, tag_key
from lib_lora_train.dataset.held_out import HeldOutImage
from lib_lora_train.dataset.images import read_image
from lib_lora_train.evaluation.caption_check import caption_effect
from lib_lora_train.evaluation.likeness import layout_distance, layout_of, likeness, subject_weights
from lib_lora_train.evaluation.resemblance import patch_features
from lib_lora_train.host.lease import ModelLease
from lib_lora_train.tagging.captioner import Captioner


@dataclasses.dataclass(frozen=True)
class ImageScores:
    """What was measured on one image, None where it does not apply. Likeness and prompt following are cosines, -1…1, tag recall
    a share, drift 0…2, copy risk a ratio."""

    likeness: float | None = None
    prompt_following: float | None = None
    tag_recall: float | None = None
    drift: float | None = None
    copy_risk: float | None = None


NAMES = tuple(field.name for field in dataclasses.fields(ImageScores))


class Scorer:
    """Scores images of one size on a leased model. What it is given to compare with is measured at once."""

    def __init__(self, lease: ModelLease, *, size: tuple[int, int]) -> None:
        self._lease, self._size = lease, size
        self._held_out: list[tuple[Tensor, Tensor]] = []  # fine features, and how much of each patch is the subject
        self._layouts: tuple[list[Tensor], list[Tensor]] = ([], [])  # of what was held out and what was trained
        self._means: list[Tensor] = []

    def add_held_out(self, held_out: HeldOutImage, *, caption: str, mask: Path | None) -> float | None:
        """An image that was not trained on, and the mask of its subject; how much the image itself follows its caption."""
        image = self._shown(held_out, held_out.example.path)
        features = self._add(image, self._layouts[0])
        weights = subject_weights(image, len(features), mask=self._shown(held_out, mask) if mask else None)
        self._held_out.append((features, weights.to(features.device)))
        return self._follows(self._latents(image), caption)

    def add_training(self, path: Path) -> None:
        """An image that was trained."""
        self._add(ImageOps.fit(read_image(path), self._size), self._layouts[1])

    def _add(self, image: Image.Image, layouts: list[Tensor]) -> Tensor:
        """Measure a reference; its fine features."""
        latents = self._latents(image)
        layouts.append(self._layout(latents))
        features = self._features(latents, fine=True)
        self._means.append(features.mean(dim=0))
        return features

    def score(self, image: Image.Image, *, caption: str) -> ImageScores:
        """All that is measured on an image alone. `caption` is its prompt without the trigger word; of "" nothing is asked."""
        latents, alike, copied = self._latents(image), None, None
        if self._held_out:
            usual = torch.stack(self._means).mean(dim=0)
            features = self._features(latents, fine=True) - usual
            alike = max(likeness(reference - usual, weights, features) for reference, weights in self._held_out)
        if all(self._layouts):
            layout = self._layout(latents)
            held_out, trained = (min(layout_distance(layout, other) for other in others) for others in self._layouts)
            copied = held_out / max(trained, 1e-6)
        return ImageScores(_finite(alike), self._follows(latents, caption), copy_risk=_finite(copied))

    def distance(self, image: Image.Image, other: Image.Image) -> float | None:
        """How far two images are apart, 0…2."""
        return _finite(layout_distance(self._layout(self._latents(image)), self._layout(self._latents(other))))

    def _follows(self, latents: Tensor, caption: str) -> float | None:
        if not caption:
            return None
        return _finite(caption_effect(self._lease, latents, caption, Placement(self._size, self._size, (0, 0), self._size))[0])

    def _shown(self, held_out: HeldOutImage, path: Path) -> Image.Image:
        """What is seen of the image of that path, or of its mask."""
        image = read_image(path)
        example = held_out.example
        if image.size != (example.width, example.height):
            image = image.resize((example.width, example.height))
        image = image.crop(held_out.box)
        return ImageOps.fit(ImageOps.mirror(image) if held_out.mirrored else image, self._size)

    @torch.no_grad()
    def _latents(self, image: Image.Image) -> Tensor:
        """[1, 4, h, w]: the mean of the VAE's distribution."""
        model = self._lease.model
        return model.vae.encode(to_tensor(image.convert("RGB"))[None].to(model.device))[0]

    def _layout(self, latents: Tensor) -> Tensor:
        return layout_of(self._features(latents), self._size)

    def _features(self, latents: Tensor, *, fine: bool = False) -> Tensor:
        return patch_features(self._lease.model, latents, clip_skip=self._lease.clip_skip, dtype=self._lease.dtype, fine=fine)


def tag_recall(tagger: Captioner, image: Image.Image, caption: str) -> float | None:
    """The share of the caption's tags that the tagger finds in the image; None for a caption without any."""
    wanted = set(map(tag_key, split_tags(caption)))
    found = {tag_key(tag.name.replace("_", " ")) for tag in tagger.describe([image])[0].tags}
    return len(wanted & found) / len(wanted) if wanted else None


def _finite(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else value


@dataclasses.dataclass(frozen=True)
class Spread:
    """Mean and standard deviation over seeds; None where nothing was measured, or with one seed."""

    mean: float | None = None
    deviation: float | None = None


def spread_of(by_seed: Sequence[Sequence[float]]) -> Spread:
    """The spread over seeds of the means over the images of each."""
    means = [sum(values) / len(values) for values in by_seed if values]
    if not means:
        return Spread()
    mean = sum(means) / len(means)
    squares = sum((value - mean) * (value - mean) for value in means)
    return Spread(mean, math.sqrt(squares / (len(means) - 1)) if len(means) > 1 else None)
