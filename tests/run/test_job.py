"""The whole road, on a small model: what a run promises whoever starts it."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import functools
import hashlib
import json
import math
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lib_lora_train import events
from lib_lora_train.__main__ import main
from lib_lora_train.adapters import file
from lib_lora_train.adapters.network import AdapterNetwork
from lib_lora_train.api import service
from lib_lora_train.errors import (
    DatasetError,
    HostError,
    Interrupted,
    LoraFileError,
    ModelError,
    OutputError,
    SettingError,
    TrainingError,
)
from lib_lora_train.host import standalone
from lib_lora_train.host.standalone import StandaloneHost
from lib_lora_train.inputs import prefetcher
from lib_lora_train.run import job, soundness
from lib_lora_train.run.job import run_job
from lib_lora_train.run.planning import plan_job
from lib_lora_train.run.record import RunRecord, past_run
from lib_lora_train.run.saver import Saver
from lib_lora_train.settings import flat, parse
from lib_lora_train.training import train_step
from lib_lora_train.training.optimizers import OPTIMIZERS
from tests.jobs import run_settings
from tests.training.small_run import Sgd


def settings(images: Path, **changes: object):
    return parse({"train_data_dir": str(images), "output_name": "zzk", "resolution": "64", "num_repeats": 1,
                  "max_train_epochs": 1, "min_bucket_reso": 64, "network_dim": 4, "network_alpha": 2, "save_precision": "float",
                  "learning_rate": 1e-3, "trigger_word": "zzk", "sample_images": False, "validation": False,
                  "save_every_n_epochs": 0, **changes})


def run(chosen, host, stop=lambda: ""):
    seen: list[events.Event] = []
    finished = run_settings(chosen, host, report=seen.append, stop=stop)
    return finished, seen


def of(kind, seen):
    return [event for event in seen if isinstance(event, kind)]


def metadata(path: str) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        return file.metadata()


def test_exactly_the_planned_steps_run_and_the_file_is_where_the_last_event_says(images, host):
    finished, seen = run(settings(images, resolution="128", max_train_epochs=2), host)
    planned, = of(events.Planned, seen)
    # Three images in the square bucket and one in a wide one, batch 1: 4 batches an epoch, 2 epochs.
    assert (planned.pictures, planned.buckets, planned.batches_per_epoch, planned.steps) == (4, 2, 4, 8)
    assert [(s.step, s.epoch) for s in of(events.Step, seen)] == [(i, 1 + (i > 4)) for i in range(1, 9)]
    assert finished == events.Finished("done", finished.message, str(host.lora_folder / "zzk.safetensors"), 8, "healthy")
    assert Path(finished.path).is_file()
    assert of(events.Saved, seen) == [events.Saved(finished.path, 8, 2, True)]


@pytest.mark.parametrize("batch, accumulation, steps", [(2, 1, 3), (1, 3, 2), (2, 2, 2), (4, 1, 2)])
def test_steps_follow_kohyas_formula(images, host, batch, accumulation, steps):
    chosen = settings(images, train_batch_size=batch, gradient_accumulation_steps=accumulation, resolution="128")
    assert steps == math.ceil((math.ceil(3 / batch) + math.ceil(1 / batch)) / accumulation)
    finished, seen = run(chosen, host)
    assert finished.steps == steps == len(of(events.Step, seen))


def test_the_same_seed_gives_byte_identical_tensors_and_another_seed_others(images, host):
    changes = {"network_train_unet_only": False, "shuffle_caption": True, "caption_tag_dropout_rate": 0.3, "flip_aug": True}
    first = load_file(run(settings(images, **changes), host)[0].path)
    again = load_file(run(settings(images, **changes, overwrite=True), host)[0].path)
    other = load_file(run(settings(images, **changes, overwrite=True, seed=7), host)[0].path)
    assert first.keys() == again.keys() and all(torch.equal(first[key], again[key]) for key in first)
    assert any(not torch.equal(first[key], other[key]) for key in first if key.endswith("lora_up.weight"))


def test_every_layer_learns_and_text_layers_are_there_only_when_asked_for(images, host):
    both = load_file(run(settings(images, network_train_unet_only=False), host)[0].path)
    ups = [key for key in both if key.endswith("lora_up.weight")]
    # 6 transformers of 12 layers each, and 2 text layers of 6.
    assert len([key for key in ups if key.startswith("lora_unet_")]) == 72
    assert len([key for key in ups if key.startswith("lora_te_")]) == 12
    assert all(both[key].abs().max() > 0 for key in ups)
    unet_only = load_file(run(settings(images, overwrite=True), host)[0].path)
    assert not [key for key in unet_only if key.startswith("lora_te")]


def test_the_lent_tensors_come_back_as_they_were(images, host):
    with host.lease() as borrowed:
        lent = borrowed.tensors
        for tensor in lent.values():
            if tensor.is_floating_point():
                tensor.requires_grad_(True)
        before = {name: hashlib.sha256(t.detach().numpy().tobytes()).digest() for name, t in lent.items()}
    run(settings(images, network_train_unet_only=False, gradient_checkpointing=True), host)
    for name, tensor in lent.items():
        assert hashlib.sha256(tensor.detach().numpy().tobytes()).digest() == before[name], name
        assert tensor.grad is None and tensor.requires_grad == tensor.is_floating_point(), name


def test_the_global_random_state_is_left_alone(images, host):
    state = torch.get_rng_state()
    run(settings(images), host)
    assert torch.equal(torch.get_rng_state(), state)


def test_gradient_checkpointing_changes_nothing_but_memory(images, host):
    changes = {"network_train_unet_only": False}
    plain = load_file(run(settings(images, **changes), host)[0].path)
    saving = load_file(run(settings(images, **changes, overwrite=True, gradient_checkpointing=True), host)[0].path)
    assert all(torch.allclose(plain[key], saving[key], atol=1e-5) for key in plain)


@pytest.mark.parametrize("kind", ["stop", "save"])
def test_stopping_ends_within_one_step_and_keeps_what_was_learnt_if_asked(images, host, kind):
    seen: list[events.Event] = []
    chosen, stop = settings(images), lambda: kind if len(of(events.Step, seen)) >= 3 else ""
    if kind == "stop":
        with pytest.raises(Interrupted):
            run_settings(chosen, host, report=seen.append, stop=stop)
        assert not list(host.lora_folder.iterdir())
    else:
        finished = run_settings(chosen, host, report=seen.append, stop=stop)
        assert (finished.outcome, finished.steps) == ("stopped", 3)
        assert metadata(finished.path)["ss_steps"] == "3"
    assert len(of(events.Step, seen)) == 3


def test_a_stop_while_pictures_are_read_leaves_nothing_behind(images, host):
    with pytest.raises(Interrupted):
        run(settings(images), host, stop=lambda: "save")
    assert not list(host.lora_folder.iterdir())


def test_a_run_for_one_checkpoint_trains_on_no_other(images, host):
    other = "another.safetensors [0123456789]"
    plan = dataclasses.replace(plan_job(settings(images, max_train_steps=1), host), checkpoint=other)
    with pytest.raises(HostError):
        run_job(plan, host, report=lambda event: None, stop=lambda: "")
    own = dataclasses.replace(plan, checkpoint=f"{host.checkpoint().title} [0123456789]")
    assert run_job(own, host, report=lambda event: None, stop=lambda: "").outcome == "done"


def test_saves_on_the_way_have_kohyas_names_and_say_how_far_they_are(images, host):
    finished, seen = run(settings(images, save_every_n_epochs=1, save_every_n_steps=3, max_train_epochs=3), host)
    saved = [(Path(s.path).name, s.step) for s in of(events.Saved, seen)]
    assert saved == [("zzk-step00000003.safetensors", 3), ("zzk-000001.safetensors", 4), ("zzk-step00000006.safetensors", 6),
                     ("zzk-000002.safetensors", 8), ("zzk-step00000009.safetensors", 9), ("zzk.safetensors", 12)]
    early = metadata(str(host.lora_folder / "zzk-000001.safetensors"))
    assert (early["ss_output_name"], early["ss_epoch"], early["ss_steps"]) == ("zzk-000001", "1", "4")


def test_a_lora_of_another_run_is_never_replaced_by_a_save_or_by_the_result(images, host):
    """A LoRA that has the name of a save, and a result that another run finished first."""
    other = Path(run(settings(images, output_name="zzk-000001", max_train_steps=1), host)[0].path)
    plan, seen = plan_job(settings(images, save_every_n_epochs=1, max_train_epochs=2), host), []
    first = Path(run(settings(images, max_train_steps=1), host)[0].path)
    before = other.read_bytes(), first.read_bytes()
    finished = run_job(plan, host, report=seen.append, stop=lambda: "")
    assert (other.read_bytes(), first.read_bytes()) == before
    saved = [Path(event.path).name for event in of(events.Saved, seen)]
    assert saved == ["zzk-000001-2.safetensors", "zzk-2.safetensors"] and Path(finished.path).name == saved[-1]
    assert len([warning for warning in of(events.Warned, seen) if "another LoRA" in warning.message]) == 2
    assert metadata(finished.path)["ss_output_name"] == "zzk-2"


def test_continuing_from_a_lora_begins_where_it_ended_and_takes_its_rank(images, host):
    first = run(settings(images, network_dim=6, network_alpha=3), host)[0].path
    # With a learning rate of almost zero the continued file must hold what the first one held.
    second = run(settings(images, output_name="next", network_weights=first, learning_rate=1e-12), host)[0].path
    before, after = load_file(first), load_file(second)
    assert before.keys() == after.keys()
    assert all(torch.allclose(before[key], after[key], atol=1e-6) for key in before)
    assert metadata(second)["ss_network_dim"] == "6"


def test_a_text_encoder_learnt_before_is_kept_when_only_the_unet_goes_on(images, host):
    first = run(settings(images, network_train_unet_only=False), host)[0].path
    second = run(settings(images, output_name="next", network_weights=first), host)[0].path
    before, after = load_file(first), load_file(second)
    text = [key for key in before if key.startswith("lora_te_")]
    assert text and all(torch.equal(before[key], after[key]) for key in text)
    assert any(not torch.equal(before[key], after[key]) for key in before if key.startswith("lora_unet_"))


def poisoned(monkeypatch, *, calls: range) -> None:
    """Losses of these calls, counted from 1, are no numbers."""
    original, made = train_step.denoising_loss, []

    def loss(model, batch, **given):
        made.append(1)
        return original(model, batch, **given) * (math.nan if len(made) in calls else 1)
    monkeypatch.setattr(train_step, "denoising_loss", loss)


def test_one_loss_that_is_no_number_is_skipped_and_counted_and_the_count_survives_a_resume(images, host, monkeypatch):
    poisoned(monkeypatch, calls=range(4, 5))
    chosen, folder, seen = settings(images, save_every_n_steps=1, max_train_epochs=2), host.runs_folder / "zzk-1", []
    with contextlib.suppress(Interrupted):
        run_settings(chosen, host, report=lambda event: seen.append(event), folder=folder,
                     stop=lambda: "stop" if len(of(events.Step, seen)) >= 5 else "")
    assert [(s.skipped, s.skipped_steps, math.isnan(s.loss)) for s in of(events.Step, seen)] == [
        *[(False, 0, False)] * 3, (True, 1, True), (False, 1, False)]
    assert math.isfinite(of(events.Step, seen)[-1].average_loss)
    json.loads(json.dumps(events.to_dict(of(events.Step, seen)[3]), allow_nan=False))
    third, fourth, fifth = (load_file(host.lora_folder / f"zzk-step0000000{step}.safetensors") for step in (3, 4, 5))
    assert all(torch.equal(third[key], fourth[key]) for key in third)
    assert any(not torch.equal(fourth[key], fifth[key]) for key in fourth)
    finished, seen = run(parse({**flat(chosen), "resume": str(folder)}), host)
    assert finished.outcome == "done" and of(events.Step, seen)[-1].skipped_steps == 1


def test_losses_that_are_no_numbers_any_more_end_the_run_and_keep_the_last_good_weights(images, host, monkeypatch):
    poisoned(monkeypatch, calls=range(2, 100))
    seen: list[events.Event] = []
    with pytest.raises(TrainingError, match="no longer a number.*zzk-step000000"):
        run_settings(settings(images, max_train_steps=60, network_dim=1, save_every_n_epochs=0), host, report=seen.append,
                     stop=lambda: "")
    kept, = host.lora_folder.glob("*.safetensors")
    assert all(torch.isfinite(tensor).all() for tensor in load_file(kept).values())


@pytest.fixture
def own_host(tiny_file, tmp_path) -> StandaloneHost:
    """A host whose model a test may damage."""
    return StandaloneHost(tiny_file, lora_folder=tmp_path / "loras", runs_folder=tmp_path / "runs")


@pytest.mark.parametrize("name, part, tensor", [
    ("model.diffusion_model.out.2.weight", "UNet", "out.2.weight"),
    ("first_stage_model.encoder.conv_in.bias", "VAE", "encoder.conv_in.bias"),
    ("cond_stage_model.transformer.text_model.final_layer_norm.weight", "text encoder", "final_layer_norm.weight")])
def test_weights_that_are_no_numbers_are_named_before_a_picture_is_encoded(images, own_host, name, part, tensor):
    with own_host.lease() as borrowed:
        borrowed.tensors[name].view(-1)[1] = -math.inf
    seen: list[events.Event] = []
    with pytest.raises(ModelError) as caught:
        run_settings(settings(images), own_host, report=seen.append, stop=lambda: "")
    assert part in caught.value.what and tensor in caught.value.why and caught.value.remedy
    assert not [s for s in of(events.Stage, seen) if s.name.startswith("Encoding")]


def test_a_vae_decoder_that_is_no_numbers_is_not_the_trainings_matter(images, own_host):
    with own_host.lease() as borrowed:
        borrowed.tensors["first_stage_model.decoder.conv_in.bias"].fill_(math.nan)
    assert run(settings(images, max_train_steps=1), own_host)[0].outcome == "done"


@pytest.mark.parametrize("only, error, said", [
    (torch.bfloat16, TrainingError, "mixed_precision"), (None, ModelError, "another checkpoint")],
    ids=["in bf16 only", "always"])
def test_a_model_whose_activations_overflow_is_told_before_the_first_step_and_apart_from_damaged_weights(
        images, host, monkeypatch, only, error, said):
    """Overflow of activations, pretended: no CPU here computes in fp16."""
    original = soundness.denoising_loss
    monkeypatch.setattr(soundness, "denoising_loss", lambda model, batch, *, config, **given: original(
        model, batch, config=config, **given) * (math.nan if only in (None, config.dtype) else 1))
    seen: list[events.Event] = []
    with pytest.raises(error, match="although its weights are") as caught:
        run_settings(settings(images, mixed_precision="bf16"), host, report=seen.append, stop=lambda: "")
    assert said in caught.value.remedy and not of(events.Step, seen)


def test_a_lora_that_holds_or_makes_values_that_are_no_numbers_is_not_continued(images, host):
    first = run(settings(images, max_train_steps=1), host)[0].path
    for name, value, said in (("nan", math.nan, r"2 of its \d+ tensors"), ("huge", 1e30, "with it the model computes")):
        tensors = load_file(first)
        for key in [key for key in tensors if key.endswith("weight")][10:12]:
            tensors[key].fill_(value)
        save_file(tensors, host.lora_folder / f"{name}.safetensors")
        seen: list[events.Event] = []
        with pytest.raises(LoraFileError, match=rf"^{name}\.safetensors cannot be continued: .*{said}"):
            run_settings(settings(images, output_name="next", network_weights=str(host.lora_folder / f"{name}.safetensors")),
                         host, report=seen.append, stop=lambda: "")
        assert not of(events.Step, seen)


def test_a_lora_ruined_by_its_learning_rate_is_not_called_ready_and_was_warned_of(images, host):
    folder = host.runs_folder / "zzk-1"
    record = RunRecord(folder, settings(images))
    finished, seen = run(settings(images, learning_rate=5, max_train_steps=4, validation=True), host)
    for event in (*seen, finished):
        record.write(event)
    record.close()
    assert (finished.outcome, finished.verdict) == ("done", "ruined") and Path(finished.path).is_file()
    assert "Ruined:" in finished.message and "ready" not in finished.message and finished.path in finished.message
    assert past_run(folder).verdict == "ruined" and past_run(folder).message == finished.message
    before_the_steps = seen[:seen.index(of(events.Step, seen)[0])]
    assert any("(learning_rate) = 5" in w.message for w in of(events.Warned, before_the_steps))
    healthy, seen = run(settings(images, output_name="good", validation=True), host)
    assert healthy.verdict == "healthy" and "Ruined:" not in healthy.message


@pytest.mark.parametrize("name, error", [("zero_loss", RuntimeError("CUDA out of memory.")), ("strength", KeyError("layer"))])
def test_a_look_at_the_result_that_fails_costs_no_lora(images, host, monkeypatch, name, error):
    def failing(probe):
        raise error
    monkeypatch.setattr(soundness.Probe, name, failing)
    with contextlib.suppress(KeyError):
        assert "was not looked at" in run(settings(images), host)[0].message
    assert len(list(host.lora_folder.glob("*.safetensors"))) == 1


def test_values_known_to_fail_are_told_alike_by_the_plan_the_check_and_the_run(images, host, capsys):
    values = {**flat(settings(images)), "learning_rate": 0.05, "train_batch_size": 6, "network_alpha": 64,
              "lr_warmup_steps": 500, "max_train_steps": 2, "save_every_n_epochs": 0}
    named = ("learning_rate", "network_alpha", "lr_warmup_steps", "train_batch_size")

    def told(sentences) -> list[str]:
        return sorted(s for s in sentences if any(f"({name}) = " in s for name in named))
    planned = told(service.plan(values, host=host)["warnings"])
    assert len(planned) == 4
    chosen = [f"--set={name}={value}" for name, value in values.items() if name != "train_data_dir"]
    main(["check", str(images), "--json", *chosen])
    assert told(json.loads(capsys.readouterr().out)["advice"]) == planned
    assert told(w.message for w in of(events.Warned, run(parse(values), host)[1])) == planned


def refusing(monkeypatch, refused):
    """Writing a file whose path `refused` accepts fails, as on a full disk."""
    original = file.replacing

    def replacing(path: Path):
        if refused(path):
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(path)
    monkeypatch.setattr(file, "replacing", replacing)


def test_a_save_on_the_way_that_fails_is_told_and_does_not_end_the_run(images, host, monkeypatch):
    refusing(monkeypatch, lambda path: "step" in path.name)
    finished, seen = run(settings(images, save_every_n_steps=3), host)
    assert finished.outcome == "done" and Path(finished.path).is_file()
    assert any("zzk-step00000003" in w.message and "No space left" in w.message for w in of(events.Warned, seen))


def test_a_result_that_cannot_be_written_under_its_name_is_kept_under_another(images, host, monkeypatch):
    refusing(monkeypatch, lambda path: path.name == "zzk.safetensors")
    with pytest.raises(OutputError, match="No space left.*zzk-step00000004"):
        run(settings(images), host)
    assert metadata(str(host.lora_folder / "zzk-step00000004.safetensors"))["ss_steps"] == "4"


def test_what_a_full_disk_refuses_is_kept_on_the_disk_of_temporary_files(images, host, monkeypatch, tmp_path):
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    refusing(monkeypatch, lambda path: "temporary" not in path.parts)
    with pytest.raises(OutputError, match="No space left.*temporary.zzk-step00000004"):
        run_settings(settings(images), host, report=lambda event: None, stop=lambda: "")
    assert metadata(str(tmp_path / "temporary" / "zzk-step00000004.safetensors"))["ss_steps"] == "4"


def test_a_picture_that_vanishes_in_the_middle_does_not_cost_what_was_learnt(images, host, monkeypatch):
    monkeypatch.setattr(prefetcher, "reading_threads", lambda: 0)  # those of the next steps would be ready before they go

    def report(event: events.Event) -> None:
        if isinstance(event, events.Step) and event.step == 3:
            for image in images.glob("*.png"):
                image.unlink()
    with pytest.raises(DatasetError, match=r"\.png.*zzk-step00000003"):
        run_settings(settings(images, color_aug=True), host, report=report, stop=lambda: "")
    assert (host.lora_folder / "zzk-step00000003.safetensors").is_file()


def test_why_a_run_failed_is_told_although_nothing_can_be_saved(images, host, monkeypatch):
    def report(event: events.Event) -> None:
        if isinstance(event, events.Step) and event.step == 3:
            raise TrainingError("The card fell out")
    refusing(monkeypatch, lambda path: True)
    with pytest.raises(TrainingError, match=r"^The card fell out\.$"):
        run_settings(settings(images), host, report=report, stop=lambda: "")


@pytest.mark.parametrize("error", [BrokenPipeError(errno.EPIPE, "Broken pipe"),
                                   OSError(errno.ENOSPC, "No space left on device"), ZeroDivisionError("a display's defect")])
def test_what_only_shows_a_run_does_not_end_it(images, host, caplog, error):
    def report(event: events.Event) -> None:
        raise error
    finished = run_job(plan_job(settings(images, max_train_steps=2), host), host, report=report, stop=lambda: "")
    assert (finished.outcome, finished.steps) == ("done", 2) and Path(finished.path).is_file()
    assert [record.exc_info[1] for record in caplog.records if "the work goes on" in record.message] == [error], "told once"


@pytest.mark.skipif(sys.platform != "linux", reason="only there a file's name may be bytes that are no text")
def test_names_that_are_no_text_are_printable_in_the_metadata_of_a_lora(images, host):
    folder = images.with_name("caf\udce9")  # the dataset's own
    images.rename(folder)
    described = host.checkpoint()
    host.lease = named_lease(host, dataclasses.replace(described, name="mod\udce8le", vae_name="\udcff.vae.pt"))
    finished, _ = run(settings(folder, max_train_steps=1), host)
    told = metadata(finished.path)
    assert (told["ss_sd_model_name"], told["ss_vae_name"]) == ("mod?le", "?.vae.pt")
    assert list(json.loads(told["ss_dataset_dirs"])) == list(json.loads(told["ss_tag_frequency"])) == ["caf?"]


def named_lease(host, checkpoint):
    """The host's lease of a model that is called so, as the WebUI may call one of any file."""
    original = host.lease

    @contextlib.contextmanager
    def lease(*, stop):
        with original(stop=stop) as leased:
            leased.checkpoint = checkpoint
            yield leased
    return lease


