"""Samples on the way show the model as it is after a step, and the training does not notice them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from lib_lora_train import events
from lib_lora_train.dataset.plan import Plan
from lib_lora_train.evaluation.prompts import default_prompts, parse_prompts
from lib_lora_train.events import Sampled, Warned
from lib_lora_train.host.port import LeasedModel, RenderRequest
from lib_lora_train.host.standalone import StandaloneHost
from lib_lora_train.model.sampler import SampleRequest
from lib_lora_train.run import job, sampling
from lib_lora_train.run.runner import Runner
from lib_lora_train.run.sampling import interval
from lib_lora_train.settings import parse
from tests.fake_host import FakeHost
from tests.jobs import plan_of, run_settings
from tests.run.test_job import of

PROMPTS = "red cat <lora:style:0.5> --n photo --w 70 --s 3\nblue --l 1 --s 2 --d 5\na <lora:none:1>"


class Ran(NamedTuple):
    host: StandaloneHost
    folder: Path
    seen: list[events.Event]
    path: Path


def images_in(folder: Path) -> Path:
    folder.mkdir(parents=True)
    for number in range(3):
        Image.new("RGB", (64, 64), (80 * number, 40, 120)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"a photo, {number}", encoding="utf-8")
    return folder


def run(place: Path, tiny_file: Path, *, stop: Callable[[list], str] = lambda seen: "", **changes: object) -> Ran:
    """A run of its own in `place`, or the next one there."""
    images = place / "pictures" if (place / "pictures").exists() else images_in(place / "pictures")
    host = StandaloneHost(tiny_file, lora_folder=place / "loras", runs_folder=place / "runs")
    folder, seen = place / "runs" / str(changes.get("output_name", "zzk")), list[events.Event]()
    folder.mkdir(parents=True, exist_ok=True)
    chosen = parse({"train_data_dir": str(images), "output_name": "zzk", "resolution": "64", "min_bucket_reso": 64,
                    "num_repeats": 1, "max_train_steps": 3, "network_dim": 2, "learning_rate": 0.02, "seed": 7,
                    "save_precision": "float", "save_state": False, "validation": False, "sample_prompts": PROMPTS, **changes})
    finished = run_settings(chosen, host, report=seen.append, stop=lambda: stop(seen), folder=folder)
    return Ran(host, folder, seen, Path(finished.path))


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image, dtype=int)


def rendered(ran: Ran, prompt: str, **changes: object) -> np.ndarray:
    return np.asarray(ran.host.render(RenderRequest(prompt, width=64, height=64, **changes))[0], dtype=int)


@pytest.fixture(scope="module")
def whole(tiny_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Ran:
    """A run of three steps that samples at every second, beside a LoRA `style`."""
    place = tmp_path_factory.mktemp("whole")
    run(place, tiny_file, output_name="style", sample_images=False, network_train_unet_only=False, text_encoder_lr=0.02,
        max_train_steps=2)
    return run(place, tiny_file, sample_every_n_steps=2)


def test_each_prompt_is_sampled_before_the_first_step_as_often_as_asked_for_and_at_the_end(whole: Ran) -> None:
    found = [(s.step, s.epoch, s.index, s.prompt, s.seed) for s in of(Sampled, whole.seen)]
    assert found == [(step, epoch, *prompt) for step, epoch in ((0, 1), (2, 1), (3, 1))
                     for prompt in ((0, "red cat <lora:style:0.5>", 7), (1, "blue", 5))]
    files = [s.file for s in of(Sampled, whole.seen)]
    assert files[:2] == ["samples/step-00000000-1.png", "samples/step-00000000-2.png"]
    assert sorted(files) == sorted(path.relative_to(whole.folder).as_posix() for path in whole.folder.glob("*/*.png"))
    with Image.open(whole.folder / files[-2]) as image:
        assert image.text["parameters"] == (
            "red cat <lora:style:0.5> <lora:zzk:1>\nNegative prompt: photo\n"
            "Steps: 3, Sampler: Euler, CFG scale: 7, Seed: 7, Size: 64x64, Model: tiny")
    stages = [(s.done, s.total) for s in of(events.Stage, whole.seen) if s.name == "Sampling pictures"]
    assert stages == [(0, 2), (1, 2), (2, 2)] * 3
    kinds = [event.kind for event in whole.seen if event.kind in ("saved", "sampled", "step")]
    assert kinds[-3:] == ["saved", "sampled", "sampled"]  # the result is safe before anything is made of it


def test_before_the_first_step_the_unadapted_model_is_seen(whole: Ran) -> None:
    for number, (prompt, changes) in enumerate(REQUESTS, start=1):
        assert np.array_equal(pixels(whole.folder / f"samples/step-00000000-{number}.png"), rendered(whole, prompt, **changes))


REQUESTS = (("red cat <lora:style:0.5>", {"negative_prompt": "photo", "steps": 3, "seed": 7}),
            ("blue", {"cfg_scale": 1.0, "steps": 2, "seed": 5}))


def test_the_last_sample_is_what_the_result_renders(whole: Ran) -> None:
    for number, (prompt, changes) in enumerate(REQUESTS, start=1):
        found = pixels(whole.folder / f"samples/step-00000003-{number}.png")
        assert abs(found - rendered(whole, f"{prompt}<lora:zzk:1>", **changes)).max() <= 1
        assert abs(found - rendered(whole, prompt, **changes)).max() > 1


def test_a_prompt_with_a_lora_that_is_not_there_and_a_size_that_is_none_are_told_at_the_start(whole: Ran) -> None:
    first = next(number for number, event in enumerate(whole.seen) if isinstance(event, Sampled))
    told = [event.message for event in whole.seen[:first] if isinstance(event, Warned)]
    assert [("'none'" in text, "70×64" in text) for text in told if "sample" in text.lower()] == [(False, True), (True, False)]
    assert not of(Warned, whole.seen[first:])


def test_what_is_trained_is_the_same_to_the_bit_and_so_is_the_global_random_state(tiny_file: Path, whole: Ran) -> None:
    state = torch.get_rng_state()
    without = run(whole.folder.parent.parent, tiny_file, output_name="without", sample_images=False)
    assert not of(Sampled, without.seen) and torch.equal(state, torch.get_rng_state())
    sampled, plain = load_file(whole.path), load_file(without.path)
    assert sampled.keys() == plain.keys() and all(torch.equal(sampled[key], plain[key]) for key in plain)
    assert [s.loss for s in of(events.Step, whole.seen)] == [s.loss for s in of(events.Step, without.seen)]


def test_with_text_encoders_in_training_and_other_weights_in_memory_it_samples_too(
        tiny_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Samples are asked for before the second step; at the end the text is that of the trained encoders.
    asked, original = iter([False, True, False, False]), job.run_job
    monkeypatch.setattr("tests.jobs.run_job", lambda plan, host, **given: original(
        plan, host, sample_now=lambda: next(asked), **given))
    ran = run(tmp_path, tiny_file, network_train_unet_only=False, text_encoder_lr=0.02, sample_at_first=False,
              base_weights="int8", channels_last="on", gradient_checkpointing=True, sample_prompts="red --s 2 --l 1")
    assert [s.step for s in of(Sampled, ran.seen)] == [1, 3]
    found, (exact, without) = pixels(ran.folder / "samples/step-00000003-1.png"), (
        rendered(ran, prompt, steps=2, cfg_scale=1.0, seed=7) for prompt in ("red<lora:zzk:1>", "red"))
    assert abs(found - exact).mean() < abs(found - without).mean() / 2


def test_a_stop_and_others_who_wait_come_between_two_pictures(
        tiny_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    yielded: list[int] = []
    seen: list[events.Event] = []

    def stop(so_far: list[events.Event]) -> str:
        seen[:] = so_far
        return "save" if of(Sampled, so_far)[-1:] and of(Sampled, so_far)[-1].step == 2 else ""
    monkeypatch.setattr(LeasedModel, "others_waiting", lambda self: len(of(Sampled, seen)) == 1 and not yielded)
    monkeypatch.setattr(LeasedModel, "yield_model", lambda self, report: yielded.append(len(of(Sampled, seen))) or self.tensors)
    ran = run(tmp_path, tiny_file, stop=stop, sample_every_n_steps=2, sample_prompts="a --s 1\nb --s 1")
    assert yielded == [1]
    assert [(s.step, s.index) for s in of(Sampled, ran.seen)] == [(0, 0), (0, 1), (2, 0)]
    assert len(of(events.Step, ran.seen)) == 2 and ran.path.is_file()


def test_whatever_goes_wrong_costs_a_sample_and_is_told_once(
        tiny_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = sampling.sample_batch

    def failing(model, requests, **named):
        prompt = requests[0].prompt
        if prompt == "full":
            raise RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")
        if prompt == "defect":
            raise ValueError("a defect of ours")
        latents = original(model, requests, **named)
        return latents * float("nan") if prompt == "nan" else latents
    monkeypatch.setattr(sampling, "sample_batch", failing)
    monkeypatch.setattr(sampling, "find_lora", lambda tag, folder: {}[tag.name])
    ran = run(tmp_path, tiny_file, max_train_steps=1, sample_prompts="full\nnan --s 1\ndefect\nfine --s 1\na <lora:odd>")
    assert [(s.step, s.index) for s in of(Sampled, ran.seen)] == [(0, 3), (1, 3)]
    told = [w.message for w in of(Warned, ran.seen) if "sample" in w.message.lower()]
    assert [[word in text for text in told] for word in ("KeyError", "memory", "not finite", "a defect of ours")] == [
        [row == column for column in range(4)] for row in range(4)]
    (ran.folder / "samples").rename(tmp_path / "elsewhere")
    (ran.folder / "samples").write_text("a file where the folder should be", encoding="utf-8")
    again = run(tmp_path, tiny_file, max_train_steps=1, sample_prompts="fine --s 1\nfine --s 1", overwrite=True)
    assert not of(Sampled, again.seen) and again.path.is_file()
    assert len([w for w in of(Warned, again.seen) if "written" in w.message]) == 1


@pytest.mark.parametrize(("steps", "batch", "text", "at_most"), [
    (1500, 1, "", 0.06), (1500, 4, "", 0.06), (20_000, 1, "", 0.06), (1500, 1, "a --s 50\nb --w 1024 --h 1024", None),
    (40, 1, "", None)])
def test_samples_take_a_small_share_of_the_runs_unet_passes(steps: int, batch: int, text: str, at_most: float | None) -> None:
    defaults = SampleRequest("", steps=12)
    prompts = parse_prompts(text, defaults=defaults) or default_prompts("abcd", trigger_word="", defaults=defaults)
    plan = dataclasses.replace(
        plan_of(parse({"train_batch_size": batch})), prompts=prompts, resolutions=((512, 512),),
        schedule=Plan(batches_per_epoch=steps, steps_per_epoch=steps, epochs=1, steps=steps, buckets=()))
    every = interval(plan)
    at = {0, *range(every, steps, every), steps}
    passes = sum(2 * p.request.steps * p.request.width * p.request.height / 512 ** 2 for p in prompts) * len(at)
    assert 2 <= len(at) <= 12
    if at_most is None:  # even two sets are more
        assert len(at) == 2 and passes > 0.06 * 3 * steps * batch
    else:
        assert passes <= at_most * 3 * steps * batch and len(at) > 2
        assert len(at) == 12 or passes * (len(at) + 1) / len(at) > at_most * 3 * steps * batch


@pytest.mark.parametrize(("changes", "every"), [
    ({"sample_every_n_epochs": 2, "sample_every_n_steps": 3}, 20), ({"sample_every_n_steps": 3}, 3)])
def test_how_often_may_be_said(changes: dict[str, object], every: int) -> None:
    schedule = Plan(batches_per_epoch=10, steps_per_epoch=10, epochs=5, steps=50, buckets=())
    plan = dataclasses.replace(plan_of(parse(changes)), schedule=schedule, prompts=default_prompts(
        ["a"], trigger_word="", defaults=SampleRequest("")))
    assert interval(plan) == every


def test_where_nobody_says_how_often_samples_are_those_of_saves() -> None:
    schedule = Plan(batches_per_epoch=100, steps_per_epoch=100, epochs=50, steps=5000, buckets=())
    plan = dataclasses.replace(plan_of(parse({"save_every_n_epochs": 3})), schedule=schedule, resolutions=((512, 512),),
                               prompts=default_prompts("a", trigger_word="", defaults=SampleRequest("", steps=12)))
    rarely = dataclasses.replace(plan, settings=parse({"save_every_n_epochs": 30}))
    assert interval(plan) % 300 == 0 and interval(plan) - 300 < interval(rarely) <= interval(plan)


def test_samples_are_asked_for_while_a_run_that_samples_is_under_way(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers, host, one = [], FakeHost(tmp_path), Runner()

    def fake(plan, host, *, report, stop, sample_now, save_now, paused, folder):
        answers.extend([sample_now(), one.sample_now(), sample_now(), sample_now()])
        return events.Finished("done", "ready", "", 1)
    monkeypatch.setattr("lib_lora_train.run.runner.run_job", fake)
    for chosen, expected in (({}, [False, True, True, False]), ({"sample_images": False}, [False] * 4)):
        assert not one.sample_now()
        answers.clear()
        started = parse({"output_name": "zzk", **chosen})
        one.start(plan_of(started), host)
        assert one.wait(30) and answers == expected
