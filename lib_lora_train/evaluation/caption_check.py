"""Is the caption right? Asked of the very model that is to be trained.

1. Does the caption help it to see the picture? Noise is laid over the picture and the model says what the noise was, once
   told nothing and once told the caption. The loss of the two is the diffusion classifier of Li et al. 2023 ("Your
   Diffusion Model is Secretly a Zero-Shot Classifier", arXiv 2303.16203) with two classes, the caption and the empty text;
   as there, both see the same timesteps and noise. The score asks less: does the caption push the answer in the right
   direction? It is the cosine between what the caption changes and what is wrong without it. A model may overdo what
   it is told, above all with pictures in a hand it does not know, and then the right caption pushes the right way and
   adds to the loss nevertheless. High timesteps are asked, where little of the picture is seen and the words decide.
2. What does it paint from the caption? A few pictures of the same size beside the original, and how near they are to it
   (`resemblance.py`).

What it cannot tell: words the model does not know (the trigger word of a new subject) say nothing to it, and there is no
score that is good enough: it differs from model to model, and pictures in a hand the model does not know have lower ones
all together. Of the demo's emoji, right captions have 85 and wrong ones 4 on average in the hand it learnt, 26 and 10 in
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
from lib_lora_train.evaluation.lease import Lease, leased
from lib_lora_train.evaluation.resemblance import resemblance, subject_features
from lib_lora_train.evaluation.sampler import SampleRequest, sample_latents, to_image
from lib_lora_train.host.port import Host
from lib_lora_train.model.sd.text import Conditioning, size_vector
from lib_lora_train.settings import Settings
from lib_lora_train.training.noise import seed_of

TIMESTEPS = (550, 650, 750, 850, 950)
NOISES = 2
"""Different noises at each timestep; the same ones for all pictures of a size."""
FIRST_SEED = 1000


@dataclasses.dataclass(frozen=True, eq=False)
class Checked:
    """What is known of one caption. Where the picture could not be checked, `problem` is a sentence and the rest None.

    score        0…100: 100 times the cosine between what the caption changes in the model's answer and what is wrong with
                 the answer without it: 0 is a caption that has nothing to do with the picture, or less than nothing
    gain         the share of the loss that the caption takes away, below 0 where it adds some
    similarity   0…1: how near the painted pictures are to the original on average; None where none was painted
    pictures     painted from the caption
    """

    path: Path
    caption: str
    score: float | None = None
    gain: float | None = None
    similarity: float | None = None
    images: tuple[Image.Image, ...] = ()
    problem: str = ""


def check_captions(host: Host, items: Sequence[tuple[Path, str]], *, settings: Settings | None = None, seeds: int = 2,
                   steps: int = 20, cfg: float = 7.0, worst: int | None = None, on_progress: Progress | None = None,
                   should_stop: ShouldStop | None = None) -> Iterator[Checked]:
    """Each (picture, caption) of `items`, the worst caption first, with `seeds` pictures painted from it.

    First all captions are measured, and then the pictures are painted, in that order, so that the worst ones are seen
    while the others are still at work. `worst` paints for that many only; `seeds=0` paints nothing.
    `settings` say to which sizes pictures are brought, as a training does; by default those of the model's family.
    Progress counts pictures measured and pictures painted for. The model is borrowed until the iterator ends or is closed.
    A picture that cannot be read is one row with a `problem`, before all others.
    Raises HostError, ModelError, SettingError for sizes that do not fit the model, TrainingError where the memory ran
    out, and Interrupted where it was stopped, after the rows of all that was measured by then.
    """
    settings = settings or Settings()
    if not items:
        return
    with leased(host, work="Checking captions", settings=settings, should_stop=should_stop) as loan, \
            translated("checking the captions"):
        check = _Check(loan, buckets_for(settings.dataset, sizes=loan.model.architecture.family.sizes), steps=steps, cfg=cfg,
                       seeds=seeds)
        most = (len(items) if worst is None else worst) if seeds else 0
        total, measured = len(items) + min(most, len(items)), []
        stopped: Interrupted | None = None
        try:
            for done, (path, caption) in enumerate(items):
                loan.between(done, total)
                measured.append(check.measure(path, caption))
                if on_progress:
                    on_progress(done + 1, total)
        except Interrupted as error:
            stopped = error
        measured.sort(key=_order)
        done, total = len(items), len(items) + min(most, sum(one.features is not None for one in measured))
        for one in measured:
            if one.features is not None and done < total and stopped is None:
                try:
                    loan.between(done, total)
                    one, done = check.sample(one, one.features), done + 1
                    if on_progress:
                        on_progress(done, total)
                except Interrupted as error:
                    stopped = error
            yield one.checked
        if stopped:
            raise stopped


@dataclasses.dataclass(frozen=True, eq=False)
class _Measured:
    """A row on its way. `features` are the original's, None where nothing is to be painted from its caption."""

    checked: Checked
    size: tuple[int, int] = (0, 0)
    cosine: float = -1.0
    features: Tensor | None = None


