"""`bench background`: how much of its pictures' background a LoRA takes along, with masks and with what preserves the model.

The demo's subject, where it stands on white, gets one striped background in the pictures that are trained, and masks of what is
not background; scenes that fill their picture stay whole. For each kind of training and each seed one run, and of its last
save four numbers:

stripes     the correlation of the stripes with what the LoRA changes in the frame of generated pictures of the subject, their
            outermost eighth, 0 where the trained background is not taken along
leak        how far that frame is from the base model's picture of the same prompt and noise: RMS, 0 to 1. The base model paints
            things on white
drift       as the results page measures it: the distance to the base model's picture of the same noise where the prompt does
            not call the subject, 0 to 2
likeness    as the results page measures it: to poses of the subject that were kept back, on their own white background
"""

from __future__ import annotations

import dataclasses
import shutil
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from lib_lora_train.dataset.augment import to_tensor
from lib_lora_train.dataset.examples import Example
from lib_lora_train.dataset.held_out import HeldOutImage
from lib_lora_train.dataset.images import read_image
from lib_lora_train.demo import SUBJECT
from lib_lora_train.evaluation.scores import Scorer
from lib_lora_train.host.lease import lease_for
from lib_lora_train.host.port import Host
from lib_lora_train.settings import Settings
from tools.bench.real_images import SIDE, to_image
from tools.bench.report import grid, machine_text, write_report
from tools.bench.sampler import CFG_SCALE, Sampler
from tools.bench.sheet import save_sheet
from tools.bench.subject import KEPT_BACK, SCENES, TRIGGER
from tools.bench.training import Say, train_lora

_CLASS = {"preservation_class": "monster"}
CASES: Mapping[str, Mapping[str, object]] = {
    "whole": {}, "masked": {"masked_loss": True}, "masked, 0.1 outside": {"masked_loss": True, "unmasked_weight": 0.1},
    "masked, base outside": {"masked_loss": True, "masked_prior_preservation_weight": 1.0},
    "dop": {"preservation": "dop", **_CLASS}, "blank": {"preservation": "blank"}, "dco": {"preservation": "dco", **_CLASS}}
SETTINGS: Mapping[str, object] = {"resolution": "128", "train_batch_size": 4, "network_dim": 16, "network_alpha": 16.0,
                                  "learning_rate": 1e-3, "save_state": False}
WITHOUT_TRIGGER = ("red apple", "dog face", "house", "car", "sun", "cake", "tree", "smiling face")
_STRIPES, _WIDTH, _BACKGROUND, _MARK = ((250, 200, 60), (60, 120, 220)), 24, 24, (255, 0, 255)


@dataclasses.dataclass(frozen=True)
class BackgroundPlan:
    """What to measure: a run of so many steps for each case and seed, so many pictures of each prompt."""

    output: Path
    cases: tuple[str, ...] = ("whole", "masked")
    seeds: tuple[int, ...] = (42, 43)
    steps: int = 200
    samples: int = 2
    cfg_scale: float = CFG_SCALE


@dataclasses.dataclass(frozen=True)
class Figures:
    """One run's numbers, as the module says."""

    case: str
    seed: int
    stripes: float
    leak: float
    drift: float
    likeness: float


def run_background(plan: BackgroundPlan, host: Host, *, say: Say) -> str:
    """Measure, write background.md and background.json into the output folder, and return the table."""
    data, kept_back = write_dataset(SUBJECT, plan.output / "subject")
    sampler = Sampler(host, steps=12, cfg_scale=plan.cfg_scale)
    called = [f"{TRIGGER}, {scene}" for scene in SCENES for _ in range(plan.samples)]
    others = [word for word in WITHOUT_TRIGGER for _ in range(plan.samples)]
    base = sampler.sample([*called, *others])
    found = []
    for case in plan.cases:
        for seed in plan.seeds:
            say(f"{case}, seed {seed}")
            name = f"background-{list(CASES).index(case)}-{seed}"
            lora = train_lora(host, settings={**SETTINGS, **CASES[case], "seed": seed}, data=data, trigger_word=TRIGGER,
                              name=name, steps=plan.steps, wanted=(plan.steps,), say=say)[plan.steps]
            shown = sampler.sample([*called, *others], sampler.lora(lora, weight=1.0))
            save_sheet(plan.output / f"{name}.png", [base, shown])
            found.append(_figures(case, seed, base, shown, called=len(called), kept_back=kept_back, host=host))
    text = _table(found, plan)
    return write_report(plan.output, "background", text, {"runs": [dataclasses.asdict(one) for one in found]})


