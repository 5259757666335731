"""Trackers: what TensorBoard and Weights & Biases are told of a run, read back with their own readers; and that none of them,
however it fails, changes or ends a training."""

from __future__ import annotations

import importlib.util
import random
import sys
import threading
from pathlib import Path

import pytest

from lib_lora_train import events
from lib_lora_train.errors import SettingError
from lib_lora_train.run import tracking as tracking_module
from lib_lora_train.run.tracker_checks import check_trackers
from lib_lora_train.run.tracking import BackgroundTracker, TrackerEntry
from lib_lora_train.settings import kohya, parse
from lib_lora_train.settings.importing import import_file
from tests.jobs import run_settings
from tests.run.test_job import of, run, settings

PATIENCE = 240.0  # seconds, of a machine that does much else


class Recorder:
    """A tracker that keeps what it is told, and may raise or hang."""

    def __init__(self, _: object = None) -> None:
        self.entries: list[TrackerEntry] = []
        self.ended = False

    def begin(self) -> None:
        pass

    def write(self, entry: TrackerEntry) -> None:
        self.entries.append(entry)

    def end(self) -> None:
        self.ended = True


class Raising(Recorder):
    def write(self, entry: TrackerEntry) -> None:
        raise OSError(28, "No space left on device")


class Hanging(Recorder):
    released = threading.Event()

    def write(self, entry: TrackerEntry) -> None:
        self.released.wait(60)


def trained(images: Path, host, tracker: type, monkeypatch, **changes: object):
    """The file's tensors as bytes, and the events, of a run that `tracker` follows, which is there as tensorboard."""
    monkeypatch.setattr(tracking_module, "_KINDS", {"tensorboard": tracker})
    monkeypatch.setattr("lib_lora_train.run.planning.check_trackers", lambda settings: None)
    monkeypatch.setattr(tracking_module, "_CLOSE_SECONDS", 0.2 if tracker is Hanging else PATIENCE)
    finished, seen = run(settings(images, log_with="tensorboard", overwrite=True, **changes), host)
    return weights(finished.path), seen


def weights(path: str) -> bytes:
    """What follows the header of a safetensors file, which names the time."""
    data = Path(path).read_bytes()
    return data[8 + int.from_bytes(data[:8], "little"):]


@pytest.mark.parametrize("tracker", [Recorder, Raising, Hanging])
def test_what_is_learnt_is_the_same_to_the_byte_whatever_a_tracker_does(images, host, monkeypatch, tracker):
    Hanging.released.clear()
    finished, _ = run(settings(images), host)
    expected = weights(finished.path)
    learnt, seen = trained(images, host, tracker, monkeypatch)
    Hanging.released.set()
    told = [event.message for event in of(events.Warned, seen) if "TensorBoard" in event.message]
    assert learnt == expected and len(of(events.Step, seen)) == 4
    assert len(told) == (0 if tracker is Recorder else 1)
    assert tracker is not Raising or "No space left on device" in told[0]


def test_a_tracker_that_does_not_keep_up_misses_some_is_named_once_and_nobody_waits():
    begun, go_on = threading.Event(), threading.Event()

    class Slow(Recorder):
        def write(self, entry: TrackerEntry) -> None:
            begun.set()
            go_on.wait(60)
            super().write(entry)

    slow = Slow()
    tracker = BackgroundTracker("Slow", slow, most=2)
    tracker.send(TrackerEntry(1))
    assert begun.wait(60)
    for step in range(2, 9):
        tracker.send(TrackerEntry(step))
    assert "step 4" in tracker.problem() and tracker.problem() == ""
    go_on.set()
    tracker.close(60)
    assert slow.ended and [entry.step for entry in slow.entries][0] == 1 and len(slow.entries) < 8


def test_a_tracker_whose_package_is_missing_or_that_has_no_key_is_refused_before_the_start(images, host, monkeypatch, tmp_path):
    there = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "tensorboard" else there(name, *rest))
    with pytest.raises(SettingError, match="pip install tensorboard"):
        run(settings(images, log_with="tensorboard"), host)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: there("json"))
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "netrc").write_text("machine example.com login user password " + "k" * 40)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with pytest.raises(SettingError, match="wandb login"):
        run(settings(images, log_with="wandb"), host)
    assert not list(host.lora_folder.glob("*.safetensors"))


