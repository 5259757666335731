"""What a terminal does to the program: it is interrupted, closed, or read no more, at any moment. Real signals."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from lib_lora_train import __main__ as program
from lib_lora_train import demo, events, terminal
from lib_lora_train.api import service
from lib_lora_train.run import runner
from lib_lora_train.run.record import past_runs
from lib_lora_train.run.runner import Runner
from lib_lora_train.settings import parse
from lib_lora_train.tagging import plain
from lib_lora_train.ui import standalone
from tests.fake_host import FakeHost
from tests.jobs import plan_of

ROOT = Path(__file__).resolve().parent.parent
SIGNALS = [name for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="Windows signals the whole console, or ends the process")


@pytest.fixture
def set_up(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The program's streams and signals in this process."""
    before = {name: signal.getsignal(getattr(signal, name)) for name in SIGNALS}
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, getattr(sys, name))
    for name in SIGNALS:
        signal.signal(getattr(signal, name), signal.SIG_DFL)  # the tests themselves may run under nohup
    terminal.set_up()
    yield
    for name, handler in before.items():
        signal.signal(getattr(signal, name), handler)


def send(name: str) -> None:
    os.kill(os.getpid(), getattr(signal, name))


# ---- while the program starts

@pytest.mark.parametrize(("name", "command"), [
    ("SIGINT", ["train", "--checkpoint", "a.safetensors"]), ("SIGINT", ["ui"]), ("SIGTERM", ["tag", ".", "--with", "filename"]),
    ("SIGHUP", ["demo"])])
def test_an_interrupt_during_the_imports_ends_with_130_and_a_sentence(tmp_path, name, command):
    # torch and what it imports catch exceptions at some places: one that is raised by a signal there may be lost.
    (tmp_path / "torch.py").write_text(
        f"import os, signal\ntry:\n    os.kill(os.getpid(), signal.{name})\n    for _ in range(1000): pass\n"
        "except BaseException: pass\nprint('lost')\n", encoding="utf-8")
    before = signal.signal(getattr(signal, name), signal.SIG_DFL)  # which nohup sets, and a new program takes over
    try:
        done = subprocess.run([sys.executable, "-m", "lib_lora_train", *command], cwd=ROOT, text=True, capture_output=True,
                              check=False, env={**os.environ, "PYTHONPATH": str(tmp_path)})
    finally:
        signal.signal(getattr(signal, name), before)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "\nStopped.\n")


def test_a_program_under_nohup_does_not_mind_a_closed_terminal(set_up):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    terminal.set_up()
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


# ---- while it works

@pytest.mark.parametrize(("name", "moment"), [("SIGTERM", "Reading pictures"), ("SIGINT", "Encoding pictures"),
                                              ("SIGHUP", "step"), ("SIGTERM", "step")])
def test_a_training_that_is_interrupted_closed_or_terminated_keeps_what_it_learnt(
        set_up, tiny_file, images, tmp_path, monkeypatch, capfd, name, moment):
    to_dict, sent = events.to_dict, list[str]()

    def telling(event: events.Event) -> dict[str, object]:
        if moment in (event.kind, getattr(event, "name", "")) and not sent:
            sent.append(name)
            send(name)
        return to_dict(event)
    monkeypatch.setattr(events, "to_dict", telling)
    out = tmp_path / "out"
    code = program.main(list(map(str, (
        "train", "--checkpoint", tiny_file, "--data", images, "--name", "zzk", "--output-dir", out, "--json", "--set",
        "resolution=64", "--set", "min_bucket_reso=64", "--set", "network_dim=2", "--set", "max_train_steps=100000", "--set",
        "sample_images=false", "--set", "validation=false"))))
    told, said = capfd.readouterr()
    last = events.from_dict(json.loads(told.splitlines()[-1]))
    assert (code, last.outcome) == (130, "stopped") and said.count("what was learnt until now is saved") == 1
    learnt = moment == "step"
    assert (out / "zzk.safetensors").is_file() == learnt and "Traceback" not in said
    assert past_runs(out / "runs")[0].resume_step == (last.steps if learnt else None)


def test_a_second_interrupt_ends_at_once():
    script = ("import os, signal\nfrom lib_lora_train import terminal\nwith terminal.StopRequest(launched=False, tells=True):\n"
              "    for _ in range(2): os.kill(os.getpid(), signal.SIGINT)\n    print('too late')")
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, text=True, capture_output=True, check=False)
    assert (done.returncode, done.stdout) == (130, "") and done.stderr.splitlines()[-1] == "Stopped."


