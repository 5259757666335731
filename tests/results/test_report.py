"""The report of a run stands alone, tells the truth of its events, and gives away nobody's folders."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import math
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from lib_lora_train import events
from lib_lora_train.results import report
from lib_lora_train.results.grid import Cell, Column, Grid, Prompt, SampleOptions
from lib_lora_train.results.report import report_html, write_report
from lib_lora_train.run import runner
from lib_lora_train.run.record import read_events
from lib_lora_train.run.runner import Runner
from lib_lora_train.settings import flat, parse
from lib_lora_train.settings.toml import read_toml
from lib_lora_train.storage.lock import is_locked
from tests.fake_host import FakeHost
from tests.jobs import plan_of
from tests.results.written_run import Run, step

NASTY = '"><img src=x onerror=alert(1)><script>alert(2)</script>&amp;'


class Page(HTMLParser):
    """What a browser would find in the HTML: tags with their attributes, the text, the cells of the rows of tables."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text, self.rows, self.blocks = "", [], []
        self.inside: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.inside.append(tag)
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
        elif tag == "pre":
            self.blocks.append("")

    def handle_endtag(self, tag: str) -> None:
        while self.inside and self.inside.pop() != tag:  # <path/>, <img> and <meta> are not closed
            pass

    def handle_data(self, data: str) -> None:
        self.text += data
        if {"td", "th"} & set(self.inside):
            self.rows[-1][-1] += data
        if "pre" in self.inside:
            self.blocks[-1] += data

    def images(self) -> list[str]:
        return [attributes["src"] or "" for tag, attributes in self.tags if tag == "img"]


def html_of(run: Run) -> str:
    run.record.close()
    return report_html(run.folder, run.host)


def measured(number: int, factor: float) -> events.Measured:
    return events.Measured(number, 1, (0.1 * factor, 0.2 * factor, 0.3 * factor), (0.2, 0.3, 0.4), (0.2, 0.3, 0.4 * factor),
                           (0.2, 0.3, 0.5), {"unet": 0.01})


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path)


def test_nothing_is_fetched_and_no_program_is_in_it(run: Run) -> None:
    run.tell(*(step(number) for number in range(1, 40)), measured(10, 1.0), measured(20, 0.9))
    run.sample(10)
    html = html_of(run)
    page = Page(html)
    assert page.images() and all(source.startswith("data:image/jpeg;base64,") for source in page.images())
    assert not {tag for tag, _ in page.tags} & {"script", "link", "iframe", "object", "base", "form"}
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on") or name == "href"]
    assert not any(word in html for word in ("http://", "https://", "@import", "url("))


def test_what_files_say_is_text(tmp_path: Path) -> None:
    run = Run(tmp_path, values={"trigger_word": NASTY})
    run.sample(5, prompt=NASTY)
    run.tell(events.Warned(f"w{NASTY}"), events.HeldOut((f"h{NASTY}.png",), derived=False),
             events.ImageLosses(5, (f"i{NASTY}.png",), (0.1,), (0.2,)),
             events.Diagnosed(5, "words", f"d{NASTY}", "learning_rate", f"v{NASTY}"), events.Finished("failed", NASTY, "", 5))
    page = Page(html_of(run))
    assert len(page.images()) == 1 and "script" not in {tag for tag, _ in page.tags}
    # Nor would one run: the page opens the report from memory, without the server's headers.
    policy, = (given["content"] for tag, given in page.tags if tag == "meta" and "http-equiv" in given)
    assert policy.startswith("default-src 'none'") and "script" not in policy
    assert page.text.count(NASTY) >= 8


def test_folders_users_and_the_comment_are_not_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("USER", "zaphod")
    continued = tmp_path / "others" / "first.safetensors"
    run = Run(tmp_path, values={"training_comment": "for nobody else", "network_weights": str(continued),
                                "train_data_dir": str(tmp_path / "pictures"), "output_dir": str(tmp_path / "loras")})
    path = run.save("zzk", 100, final=True)
    run.tell(events.Warned(f"{tmp_path / 'pictures' / 'a.png'} cannot be opened, zaphod."),
             events.HeldOut((f"{tmp_path}/a.png",), derived=False),
             events.Finished("done", f"zzk is ready: {path}", str(path), 100))
    html = html_of(run)
    assert not [word for word in (str(tmp_path), str(Path.home()) + "/", "zaphod", "for nobody else") if word in html]
    assert "zzk is ready: zzk.safetensors" in html and "first.safetensors" in html