def write_dataset(subject: Path, output: Path) -> tuple[Path, list[Path]]:
    """(a folder with three of four of the subject's images on stripes, their captions and masks; the images kept back)."""
    shutil.rmtree(output, ignore_errors=True)
    (output / "masks").mkdir(parents=True)
    files = sorted(subject.glob("*.png"))
    kept_back = files[KEPT_BACK]
    for file in files:
        if file not in kept_back:
            image = read_image(file)
            mask = subject_mask(image)
            mask.save(output / "masks" / file.name)
            Image.composite(image, stripes(image.size), mask).save(output / file.name)
            shutil.copyfile(file.with_suffix(".txt"), output / f"{file.stem}.txt")
    return output, kept_back


def subject_mask(image: Image.Image) -> Image.Image:
    """White where an RGB image is not the plain background that begins at its corners."""
    marked = image.copy()
    right, bottom = image.width - 1, image.height - 1
    for corner in ((0, 0), (right, 0), (0, bottom), (right, bottom)):
        if max(abs(own - 255) for own in image.getpixel(corner)) <= _BACKGROUND:
            ImageDraw.floodfill(marked, corner, _MARK, thresh=_BACKGROUND)
    return Image.fromarray(np.where((np.asarray(marked) == _MARK).all(axis=2), 0, 255).astype(np.uint8))


def stripes(size: tuple[int, int]) -> Image.Image:
    """Diagonal stripes of two colours."""
    across, down = np.meshgrid(np.arange(size[0]), np.arange(size[1]))
    return Image.fromarray(np.array(_STRIPES, np.uint8)[(across + down) // _WIDTH % 2])


def striped(images: torch.Tensor, without: torch.Tensor, size: tuple[int, int]) -> float:
    """The mean over images [N, 3, h, w] of the correlation, in their frame, of `stripes` of the trained images' `size` with the
    difference to those `without` the LoRA."""
    side = images.shape[-1]
    pattern = to_tensor(stripes(size).resize((side, side), Image.Resampling.BILINEAR))[:, _frame(side)]
    change = (images - without)[:, :, _frame(side)]
    pattern, change = (one - one.mean(dim=-1, keepdim=True) for one in (pattern[None], change))
    return float(torch.cosine_similarity(change.flatten(1), pattern.flatten(1)).mean())


def leak(images: torch.Tensor, without: torch.Tensor) -> float:
    """The mean over images [N, 3, h, w] of the RMS difference to those `without` the LoRA in their frame."""
    return float((images - without)[:, :, _frame(images.shape[-1])].square().mean(dim=(1, 2)).sqrt().mean())


def _frame(side: int) -> torch.Tensor:
    frame = torch.ones(side, side, dtype=torch.bool)
    frame[side // 8:-(side // 8), side // 8:-(side // 8)] = False
    return frame


def _figures(case: str, seed: int, without: torch.Tensor, shown: torch.Tensor, *, called: int, kept_back: Sequence[Path],
             host: Host) -> Figures:
    with lease_for(host, "Comparing pictures", settings=Settings(), should_stop=None) as lease:
        scorer = Scorer(lease, size=(SIDE, SIDE))
        for path in kept_back:
            width, height = read_image(path).size
            scorer.add_held_out(HeldOutImage(Example(path, "", 1, path.parent.name, width, height)), caption="", mask=None)
        likeness = [scorer.score(to_image(image), caption="").likeness for image in shown[:called]]
        drift = [scorer.distance(to_image(image), to_image(other))
                 for image, other in zip(shown[called:], without[called:], strict=True)]
    drift, likeness = ([one for one in values if one is not None] for values in (drift, likeness))
    with_lora, base = shown[:called], without[:called]
    size = read_image(kept_back[0]).size
    return Figures(case, seed, striped(with_lora, base, size), leak(with_lora, base), statistics.fmean(drift),
                   statistics.fmean(likeness))


def _table(found: Sequence[Figures], plan: BackgroundPlan) -> str:
    def cell(case: str, name: str) -> str:
        values = [getattr(one, name) for one in found if one.case == case]
        return f"{statistics.fmean(values):.3f} ({min(values):.3f} to {max(values):.3f})"
    names = ("stripes", "leak", "drift", "likeness")
    seeds = ", ".join(map(str, plan.seeds))
    rows = [(case, *(cell(case, name) for name in names)) for case in plan.cases]
    made = f"{plan.steps} steps, CFG scale {plan.cfg_scale:g}, seeds {seeds}: mean (least to most)."
    return "\n".join([f"{made} {machine_text(torch.device('cpu'))}", "", grid(("training", *names), rows)])