def test_memory_that_runs_out_before_the_first_step_is_told_as_such(images, host, monkeypatch):
    def no_room(*args, **kwargs):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    monkeypatch.setattr(AdapterNetwork, "to", no_room)
    with pytest.raises(TrainingError, match="memory ran out"):
        run(settings(images), host)
    monkeypatch.setattr(standalone, "load_file", no_room)
    with pytest.raises(TrainingError, match="memory ran out while loading"):
        run(settings(images), StandaloneHost(host.checkpoint_file, lora_folder=host.lora_folder,
                                               runs_folder=host.runs_folder))


def test_latents_that_are_no_numbers_are_found_before_training_and_name_the_picture(images, own_host):
    with own_host.lease() as borrowed:
        borrowed.tensors["first_stage_model.encoder.conv_in.weight"].fill_(1e38)  # a number, and its sums are none
    with pytest.raises(TrainingError, match=r"0\.png.*overflow"):
        run(settings(images), own_host)


def test_a_picture_that_breaks_off_is_named_and_the_rest_is_trained(images, host):
    whole = images / "big.jpg"
    from PIL import Image
    Image.effect_noise((64, 64), 90).convert("RGB").save(whole, quality=95)
    whole.write_bytes(whole.read_bytes()[:900])
    finished, seen = run(settings(images), host)
    assert finished.outcome == "done"
    assert any("big.jpg" in warning.message for warning in of(events.Warned, seen))
    assert of(events.Planned, seen)[0].pictures == 4


