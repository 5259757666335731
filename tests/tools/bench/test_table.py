"""The table says what counts for nothing before it says anything else."""

from __future__ import annotations

import dataclasses

from tools.bench.evaluator import Band, Memorised, Row, ScorerFigures
from tools.bench.headline import HeadlineRow
from tools.bench.joint_scorer import WordGate
from tools.bench.style import StyleResult
from tools.bench.style_scorer import StyleGate
from tools.bench.subject import SubjectResult
from tools.bench.table import WORTHLESS, detail_text, gates_text, headlines_text, intro_text, scorers_text

SCORERS = ScorerFigures(style=0.96875, style_palette=0.9, style_texture=0.85, style_counts=True, word_noto=1.0,
                        word_twemoji=0.98, word_across=0.45)
STYLE = StyleResult(
    steps=800, rows=[Row("base", 0.03125, 0.1, 0.2, 0.75, 12.345, 0.5, 0.25), Row("LoRA at 1", 0.9, 1, 1, 0.7, 14.0, 0.6, 0.2)],
    weight_0_is_base_model=True, own=0.5, intermediate=[Row("50 steps", 0.5, 1, 1, 0.7, 14.0, 0.6, 0.2)],
    memorised=[Memorised("real held-out Twemoji", 0.2, 0.1, 0.0)], loss=[Band("0-199", 0.5, 0.4)], training_seconds=9.0)
SUBJECT = SubjectResult(
    steps=400, images=16, base_model=0.0, lora=0.75, real=0.9, mistaken=0.01, loss=[Band("0-199", 0.5, 0.6)])


def text(scorers: ScorerFigures = SCORERS, style: StyleResult = STYLE, *, thorough: bool = True) -> str:
    intro = intro_text(settings={"network_dim": 8}, checkpoint="emoji", thorough=thorough, seconds=600.0)
    return f"{intro}\n\n{detail_text(scorers=scorers, style=style, subject=SUBJECT)}\n"


def test_a_scorer_that_is_right_too_seldom_is_named_before_its_verdicts():
    poor = dataclasses.replace(SCORERS, style=0.93, style_counts=False)
    assert scorers_text(poor).startswith(WORTHLESS) and text(poor).index(WORTHLESS) < text(poor).index("| base")
    assert WORTHLESS not in text()


def test_the_scorers_own_accuracy_comes_before_all_shares():
    assert text().index("96.9 %") < text().index("| base")


def test_every_row_of_a_table_has_as_many_cells_as_its_head_and_they_line_up():
    tables = [block.splitlines() for block in text().split("\n\n") if block.startswith("|")]
    assert tables
    for lines in tables:
        assert len({line.count("|") for line in lines}) == 1 and len({len(line) for line in lines}) == 1


def test_figures_are_shown_with_their_signs_and_units():
    shown = text()
    assert "3.1 %" in shown and "12.35" in shown  # a share and a PSNR
    assert "-20.0 %" in shown and "+20.0 %" in shown  # a loss that fell, and one that rose


def test_a_quick_run_and_a_weight_0_that_changes_something_are_told():
    assert "Not to be quoted" in text(thorough=False) and "Not to be quoted" not in text()
    assert "something is wrong" in text(style=dataclasses.replace(STYLE, weight_0_is_base_model=False))


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
    assert gates_text(gates).count("**failed**") == 3
