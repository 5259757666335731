"""Whether captions are right, asked of the very model that is to be trained.

1. Does the caption help the model to see the image? Noise is added to the image and the model predicts it, once with
   the empty text and once with the caption. The loss of the two is the diffusion classifier of Li et al. 2023 ("Your
   Diffusion Model is Secretly a Zero-Shot Classifier", arXiv 2303.16203) with two classes, the caption and the empty text;
   as there, both see the same timesteps and noise. The score asks less: does the caption push the prediction in the right
   direction? It is the cosine between what the caption changes and the error without it. A model may overdo what
   it is told, above all with images in a style it does not know, and then the right caption pushes the right way and
   adds to the loss nevertheless. High timesteps are asked, where little of the image is seen and the words decide.
2. What does it sample from the caption? A few samples of the image's size beside the original, and how near they are to it
   (`resemblance.py`).

What it cannot tell: words the model does not know (the trigger word of a new subject) say nothing to it, and there is no
score that is good enough: it differs from model to model, and images in a style the model does not know have lower ones
all together. Of the demo's emoji, right captions have 85 and wrong ones 4 on average in the style it learnt, 26 and 10 in
another one. The order within one dataset is what counts.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from lib_lora_train.dataset.augment import scale_and_crop, to_tensor
from lib_lora_train.dataset.buckets import Buckets, Placement, buckets_for
from lib_lora_train.dataset.images import read_image
from lib_lora_train.dataset.progress import Progress, ShouldStop
from lib_lora_train.errors import DatasetError, Interrupted, translated
from lib_lora_train.evaluation.resemblance import resemblance, subject_features
from lib_lora_train.host.lease import LeaseHost, ModelLease, lease_for
from lib_lora_train.model.sampler import SampleRequest, to_image
from lib_lora_train.settings import Settings
from lib_lora_train.training.noise import seed_of

TIMESTEPS = (550, 650, 750, 850, 950)
NOISES = 2
"""Different noises at each timestep; the same ones for all images of a size."""
PASSES = len(TIMESTEPS) * NOISES
"""Of the UNet, to measure one image; a sample takes one a step."""
FIRST_SEED = 1000


@dataclasses.dataclass(frozen=True, eq=False)
class Checked:
    """What is known of one caption. Where the image could not be checked, `problem` is a sentence and the rest None.

    score        0…100: 100 times the cosine between what the caption changes in the prediction and the error of the
                 prediction without it: 0 is a caption that has nothing to do with the image, or less than nothing
    gain         the share of the loss that the caption removes, below 0 where it adds some
    similarity   0…1: how near the samples are to the original on average; None where none was made
    images       sampled from the caption
    """

    path: Path
    caption: str
    score: float | None = None
    gain: float | None = None
    similarity: float | None = None
    images: tuple[Image.Image, ...] = ()
    problem: str = ""


@dataclasses.dataclass(frozen=True, eq=False)
class _Measured:
    """A row before its images are sampled. `features` are the original's, None where nothing is to be sampled from its
    caption."""

    checked: Checked
    size: tuple[int, int] = (0, 0)
    cosine: float = -1.0
    features: Tensor | None = None


def check_captions(host: LeaseHost, items: Sequence[tuple[Path, str]], *, settings: Settings | None = None, seeds: int = 2,
                   steps: int = 20, cfg: float = 7.0, worst: int | None = None, on_progress: Progress | None = None,
                   should_stop: ShouldStop | None = None) -> Iterator[Checked]:
    """Each (image, caption) of `items`, the worst caption first, with `seeds` images sampled from it.

    First all captions are measured, and then the images are sampled, in that order, so that the worst ones are seen
    while the others still run. `worst` samples for that many only; `seeds=0` samples nothing.
    `settings` say to which sizes images are scaled, as in a training; by default those of the model's family.
    Progress counts images measured and images sampled for. The model is leased until the iterator ends or is closed.
    An image that cannot be read is one row with a `problem`, before all others.
    Raises HostError, ModelError, SettingError for sizes that do not fit the model, TrainingError where the memory ran
    out, and Interrupted where it was stopped, after the rows of all that was measured by then.
    """
    settings = settings or Settings()
    if not items:
        return
    with lease_for(host, "Checking captions", settings=settings, should_stop=should_stop) as lease, \
            translated("checking the captions"):
        check = _Check(lease, buckets_for(settings.dataset, sizes=lease.model.architecture.family.sizes), seeds=seeds)
        most = (len(items) if worst is None else worst) if seeds else 0
        total, measured = len(items) + min(most, len(items)), []
        stopped: Interrupted | None = None
        if on_progress:
            on_progress(0, total)  # the first one may take a minute
        try:
            for done, (path, caption) in enumerate(items):
                lease.before_item(done, total)
                measured.append(check.measure(path, caption))
                if on_progress:
                    on_progress(done + 1, total)
        except Interrupted as error:
            stopped = error
        measured.sort(key=lambda one: (one.checked.score is not None, one.cosine))
        done, total = len(items), len(items) + min(most, sum(one.features is not None for one in measured))
        for one in measured:
            row = one.checked
            if one.features is not None and done < total and stopped is None:
                try:
                    lease.before_item(done, total)
                    row, done = check.sample(one, one.features, steps=steps, cfg=cfg), done + 1
                    if on_progress:
                        on_progress(done, total)
                except Interrupted as error:
                    stopped = error
            yield row
        if stopped:
            raise stopped


class _Check:
    """The check of single images on a leased model."""

    def __init__(self, lease: ModelLease, buckets: Buckets, *, seeds: int) -> None:
        self._lease, self._model, self._buckets, self._seeds = lease, lease.model, buckets, seeds

    def measure(self, path: Path, caption: str) -> _Measured:
        """How much the caption helps, by the loss."""
        if not caption.strip():
            return _Measured(Checked(path, caption, problem="It has no caption."))
        try:
            image = read_image(path)
            placement = self._buckets.assign(*image.size)
            pixels = to_tensor(scale_and_crop(image, placement))
        except DatasetError as error:
            return _Measured(Checked(path, caption, problem=str(error)))
        # The mean of the VAE's distribution: its spread is far below the noise that is added.
        mean, _ = self._model.vae.encode(pixels[None].to(self._model.device))
        cosine, gain = caption_effect(self._lease, mean, caption, placement)
        if not math.isfinite(cosine + gain):
            return _Measured(Checked(path, caption, problem="The model has no number for this picture (NaN)."))
        return _Measured(Checked(path, caption, 100 * max(0.0, cosine), gain), placement.bucket, cosine,
                         self._features(mean) if self._seeds else None)

    def sample(self, measured: _Measured, features: Tensor, *, steps: int, cfg: float) -> Checked:
        """The row with images sampled from the caption, compared with the original by its `features`."""
        images, similarities = [], []
        for seed in range(FIRST_SEED, FIRST_SEED + self._seeds):
            # One by one: two at once take the memory of four, which a GPU may not have.
            latents = self._lease.sample(SampleRequest(
                measured.checked.caption, width=measured.size[0], height=measured.size[1], steps=steps, cfg_scale=cfg,
                seed=seed))
            images.append(to_image(self._model, latents))
            similarities.append(resemblance(features, self._features(latents)))
        return dataclasses.replace(measured.checked, images=tuple(images), similarity=sum(similarities) / len(similarities))

    def _features(self, latents: Tensor) -> Tensor:
        return subject_features(self._model, latents, clip_skip=self._lease.clip_skip, dtype=self._lease.dtype)


@torch.no_grad()
def caption_effect(lease: ModelLease, mean: Tensor, caption: str, placement: Placement) -> tuple[float, float]:
    """(cosine, gain) of the caption, each the mean over timesteps and noises; `mean` is the image's latents [1, 4, h, w]."""
    model, dtype, device = lease.model, lease.dtype, lease.model.device
    texts = [model.text.tokenize(""), model.text.tokenize(caption)]
    conditioning = model.text.encode(texts, clip_skip=lease.clip_skip)
    context, (width, height), (across, down) = conditioning.context.to(device, dtype), placement.original, placement.bucket
    y = conditioning.vector(original=(height, width), crop=placement.size_condition_crop(), target=(down, across))
    x_0 = mean * model.architecture.latent_scale
    cosines, log_gains = [], []
    for timestep in TIMESTEPS:
        for index in range(NOISES):
            lease.check_stop()
            generator = torch.Generator().manual_seed(seed_of("caption", timestep, index))
            noise = torch.randn(x_0.shape, generator=generator).to(device)
            t = torch.tensor([timestep], device=device)
            x_t, target = model.schedule.add_noise(x_0, noise, t), model.schedule.target(x_0, noise, t)
            # Two rows, as a sampling step has them: whoever can sample this size can check it.
            without, with_caption = model.unet(
                x_t.to(dtype).expand(2, -1, -1, -1), t.expand(2), context,
                None if y is None else y.to(device, dtype)).float().flatten(1)
            error = target.flatten() - without
            # 0 where the caption changes nothing at all: cosine_similarity keeps its divisor from 0.
            cosines.append(F.cosine_similarity(with_caption - without, error, dim=0))
            log_gains.append(error.square().mean().log() - (target.flatten() - with_caption).square().mean().log())
    # One synchronisation an image. Relative losses are averaged, or only the low timesteps would count.
    cosine, log_gain = torch.stack([torch.stack(cosines).mean(), torch.stack(log_gains).mean()]).tolist()
    return cosine, 1 - math.exp(-log_gain)