@pytest.mark.parametrize("changes, error", [
    ({"train_data_dir": ""}, DatasetError),
    ({"train_data_dir": "does/not/exist"}, DatasetError),
    ({"output_name": "a/b"}, OutputError),
    ({"output_name": ""}, OutputError),
    ({"resolution": "72", "bucket_reso_steps": 8}, SettingError),
    ({"network_weights": "missing.safetensors"}, LoraFileError),
    ({"mixed_precision": "fp16"}, SettingError),
    ({"learning_rate": 0}, SettingError),
])
def test_bad_settings_are_refused_in_one_sentence_before_anything_is_encoded(images, host, changes, error):
    seen: list[events.Event] = []
    with pytest.raises(error) as caught:
        run_settings(settings(images, **changes), host, report=seen.append, stop=lambda: "")
    assert "\n" not in str(caught.value)
    assert not [s for s in of(events.Stage, seen) if s.name.startswith("Encoding")]


def test_an_existing_lora_is_refused_before_the_pictures_are_read(images, host):
    host.lora_folder.mkdir()
    (host.lora_folder / "zzk.safetensors").write_bytes(b"precious")
    seen: list[events.Event] = []
    with pytest.raises(OutputError, match="already"):
        run_settings(settings(images), host, report=seen.append, stop=lambda: "")
    assert not seen and (host.lora_folder / "zzk.safetensors").read_bytes() == b"precious"


