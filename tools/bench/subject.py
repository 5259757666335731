"""What a subject LoRA learnt: nine images of one thing to train on, three kept back, and where the model is to put it."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch

from lib_lora_train.host.port import Host
from tools.bench.headline import over_words
from tools.bench.image_metrics import nearest_index
from tools.bench.joint_scorer import JointScorer
from tools.bench.real_images import HELD_OUT, NOTO, TWEMOJI, read_dataset
from tools.bench.sampler import WITHOUT, Sampler
from tools.bench.sheet import save_sheet
from tools.bench.training import Say, train_lora

TRIGGER = "zorbi"
SCENES = ("{}, on red", "{}, on yellow", "{}, on black", "{}, on purple", "small {}", "small {}, on green")
"""What the model can do with any word."""
KEPT_BACK = slice(3, None, 4)
STYLES = NOTO, TWEMOJI
"""The emoji among which the subject is looked for are real ones in these styles."""


@dataclasses.dataclass(frozen=True)
class SubjectRow:
    """The share of images whose nearest real image shows the subject; its standard error over scenes, None for real ones."""

    subject: str
    what: str
    found: float
    error: float | None = None


def measure_subject(host: Host, sampler: Sampler, scorer: JointScorer, *, name: str, data: Path, output: Path,
                    settings: Mapping[str, object], steps: int, say: Say) -> list[SubjectRow]:
    """Train on `data` without every fourth image, copied to `output`/subject/NAME, and sample scenes of the trigger word.

    The first rows say what the measure is worth: real images of the subject, each compared with all others, and real emoji.
    """
    extent = scorer.extent
    files, _, pixels = read_dataset(data)
    kept_back = list(range(len(files)))[KEPT_BACK]
    trained_on = _copied([file for index, file in enumerate(files) if index not in kept_back], output / "subject" / name)
    say(f"{name}: {extent.runs} runs of {steps} steps")
    loras = [sampler.lora(train_lora(
        host, settings={**settings, "seed": 42 + run}, data=trained_on, trigger_word=TRIGGER, name=f"bench-{name}-{run}",
        steps=steps, wanted=(steps,), say=say)[steps], weight=1.0) for run in range(extent.runs)]
    gallery = Gallery(scorer, sampler.through_vae(pixels))
    rows = [SubjectRow(name, "real ones", gallery.found()), SubjectRow(name, "real emoji (mistaken)", gallery.mistaken())]
    prompts = [scene.format(TRIGGER) for scene in SCENES for _ in range(extent.seeds)]
    for scale in extent.scales:
        say(f"{name}: sampling {len(prompts)} images {1 + len(loras)} times at CFG {scale:g}")
        painted = [sampler.sample(prompts, lora, cfg_scale=scale) for lora in (WITHOUT, *loras)]
        shown = [gallery.shows(images).float() for images in painted]
        rows += [SubjectRow(name, f"model alone, CFG {scale:g}", *over_words(shown[0], extent.seeds)),
                 SubjectRow(name, f"LoRA, CFG {scale:g}", *over_words(torch.stack(shown[1:]).mean(0), extent.seeds))]
    save_sheet(output / f"{name}.png", painted[:2])
    return rows


class Gallery:
    """Features of the subject's images, then of all real emoji in two styles."""

    def __init__(self, scorer: JointScorer, subject: torch.Tensor) -> None:
        """`subject` are the subject's real images as the VAE shows them."""
        self._of, self._subjects = scorer.word_features, len(subject)
        images = scorer.images
        self._rows = torch.cat([images.images[style][0] for style in STYLES])
        self._held_out = [index for index, row in enumerate(self._rows.tolist()) if images.splits[row] == HELD_OUT]
        self._features = self._of(torch.cat([subject, *(images.images[style][1] for style in STYLES)]))

    def shows(self, pixels: torch.Tensor) -> torch.Tensor:
        """bool [N]: whether the nearest of each of the images is the subject."""
        return nearest_index(self._of(pixels), self._features) < self._subjects

    def found(self) -> float:
        """The share of the subject's own images whose nearest other image is the subject."""
        return _share([self._nearest_but(index, [index]) < self._subjects for index in range(self._subjects)])

    def mistaken(self) -> float:
        """The share of real held-out emoji whose nearest image of another word is the subject."""
        return _share([self._nearest_but(
            self._subjects + index, (self._subjects + (self._rows == self._rows[index]).nonzero()[:, 0]).tolist())
            < self._subjects for index in self._held_out])

    def _nearest_but(self, index: int, left_out: list[int]) -> int:
        likeness = self._features @ self._features[index]
        likeness[left_out] = -torch.inf
        return int(likeness.argmax())


def _share(values: list[bool]) -> float:
    return sum(values) / len(values)


def _copied(files: list[Path], folder: Path) -> Path:
    """These images and their captions in a folder of their own, which holds nothing else."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for file in files:
        for part in (file, file.with_suffix(".txt")):
            shutil.copyfile(part, folder / part.name)
    return folder
