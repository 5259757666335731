"""The table says what counts for nothing before it says anything else."""

from __future__ import annotations

import dataclasses

from tools.bench.headline import HeadlineRow
from tools.bench.joint_scorer import QUICK, THOROUGH, WordGate
from tools.bench.style_scorer import StyleGate
from tools.bench.subject import SubjectRow
from tools.bench.table import gates_text, headlines_text, intro_text, subject_text


def test_every_row_of_a_table_has_as_many_cells_as_its_head_and_they_line_up():
    lines = subject_text([SubjectRow("jug", "real ones", 1.0), SubjectRow("jug", "LoRA, CFG 2", 0.03125, 0.02)],
                         steps=3).splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert len(table) == 4 and len({(line.count("|"), len(line)) for line in table}) == 1
    assert "100.0 % |" in table[2] and "3.1 % ± 2.0 |" in table[3]


def test_a_quick_run_is_told():
    quick, thorough = (intro_text(settings={"network_dim": 8}, checkpoint="emoji", extent=extent, words=64, seconds=600.0)
                       for extent in (QUICK, dataclasses.replace(THOROUGH, runs=2, test=True)))
    assert "Not to be quoted" in quick and "Not to be quoted" not in thorough
    assert "Held-out words: 64" in quick and "Test words: 64; images a word: 4; runs: 2" in thorough


def test_what_a_failed_gate_stands_before_is_struck_through_and_nothing_else():
    right, wrong = {"as it is": 0.99, "blurred": 0.96}, {"1": 0.05, "4": 0.10}
    gates = {"good": (StyleGate("good", right, wrong), WordGate("good", 0.91)),
             "faded": (StyleGate("faded", {**right, "blurred": 0.94}, wrong), WordGate("faded", 0.91)),
             "taken": (StyleGate("taken", right, {**wrong, "4": 0.11}), WordGate("taken", 0.89))}
    rows = [HeadlineRow(name, "LoRA", 0.5, 0.25, 0.125, 0.03, 0.1, 0.04, 0.0) for name in gates]
    shown = headlines_text(rows, gates, steps=9).splitlines()
    lines = {line.split(":")[0].strip("| "): line for line in shown if "LoRA" in line}
    struck = {name: [part in line for part in ("~~50.0 %~~", "~~25.0 %~~", "~~12.5 % ± 3.0~~", "~~+10.0 ± 4.0~~")]
              for name, line in lines.items()}
    assert struck == {"good": [False] * 4, "faded": [True, False, True, True], "taken": [True, True, True, True]}
    assert [gates_text(gates, own).count("**failed**") for own in (0.95, 0.94)] == [3, 4]
