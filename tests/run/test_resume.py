"""A run that was cut off goes on as if nothing had happened; one that is no longer the same run says so."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from lib_lora_train import events
from lib_lora_train.errors import Interrupted, LoraFileError, LoraTrainError, ModelError, OutputError, SettingError
from lib_lora_train.host.standalone import StandaloneHost
from lib_lora_train.inputs import prefetcher
from lib_lora_train.model.fingerprint import sampled_fingerprint
from lib_lora_train.run import job, resume, saver
from lib_lora_train.run.planning import RunPlan, plan_dataset, plan_job
from lib_lora_train.run.saver import Checkpointer
from lib_lora_train.settings import EvaluationSettings, SaveSettings
from lib_lora_train.training import checkpoint as checkpoint_module
from tests.jobs import run_settings
from tests.run.test_job import metadata, of, settings
from tools import tiny_checkpoint

STATE = "state.safetensors"
MAY_DIFFER = {"ss_training_finished_at", "modelspec.date"}
EXACT = {"save_every_n_steps": 2, "max_train_steps": 5, "overwrite": True}


def run(chosen, host, folder: Path | None, stop_after: int = 0):
    """Train in `folder`; stop without saving once that many steps are seen. Returns (the last event or None, all others)."""
    seen: list[events.Event] = []

    def stop() -> str:
        return "stop" if stop_after and len(of(events.Step, seen)) >= stop_after else ""
    try:
        return run_settings(chosen, host, report=seen.append, stop=stop, folder=folder), seen
    except Interrupted:
        return None, seen


def interrupted(chosen, host, *, after: int = 3) -> Path:
    """The folder of a run that ended after so many steps."""
    folder = host.runs_folder / "zzk-1"
    run(chosen, host, folder, stop_after=after)
    return folder


def told(seen: list[events.Event]) -> list[str]:
    """The warnings, but for those about the settings and the images of all these tests."""
    return [w.message for w in of(events.Warned, seen) if not w.message.startswith((
        "Epochs (max_train_epochs) has no effect", "Batch size (train_batch_size) = ", "4 pictures, 3 with captions"))]


def going_on(chosen, folder: Path, **changes: object):
    return dataclasses.replace(chosen, save=dataclasses.replace(chosen.save, resume=str(folder), **changes))


@pytest.mark.parametrize("changes, steps_an_epoch", [
    # Three square images and a wide one in batches of two: 3 batches, 2 steps an epoch, the second of one batch only.
    ({"resolution": "128", "train_batch_size": 2, "gradient_accumulation_steps": 2, "network_train_unet_only": False,
      "shuffle_caption": True, "caption_tag_dropout_rate": 0.4, "flip_aug": True, "caption_dropout_rate": 0.3,
      "network_alpha": 0.1, "rotate_aug_degrees": 20, "token_warmup_step": 0.5}, 2),
    ({"lr_scheduler": "cosine_with_restarts", "lr_scheduler_num_cycles": 2, "lr_warmup_steps": 3, "noise_offset": 0.1,
      "multires_noise_iterations": 4, "ip_noise_gamma": 0.1, "timestep_distribution": "sigmoid", "preservation": "dco",
      "preservation_class": "cat", "color_aug": True, "random_crop": True, "rotate_aug_degrees": 20, "shuffle_caption": True,
      "mixed_precision": "bf16", "gradient_checkpointing": True, "weight_decay": 0.1}, 4),
], ids=["accumulation, buckets, text encoder", "warmup, fresh images, bf16"])
def test_interrupted_and_resumed_equals_the_straight_run_byte_for_byte(images, host, changes, steps_an_epoch):
    chosen = settings(images, **EXACT, **changes)
    finished, seen = run(chosen, host, None)
    straight, curve = Path(finished.path).read_bytes(), of(events.Step, seen)
    assert [s.epoch for s in curve] == [1 + (s.step - 1) // steps_an_epoch for s in curve]
    before = metadata(finished.path)

    folder = interrupted(chosen, host)
    finished, seen = run(going_on(chosen, folder), host, folder)
    # Saved after step 2, cut off after step 3: one step is made again.
    assert of(events.Planned, seen)[0].resumed_at == 2

    def told_of(steps):
        return [(s.step, s.epoch, s.loss, s.average_loss, s.learning_rate, s.text_encoder_lr) for s in steps]
    assert told_of(of(events.Step, seen)) == told_of(curve[2:])
    after = metadata(finished.path)
    length = int.from_bytes(straight[:8], "little")
    again = Path(finished.path).read_bytes()
    assert again[8 + int.from_bytes(again[:8], "little"):] == straight[8 + length:]
    started = {"ss_training_started_at"}  # two runs; that of the resumed one is told below
    assert {k for k in before if before[k] != after[k]} <= MAY_DIFFER | started and before.keys() == after.keys()
    intermediate = metadata(str(host.lora_folder / "zzk-step00000002.safetensors"))
    assert intermediate["ss_training_started_at"] == after["ss_training_started_at"]
    assert not (folder / STATE).exists(), "a run that is done needs none"


def test_fp16_with_loss_scaling_resumes_exactly(images, host, monkeypatch):
    monkeypatch.setattr(job, "compute_dtype", lambda *args, **kwargs: torch.float16)
    half = torch.ones(2, 2, dtype=torch.float16)
    try:
        half @ half
    except RuntimeError:
        pytest.skip("this torch computes no fp16 on CPUs")
    chosen = settings(images, **EXACT)
    straight = load_file(run(chosen, host, None)[0].path)
    folder = interrupted(chosen, host)
    scale = load_file(folder / STATE)["scaler.scale"]
    again = load_file(run(going_on(chosen, folder), host, folder)[0].path)
    assert scale > 1 and all(torch.equal(straight[key], again[key]) for key in straight)


def test_a_run_may_be_cut_off_again_and_again(images, host):
    chosen = settings(images, **{**EXACT, "save_every_n_steps": 1})
    straight = load_file(run(chosen, host, None)[0].path)
    folder = interrupted(chosen, host, after=1)
    for _ in range(2):
        run(going_on(chosen, folder), host, folder, stop_after=1)
    again = load_file(run(going_on(chosen, folder), host, folder)[0].path)
    assert all(torch.equal(straight[key], again[key]) for key in straight)


def test_more_steps_can_be_asked_for_and_fewer_than_made_cannot(images, host):
    chosen = settings(images, **EXACT, lr_scheduler="constant", save_state_on_train_end=True)
    longer = dataclasses.replace(chosen.optimizer, max_train_steps=7)
    straight = load_file(run(dataclasses.replace(chosen, optimizer=longer), host, None)[0].path)
    folder = host.runs_folder / "zzk-1"
    run(chosen, host, folder)
    finished, seen = run(dataclasses.replace(going_on(chosen, folder), optimizer=longer), host, folder)
    again = load_file(finished.path)
    assert [s.step for s in of(events.Step, seen)] == [6, 7] and told(seen) == []
    assert all(torch.equal(straight[key], again[key]) for key in straight)
    with pytest.raises(SettingError, match="7 steps already.*raise Steps .max_train_steps"):
        run(going_on(chosen, folder), host, folder)


def test_repeats_that_were_chosen_by_themselves_stay_when_the_run_goes_on_with_other_epochs(images, host):
    # Four pictures, 1500 visits over 30 epochs: 12.5 repeats. Over 2 epochs they would be 188.
    chosen = settings(images, num_repeats=0, max_train_epochs=30, train_batch_size=64, save_every_n_steps=1)
    folder = interrupted(chosen, host, after=1)
    _, seen = run(changed(chosen, folder, max_train_epochs=2, lr_scheduler="constant"), host, folder)
    planned, = of(events.Planned, seen)
    assert "× 13 repeats" in planned.summary and planned.steps == 2 and [s.step for s in of(events.Step, seen)] == [2]
    assert not [text for text in told(seen) if "pictures" in text or "repeats" in text]


def test_a_run_resumed_from_another_folder_writes_where_it_began(images, host, tmp_path, monkeypatch):
    here, elsewhere = tmp_path / "here", tmp_path / "elsewhere"
    here.mkdir()
    elsewhere.mkdir()
    monkeypatch.chdir(here)
    chosen = settings(images, **{**EXACT, "output_dir": "out", "train_data_dir": os.path.relpath(images)})
    folder = interrupted(chosen, host)
    monkeypatch.chdir(elsewhere)
    finished, seen = run(changed(chosen, folder), host, folder)
    assert Path(finished.path) == here / "out" / "zzk.safetensors" and told(seen) == []
    assert not list(elsewhere.iterdir())


def test_stop_and_save_leaves_a_point_to_go_on_from_and_its_file_may_be_replaced(images, host):
    chosen = settings(images, max_train_steps=4)
    folder, seen = host.runs_folder / "zzk-1", []
    first = run_settings(chosen, host, report=seen.append, folder=folder,
                    stop=lambda: "save" if len(of(events.Step, seen)) >= 2 else "")
    assert (first.outcome, first.steps) == ("stopped", 2)
    finished, seen = run(going_on(chosen, folder), host, folder)
    assert finished.path == first.path and metadata(finished.path)["ss_steps"] == "4"
    # Of another run the file is precious.
    other = interrupted(settings(images, **{**EXACT, "output_name": "other"}), host)
    with pytest.raises(OutputError, match="already"):
        run(going_on(chosen, other), host, other)


@pytest.fixture(scope="module")
def cut_off_once(tiny_file, tmp_path_factory):
    """A run that was cut off after step 3 of 5 and saved after step 2: (its images, its host)."""
    place = tmp_path_factory.mktemp("cut_off")
    images = place / "pictures"
    images.mkdir()
    for number, color in enumerate(("red", "blue", "green")):
        Image.new("RGB", (64, 64), color).save(images / f"{number}.png")
        (images / f"{number}.txt").write_text(f"a photo, {color} cat", encoding="utf-8")
    host = StandaloneHost(tiny_file, lora_folder=place / "loras", runs_folder=place / "runs")
    interrupted(settings(images, **EXACT), host)
    return images, host


@pytest.fixture
def cut_off(cut_off_once, host):
    """(settings, folder) of that run, copied to this test's own host."""
    images, original = cut_off_once
    shutil.copytree(original.runs_folder, host.runs_folder)
    shutil.copytree(original.lora_folder, host.lora_folder)
    return settings(images, **EXACT), host.runs_folder / "zzk-1"


