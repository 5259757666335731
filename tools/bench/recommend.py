"""`bench recommend`: how well the scores of a run's grid order its saves, beside scorers that the scores know nothing of.

One run of the demo's style and of its subject, with a save every so many steps; the grid, its scores and the recommendation as
a user gets them; and for each save the yardstick's points: for the style the share of images of words that were not trained in
which style and word are right, and for the subject the share of new scenes whose nearest real picture is the subject. All that
is made stays in the output folder, so that the command goes on where it was stopped.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from PIL import Image, ImageOps

from lib_lora_train.adapters.file import load
from lib_lora_train.dataset.augment import to_tensor
from lib_lora_train.dataset.images import read_image
from lib_lora_train.demo import STYLE, SUBJECT
from lib_lora_train.errors import translated
from lib_lora_train.evaluation.resemblance import resemblance, subject_features
from lib_lora_train.evaluation.scores import NAMES
from lib_lora_train.host.lease import lease_for
from lib_lora_train.host.port import Host
from lib_lora_train.results.grid import SampleOptions, read_grid, sample_grid
from lib_lora_train.results.history import read_history
from lib_lora_train.results.recommend import Recommendation, recommended_by_loss, recommended_by_scores
from lib_lora_train.results.references import references_of, settings_of
from lib_lora_train.results.saves import Save, saves_of
from lib_lora_train.results.scoring import score_grid
from lib_lora_train.run.job import run_job
from lib_lora_train.run.planning import plan_job
from lib_lora_train.run.record import RunRecord
from lib_lora_train.settings import parse
from lib_lora_train.storage.atomic import write_atomic
from tools.bench import real_images, styled_images
from tools.bench.joint_scorer import Extent, JointScorer
from tools.bench.report import grid as table
from tools.bench.report import write_report
from tools.bench.sampler import CFG_SCALE, WITHOUT, Sampler
from tools.bench.subject import KEPT_BACK, SCENES, Gallery
from tools.bench.training import Say

TRIGGERS = {"style": "sticker", "subject": "zorbi"}
DATA = {"style": STYLE, "subject": SUBJECT}
SETTINGS: Mapping[str, object] = {
    "resolution": "128", "train_batch_size": 4, "network_dim": 16, "network_alpha": 16.0, "learning_rate": 1e-3,
    "sample_images": False, "save_state": False, "overwrite": True}
"""The demo's."""
SCENE_SAMPLES = 4


@dataclasses.dataclass(frozen=True)
class RecommendPlan:
    """What to measure. `extent` is that of the scorers, as for `bench quality`."""

    output: Path
    cases: tuple[str, ...] = ("style", "subject")
    seeds: tuple[int, ...] = (42,)
    steps: int = 420
    every: int = 30
    sampler_steps: int = 10
    extent: Extent = Extent(seeds=1)
    changes: Mapping[str, object] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class SaveFigures:
    """One save: what the scores say of it (higher is better for the first ones), and the yardstick's points in per cent."""

    save: str
    step: int
    numbers: dict[str, float]
    points: float


@dataclasses.dataclass(frozen=True)
class CaseFigures:
    """One run. `correlations` are Spearman's, of each number and of the two recommended orders with the yardstick's points;
    `below` is how many points each recommended save is below the best one."""

    name: str
    seed: int
    unadapted: dict[str, float]
    unadapted_points: float
    saves: tuple[SaveFigures, ...]
    correlations: dict[str, float]
    recommended: dict[str, str]
    below: dict[str, float]


NUMBERS = (*NAMES, "whole image", "loss")
LOWER_IS_BETTER = ("drift", "copy_risk", "loss")


def run_recommend(plan: RecommendPlan, host: Host, *, say: Say) -> str:
    """Measure and return the report, which also lies in `plan.output`/recommend.md and .json."""
    with translated("making the folder of the results"):
        plan.output.mkdir(parents=True, exist_ok=True)
    yardstick, found = Yardstick(host, plan, say), []
    for seed in plan.seeds:
        for name in plan.cases:
            found.append(_measure(plan, host, yardstick, name=name, seed=seed, say=say))
            say(case_text(found[-1]))
    text = "\n\n".join([*map(case_text, found), summary_text(found)]) + "\n"
    return write_report(plan.output, "recommend", text, {"cases": [dataclasses.asdict(one) for one in found]})