@pytest.mark.parametrize("name", ["log_prefix", "log_tracker_name"])
@pytest.mark.parametrize("value", ["/tmp/x", "../../x", "a/b", "C:x", "a\\b", "CON.", ".."])
def test_a_part_of_a_trackers_folder_is_a_plain_name_so_that_it_stays_in_the_folder(name, value):
    chosen = {"log_with": "tensorboard", "logging_dir": "logs"}
    with pytest.raises(SettingError, match=name):
        check_trackers(parse({**chosen, name: value}))
    check_trackers(parse({name: value}))  # nothing is written


def test_a_key_in_a_file_of_kohyas_is_not_taken_and_not_shown(tmp_path):
    key = "0123456789abcdef" * 2 + "01234567"
    (tmp_path / "kohya.toml").write_text(f'log_with = "wandb"\nlogging_dir = "logs"\nwandb_api_key = "{key}"\n'
                                         f'huggingface_token = "{key}"\nnetwork_module = "networks.lora"\n')
    found = import_file(tmp_path / "kohya.toml")
    assert (found.values["log_with"], found.values["logging_dir"]) == ("wandb", "logs")
    told = {entry.name: entry for entry in found.entries}
    assert told["wandb_api_key"].kind == told["huggingface_token"].kind == "refused"
    assert "wandb login" in told["wandb_api_key"].text
    assert key not in str(found.to_json()) and key not in "".join(found.sentences()) and key not in str(found.values)
    assert parse(kohya.adopt({"use_wandb": True}).values).tracking.chosen == ("wandb",)


def followed(images: Path, host, folder: Path, monkeypatch, **changes: object) -> events.Finished:
    """A run with samples and measurements, in a folder."""
    monkeypatch.setattr(tracking_module, "_CLOSE_SECONDS", PATIENCE)
    (folder / "samples").mkdir(parents=True)
    return run_settings(settings(images, validation=True, sample_images=True, sample_prompts="zzk cat --w 64 --h 64 --s 1",
                                 train_batch_size=1, training_comment="nobody else's", **changes),
                        host, report=lambda event: None, stop=lambda: "", folder=folder)


def test_tensorboard_reads_back_the_curves_the_samples_the_settings_and_the_verdict(images, host, tmp_path, monkeypatch):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    finished = followed(images, host, tmp_path / "run", monkeypatch, log_with="tensorboard")
    files = EventAccumulator(str(tmp_path / "run" / "logs"), size_guidance={"scalars": 0, "images": 0, "tensors": 0})
    files.Reload()
    tags = files.Tags()
    assert finished.steps == len(files.Scalars("loss/current")) == len(files.Scalars("lr/unet"))
    assert {"loss/average", "loss/validation/training", "strength/unet"} <= set(tags["scalars"])
    assert files.Images("sample/0")[0].encoded_image_string.startswith(b"\x89PNG")
    texts = {tag: files.Tensors(tag)[-1].tensor_proto.string_val[0].decode() for tag in tags["tensors"]}
    assert "| network_dim | 4 |" in texts["settings/text_summary"]
    assert "zzk" in texts["outcome/text_summary"] and "_hparams_/experiment" in files.summary_metadata
    everything = " ".join(texts.values())
    assert str(tmp_path) not in everything and str(images) not in everything and "nobody" not in everything


def test_weights_and_biases_reads_back_the_same_and_leaves_python_as_it_was(images, host, tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="wandb is not installed")
    from wandb.proto import wandb_internal_pb2
    from wandb.sdk.internal.datastore import DataStore

    monkeypatch.setenv("WANDB_MODE", "offline")
    random.seed(7)
    before = sys.exit, sys.excepthook, random.getstate()
    finished = followed(images, host, tmp_path / "run", monkeypatch, log_with="wandb", wandb_run_name="one",
                        log_tracker_name="cats")
    assert before == (sys.exit, sys.excepthook, random.getstate())
    file, = (tmp_path / "run" / "logs" / "wandb").glob("offline-run-*/*.wandb")
    store, history, told, names = DataStore(), [], b"", []
    store.open_for_scan(str(file))
    while (data := store.scan_data()) is not None:
        entry = wandb_internal_pb2.Record()
        entry.ParseFromString(data)
        told += data
        if entry.WhichOneof("record_type") == "history":
            history.append({item.key or "/".join(item.nested_key): item.value_json for item in entry.history.item})
        if entry.WhichOneof("record_type") == "run":
            names.append((entry.run.project, entry.run.display_name))
    assert names[0] == ("cats", "one") and sum("loss/current" in one for one in history) == finished.steps
    assert any(key.startswith("sample/0") for one in history for key in one) and b"network_dim" in told and b"outcome" in told
    assert b"nobody" not in told and str(images).encode() not in told and str(host.lora_folder).encode() not in told