def changed(chosen, folder: Path, **changes: object):
    return resume.settings_of(resume.find(str(folder), folder.parent), changes)


@pytest.mark.parametrize("name, value", [
    ("network_dim", 8), ("network_alpha", 1), ("network_train_unet_only", False), ("network_weights", "some.safetensors")])
def test_what_no_longer_fits_is_refused_by_name(cut_off, host, name, value):
    chosen, folder = cut_off
    with pytest.raises(SettingError, match=rf"\({name}\) is .* was .*set it back"):
        run(changed(chosen, folder, **{name: value}), host, folder)


@pytest.mark.parametrize("name, value", [("learning_rate", 5e-4), ("seed", 7), ("train_batch_size", 2), ("noise_offset", 0.1)])
def test_what_changes_the_result_is_told_by_name(cut_off, host, name, value):
    chosen, folder = cut_off
    _, seen = run(changed(chosen, folder, **{name: value}), host, folder, stop_after=1)
    assert sum(f"({name}) is {value!r} and was " in message for message in told(seen)) == 1


def test_a_longer_run_with_a_falling_rate_is_told(cut_off, host):
    chosen, folder = cut_off
    said = told(run(changed(chosen, folder, max_train_steps=6), host, folder, stop_after=1)[1])
    assert len(said) == 1 and "6 steps" in said[0] and "cosine" in said[0]


