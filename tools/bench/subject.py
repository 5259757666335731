"""What a subject LoRA learnt: nine images of one character to train on, three poses kept back, new scenes to sample."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch

from lib_lora_train.host.port import Host
from tools.bench.evaluator import Band, Evaluator, loss_bands, mean
from tools.bench.image_metrics import nearest_index
from tools.bench.real_images import HELD_OUT, STYLES, read_dataset
from tools.bench.sampler import Sampler
from tools.bench.scorers import WordScorer
from tools.bench.style import save_sheet
from tools.bench.training import Say, train_lora

TRIGGER = "zorbi"
SCENES = ("reading a book", "playing a guitar", "eating a banana", "with a red heart", "in the snow")
"""Beside the captions of the poses that were kept back."""
KEPT_BACK = slice(3, None, 4)


@dataclasses.dataclass(frozen=True)
class SubjectResult:
    """Shares of images whose nearest real image, in the word scorer's features, shows the subject.

    base_model, lora    generated images, the same prompts and noise, without and with the LoRA at weight 1
    real                real images of the subject, each compared with all others: how well the measure finds it
    mistaken            real emoji of held-out words, each compared with all other words: how often it finds it wrongly
    loss                on the poses that were kept back
    """

    steps: int
    images: int
    base_model: float
    lora: float
    real: float
    mistaken: float
    loss: list[Band]


def measure_subject(host: Host, sampler: Sampler, evaluator: Evaluator, *, data: Path, output: Path,
                    settings: Mapping[str, object], steps: int, say: Say) -> SubjectResult:
    """Train on `data` without every fourth image, copied to `output`/subject, and sample scenes of the trigger word."""
    files, captions, pixels = read_dataset(data)
    kept_back = list(range(len(files)))[KEPT_BACK]
    trained_on = _copied([file for index, file in enumerate(files) if index not in kept_back], output / "subject")
    lora = train_lora(host, settings=settings, data=trained_on, trigger_word=TRIGGER, name="bench-subject", steps=steps,
                      wanted=(steps,), say=say)[steps]
    full = sampler.lora(lora, weight=1.0)
    prompts = [f"{TRIGGER}, {scene}" for scene in (*(captions[index] for index in kept_back), *SCENES)
               for _ in range(evaluator.effort.samples)]
    say(f"  sampling {2 * len(prompts)} pictures, without and with the LoRA")
    base, generated = sampler.sample(prompts), sampler.sample(prompts, full)
    gallery = Gallery(evaluator, sampler.through_vae(pixels))
    say("  the loss on the poses that were kept back")
    loss = loss_bands(sampler, pixels[kept_back], [f"{TRIGGER}, {captions[index]}" for index in kept_back], full)
    save_sheet(output / "subject.png", [base, generated])
    return SubjectResult(
        steps=steps, images=len(prompts), base_model=gallery.share(base), lora=gallery.share(generated), real=gallery.found(),
        mistaken=gallery.mistaken(), loss=loss)


class Gallery:
    """Features of the subject's images, then of all real emoji in both styles."""

    def __init__(self, evaluator: Evaluator, subject: torch.Tensor) -> None:
        """`subject` are the subject's real images as the VAE shows them."""
        self._scorer: WordScorer = evaluator.word
        self._subjects, self._words = len(subject), len(evaluator.real.words)
        self._held_out = evaluator.real.indices(HELD_OUT)
        self._features = self._scorer.features(torch.cat([subject, *(evaluator.shown[style] for style in STYLES)]))

    def share(self, images: torch.Tensor) -> float:
        """The share of `images` whose nearest is the subject."""
        return mean(nearest_index(self._scorer.features(images), self._features) < self._subjects)

    def found(self) -> float:
        """The share of the subject's own images whose nearest other image is the subject."""
        return mean(torch.stack([self._nearest_but(index, [index]) < self._subjects for index in range(self._subjects)]))

    def mistaken(self) -> float:
        """The share of real held-out emoji whose nearest image of another word is the subject."""
        return mean(torch.stack([
            self._nearest_but(self._subjects + style * self._words + index, [
                self._subjects + other * self._words + index for other in range(len(STYLES))]) < self._subjects
            for style in range(len(STYLES)) for index in self._held_out.tolist()]))

    def _nearest_but(self, index: int, left_out: list[int]) -> torch.Tensor:
        likeness = self._features @ self._features[index]
        likeness[left_out] = -torch.inf
        return likeness.argmax()


def _copied(files: list[Path], folder: Path) -> Path:
    """These images and their captions in a folder of their own, which holds nothing else."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for file in files:
        for part in (file, file.with_suffix(".txt")):
            shutil.copyfile(part, folder / part.name)
    return folder