def _order(one: _Measured) -> tuple[bool, float]:
    """Worst first; what could not be checked before everything."""
    return one.checked.score is not None, one.cosine


class _Check:
    """The work on single pictures, on a model that is lent."""

    def __init__(self, loan: Lease, buckets: Buckets, *, steps: int, cfg: float, seeds: int) -> None:
        self._loan, self._model, self._buckets = loan, loan.model, buckets
        self._steps, self._cfg, self._seeds = steps, cfg, seeds

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
        # The middle of what the VAE says: its spread is far below the noise that is laid over it.
        mean, _ = self._model.vae.encode(pixels[None].to(self._model.device))
        cosine, gain = self._agreement(mean, caption, placement)
        if not math.isfinite(cosine + gain):
            return _Measured(Checked(path, caption, problem="The model has no number for this picture (NaN)."))
        return _Measured(Checked(path, caption, 100 * max(0.0, cosine), gain), placement.bucket, cosine,
                         self._features(mean) if self._seeds else None)

    def sample(self, one: _Measured, features: Tensor) -> _Measured:
        """The same with pictures painted from the caption, compared with the original by its `features`."""
        images, near = [], []
        for seed in range(FIRST_SEED, FIRST_SEED + self._seeds):
            request = SampleRequest(one.checked.caption, width=one.size[0], height=one.size[1], steps=self._steps,
                                    cfg_scale=self._cfg, seed=seed)
            # One by one: two at once take the memory of four, which a card may not have.
            latents = sample_latents(self._model, request, clip_skip=self._loan.clip_skip, dtype=self._loan.dtype,
                                     on_step=lambda *_: self._loan.check())
            images.append(to_image(self._model, latents))
            near.append(resemblance(features, self._features(latents)))
        return dataclasses.replace(one, checked=dataclasses.replace(
            one.checked, images=tuple(images), similarity=sum(near) / len(near)))

    def _features(self, latents: Tensor) -> Tensor:
        return subject_features(self._model, latents, clip_skip=self._loan.clip_skip, dtype=self._loan.dtype)

    @torch.no_grad()
    def _agreement(self, mean: Tensor, caption: str, placement: Placement) -> tuple[float, float]:
        """(cosine, gain), each the mean over timesteps and noises; `mean` is the picture's latents [1, 4, h, w]."""
        model, dtype, device = self._model, self._loan.dtype, self._model.device
        texts = [model.text.tokenize(""), model.text.tokenize(caption)]
        conditioning = model.text.encode(texts, clip_skip=self._loan.clip_skip)
        context, y = conditioning.context.to(device, dtype), _size_vector(conditioning, placement)
        x_0 = mean * model.architecture.latent_scale
        cosines, log_gains = [], []
        for timestep in TIMESTEPS:
            for place in range(NOISES):
                self._loan.check()
                generator = torch.Generator().manual_seed(seed_of("caption", timestep, place))
                noise = torch.randn(x_0.shape, generator=generator).to(device)
                t = torch.tensor([timestep], device=device)
                x_t, target = model.schedule.add_noise(x_0, noise, t), model.schedule.target(x_0, noise, t)
                # Two rows, as a step of painting has them: whoever can paint this size can check it.
                nothing, told = model.unet(x_t.to(dtype).expand(2, -1, -1, -1), t.expand(2), context,
                                           None if y is None else y.to(device, dtype)).float().flatten(1)
                missing = target.flatten() - nothing
                # 0 where the caption changes nothing at all: cosine_similarity keeps its divisor from 0.
                cosines.append(F.cosine_similarity(told - nothing, missing, dim=0))
                log_gains.append(missing.square().mean().log() - (target.flatten() - told).square().mean().log())
        # One synchronisation a picture. Relative losses are averaged, or the low timesteps would be the only ones to count.
        cosine, log_gain = torch.stack([torch.stack(cosines).mean(), torch.stack(log_gains).mean()]).tolist()
        return cosine, 1 - math.exp(-log_gain)


def _size_vector(conditioning: Conditioning, placement: Placement) -> Tensor | None:
    """SDXL's sizes as a training on this picture tells them; None for other families."""
    if conditioning.pooled is None:
        return None
    (width, height), (across, down) = placement.original, placement.bucket
    return size_vector(conditioning.pooled, original=(height, width), crop=placement.size_condition_crop(),
                       target=(down, across))