def test_another_number_of_processes_is_told_where_the_batch_of_all_is_another(cut_off):
    chosen, folder = cut_off
    point = resume.find(str(folder), folder.parent)
    assert resume.compare_settings(chosen, point, steps=5, processes=1) == []
    said, = resume.compare_settings(chosen, point, steps=5, processes=2)
    assert "1 × 2 pictures (Batch size (train_batch_size) × processes) and was 1 × 1" in said
    one_with_two = dataclasses.replace(point, metadata={
        **point.metadata, "settings": {**point.metadata["settings"], "train_batch_size": 2}})
    assert resume.compare_settings(chosen, one_with_two, steps=5, processes=2) == []


def test_other_pictures_or_captions_are_told_and_the_same_ones_elsewhere_are_not(cut_off, cut_off_once, host, tmp_path):
    chosen, folder = cut_off
    moved = tmp_path / "elsewhere" / "pictures"
    shutil.copytree(cut_off_once[0], moved)
    chosen = changed(chosen, folder, train_data_dir=str(moved), save_state=False)
    assert told(run(chosen, host, folder, stop_after=1)[1]) == []
    (moved / "0.txt").write_text("a photo, purple cat", encoding="utf-8")
    said = told(run(chosen, host, folder, stop_after=1)[1])
    assert len(said) == 1 and "train_data_dir" in said[0]


def fingerprint(plan: RunPlan) -> str:
    return resume.dataset_fingerprint(plan.dataset, plan.placements)