def test_its_numbers_are_those_of_the_events(run: Run) -> None:
    run.tell(measured(0, 1.0), step(50), measured(50, 0.5))
    run.save("zzk-step00000050", 50)
    names, losses = ("a.png", "b.png", "c.png", "d.png", "e.png"), (0.3, math.nan, 0.32, 0.41, 0.1)
    run.tell(events.ImageLosses(50, names, losses, (0.4,) * 5))
    page = Page(html_of(run))
    row, = (row for row in page.rows if row[0] == "zzk-step00000050")
    # Held out, of the base model's loss: 1, 1 and 0.4, whose cube root is 0.737; training: 1/4, 1/3 and 3/8, of 1/32 0.315.
    assert row[1:5] == ["50", "1", "+26.3 %", "+68.5 %"]
    never, at_once, *every = [row for row in page.rows if row[0].endswith(".png")]
    assert (never, at_once) == (["d.png", "-2.5 %"], ["e.png", "+75.0 %"])
    assert every == [["d.png", "-2.5 %"], ["c.png", "+20.0 %"], ["a.png", "+25.0 %"], ["e.png", "+75.0 %"]]
    for told in ("step 50: held-out pictures 26.3 %", "step 50: training pictures 68.5 %",  # and the bands one by one
                 "step 50: training pictures 75 %", "step 50: held-out pictures 60 %"):
        assert told in page.text


def test_the_settings_in_it_are_a_file_that_repeats_the_run(tmp_path: Path) -> None:
    run = Run(tmp_path, values={"network_dim": 3, "trigger_word": 'a "quoted" <word>', "lr_scheduler": "linear",
                                "train_data_dir": str(tmp_path), "output_dir": str(tmp_path)})
    page = Page(html_of(run))
    (tmp_path / "settings.toml").write_text(page.blocks[0], encoding="utf-8")
    again = flat(parse(read_toml(tmp_path / "settings.toml")))
    assert again == {**flat(run.settings), "train_data_dir": "", "output_dir": ""}
    assert ["Rank (network_dim)", "3", "16"] in page.rows
    assert not [row for row in page.rows if row[0].endswith("(network_alpha)")]  # it has its default
    assert "--config settings.toml" in page.blocks[1]


@pytest.mark.parametrize("ending, word", [
    ([], "interrupted"), ([events.Finished("failed", "The memory ran out.", "", 3)], "The memory ran out."),
    ([events.Finished("stopped", "Stopped after 3 of 100 steps.", "", 3)], "stopped")])
def test_a_run_that_ended_early_has_one(run: Run, ending: list[events.Event], word: str) -> None:
    run.tell(step(1), step(2), step(3), *ending)
    assert word in Page(html_of(run)).text


def test_a_run_of_an_older_version_and_an_empty_folder_have_one(run: Run) -> None:
    old = {"event": "step", "step": 1, "total": 100, "epoch": 1, "epochs": 1, "loss": 0.5, "average_loss": 0.5,
           "learning_rate": 1e-4, "text_encoder_lr": 0.0, "steps_per_second": None, "seconds_left": None}
    with (run.folder / "events.jsonl").open("a", encoding="utf-8") as log:
        log.write("".join(json.dumps({**old, "step": number}) + "\n" for number in range(1, 5)) + '{"event": "st')
    (run.folder / "settings.toml").write_text('output_name = "zzk"\nno_longer_there = 3\n', encoding="utf-8")
    page = Page(html_of(run))
    assert "Loss of the steps" in page.text and "no_longer_there = 3" in page.blocks[0]
    empty = run.folder.with_name("empty")
    empty.mkdir()
    assert "empty" in Page(report_html(empty, None)).text


