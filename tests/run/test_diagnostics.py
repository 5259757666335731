"""The zip for whoever helps: what it tells, and that nothing private is in it."""

from __future__ import annotations

import getpass
import io
import json
import logging
import os
import platform
import re
import socket
import zipfile
from pathlib import Path

import pytest

from lib_lora_train import events
from lib_lora_train.__main__ import main
from lib_lora_train.errors import HostError
from lib_lora_train.run import runner as runner_module
from lib_lora_train.run.diagnostics import Private, bundle, remember_log
from lib_lora_train.run.record import RunRecord
from lib_lora_train.run.runner import Runner
from lib_lora_train.settings import parse
from lib_lora_train.settings.toml import write_toml
from tests.fake_host import FakeHost, images
from tests.jobs import plan_of

USER, COMPUTER, SECRET = "annelies77", "annes-laptop", "my secret dataset"


def files(data: bytes) -> dict[str, str]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        assert archive.testzip() is None
        return {name: archive.read(name).decode("utf-8") for name in archive.namelist()}


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home folder of a user of a machine, where the process runs."""
    folder = tmp_path / "Users" / USER
    folder.mkdir(parents=True)
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, str(folder))
    for name in ("USER", "USERNAME", "LOGNAME"):
        monkeypatch.setenv(name, USER)
    monkeypatch.setattr(socket, "gethostname", lambda: f"{COMPUTER}.fritz.box")
    monkeypatch.setattr(platform, "node", lambda: COMPUTER)
    monkeypatch.chdir(folder)
    return folder


def failed_run(host: FakeHost, data: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run that failed in many words, as they come: in events, in a traceback, in the log, in settings."""
    def job(settings, host, *, report, stop, sample_now, save_now, paused, folder=None):
        report(events.Planned(3, 1, 1, 1, 9, f"pictures of {data}", "64×64", "base", 1))
        report(events.Warned(f"Skipped: The picture {data / '1 anna.png'} cannot be used: it is damaged."))
        report(events.Warned(f"2 picture(s) have no caption: anna.png, {USER}.jpg."))
        report(events.Saved(str(host.lora_folder / "zzk-000001.safetensors"), 1, 1, False))
        log = logging.getLogger("lib_lora_train.inputs")
        log.warning("cannot write %s on %s as %s", data / ".lora_train_cache", COMPUTER, USER)
        raise OSError(28, "No space left on device", str(data / "1 anna.png"))

    monkeypatch.setattr(runner_module, "run_job", job)
    runner = Runner()
    run = runner.start(plan_of(parse({
        "output_name": "zzk", "train_data_dir": str(data), "reg_data_dir": "/mnt/other disk/reg", "trigger_word": "zzk girl",
        "network_weights": "D:\\Loras\\Old One\\a.safetensors", "training_comment": "for aunt Marta's birthday"})), host)
    assert runner.wait(10)
    return host.runs_folder / run


def test_no_file_of_the_zip_holds_a_folder_or_a_name_of_the_user(home: Path, monkeypatch: pytest.MonkeyPatch):
    remember_log()
    data = images(home / SECRET)
    (home / "webui").mkdir()
    host = FakeHost(home / "webui")
    run = failed_run(host, data, monkeypatch)
    found = files(bundle(run, host=host))
    assert set(found) == {"about.txt", "report.json", "settings.toml", "events.jsonl", "error.txt", "log.txt"}
    private = {str(home), home.as_posix(), USER, COMPUTER, f"{COMPUTER}.fritz.box", str(data), SECRET, "secret",
               str(home.parent), "anna.png", "Marta", "other disk", "Old One", str(host.lora_folder),
               json.dumps(str(data))[1:-1]}
    for name, text in found.items():
        for word in private:
            assert word.casefold() not in text.casefold(), f"{word!r} is in {name}:\n{text}"
    # What a helper needs is still there.
    assert "No space left on device" in found["error.txt"] and "test_diagnostics.py" in found["error.txt"]
    assert 'trigger_word = "zzk girl"' in found["settings.toml"] and "<train_data_dir>" in found["settings.toml"]
    assert [json.loads(line)["event"] for line in found["events.jsonl"].splitlines()] == [
        "planned", "warning", "warning", "saved", "finished"]
    assert "cannot write" in found["log.txt"] and "The disk refused" in found["events.jsonl"]
    report = json.loads(found["report.json"])
    assert report["packages"]["torch"] and report["checkpoint"]["name"] == "dreamshaper_8" and report["run"] == run.name


