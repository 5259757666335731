"""What is measured of a run: right, cheap, and without a trace in what is learnt."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from safetensors.torch import load_file

from lib_lora_train import events
from lib_lora_train.demo import SETTINGS, demo_host
from lib_lora_train.errors import Interrupted
from lib_lora_train.evaluation import fixed_loss
from lib_lora_train.evaluation.fixed_loss import BANDS
from lib_lora_train.evaluation.schedule import plan_measurements, spread
from lib_lora_train.host.lease import frozen_model
from lib_lora_train.host.standalone import StandaloneHost
from lib_lora_train.model.sd.unet import UNet
from lib_lora_train.run.measuring import measurements_of, stands_still
from lib_lora_train.run.planning import plan_job
from lib_lora_train.settings import parse
from lib_lora_train.training.noise import draw, seed_of
from tests.injection import FAULTS
from tests.jobs import run_settings

WORK = {"max_train_steps": 14, "save_every_n_steps": 6}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Thirteen images, two of which are kept back."""
    return drawn(tmp_path_factory.mktemp("measured"), 13)


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two images, of which crops are measured."""
    return drawn(tmp_path_factory.mktemp("few"), 2)


def drawn(folder: Path, count: int) -> Path:
    for number in range(count):
        image = Image.new("RGB", (64, 64), (19 * number, 80, 255 - 19 * number))
        ImageDraw.Draw(image).ellipse((8, 8, 20 + 3 * number, 56), fill="white")
        image.save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"a photo, cat {number % 3}", encoding="utf-8")
    return folder


def settings(pictures: Path, **changes: object):
    return parse({"train_data_dir": str(pictures), "output_name": "zzk", "resolution": "64", "min_bucket_reso": 64,
                  "num_repeats": 1, "max_train_steps": 3, "network_dim": 4, "network_alpha": 2, "save_precision": "float",
                  "learning_rate": 1e-3, "trigger_word": "zzk", "overwrite": True, "sample_images": False, **changes})


def run(chosen, host, *, folder: Path | None = None, stop_after: int = 0):
    """The last event (None after a stop) and all others; stopped without saving after so many steps."""
    seen: list[events.Event] = []

    def stop() -> str:
        return "stop" if stop_after and len(of(events.Step, seen)) >= stop_after else ""
    try:
        return run_settings(chosen, host, report=seen.append, stop=stop, folder=folder), seen
    except Interrupted:
        return None, seen


def of(kind, seen):
    return [event for event in seen if isinstance(event, kind)]


@dataclasses.dataclass(frozen=True)
class Counted:
    """A run, and the passes of the UNet with one image that it took; forward and backward are three."""

    finished: events.Finished
    seen: list[events.Event]
    passes: int


@pytest.fixture(scope="module")
def work(pictures: Path, tiny_file: Path, tmp_path_factory: pytest.TempPathFactory):
    """(plan, a run that is measured, the same run that is not)."""
    folder = tmp_path_factory.mktemp("run")
    host, passes, original = StandaloneHost(tiny_file, lora_folder=folder, runs_folder=folder), [], UNet.__call__

    def counted(unet, x, *rest, **named):
        passes.append(0 if x.is_meta else len(x) * (3 if torch.is_grad_enabled() else 1))
        return original(unet, x, *rest, **named)

    def run_counted(**changes: object) -> Counted:
        passes.clear()
        finished, seen = run(settings(pictures, **WORK, **changes), host)
        return Counted(finished, seen, sum(passes))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(UNet, "__call__", counted)
        return (plan_job(settings(pictures, **WORK), host), run_counted(validate_every_n_steps=5),
                run_counted(validation=False, output_name="off"))


def test_the_zero_line_is_the_loss_of_the_checkpoint_as_the_paper_has_it(work, pictures, tiny_file):
    """Of the held-out images: (eps - eps_theta(sqrt(abar) x_0 + sqrt(1 - abar) eps, t))², the mean of each third."""
    plan, on, _ = work
    zero = of(events.Measured, on.seen)[0]
    expected = [[], [], []]
    with StandaloneHost(tiny_file, lora_folder=pictures, runs_folder=pictures).lease() as leased:
        model = frozen_model(leased, plan.settings)
    for number, image in enumerate(plan.held_out):
        pixels = torch.from_numpy(np.array(Image.open(image.example.path), dtype=np.float32)).permute(2, 0, 1)[None]
        mean, std = model.vae.encode(pixels / 127.5 - 1)
        context = model.text.encode([model.text.tokenize(image.example.caption)], clip_skip=1).context
        for band, t in enumerate([83, 416, 750] if number == 0 else [250, 583, 916]):
            drawn = draw(mean.shape, seed=seed_of(42, "fixed", image.example.path.name), step=0, micro=t, timesteps=1)
            x_0 = (mean + std * drawn["latent_noise"]) * 0.18215
            abar = torch.cumprod(1 - torch.linspace(0.00085 ** 0.5, 0.012 ** 0.5, 1000, dtype=torch.float64) ** 2, 0)[t].float()
            x_t = abar.sqrt() * x_0 + (1 - abar).sqrt() * drawn["noise"]
            eps = model.unet(x_t, torch.tensor([t]), context)
            expected[band].append(float((eps - drawn["noise"]).square().mean()))
    assert zero.step == 0 and zero.held_out == zero.unadapted_held_out and zero.training == zero.unadapted_training
    assert zero.held_out == pytest.approx([sum(band) / len(band) for band in expected], rel=1e-5)


def test_it_is_measured_at_every_save_every_n_steps_and_at_the_end_and_the_loss_on_its_own_images_falls(work):
    _, on, off = work
    found = of(events.Measured, on.seen)
    assert [m.step for m in found] == [0, 5, 6, 10, 12, 14] and not of(events.Measured, off.seen)
    saved = {event.step: event.path for event in of(events.Saved, on.seen)}
    assert {m.step: m.path for m in found if m.path} == saved and set(saved) == {6, 12, 14}
    assert all(len(m.training) == len(m.held_out) == BANDS for m in found)
    assert sum(found[-1].training) < sum(found[1].training) < sum(found[0].unadapted_training)
    assert 0 < found[1].strength["unet"] < found[-1].strength["unet"] < 1
    held_out, = of(events.HeldOut, on.seen)
    assert len(held_out.pictures) == 2 and not held_out.derived
    # What the stream tells is in order: no step is told after it was measured.
    steps = [event.step for event in on.seen if isinstance(event, (events.Step, events.Measured))]
    assert steps == sorted(steps)


def test_each_training_image_has_its_loss_and_no_held_out_one_has(work):
    plan, on, _ = work
    losses, = of(events.ImageLosses, on.seen)
    held_out, = of(events.HeldOut, on.seen)
    assert losses.step == 14 and len(losses.images) == len(losses.losses) == len(losses.unadapted) > 0
    assert set(losses.images) <= {example.path.name for example in plan.dataset.examples} and not {*losses.images} & {
        *held_out.pictures}


def test_it_takes_the_passes_of_the_unet_that_were_planned(work):
    plan, on, off = work
    assert on.passes - off.passes == measurements_of(dataclasses.replace(
        plan, settings=settings(Path(), **WORK, validate_every_n_steps=5))).passes > 0


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("images, held_out", [(15, 2), (15, 4), (60, 6), (500, 50), (5, 4), (15, 0)])
@pytest.mark.parametrize("saves", [(), range(150, 1500, 150)], ids=["one save", "ten saves"])
def test_a_run_of_1500_steps_is_measured_for_at_most_four_per_cent(batch, images, held_out, saves):
    passes = 3 * 1500 * batch
    plan = plan_measurements(passes=passes, steps=1500, saves=saves, training=images, held_out=held_out)
    assert plan.passes <= 0.04 * passes
    assert 5 <= len(plan.steps) <= 40 and plan.steps[-1] == 1500 and plan.steps[0] <= 300
    assert plan.looked_at >= min(images, 44) and min(plan.training, images) >= 2


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_the_shortest_run_is_measured_at_its_end(steps):
    assert plan_measurements(passes=3 * steps, steps=steps, saves=(), training=3, held_out=3).steps == (steps,)


def test_all_saves_are_measured_while_they_cost_little_and_all_that_the_user_asks_for():
    saves = range(1000, 10_000, 1000)
    assert set(saves) <= set(plan_measurements(passes=30_000, steps=10_000, saves=saves, training=9, held_out=2).steps)
    chosen = plan_measurements(passes=30, steps=10, saves=(4,), training=9, held_out=2, every=3)
    assert chosen.steps == (3, 4, 6, 9, 10)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("total, count", [(300, 50), (7, 4), (4, 4), (3, 9), (1, 1), (0, 3), (9, 0)])
def test_images_are_spread_over_the_set(total, count, seed):
    chosen = spread(range(total), count, seed=seed)
    assert len(set(chosen)) == min(count, total) and list(chosen) == sorted(chosen)
    assert all(later - earlier <= 2 * -(-total // count) for earlier, later in zip(chosen, chosen[1:], strict=False))


VARIED = {
    "text encoder, shuffled, dropped": {"network_train_unet_only": False, "shuffle_caption": True, "caption_dropout_rate": 0.3,
                                        "caption_tag_dropout_rate": 0.3, "gradient_accumulation_steps": 2},
    "shuffled, on disk": {"shuffle_caption": True, "keep_tokens": 0, "cache_latents_to_disk": True, "flip_aug": True},
    "varied images": {"color_aug": True, "random_crop": True, "gradient_checkpointing": True}}


@pytest.mark.parametrize("changes", VARIED.values(), ids=VARIED)
def test_measured_and_resumed_or_not_the_weights_are_the_same_to_the_byte(changes, few, host):
    changes = {"save_every_n_steps": 1, **changes}
    straight, _ = run(settings(few, validation=False, **changes), host)
    expected = load_file(straight.path)
    folder = host.runs_folder / "zzk-1"
    watched = settings(few, validate_every_n_steps=2, **changes)
    _, before = run(watched, host, folder=folder, stop_after=2)
    finished, after = run(dataclasses.replace(watched, save=dataclasses.replace(watched.save, resume=str(folder))), host,
                          folder=folder)
    assert [m.step for m in of(events.Measured, before)] == [0, 1, 2] and [
        m.step for m in of(events.Measured, after)] == [0, 3]
    assert of(events.Measured, before)[0] == of(events.Measured, after)[0]
    learnt = load_file(finished.path)
    assert learnt.keys() == expected.keys() and all(torch.equal(learnt[key], expected[key]) for key in learnt)


def test_whatever_is_learnt_is_the_same_without_a_resume_too(work):
    _, on, off = work
    first, second = load_file(on.finished.path), load_file(off.finished.path)
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_a_measurement_that_is_no_number_is_told_as_such_and_ends_nothing(few, host, monkeypatch):
    original = fixed_loss.denoising_loss
    monkeypatch.setattr(fixed_loss, "denoising_loss", lambda *given, **named: original(*given, **named) * math.nan)
    finished, seen = run(settings(few), host)
    assert finished.outcome == "done" and all(math.isnan(loss) for m in of(events.Measured, seen) for loss in m.training)


@pytest.mark.parametrize("fault", ["the GPU's memory is full", "the memory is full", "an unexpected error"])
def test_a_measurement_that_fails_is_told_once_and_ends_nothing(fault, few, host, monkeypatch):
    original, calls = fixed_loss.denoising_loss, []

    def failing(*given, **named):
        calls.append(1)
        if len(calls) > 4:  # once the checkpoint alone was measured
            raise FAULTS[fault]()
        return original(*given, **named)
    monkeypatch.setattr(fixed_loss, "denoising_loss", failing)
    finished, seen = run(settings(few, validate_every_n_steps=1), host)
    assert finished.outcome == "done" and len(of(events.Step, seen)) == 3
    assert [m.step for m in of(events.Measured, seen)] == [0]
    assert sum("measured" in warning.message for warning in of(events.Warned, seen)) == 1


def test_a_held_out_image_that_cannot_be_decoded_is_told_and_the_others_are_measured(pictures, host, work):
    plan, _, _ = work
    broken = plan.held_out[0].example.path
    whole = broken.read_bytes()
    broken.write_bytes(whole[:len(whole) // 2])
    try:
        finished, seen = run(settings(pictures, max_train_steps=1), host)
    finally:
        broken.write_bytes(whole)
    assert finished.outcome == "done" and len(of(events.Measured, seen)[-1].held_out) == BANDS
    assert any(broken.name in warning.message for warning in of(events.Warned, seen))


def test_the_curve_of_the_demos_style_falls(tmp_path):
    host = demo_host(tmp_path)
    finished, seen = run(parse({**SETTINGS, "max_train_steps": 6, "train_batch_size": 1, "lr_scheduler": "constant",
                                "sample_images": False}), host)
    first, last = of(events.Measured, seen)
    assert sum(last.held_out) < 0.99 * sum(first.held_out) and sum(last.training) < 0.99 * sum(first.training)


@pytest.mark.parametrize("losses, still", [
    ([1 - 0.02 * n for n in range(40)], False),  # as fast as ever
    ([0.5 + math.exp(-n / 2) for n in range(8)], True),  # to 0.5, and no further
    ([0.5 + math.exp(-n / 2) for n in range(7)], False),  # too few to say
    ([0.3] * 20, True),
    ([0.5 + math.exp(-n / 2) for n in range(12)] + [0.6 + n / 20 for n in range(12)], False),  # it gets worse: not still
    ([math.nan] * 20, False)])
def test_what_stands_still(losses, still):
    assert stands_still(losses) is still


def test_a_run_that_learns_nothing_any_more_ends_by_itself_and_keeps_what_was_learnt(few, host):
    finished, seen = run(settings(few, early_stopping=True, learning_rate=1e-12, max_train_steps=20,
                                  validate_every_n_steps=1, validation_split=0.0), host)
    assert (finished.outcome, finished.steps) == ("stopped", 8) and Path(finished.path).is_file()
    assert "stood still" in finished.message and of(events.Measured, seen)[-1].step == 8