@pytest.mark.parametrize("name", SIGNALS)
def test_captions_found_until_an_interrupt_are_written(set_up, tmp_path, monkeypatch, capfd, name):
    words = plain.words_of_name

    def interrupting(stem: str) -> str:
        if stem == "c":
            send(name)
        return words(stem)
    monkeypatch.setattr(plain, "words_of_name", interrupting)
    for stem in "abc":
        Image.new("RGB", (64, 64)).save(tmp_path / f"{stem}.png")
    assert program.main(["tag", str(tmp_path), "--with", "filename", "--set", "batch_size=1"]) == 130
    assert sorted(path.name for path in tmp_path.glob("*.txt")) == ["a.txt", "b.txt"]
    assert "kept" in capfd.readouterr().err


@pytest.fixture
def training(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """A runner whose training goes on until it is stopped, and says how; the host."""
    def job(plan, host, *, report, stop, sample_now, save_now, paused, folder=None):
        begun.set()
        while not stop():
            pass
        return events.Finished("stopped", f"Stopped to {stop()}.", "", 3)
    begun, one, host = threading.Event(), Runner(), FakeHost(tmp_path)
    monkeypatch.setattr(runner, "run_job", job)
    for place in (demo, standalone):
        monkeypatch.setattr(place, "RUNNER", one)

    def start() -> None:
        one.start(plan_of(parse({"output_name": "zzk"})), host)
        assert begun.wait(30)
    return one, host, start


@pytest.mark.parametrize("name", SIGNALS)
def test_the_page_that_is_ended_has_its_training_keep_what_it_learnt(set_up, training, monkeypatch, name):
    one, host, start = training

    def serving(server: object, sockets: object) -> None:
        start()
        send(name)
    monkeypatch.setattr(standalone.uvicorn.Server, "run", serving)
    standalone.serve(host, port=0)
    assert one.status().finished.message == "Stopped to save." and not one.running()


@pytest.mark.parametrize("name", SIGNALS)
def test_a_training_is_not_over_because_waiting_for_it_was_interrupted(set_up, training, name):
    one, _, start = training
    terminal.raise_on_interrupt()
    start()
    main = threading.get_ident()

    def interrupting() -> None:
        stack = ""
        while "one.wait(timeout=30)" not in stack or "threading.py" not in stack.rpartition("File")[2]:
            stack = "".join(traceback.format_stack(sys._current_frames()[main]))
        send(name)
    threading.Thread(target=interrupting, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        one.wait(timeout=30)
    assert not one.wait(timeout=0) and one.running()
    one.finish()
    assert one.status().finished.message == "Stopped to save."


def test_an_end_that_is_told_twice_is_no_second_wish(set_up):
    terminal.raise_on_interrupt()
    with pytest.raises(KeyboardInterrupt):
        send("SIGTERM")
    for name in set(SIGNALS) - {"SIGINT"}:  # as `timeout` tells the program and then its group
        send(name)


@pytest.mark.parametrize("name", SIGNALS)
def test_the_demo_that_is_ended_keeps_what_it_learnt(set_up, training, monkeypatch, tmp_path, capfd, name):
    one, _, start = training
    monkeypatch.setattr(service, "start", lambda *_, **__: start())
    waiting = one.wait
    monkeypatch.setattr(one, "wait", lambda timeout: send(name) if timeout == 2.0 else waiting(timeout))
    assert demo.run_demo(tmp_path, page=False, port=0, address="") == 130
    assert "Stopped to save." in capfd.readouterr().out and not one.running()


# ---- while nobody reads

def reader_gone():
    read, write = os.pipe()
    os.close(read)
    return os.fdopen(write, "w", buffering=1)


def terminal_closed():
    inside, outside = os.openpty()
    os.close(inside)
    return os.fdopen(outside, "w", buffering=1)


@pytest.mark.parametrize(("stream", "said"), [
    (reader_gone, ""), (terminal_closed, "(Input/output error)"),
    pytest.param(lambda: open("/dev/full", "w", encoding="utf-8", buffering=1), "(No space left on device)",
                 marks=pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a device of Linux"))])
def test_captions_are_written_though_what_is_printed_cannot_be(set_up, tmp_path, monkeypatch, capfd, stream, said):
    for stem in "ab":
        Image.new("RGB", (64, 64)).save(tmp_path / f"{stem}.png")
    with stream() as shown:
        monkeypatch.setattr(sys, "stdout", shown)
        terminal.set_up()
        assert program.main(["tag", str(tmp_path), "--with", "filename", "--json"]) == 0
    assert sorted(path.name for path in tmp_path.glob("*.txt")) == ["a.txt", "b.txt"]
    told = capfd.readouterr().err
    assert said in told and ("the work goes on" in told) == bool(said)