def test_this_machines_own_names_are_not_in_it_either(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    host = FakeHost(tmp_path)
    found = files(bundle(failed_run(host, images(tmp_path / "data"), monkeypatch), host=host))
    user, computer = getpass.getuser(), socket.gethostname()
    for name, text in found.items():
        for word in (str(Path.home()), str(tmp_path), os.getcwd()):
            assert word not in text, f"{word!r} is in {name}:\n{text}"
        for word in (user, computer):
            assert not re.search(rf"(?<![A-Za-z0-9]){re.escape(word)}(?![A-Za-z0-9])", text), f"{word!r} is in {name}:\n{text}"


def test_what_was_agreed_to_is_shown(home: Path, monkeypatch: pytest.MonkeyPatch):
    host = FakeHost(home)
    data = images(home / "data")
    run = failed_run(host, data, monkeypatch)
    found = files(bundle(run, host=host, paths=True))
    assert str(data) in found["error.txt"] and "Marta" in found["settings.toml"]
    assert "agreed" in found["about.txt"] and "agreed" not in files(bundle(run, host=host))["about.txt"]


@pytest.mark.parametrize(("text", "expected"), [
    ("see C:\\Users\\bob\\x.py, line 3", "see <path>, line 3"), ('"D:\\\\My\\\\a.toml"', '"<path>"'),
    ("\\\\nas\\share\\x is gone", "<path> is gone"), ("open /srv/private/x: denied", "open <path>: denied"),
    ("a/b and 1/2 it/s, https://example.org/a/b", "a/b and 1/2 it/s, https://example.org/a/b"),
    ("bob's bobsled at BOB.", "<user>'s bobsled at <user>."), ("bob_dog", "<user>_dog"), ("/data/x/1.png", "<dataset>"),
    ("C:/DATA-2/x", "<path>"), ("2 pictures: dog.png, Émile.JPG", "2 pictures: <file>.png, <file>.JPG"),
    ("/code/lora/job.py:7", "<extension>/job.py:7"), ("keep 1.5 of 8 and 10:30", "keep 1.5 of 8 and 10:30")])
def test_paths_and_names_are_found_in_text(text: str, expected: str):
    private = Private(folders={"/data/x": "<dataset>"}, code_folders={"/code/lora": "<extension>"}, names={"bob": "<user>"})
    assert private.replaced(text) == expected


def test_folders_are_found_as_json_toml_and_another_system_spell_them():
    folder = "/Users/josé/bilder"
    private = Private(folders={folder: "<x>"}, code_folders={}, names={})
    for spelt in (folder, json.dumps(folder)[1:-1], folder.replace("/", "\\"), folder.replace("/", "\\\\"),
                  "/Users/jose\u0301/bilder", repr(folder)[1:-1]):
        assert private.replaced(f"a {spelt} b {spelt}/c/d.txt!") == "a <x> b <x>", spelt


def test_folders_that_a_dataset_config_names_are_private():
    config = """[[datasets]]
    [[datasets.subsets]]
    image_dir = "/mnt/my data/cats"
    [[datasets.subsets]]
    image_dir = 'C:\\my pictures\\dogs'
    [[datasets.subsets]]
    image_dir = "D:\\\\some where\\\\mice"
    """
    private = Private.of({"dataset_config": config}, host=None, run=None)
    for text in (config, write_toml({"dataset_config": config}), json.dumps({"dataset_config": config})):
        told = private.replaced(text)
        assert told.count("<image_dir>") == 3 and not any(word in told for word in (
            "my data", "cats", "pictures", "dogs", "where", "mice"))
    assert Private.of({"dataset_config": "[["}, host=None, run=None).replaced("[[") == "[["


def test_a_long_run_and_a_damaged_one_make_a_small_zip(tmp_path: Path, home: Path):
    record = RunRecord(tmp_path / "runs" / "zzk", parse({"output_name": "zzk"}))
    (record.folder / "events.jsonl").write_bytes(b'{"event": "x"}\n' * 500_000 + b'{"torn\xff')
    (record.folder / "settings.toml").write_bytes(b"\xff not TOML")
    record.close()
    found = files(bundle(record.folder))
    assert len(found["events.jsonl"]) <= 1 << 20
    assert "report.json" in files(bundle(tmp_path / "runs" / "gone")) and "report.json" in files(bundle(None))


def test_our_own_refusals_keep_where_they_came_from_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def job(settings, host, *, report, stop, sample_now, save_now, paused, folder=None):
        raise HostError("The model is gone")
    monkeypatch.setattr(runner_module, "run_job", job)
    host, runner = FakeHost(tmp_path), Runner()
    run = runner.start(plan_of(parse({"output_name": "zzk"})), host)
    assert runner.wait(10)
    assert "HostError: The model is gone" in (host.runs_folder / run / "error.txt").read_text(encoding="utf-8")


def test_the_log_is_remembered_once_and_not_without_end():
    assert remember_log() is remember_log()
    log = logging.getLogger("lib_lora_train.x")
    for number in range(5000):
        log.warning("line %d", number)
    lines = remember_log().text().splitlines()
    assert len(lines) <= 1000 and lines[-1].endswith("line 4999")


def test_the_command_writes_the_zip_of_the_newest_run(home: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["diagnose"]) == 0
    assert "no run was found" in capsys.readouterr().out
    RunRecord(home / "runs" / "zzk-1", parse({"output_name": "zzk", "train_data_dir": str(home / "pics")})).close()
    assert main(["diagnose", "--out", "r.zip"]) == 0
    assert "zzk-1" in capsys.readouterr().out
    assert USER not in "".join(files((home / "r.zip").read_bytes()).values())
    assert main(["diagnose", "runs/zzk-1", "--out", "p.zip", "--paths"]) == 0
    assert USER in files((home / "p.zip").read_bytes())["settings.toml"]
    assert main(["diagnose", "nowhere"]) == 2