@pytest.mark.parametrize("name, reason", [("model.ckpt", "pickled"), ("model.safetensors", "does not exist"),
                                          ("model.txt", "not a checkpoint")])
def test_a_checkpoint_that_cannot_be_used_is_refused_with_the_reason(images, tmp_path, name, reason):
    host = StandaloneHost(tmp_path / name, lora_folder=tmp_path / "loras", runs_folder=tmp_path / "runs")
    with pytest.raises(ModelError, match=reason):
        run(settings(images), host)


def test_a_checkpoint_that_breaks_off_is_refused(images, tiny_file, tmp_path):
    torn = tmp_path / "torn.safetensors"
    torn.write_bytes(tiny_file.read_bytes()[:100_000])
    host = StandaloneHost(torn, lora_folder=tmp_path / "loras", runs_folder=tmp_path / "runs")
    with pytest.raises(ModelError, match="torn"):
        run(settings(images), host)


def test_latents_kept_on_disk_give_the_same_lora(images, host):
    first = load_file(run(settings(images, cache_latents_to_disk=True), host)[0].path)
    assert list(images.rglob("*.safetensors"))
    again = load_file(run(settings(images, cache_latents_to_disk=True, overwrite=True), host)[0].path)
    assert all(torch.equal(first[key], again[key]) for key in first)