def test_the_grid_is_shown_with_a_picture_of_each_save_weight_and_prompt(run: Run) -> None:
    columns = Column(), Column("zzk-step00000050", 0.7), Column("zzk", 1.0, part="unet", problem="zzk is <b>gone</b>.")
    prompts = Prompt("zzk, a <cat>", True), Prompt("a dog", False)
    cells = tuple(Cell(column, prompt, seed, f"grid/{column}{prompt}{seed}.png")
                  for column in range(2) for prompt in range(2) for seed in (1, 2))
    (run.folder / "grid").mkdir()
    for cell in cells[:-2]:  # of the last prompt of the last column none was painted yet
        Image.new("RGB", (64, 64), (50 * cell.column, 50 * cell.prompt, 100 * cell.seed)).save(run.folder / cell.file)
    grid = Grid(columns, prompts, (1, 2), SampleOptions(size=(64, 64)), cells, ("A note.",))
    (run.folder / "grid" / "cells.json").write_text(json.dumps(dataclasses.asdict(grid)), encoding="utf-8")
    likeness = {cells[0].file: 0.5, cells[1].file: 0.54, cells[4].file: 0.6, cells[5].file: 0.64}  # of the first prompt
    (run.folder / "grid" / "scores.json").write_text(json.dumps({"scored_by": "", "notes": ["B note."], "images": {
        name: {"likeness": value} for name, value in likeness.items()}}), encoding="utf-8")
    page = Page(html_of(run))
    files = [io.BytesIO(base64.b64decode(source.partition(",")[2])) for source in page.images()]
    colours = [[round(value / 50) for value in Image.open(one).getpixel((9, 9))] for one in files]
    assert colours == [[0, 0, 2], [0, 1, 2], [1, 0, 2]]
    head, *rows = [row for row in page.rows if row[0] in ("Save, weight", "base model") or row[0].startswith("zzk")]
    assert head[1:] == ["Likeness", "zzk, a <cat>", "a dog"] and "A note." in page.text and "B note." in page.text
    assert [row[1] for row in rows] == ["0.520 ± 0.028", "+0.100 ± 0.028", ""]
    assert [row[0] for row in rows] == ["base model", "zzk-step000000500.7", "zzk1, UNet onlyzzk is <b>gone</b>."]


def test_a_sample_that_is_damaged_is_called_gone_and_the_others_are_shown(run: Run) -> None:
    run.sample(10)
    (run.folder / run.sample(20)).write_bytes(b"\x89PNG\r\n\x1a\n no image")
    page = Page(html_of(run))
    assert len(page.images()) == 1 and "gone" in page.text


def test_a_long_run_has_a_small_report_with_its_first_and_its_last_sample(run: Run) -> None:
    first = run.sample(0)
    for number in range(1, 60):
        shutil.copy(run.folder / first, run.folder / f"samples/{number}-0.png")
        run.tell(events.Sampled(number, 1, 0, "prompt 0", 1, f"samples/{number}-0.png"))
    page = Page(html_of(run))
    assert 2 < len(page.images()) <= 12
    assert "base model" in page.text and "step 59" in page.text and "step 58" not in page.text


def test_a_report_that_cannot_be_made_is_logged_and_ends_nothing(run: Run, monkeypatch, caplog) -> None:
    def fail(folder: Path, host: object) -> str:
        raise ZeroDivisionError
    monkeypatch.setattr(report, "report_html", fail)
    write_report(run.folder)
    assert "zzk-20261121-120000" in caplog.text and not (run.folder / "report.html").exists()


def test_a_run_that_has_ended_is_told_once_its_record_is_whole(tmp_path: Path, monkeypatch) -> None:
    seen = []

    def recorded(folder: Path) -> None:
        seen.append((is_locked(folder), [event.kind for event in read_events(folder)]))
    monkeypatch.setattr(runner, "run_job", lambda plan, host, *, report, stop, folder: events.Finished("done", "ready", "", 1))
    one = Runner()
    one.start(plan_of(parse({"output_name": "zzk"})), FakeHost(tmp_path), recorded=recorded)
    assert one.wait(30) and seen == [(False, ["finished"])]
