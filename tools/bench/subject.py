"""What a subject LoRA learnt: nine pictures of one character to train on, three poses kept back, new scenes to paint."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch

from lib_lora_train.host.port import Host
from tools.bench.measures import nearest_place
from tools.bench.real_images import HANDS, HELD_OUT, read_dataset
from tools.bench.sampler import Painter
from tools.bench.scorers import WordJudge
from tools.bench.style import save_sheet
from tools.bench.training import Say, train_lora
from tools.bench.yardstick import Band, Yardstick, loss_bands, mean

TRIGGER = "zorbi"
SCENES = ("reading a book", "playing a guitar", "eating a banana", "with a red heart", "in the snow")
"""Beside the captions of the poses that were kept back."""
KEPT_BACK = slice(3, None, 4)


@dataclasses.dataclass(frozen=True)
class SubjectResult:
    """Shares of pictures whose nearest real picture, in the word judge's features, shows the subject.

    base, lora    painted pictures, the same prompts and noise, without and with the LoRA at weight 1
    real          real pictures of the subject, each compared with all others: how well the measure finds it
    mistaken      real emoji of held-out words, each compared with all other words: how often it finds it wrongly
    loss          on the poses that were kept back
    """

    steps: int
    images: int
    base: float
    lora: float
    real: float
    mistaken: float
    loss: list[Band]


def measure_subject(host: Host, painter: Painter, yardstick: Yardstick, *, data: Path, output: Path,
                    settings: Mapping[str, object], steps: int, say: Say) -> SubjectResult:
    """Train on `data` without every fourth picture, copied to `output`/subject, and paint scenes of the trigger word."""
    files, captions, pixels = read_dataset(data)
    kept_back = list(range(len(files)))[KEPT_BACK]
    trained_on = _copied([file for place, file in enumerate(files) if place not in kept_back], output / "subject")
    lora = train_lora(host, settings=settings, data=trained_on, trigger_word=TRIGGER, name="bench-subject", steps=steps,
                      wanted=(steps,), say=say)[steps]
    full = painter.lora(lora, weight=1.0)
    prompts = [f"{TRIGGER}, {scene}" for scene in (*(captions[place] for place in kept_back), *SCENES)
               for _ in range(yardstick.effort.paintings)]
    say(f"  painting {2 * len(prompts)} pictures, without and with the LoRA")
    base, generated = painter.sample(prompts), painter.sample(prompts, full)
    gallery = _Gallery(yardstick, painter.through_vae(pixels))
    say("  the loss on the poses that were kept back")
    loss = loss_bands(painter, pixels[kept_back], [f"{TRIGGER}, {captions[place]}" for place in kept_back], full)
    save_sheet(output / "subject.png", [base, generated])
    return SubjectResult(
        steps=steps, images=len(prompts), base=gallery.share(base), lora=gallery.share(generated), real=gallery.found(),
        mistaken=gallery.mistaken(), loss=loss)


class _Gallery:
    """Features of the subject's pictures, then of all real emoji in both hands."""

    def __init__(self, yardstick: Yardstick, subject: torch.Tensor) -> None:
        self._judge: WordJudge = yardstick.word
        self._subjects, self._words = len(subject), len(yardstick.real.words)
        self._asked = yardstick.real.places(HELD_OUT)
        self._features = self._judge.features(torch.cat([subject, *(yardstick.shown[hand] for hand in HANDS)]))

    def share(self, images: torch.Tensor) -> float:
        """The share of `images` whose nearest is the subject."""
        return mean(nearest_place(self._judge.features(images), self._features) < self._subjects)

    def found(self) -> float:
        """The share of the subject's own pictures whose nearest other picture is the subject."""
        return mean(torch.stack([self._nearest_but(place, [place]) < self._subjects for place in range(self._subjects)]))

    def mistaken(self) -> float:
        """The share of real held-out emoji whose nearest picture of another word is the subject."""
        return mean(torch.stack([
            self._nearest_but(self._subjects + hand * self._words + place, [
                self._subjects + other * self._words + place for other in range(len(HANDS))]) < self._subjects
            for hand in range(len(HANDS)) for place in self._asked.tolist()]))

    def _nearest_but(self, place: int, left_out: list[int]) -> torch.Tensor:
        likeness = self._features @ self._features[place]
        likeness[left_out] = -torch.inf
        return likeness.argmax()


def _copied(files: list[Path], folder: Path) -> Path:
    """These pictures and their captions in a folder of their own, which holds nothing else."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for file in files:
        for part in (file, file.with_suffix(".txt")):
            shutil.copyfile(part, folder / part.name)
    return folder