def _measure(plan: RecommendPlan, host: Host, yardstick: Yardstick, *, name: str, seed: int, say: Say) -> CaseFigures:
    folder = _trained(plan, host, name=name, seed=seed, say=say)
    by_step = {save.step: save for save in saves_of(folder)}  # the last is also there under its step's name
    saves = list(by_step.values())
    say(f"  sampling and scoring the grid of {len(saves)} saves")
    sample_grid(host, folder, saves=[save.id for save in saves], weights=[1.0], options=SampleOptions(
        steps=plan.sampler_steps, cfg_scale=CFG_SCALE))
    scores = score_grid(host, folder)
    columns = scores.columns
    whole = _mean_resemblance(host, folder)
    measured = read_history(folder).measured
    losses = {event.step: sum(event.held_out) / sum(event.unadapted_held_out) for event in measured if event.held_out}
    points = yardstick.points(name, saves)
    figures = []
    for save in saves:
        column = next(one for one in columns if one.column.save == save.id)
        numbers = {number: getattr(column, number).mean for number in NAMES}
        figures.append(SaveFigures(save.id, save.step, {
            **{number: value for number, value in numbers.items() if value is not None}, "whole image": whole[save.id],
            **({"loss": losses[save.step]} if save.step in losses else {})}, points[save.id]))
    orders = {"by scores": recommended_by_scores(columns, held_out_following=scores.held_out_following),
              "by loss": recommended_by_loss(measured, saves)}
    return CaseFigures(
        name, seed, {number: value for number in NAMES if (value := getattr(columns[0], number).mean) is not None} | {
            "whole image": whole[""]}, points[""], tuple(figures), *compared(figures, orders))


def compared(figures: Sequence[SaveFigures], orders: Mapping[str, Recommendation | None]
             ) -> tuple[dict[str, float], dict[str, str], dict[str, float]]:
    """(correlations, recommended saves, points below the best) as `CaseFigures` has them."""
    points = {one.save: one.points for one in figures}
    numbers = [number for number in NUMBERS if all(number in one.numbers for one in figures)]
    correlations = {number: (-1 if number in LOWER_IS_BETTER else 1) * spearman(
        [one.numbers[number] for one in figures], [one.points for one in figures]) for number in numbers}
    known = {name: order for name, order in orders.items() if order is not None}
    for name, order in known.items():
        ids = [save for save, _ in order.order]
        correlations[name] = spearman([-ids.index(save) for save in ids], [points[save] for save in ids])
    best = max(points.values())
    return correlations, {name: order.save for name, order in known.items()}, {
        name: best - points[order.save] for name, order in known.items()}


def _trained(plan: RecommendPlan, host: Host, *, name: str, seed: int, say: Say) -> Path:
    """The folder of the run, trained where it is not there yet."""
    settings = parse({**SETTINGS, **plan.changes, "output_name": f"{name}-{seed}", "seed": seed, "trigger_word": TRIGGERS[name],
                      "train_data_dir": str(DATA[name]), "max_train_steps": plan.steps, "save_every_n_steps": plan.every,
                      "save_every_n_epochs": 0})
    folder = host.runs_folder / f"{name}-{seed}-{plan.steps}-{plan.every}"
    if (finished := read_history(folder).finished) is not None and finished.outcome == "done":
        return folder
    say(f"Training the {name} with seed {seed} for {plan.steps} steps ...")
    run_plan = plan_job(settings, host)
    (folder / "events.jsonl").unlink(missing_ok=True)
    record = RunRecord(folder, run_plan.settings)
    try:
        record.write(run_job(run_plan, host, report=record.write, stop=lambda: "", folder=folder))
    finally:
        record.close()
    return folder


def _mean_resemblance(host: Host, folder: Path) -> dict[str, float]:
    """{save: the mean cosine between the features of its images and of the held-out ones, each averaged over the image}, what
    likeness is compared with; "" is the base model."""
    settings, grid = settings_of(folder), read_grid(folder)
    assert grid is not None and grid.options.size is not None
    size, found = grid.options.size, dict[str, list[float]]()
    with lease_for(host, "Comparing pictures", settings=settings, should_stop=None) as lease:
        def features(image: Image.Image) -> torch.Tensor:
            pixels = to_tensor(ImageOps.fit(image, size))
            return subject_features(lease.model, lease.model.vae.encode(pixels[None])[0], clip_skip=1, dtype=lease.dtype)

        references = [features(read_image(image.example.path))
                      for image in references_of(folder, settings, allowed=None).held_out]
        for cell in grid.cells:
            if grid.prompts[cell.prompt].triggered:
                shown = features(read_image(folder / cell.file))
                found.setdefault(grid.columns[cell.column].save, []).extend(resemblance(shown, one) for one in references)
    return {save: sum(values) / len(values) for save, values in found.items()}


