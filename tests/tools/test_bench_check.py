"""`bench check`: each check is told, whatever becomes of it; on a CPU, on narrow models."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from tools.bench import check
from tools.bench.command import main

HAND_OVER = "hand-over to a generation"


def plan(tmp_path: Path, *only: str) -> check.CheckPlan:
    return check.CheckPlan(tmp_path, torch.device("cpu"), small=True, precision="no", only=only)


def test_what_a_cpu_can_show_holds_and_is_written(tmp_path: Path, capsys):
    names = ["kernels", "eight bits", HAND_OVER]
    command = ["check", "--device", "cpu", "--out", str(tmp_path), *[word for name in names for word in ("--only", name)]]
    assert main(command) == 0
    lines = check.read_lines(tmp_path / check.FILE_NAME)
    assert [line["check"] for line in lines] == names and all(line["ok"] for line in lines)
    # The model was elsewhere in between, and every loss is that of the run that was left alone.
    assert lines[-1]["yielded"] > 0 and lines[-1]["losses apart"] == 0
    assert "cuda_graphs = off: not measured" in capsys.readouterr().out


def test_a_check_that_fails_is_told_and_the_next_begins(tmp_path: Path, monkeypatch):
    def broken(checks: check.Checks) -> check.Figures:
        raise RuntimeError("no kernel image is available")
    monkeypatch.setattr(check.Checks, "kernels", broken)
    assert check.check_here(plan(tmp_path, "kernels", "eight bits"), say=lambda text: None) == 0
    first, second = check.read_lines(tmp_path / check.FILE_NAME)
    assert "no kernel image" in first["failed"] and second["ok"]


def test_a_process_that_is_ended_loses_one_check_each_time(tmp_path: Path):
    ended = (sys.executable, "-c", "import os; os._exit(7)")
    text = check.run_check(plan(tmp_path, "kernels", "eight bits"), command=ended)
    assert [line["failed"] for line in check.read_lines(tmp_path / check.FILE_NAME)] == ["the process ended with 7"] * 2
    assert text.count(": failed.") == 2


@pytest.mark.parametrize(("ratios", "ok", "expected"), [
    ((1.4, 1.2), True, "on"), ((1.4, 1.01), True, "off"), ((1.4, 1.2), False, "off"), ((), True, "off")])
def test_a_default_needs_every_case_to_be_faster_and_as_good(ratios, ok, expected):
    lines = [{"check": f"graphs, case {number}", "times as fast": ratio, "ok": ok} for number, ratio in enumerate(ratios)]
    assert f"cuda_graphs = {expected}:" in check.summary(lines, "a machine")


@pytest.mark.parametrize(("ratios", "ok", "expected"), [
    ((1.2, 1.4), True, "all"), ((1.2, 1.7), True, "none"), ((1.2, 1.4), False, "none"), ((), True, "none")])
def test_swapping_is_justified_where_no_case_takes_half_as_long_again(ratios, ok, expected):
    lines = [{"check": f"swapping, case {number}", "times as long": ratio, "ok": ok} for number, ratio in enumerate(ratios)]
    assert f"blocks_to_swap = {expected}:" in check.summary(lines, "a machine")