def test_a_picture_of_the_same_name_and_size_is_another_picture(images):
    chosen = settings(images)
    first = fingerprint(plan_dataset(chosen, family="sd1"))
    assert fingerprint(plan_dataset(chosen, family="sd1")) == first
    Image.new("RGB", (64, 64), "black").save(images / "1.png")
    assert fingerprint(plan_dataset(chosen, family="sd1")) != first


def test_what_the_model_was_held_in_is_remembered(cut_off, host):
    # On a GPU on which nothing else fits the plan holds it in eight bits; here its choice is written into the state.
    chosen, folder = cut_off
    held, facts = checkpoint_module.read(folder / STATE)
    checkpoint_module.write(folder / STATE, held, {**facts, "base": "int8"})
    _, seen = run(going_on(chosen, folder), host, folder, stop_after=1)
    assert "held in int8" in of(events.Planned, seen)[0].memory
    note, = told(seen)
    assert "goes on with the model held in int8" in note
    assert resume.quantized_dtype(resume.find(str(folder), folder.parent), changed(chosen, folder, base_weights="fp8")) == ""


def test_a_model_held_in_other_numbers_than_before_is_told(cut_off):
    _, folder = cut_off
    point = resume.find(str(folder), folder.parent)
    assert resume.compare_data(point.metadata, point) == []
    said = resume.compare_data({**point.metadata, "base": "int8"}, point)
    assert len(said) == 1 and "now held in int8" in said[0]


@pytest.mark.parametrize("part", ["model.diffusion_model.out.2.bias", "first_stage_model.encoder.conv_in.weight"])
def test_another_checkpoint_or_vae_is_refused_before_pictures_are_encoded(cut_off, host, tmp_path, part):
    chosen, folder = cut_off
    changed_file = tiny_checkpoint.write(tmp_path / "changed", size=tiny_checkpoint.SHALLOW)
    tensors = load_file(changed_file)
    tensors[part] = tensors[part] + 0.01
    save_file(tensors, changed_file, metadata={"format": "pt"})
    other = StandaloneHost(changed_file, lora_folder=host.lora_folder, runs_folder=host.runs_folder)
    seen: list[events.Event] = []
    with pytest.raises(ModelError, match="cannot go on with this checkpoint"):
        run_settings(going_on(chosen, folder), other, report=seen.append, stop=lambda: "", folder=folder)
    assert not [s for s in of(events.Stage, seen) if s.name.startswith("Encoding")]


def other_file(host, folder: Path, **tensors: torch.Tensor) -> StandaloneHost:
    """The same model in a file of its own, with these tensors of a noise schedule in it."""
    path = tiny_checkpoint.write(folder, size=tiny_checkpoint.SHALLOW)
    save_file({**load_file(path), **tensors}, path, metadata={"format": "pt"})
    return StandaloneHost(path, lora_folder=host.lora_folder, runs_folder=host.runs_folder)


def test_a_noise_schedule_that_the_webui_rewrote_leaves_the_checkpoint_the_right_one(cut_off, host, tmp_path):
    chosen, folder = cut_off
    # "Downcast alphas_cumprod" of its settings. (A last value of 0 would say that the model has zero terminal SNR.)
    rewritten = other_file(host, tmp_path / "rewritten", alphas_cumprod=torch.linspace(1, 0.005, 1000).half())
    _, seen = run(going_on(chosen, folder), rewritten, folder, stop_after=1)
    assert [s.step for s in of(events.Step, seen)] == [3] and told(seen) == []


def test_a_state_that_tells_its_checkpoint_by_all_tensors_goes_on_with_it_and_no_other(cut_off, host, tmp_path, tiny_file):
    chosen, folder = cut_off
    held, facts = checkpoint_module.read(folder / STATE)
    older = {"name": facts["checkpoint"]["name"], "fingerprint": sampled_fingerprint(load_file(tiny_file))}
    checkpoint_module.write(folder / STATE, held, {**facts, "checkpoint": older})
    with pytest.raises(ModelError, match="cannot go on with this checkpoint"):
        run(going_on(chosen, folder), other_file(host, tmp_path / "other", alphas_cumprod=torch.zeros(1000).half()), folder)
    _, seen = run(going_on(chosen, folder), host, folder, stop_after=1)
    assert [s.step for s in of(events.Step, seen)] == [3] and told(seen) == []


