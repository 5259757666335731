"""Two programs in turn: small ones that show steps as trainers do, and spend a known share of CPU time."""

from __future__ import annotations

import contextlib
import shlex
import sys
from pathlib import Path

import pytest

from lib_lora_train.errors import SettingError, TrainingError
from tools.bench import programs
from tools.bench.programs import Pair, Shown, Timing, filled, ratio_text, run_pairs, time_steps, words_of

# Writes its name and step count to a log, shows the bar of another work that is as long as its steps, then its steps.
TRAINER = """
import sys, time
name, steps, log, shows = sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4] == "shows"
with open(log, "a") as file:
    file.write(f"{name} {steps}\\n")
pictures = steps if shows else 8
for picture in range(1, pictures + 1):
    print(f"Encoding: 100%|####| {picture}/{pictures} [00:01<00:00]", flush=True)
for step in range(1, steps + 1):
    for _ in range(2 if step == 1 else 1):
        sum(range(200_000))
    if shows:
        sys.stderr.write(f"\\rsteps:  33%|###   | {step}/{steps} [00:01<00:02, 1.0it/s]")
        sys.stderr.write(f"\\rsteps:  33%|###   | {step}/{steps} [00:01<00:02, 1.0it/s, loss=0.1]")
        sys.stderr.flush()
"""


def command(tmp_path: Path, name: str, *, shows: bool = True) -> str:
    script = tmp_path / "trainer.py"
    script.write_text(TRAINER, encoding="utf-8")
    return " ".join([shlex.quote(sys.executable), shlex.quote(str(script)), name, "{steps}", "{output}",
                     "shows" if shows else "silent"])


def ran(tmp_path: Path) -> list[str]:
    return (tmp_path / "log").read_text(encoding="utf-8").splitlines()


def test_the_two_programs_run_in_turn(tmp_path: Path) -> None:
    pairs = run_pairs(command(tmp_path, "a"), command(tmp_path, "b"), values={"output": tmp_path / "log"}, steps=5, pairs=3,
                      say=lambda line: None)
    assert ran(tmp_path) == ["a 5", "b 5"] * 3
    assert len(pairs) == 3
    assert all(run.wall > 0 for pair in pairs for run in (pair.ours, pair.theirs))


def test_steps_that_are_shown_are_timed_within_one_run(tmp_path: Path) -> None:
    timing = time_steps(command(tmp_path, "a"), values={"output": tmp_path / "log"}, steps=6)
    assert ran(tmp_path) == ["a 6"]
    assert timing.wall > 0 and timing.gpu_bytes is None


def test_a_program_that_shows_nothing_runs_for_twice_the_steps_too(tmp_path: Path) -> None:
    with contextlib.suppress(TrainingError):  # on a busy machine these short steps drown in the start
        time_steps(command(tmp_path, "a", shows=False), values={"output": tmp_path / "log"}, steps=5)
    assert ran(tmp_path) == ["a 5", "a 10"]


def test_the_first_step_and_what_came_before_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    # Steps 1, 2, 5 were seen at 10, 12 and 18 seconds, with 5, 6 and 11 seconds of CPU: 8 and 6 s for 4 steps.
    seen = programs._Watched({1: (10.0, 5.0), 2: (12.0, 6.0), 5: (18.0, 11.0)}, wall=99.0, cpu=50.0, gpu_bytes=7)
    monkeypatch.setattr(programs, "_watched", lambda words, *, steps, gpu_bytes: seen)
    assert time_steps("trainer", values={}, steps=5) == Timing(wall=2.0, cpu=1.5, gpu_bytes=7)
    # Without the first two: 6 and 5 s for 3 steps.
    assert time_steps("trainer", values={}, steps=5, warm_up=2) == Timing(wall=2.0, cpu=5 / 3, gpu_bytes=7)


def test_of_several_bars_that_are_as_long_as_the_steps_the_last_one_counts() -> None:
    printed = [b"latents:  50%|##  | 2/4 [00:01<00:01]", b"latents: 100%|####| 4/4 [00:02<00:00]\r", b"files: 3|#| 1/7 [",
               b"captions: 100%|####| 4/4 [00:02<00:00]\r", b"steps:   0%|    | 0/4 [00:00<?]\rsteps:  25%|#   | 1",
               b"/4 [00:01<00:03]", b"steps:  25%|#   | 1/4 [00:01<00:03, loss=0.1]", b"steps:  75%|### | 3/4 [00:03<00:01]"]
    read: list[bytes] = []
    shown = Shown(4, now=lambda: (float(len(read)), None))
    for chunk in printed:
        shown.read(chunk)
        read.append(chunk)
    assert shown.at == {1: (5.0, None), 3: (7.0, None)}


