"""A run's folder says how far it got and how it ended, also where nobody was left to write that down."""

from __future__ import annotations

import errno
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from lib_lora_train import events
from lib_lora_train.errors import HostError, OutputError
from lib_lora_train.run import record as record_module
from lib_lora_train.run.record import RunRecord, past_run, past_runs, read_events
from lib_lora_train.settings import parse
from lib_lora_train.storage.lock import is_locked

SETTINGS = parse({"output_name": "zzk"})
PLANNED = events.Planned(3, 1, 10, 10, 1500, "3 pictures", "64x64", "model", 42)


def step(number: int, total: int = 1500) -> events.Step:
    return events.Step(number, total, 1, 1, 0.5, 0.5, 1e-4, 0.0, 2.0, 10.0)


def cut_off(folder: Path, *, at: int = 412) -> None:
    record = RunRecord(folder, SETTINGS)
    record.write(PLANNED)
    record.write(step(at))
    record.close()  # as the system does for a killed process


def test_a_run_is_running_while_its_process_lives_and_interrupted_afterwards(tmp_path):
    record = RunRecord(tmp_path / "one", SETTINGS)
    record.write(PLANNED)
    record.write(step(412))
    assert past_run(tmp_path / "one").outcome == "running"
    record.close()
    past = past_run(tmp_path / "one")
    assert (past.outcome, past.steps, past.total, past.resume_step) == ("interrupted", 412, 1500, None)
    assert past.message == "Interrupted at step 412 of 1500."


def test_the_lock_of_another_process_is_seen_and_gone_when_it_is_killed(tmp_path):
    script = ("import sys; from pathlib import Path; from lib_lora_train.storage.lock import lock_run\n"
              "lock = lock_run(Path(sys.argv[1])); print('taken', flush=True); sys.stdin.read()")
    root = Path(__file__).resolve().parents[2]
    process = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], cwd=root, text=True,
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    with process:
        assert process.stdout.readline() == "taken\n"
        assert is_locked(tmp_path)
        process.kill()
    assert not is_locked(tmp_path)


def test_the_next_run_removes_what_a_killed_one_left_half_written_and_nothing_else(tmp_path):
    cut_off(tmp_path / "killed")
    alive = RunRecord(tmp_path / "alive", SETTINGS)
    parts = {name: tmp_path / name / ".state.4711.part" for name in ("killed", "alive", "not a run")}
    for part in parts.values():
        part.parent.mkdir(exist_ok=True)
        part.write_bytes(b"half")
    before = {path: path.read_bytes() for path in (tmp_path / "killed").iterdir() if path != parts["killed"]}
    RunRecord(tmp_path / "next", SETTINGS).close()
    assert [name for name, part in parts.items() if part.exists()] == ["alive", "not a run"]
    assert {path: path.read_bytes() for path in (tmp_path / "killed").iterdir()} == before
    alive.close()


def test_a_run_that_is_under_way_cannot_be_resumed(tmp_path, monkeypatch):
    from lib_lora_train.storage import lock
    monkeypatch.setattr(lock, "ACQUIRE_TIMEOUT", 0.0)
    first = RunRecord(tmp_path / "one", SETTINGS)
    with pytest.raises(HostError, match="one is under way"):
        RunRecord(tmp_path / "one", SETTINGS)
    first.close()
    RunRecord(tmp_path / "one", SETTINGS).close()


def test_a_resumed_run_is_told_by_its_last_part(tmp_path):
    folder = tmp_path / "one"
    cut_off(folder)
    record = RunRecord(folder, SETTINGS)
    record.write(events.Planned(3, 1, 10, 10, 1500, "3 pictures", "64x64", "model", 42, resumed_at=400))
    assert past_run(folder).steps == 400
    record.write(events.Finished("stopped", "Stopped after 500", "a.safetensors", 500))
    record.write(events.Planned(3, 1, 10, 10, 1500, "3 pictures", "64x64", "model", 42, resumed_at=500))
    record.write(step(501))
    record.close()
    assert (past_run(folder).outcome, past_run(folder).steps) == ("interrupted", 501)


def test_a_run_cut_off_between_its_last_save_and_its_last_word_is_done(tmp_path):
    cut_off(tmp_path / "one", at=1500)
    record = RunRecord(tmp_path / "one", SETTINGS)
    record.write(events.Saved("loras/zzk.safetensors", 1500, 10, True))
    record.close()
    assert (past_run(tmp_path / "one").outcome, past_run(tmp_path / "one").path) == ("done", "loras/zzk.safetensors")


def test_a_torn_last_line_costs_that_line_alone(tmp_path):
    folder = tmp_path / "one"
    cut_off(folder)
    with open(folder / "events.jsonl", "a", encoding="utf-8") as file:
        file.write('{"event": "saved", "pa')
    record = RunRecord(folder, SETTINGS)
    record.write(events.Warned("after"))
    record.close()
    assert [event.kind for event in read_events(folder)] == ["planned", "step", "warning"]


def test_a_disk_that_is_full_for_a_while_costs_no_later_line(tmp_path, monkeypatch):
    record = RunRecord(tmp_path / "one", SETTINGS)
    real, full = open, [True]

    class Half:
        def __init__(self, file):
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def write(self, text):
            self.file.write(text[:10])
            raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(record_module, "open", lambda *a, **k: Half(real(*a, **k)) if full[0] else real(*a, **k), raising=False)
    record.write(events.Warned("lost"))
    full[0] = False
    record.write(events.Warned("kept"))
    record.close()
    assert [event.message for event in read_events(tmp_path / "one")] == ["kept"]


def test_past_runs_that_may_not_be_read_are_a_sentence_and_those_that_are_not_there_are_none(tmp_path, monkeypatch):
    assert past_runs(tmp_path / "nowhere") == []
    def closed(_: Path) -> Iterator[Path]:
        raise PermissionError(errno.EACCES, "Permission denied")
    monkeypatch.setattr(Path, "iterdir", closed)  # root may enter every folder
    with pytest.raises(OutputError):
        past_runs(tmp_path)


def test_a_folder_that_vanishes_is_begun_again_with_what_happens_then(tmp_path):
    record = RunRecord(tmp_path / "one", SETTINGS)
    record.write(PLANNED)
    shutil.rmtree(tmp_path / "one")
    record.write(events.Finished("done", "ready", "zzk.safetensors", 1500))
    record.close()
    past, = past_runs(tmp_path)
    assert (past.name, past.outcome, past.steps) == ("zzk", "done", 1500)