def test_pictures_varied_at_each_step_train_too(images, host):
    finished, _ = run(settings(images, color_aug=True, random_crop=True, flip_aug=True), host)
    assert finished.outcome == "done"


def test_ignored_settings_are_told(images, host):
    _, seen = run(settings(images, keep_tokens=2), host)
    assert any("keep_tokens" in warning.message for warning in of(events.Warned, seen))


def test_the_model_is_given_back_when_the_run_fails(images, host, monkeypatch):
    monkeypatch.setattr(job, "train", lambda *a, **k: (_ for _ in ()).throw(RuntimeError("broken")))
    with pytest.raises(RuntimeError, match="broken"):
        run(settings(images), host)
    with host.lease():
        pass


def test_v_prediction_said_by_the_user_is_written_into_the_file(images, host):
    path = run(settings(images, v_parameterization="on"), host)[0].path
    assert metadata(path)["modelspec.prediction_type"] == "v"


def test_an_optimizer_that_was_added_is_chosen_by_its_name_and_an_unknown_one_is_refused(images, host, monkeypatch):
    with pytest.raises(SettingError):
        run(settings(images, optimizer_type="Sgdx"), host)
    monkeypatch.setitem(OPTIMIZERS, "SGD", Sgd(accepts_flat=True))
    finished, _ = run(settings(images, optimizer_type="SGD", learning_rate=0.1), host)
    assert finished.outcome == "done" and metadata(finished.path)["ss_optimizer"].startswith("torch.optim.sgd.SGD")
    assert any(tensor.any() for key, tensor in load_file(finished.path).items() if key.endswith("lora_up.weight"))


def test_another_source_of_weights_is_saved_in_place_of_those_that_are_trained(images, host, monkeypatch):
    """A moving average over the steps would be such a source; this one halves the weights."""
    @contextlib.contextmanager
    def halved(progress):
        with progress.weights() as weights:
            yield {key: tensor / 2 if key.endswith("lora_up.weight") else tensor for key, tensor in weights.items()}
    plain = load_file(run(settings(images), host)[0].path)
    monkeypatch.setattr(job, "Saver", functools.partial(Saver, weights=halved))
    half = load_file(run(settings(images, output_name="half"), host)[0].path)
    assert all(torch.equal(half[key], plain[key] / (2 if key.endswith("lora_up.weight") else 1)) for key in plain)