def test_our_own_run_must_show_its_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    silent = programs._Watched({}, wall=30.0, cpu=15.0, gpu_bytes=None)
    monkeypatch.setattr(programs, "_watched", lambda words, *, steps, gpu_bytes: silent)
    with pytest.raises(TrainingError, match=r"own run showed too few of its steps.*take more --steps"):
        run_pairs(["ours"], "theirs", values={}, steps=5, pairs=1, say=lambda line: None)


def test_fewer_steps_than_are_left_out_and_two_more_are_refused() -> None:
    with pytest.raises(SettingError, match=r"--steps 11 .* first 10 are left out; take at least 12"):
        run_pairs(["ours"], "theirs", values={}, steps=11, pairs=1, warm_up=10, say=lambda line: None)


def test_the_difference_of_two_runs_is_the_steps_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    # 30 s to start and 2 s a step; half of it on the CPU.
    monkeypatch.setattr(programs, "_watched", lambda words, *, steps, gpu_bytes: programs._Watched(
        {}, wall=30.0 + 2.0 * steps, cpu=15.0 + 1.0 * steps, gpu_bytes=None))
    assert time_steps("trainer {steps}", values={}, steps=5) == Timing(wall=2.0, cpu=1.0)


def test_steps_that_drown_in_the_start_are_no_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    # 3.1 s for N steps and 3.0 s for 2 N: by the difference a step would have taken less than nothing.
    monkeypatch.setattr(programs, "_watched", lambda words, *, steps, gpu_bytes: programs._Watched(
        {}, wall=3.1 if steps == 5 else 3.0, cpu=None, gpu_bytes=None))
    with pytest.raises(TrainingError, match=r"too short.*take more --steps"):
        time_steps("trainer {steps}", values={}, steps=5)


def test_ratios_are_ours_by_theirs_run_by_run() -> None:
    pairs = [Pair(Timing(1.0, 3.0), Timing(2.0, 4.0)), Pair(Timing(3.0, 1.0), Timing(4.0, 4.0)),
             Pair(Timing(9.0, 2.0), Timing(10.0, 4.0))]
    assert ratio_text(pairs, cpu=False) == (
        "ours ÷ theirs (clock): 0.500, 0.750, 0.900; median 0.750, from 0.500 to 0.900")
    assert ratio_text(pairs, cpu=True) == (
        "ours ÷ theirs (CPU): 0.750, 0.250, 0.500; median 0.500, from 0.250 to 0.750")


def test_placeholders_are_filled_in_word_by_word() -> None:
    assert filled("train --data {data} --steps={steps} 'a b'", {"data": "/my pictures", "steps": 4}) == [
        "train", "--data", "/my pictures", "--steps=4", "a b"]
    assert filled(["a b", "{steps}"], {"steps": 4}) == ["a b", "4"], "words that are words already stay as they are"
    with pytest.raises(SettingError, match="{speed} is unknown"):
        filled("train {speed}", {"steps": 4})


@pytest.mark.parametrize("windows, command, words", [
    (True, r'"C:\Program Files\python.exe" D:\sd\train.py --name="a b" #', [
        r"C:\Program Files\python.exe", r"D:\sd\train.py", "--name=a b", "#"]),
    (False, r'"/opt/my python" a\ b \"', ["/opt/my python", "a b", '"'])])
def test_a_command_line_is_read_as_its_system_reads_it(windows: bool, command: str, words: list[str]) -> None:
    assert words_of(command, windows=windows) == words
    with pytest.raises(SettingError, match="close its quotes"):
        words_of('python "train.py', windows=windows)


def test_a_program_that_fails_says_what_it_said(tmp_path: Path) -> None:
    script = tmp_path / "fails.py"
    script.write_text("import sys; print('no such model'); sys.exit(3)", encoding="utf-8")
    with pytest.raises(TrainingError, match=r"ended with 3.*no such model"):
        time_steps(shlex.join([sys.executable, str(script)]), values={}, steps=5)


def test_the_most_memory_seen_while_a_program_ran_is_counted_from_what_was_taken_before(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def gpu_memory_used() -> int:
        asked.append(1)
        return 100 if len(asked) == 1 else 350

    monkeypatch.setattr(programs, "_POLL_SECONDS", 0.001)
    timing = time_steps(command(tmp_path, "a"), values={"output": tmp_path / "log"}, steps=6, gpu_bytes=gpu_memory_used)
    assert timing.gpu_bytes == 250