class Yardstick:
    """The points of saves, by scorers that are fitted when first asked; what was measured is kept."""

    def __init__(self, host: Host, plan: RecommendPlan, say: Say) -> None:
        self._host, self._plan, self._say = host, plan, say
        self._file = plan.output / "points.json"
        self._points: dict[str, float] = json.loads(self._file.read_text()) if self._file.is_file() else {}
        self._fitted: tuple[Sampler, JointScorer] | None = None

    def points(self, name: str, saves: Sequence[Save]) -> dict[str, float]:
        """{save's id: per cent}, and "" for the base model."""
        return {"": self.of(name, None)} | {save.id: self.of(name, save.path) for save in saves}

    def of(self, name: str, lora: Path | None) -> float:
        """The points of a LoRA in per cent; of the base model where there is none."""
        file_hash = load(lora).model_hash[:12] if lora else ""
        key = f"{name} {file_hash} {self._plan.sampler_steps} {dataclasses.astuple(self._plan.extent)}"
        if key not in self._points:
            self._say(f"  measuring {lora.stem if lora else 'the base model'} by the yardstick")
            self._points[key] = self._measured(name, lora)
            write_atomic(self._file, json.dumps(self._points, indent=1).encode())
        return self._points[key]

    def _measured(self, name: str, path: Path | None) -> float:
        if self._fitted is None:
            self._say("Fitting the scorers ...")
            sampler = Sampler(self._host, steps=self._plan.sampler_steps)
            images = styled_images.load(real_images.load(), self._plan.output / "packages")
            self._fitted = sampler, JointScorer(sampler, images, self._plan.extent)
        sampler, scorer = self._fitted
        lora = sampler.lora(path, weight=1.0) if path else WITHOUT
        if name == "style":
            words = [word for word in scorer.words for _ in range(self._plan.extent.seeds)]
            pixels = sampler.sample([f"{TRIGGERS[name]}, {word}" for word in words], lora)
            style, word = scorer.right(styled_images.STICKER, pixels, words)
            return 100 * float((style & word).float().mean())
        _, captions, pixels = real_images.read_dataset(DATA[name])
        scenes = [f"{TRIGGERS[name]}, {scene}" for scene in (*captions[KEPT_BACK], *SCENES) for _ in range(SCENE_SAMPLES)]
        shown = Gallery(scorer, sampler.through_vae(pixels)).shows(sampler.sample(scenes, lora))
        return 100 * float(shown.float().mean())


def spearman(xs: Sequence[float], ys: Sequence[float]) -> float:
    """Spearman's rank correlation, ties at the mean of their ranks; 0 where all of one side are equal."""
    a, b = _ranked(xs), _ranked(ys)
    covariance = sum((x - sum(a) / len(a)) * (y - sum(b) / len(b)) for x, y in zip(a, b, strict=True))
    spread = math.sqrt(_squares(a) * _squares(b))
    return covariance / spread if spread else 0.0


def _ranked(values: Sequence[float]) -> list[float]:
    return [sum(other < value for other in values) + (sum(other == value for other in values) - 1) / 2 for value in values]


def _squares(values: Sequence[float]) -> float:
    return sum((value - sum(values) / len(values)) ** 2 for value in values)


def case_text(case: CaseFigures) -> str:
    """The tables of one run."""
    numbers = [number for number in NUMBERS if number in case.saves[0].numbers]
    rows = [("base", case.unadapted, case.unadapted_points), *((str(one.step), one.numbers, one.points) for one in case.saves)]
    lines = [(label, *(f"{values[number]:.3f}" if number in values else "" for number in numbers), f"{points:.1f}")
             for label, values, points in rows]
    told = [f"Recommended {name}: {save}, {case.below[name]:.1f} points below the best."
            for name, save in case.recommended.items()]
    return "\n\n".join([f"### {case.name}, seed {case.seed}", table(("step", *numbers, "points"), lines), *told])


def summary_text(cases: Sequence[CaseFigures]) -> str:
    """The correlations of all runs."""
    numbers = list(dict.fromkeys(number for case in cases for number in case.correlations))
    lines = [(f"{case.name} {case.seed}", *(f"{case.correlations[number]:+.2f}" if number in case.correlations else ""
                                            for number in numbers)) for case in cases]
    return "\n\n".join(["### Spearman's rank correlation with the yardstick's points", table(("run", *numbers), lines)])