def test_a_run_that_began_before_any_were_held_out_keeps_all_its_images(cut_off, images, host):
    chosen, folder = cut_off
    for index in range(4, 14):
        shutil.copy(images / "0.png", images / f"{index}.png")
    again = changed(chosen, folder, train_data_dir=str(images))
    assert len(plan_job(again, host).held_out) == 2
    held, facts = checkpoint_module.read(folder / STATE)
    older = {name: value for name, value in facts["settings"].items() if name != "validation_split"}
    checkpoint_module.write(folder / STATE, held, {**facts, "settings": older})
    plan = plan_job(again, host)
    assert plan.held_out == () and plan.dataset.images == 14


def test_what_is_measured_and_sampled_may_be_another_from_here_on(cut_off):
    chosen, folder = cut_off
    other = EvaluationSettings(validation=False, early_stopping=True, sample_prompts="a cat", sample_every_n_epochs=2)
    assert not resume.compare_settings(dataclasses.replace(chosen, evaluation=other), resume.find(str(folder), folder.parent),
                                       steps=5)


def test_another_noise_schedule_than_the_run_began_on_is_told(cut_off, host):
    chosen, folder = cut_off
    held, facts = checkpoint_module.read(folder / STATE)
    begun = {**facts["checkpoint"], "schedule": "v_prediction, zero terminal SNR"}  # as the WebUI or a .yaml said then
    checkpoint_module.write(folder / STATE, held, {**facts, "checkpoint": begun})
    said, = told(run(going_on(chosen, folder), host, folder, stop_after=1)[1])
    assert "epsilon and was on v_prediction, zero terminal SNR" in said and "Zero terminal SNR (zero_terminal_snr)" in said


def test_a_drawn_seed_is_drawn_once(images, host):
    folder = interrupted(settings(images, **EXACT, seed=-1), host)
    chosen = changed(None, folder)
    assert chosen.optimizer.seed >= 0
    again = dataclasses.replace(chosen, optimizer=dataclasses.replace(chosen.optimizer, seed=-1))
    _, seen = run(again, host, folder, stop_after=1)
    assert of(events.Planned, seen)[0].seed == chosen.optimizer.seed and told(seen) == []


# ---- what the disk may do -------------------------------------------------------------------------------------------

def full_disk(monkeypatch) -> None:
    """From now on the disk is full when a state's first kilobyte is written, as safetensors tells it."""
    def save_file(tensors, filename, metadata):
        Path(filename).write_bytes(bytes(1024))
        raise SafetensorError('Error while serializing: IoError(Os { code: 28, message: "No space left on device" })')
    monkeypatch.setattr(safetensors.torch, "save_file", save_file)


def test_a_disk_that_fills_up_leaves_the_last_state_whole_and_is_told_once(cut_off, host, monkeypatch):
    chosen, folder = cut_off
    before = (folder / STATE).read_bytes()
    full_disk(monkeypatch)
    with pytest.raises(LoraTrainError):
        def report(event):
            seen.append(event)
            if isinstance(event, events.Step) and event.step == 5:
                raise SettingError("cut off")
        seen: list[events.Event] = []
        chosen = changed(chosen, folder, save_every_n_steps=1)
        run_settings(chosen, host, report=report, stop=lambda: "", folder=folder)
    assert (folder / STATE).read_bytes() == before
    assert sum("No resume point was kept at step 3" in w.message for w in of(events.Warned, seen)) == 1
    assert sum("resume point" in w.message for w in of(events.Warned, seen)) == 1
    assert not list(folder.glob(".*.part")) and not list(host.lora_folder.glob(".*.part"))
    assert resume.find(str(folder), folder.parent).load().step == 2


def test_a_failure_between_steps_costs_no_step(images, host, monkeypatch):
    # The images of the last steps would be ready before they go.
    monkeypatch.setattr(prefetcher, "reading_threads", lambda: 0)
    chosen = settings(images, **EXACT, color_aug=True)
    straight = load_file(run(chosen, host, None)[0].path)
    hidden = images.with_name("hidden")
    folder = host.runs_folder / "zzk-1"

    def report(event: events.Event) -> None:
        if isinstance(event, events.Step) and event.step == 3:
            images.rename(hidden)
    with pytest.raises(LoraTrainError):
        run_settings(chosen, host, report=report, stop=lambda: "", folder=folder)
    hidden.rename(images)
    finished, seen = run(going_on(chosen, folder), host, folder)
    assert [s.step for s in of(events.Step, seen)] == [4, 5]
    again = load_file(finished.path)
    assert all(torch.equal(straight[key], again[key]) for key in straight)


