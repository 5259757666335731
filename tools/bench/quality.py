"""`bench quality`: trains styles and a subject on fixed splits with fixed seeds, and measures what was learnt."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Mapping
from pathlib import Path

import torch

from lib_lora_train.demo import SUBJECT
from lib_lora_train.errors import DatasetError, translated
from lib_lora_train.host.port import Host
from lib_lora_train.host.standalone import StandaloneHost
from tools.bench import joint_scorer, jug, real_images, styled_images, table
from tools.bench.control import fine_tune, train_control
from tools.bench.headline import HeadlineRow, Sample, Trainer, measure_headlines
from tools.bench.joint_scorer import TRIGGER, Extent, JointScorer, WordGate
from tools.bench.report import write_report
from tools.bench.sampler import WITHOUT, Adapters, Sampler
from tools.bench.style_scorer import StyleGate
from tools.bench.subject import SubjectRow, measure_subject
from tools.bench.training import Say, settings_of, train_lora

STEPS, SUBJECT_STEPS = 400, 200


@dataclasses.dataclass(frozen=True)
class QualityPlan:
    """What to measure. `packages` is where npm's packages are put, `subject` the character's dataset (None leaves the subjects
    out), `control` the checkpoint that diffusers trains too, as a LoRA and whole (None leaves that out). `varied` are other
    values of one setting each, {"learning_rate=1e-3": {"learning_rate": "1e-3"}}, with lines of their own.

    An `extent` whose scorers are fitted with less effort than THOROUGH's is to see whether it works, not to be quoted.
    """

    output: Path
    packages: Path
    extent: Extent = joint_scorer.THOROUGH
    styles: tuple[str, ...] = styled_images.GRADED
    subject: Path | None = SUBJECT
    control: Path | None = None
    steps: int = STEPS
    subject_steps: int = SUBJECT_STEPS
    changes: Mapping[str, object] = dataclasses.field(default_factory=dict)
    varied: Mapping[str, Mapping[str, object]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Quality:
    """All figures of a run."""

    checkpoint: str
    settings: dict[str, object]
    extent: Extent
    torch: str
    seconds: float
    gates: dict[str, tuple[StyleGate, WordGate]]
    own: float
    headlines: list[HeadlineRow]
    subject: list[SubjectRow]


def run_quality(plan: QualityPlan, host: Host, *, say: Say) -> Quality:
    """Measure, telling progress line by line; the table goes to `plan.output`/quality.md, the figures to quality.json.

    Raises SettingError for settings that do not exist or are not free, DatasetError, ModelError, OutputError, and what
    `run_job` raises.
    """
    begin, settings = time.monotonic(), settings_of(plan.changes)
    variants = {what: settings_of({**plan.changes, **changes}) for what, changes in plan.varied.items()}
    if plan.subject and not any(plan.subject.glob("*.png")):
        raise DatasetError(f"There are no pictures in {plan.subject}", remedy="install the extension anew, with its demo")
    with translated("making the folder of the results"):
        plan.output.mkdir(parents=True, exist_ok=True)
    say("Fitting the scorers ...")
    images = styled_images.load(real_images.load(), plan.packages)
    sampler = Sampler(host, steps=plan.extent.sampler_steps)
    scorer = JointScorer(sampler, images, plan.extent)
    gates_text = table.gates_text(scorer.gates, scorer.own)
    say(gates_text)
    trainers: dict[str, Trainer] = {what: functools.partial(_train, plan, host, sampler, chosen, say)
                                    for what, chosen in {"LoRA": settings, **variants}.items()}
    if plan.control:
        trainers["LoRA by diffusers"] = functools.partial(_train_control, plan, sampler, plan.control, settings)
        trainers["whole UNet by diffusers"] = functools.partial(_fine_tune, plan, plan.control, settings)
    headlines = measure_headlines(sampler, scorer, trainers, styles=plan.styles, output=plan.output, say=say)
    subjects = {"character": plan.subject, "jug": jug.draw(plan.output / "data" / "jug")} if plan.subject else {}
    subject = [row for name, data in subjects.items() for row in measure_subject(
        host, sampler, scorer, name=name, data=data, output=plan.output, settings=settings, steps=plan.subject_steps, say=say)]
    checkpoint = host.checkpoint()
    quality = Quality(
        checkpoint=checkpoint.title if checkpoint else "", settings=dict(settings), extent=plan.extent, torch=torch.__version__,
        seconds=time.monotonic() - begin, gates=scorer.gates, own=scorer.own, headlines=headlines, subject=subject)
    parts = [table.intro_text(settings=quality.settings, checkpoint=quality.checkpoint, extent=plan.extent,
                              words=len(scorer.words), seconds=quality.seconds),
             gates_text, table.headlines_text(headlines, scorer.gates, steps=plan.steps)]
    if subject:
        parts.append(table.subject_text(subject, steps=plan.subject_steps))
    write_report(plan.output, "quality", "\n\n".join(parts) + "\n", dataclasses.asdict(quality))
    return quality


def _train(plan: QualityPlan, host: Host, sampler: Sampler, settings: Mapping[str, object], say: Say, data: Path, name: str,
           seed: int) -> Sample:
    path = train_lora(host, settings={**settings, "seed": seed}, data=data, trigger_word=TRIGGER, name=name, steps=plan.steps,
                      wanted=(plan.steps,), say=say)[plan.steps]
    return _sample(sampler, sampler.lora(path, weight=1.0))


def _train_control(plan: QualityPlan, sampler: Sampler, checkpoint: Path, settings: Mapping[str, object], data: Path,
                   name: str, seed: int) -> Sample:
    path = train_control(checkpoint, settings={**settings, "seed": seed}, data=data, trigger_word=TRIGGER,
                         target=plan.output / "control" / f"{name}.safetensors", steps=plan.steps)
    return _sample(sampler, sampler.lora(path, weight=1.0))


def _fine_tune(plan: QualityPlan, checkpoint: Path, settings: Mapping[str, object], data: Path, name: str, seed: int
               ) -> Sample:
    path = fine_tune(checkpoint, settings={**settings, "seed": seed}, data=data, trigger_word=TRIGGER,
                     target=plan.output / "control" / f"{name}.safetensors", steps=plan.steps)
    host = StandaloneHost(path, lora_folder=plan.output / "loras", runs_folder=plan.output / "runs")
    return _sample(Sampler(host, steps=plan.extent.sampler_steps), WITHOUT)


def _sample(sampler: Sampler, lora: Adapters) -> Sample:
    return lambda prompts, scale: sampler.sample(prompts, lora, cfg_scale=scale)