def test_a_result_whose_folder_vanished_is_still_written(images, host):
    def report(event: events.Event) -> None:
        if isinstance(event, events.Step) and event.step == 3:
            shutil.rmtree(host.lora_folder)
    finished = run_settings(settings(images, max_train_steps=4), host, report=report, stop=lambda: "")
    assert finished.outcome == "done" and Path(finished.path).is_file()


def test_what_the_output_folder_refuses_is_kept_beside_the_record(images, host):
    chosen, folder = settings(images, max_train_steps=2), host.runs_folder / "zzk-1"

    def report(event: events.Event) -> None:
        if isinstance(event, events.Step) and event.step == 2:
            shutil.rmtree(host.lora_folder)
            host.lora_folder.write_text("a file where the folder was")
    with pytest.raises(OutputError, match="zzk-step00000002"):
        run_settings(chosen, host, report=report, stop=lambda: "", folder=folder)
    assert metadata(str(folder / "zzk-step00000002.safetensors"))["ss_steps"] == "2"
    host.lora_folder.unlink()
    finished, seen = run(going_on(chosen, folder), host, folder)
    assert finished.outcome == "done" and not of(events.Step, seen), "nothing was left but to write the result"


@pytest.mark.parametrize("spoil", [
    lambda data: data[:-5], lambda data: data[:20], lambda data: b"", lambda data: data + b"x", lambda data: b"PK" + data[2:]])
def test_a_damaged_state_is_refused_in_one_sentence(cut_off, host, spoil):
    chosen, folder = cut_off
    (folder / STATE).write_bytes(spoil((folder / STATE).read_bytes()))
    with pytest.raises(LoraFileError, match="cannot be read") as caught:
        run(going_on(chosen, folder), host, folder)
    assert "\n" not in str(caught.value)


def test_a_run_without_a_state_says_so(cut_off, host):
    chosen, folder = cut_off
    (folder / STATE).unlink()
    with pytest.raises(LoraFileError, match="no training state"):
        run(going_on(chosen, folder), host, folder)


def test_a_lora_file_is_no_state(cut_off, host):
    chosen, folder = cut_off
    with pytest.raises(LoraFileError, match="not a training state"):
        resume.find(str(host.lora_folder / "zzk-step00000002.safetensors"), host.runs_folder)


def test_no_state_is_kept_where_none_is_wanted(images, host):
    folder = interrupted(settings(images, **EXACT, save_state=False), host)
    assert not (folder / STATE).exists()


def test_the_state_is_plain_safetensors_with_fp32_weights_and_both_moments(cut_off):
    _, folder = cut_off
    tensors = load_file(folder / STATE)  # the library's own reader
    up = [name for name in tensors if name.startswith("lora.") and name.endswith("lora_up.weight")]
    assert len(up) == 72 and all(tensors[name].dtype == torch.float32 for name in up)
    moments = [name for name in tensors if name.endswith(("exp_avg", "exp_avg_sq"))]
    assert len(moments) == 2 * 2 * 72 and {float(tensors[n]) for n in tensors if n.endswith(".step")} == {2.0}
    facts = json.loads(metadata(str(folder / STATE))["lora_train_state"])
    assert facts["step"] == 2 and facts["settings"]["network_dim"] == 4


@pytest.mark.parametrize("cost, times", [(0.0, [300, 600, 900]), (10.0, [300, 810])])
def test_states_are_kept_by_the_clock_and_less_often_where_writing_is_slow(tmp_path, monkeypatch, cost, times):
    now, kept = [0.0], []

    def write(path, state, facts):
        kept.append(now[0])
        now[0] += cost
    monkeypatch.setattr(saver.checkpoint, "write", write)
    checkpointer = Checkpointer(tmp_path, SaveSettings(save_state_every_n_minutes=5), {}, lambda event: None,
                                clock=lambda: now[0])
    while now[0] < 1000:
        checkpointer.save_if_due(lambda: SimpleNamespace(step=1))
        now[0] += 10
    assert kept == times


def test_a_state_of_weights_that_are_no_numbers_replaces_nothing(cut_off):
    _, folder = cut_off
    before = (folder / STATE).read_bytes()
    loaded, facts = checkpoint_module.read(folder / STATE)
    next(iter(loaded.lora.values())).fill_(float("nan"))
    with pytest.raises(LoraTrainError, match="not numbers"):
        checkpoint_module.write(folder / STATE, loaded, facts)
    assert (folder / STATE).read_bytes() == before and not list(folder.glob(".*.part"))
