"""The list of runs and their comparison on the page "3 Results", and a sweep on "2 Train", in a real browser, with runs that
were only written."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lib_lora_train import events
from lib_lora_train.api.queue import queue_for
from lib_lora_train.run import queue as queue_module
from lib_lora_train.run.rate_finder import finder_settings
from lib_lora_train.settings import flat, parse
from tests.browser import ServedPage, expect, needs_browser, opened_page
from tests.fake_host import FakeHost, images
from tests.results.written_run import Run

pytestmark = needs_browser
RATES, SEEDS, GAINS = (0.0001, 0.0003), (1, 2), {(0.0001, 1): 0.3, (0.0001, 2): 0.29, (0.0003, 1): 0.2, (0.0003, 2): 0.21}


def written(host: FakeHost) -> None:
    for rate, seed in GAINS:
        run = Run(host.lora_folder.parent, host, run=f"zzk{rate}-{seed}-20261121-120000",
                  values={"output_name": f"zzk{rate}-{seed}", "learning_rate": rate, "seed": seed})
        loss = GAINS[rate, seed]
        # The bands differ; the mean of their logarithms is that of the loss.
        run.tell(*(events.Measured(step, 1, (), (), (held_out / 4, held_out, 4 * held_out), (0.4,) * 3, {})
                   for step, held_out in ((0, 0.4), (100, loss))))
        run.save(f"zzk{rate}-{seed}", 100, final=True)
        run.sample(100, prompt="zzk girl")
        run.tell(events.Finished("done", "", "", 100, "healthy"))
        run.record.close()
    for name, told in (
            ("finder", [events.Diagnosed(100, "rate", "A learning rate of 0.001 suits.", "learning_rate", "0.001"),
                        events.Finished("done", "", "", 100, "")]),
            ("stopped", [events.Finished("stopped", "", "", 7, "")]), ("failed", [events.Finished("failed", "", "", 7, "")])):
        finder = Run(host.lora_folder.parent, host, run=f"{name}-20261120-120000", values=flat(finder_settings(parse(
            {"output_name": name}))))
        finder.tell(*told)
        finder.record.close()


@pytest.fixture
def served(browser: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ServedPage]:
    monkeypatch.setattr(queue_module, "_POLL_SECONDS", 1e6)  # nothing begins
    queue_for.cache_clear()
    host = FakeHost(tmp_path)
    written(host)
    with opened_page(browser, patience_ms=90_000) as page, ServedPage(tmp_path, page, host=host) as made:
        page.goto(made.url)
        yield made
        queue_for(made.host, made.runner).close()


@pytest.fixture
def listed(served: ServedPage) -> ServedPage:
    """With all runs in sight."""
    served.page.get_by_text("3 Results", exact=True).click()
    served.part("runs").locator("summary").click()
    expect(served.page.locator(".ltr-run")).to_have_count(7)
    return served


def marks_of(served: ServedPage) -> Any:
    return served.page.locator(".ltr-run", has_text="zzk").locator(".ltr-run-mark")


def test_the_settings_of_a_rate_finder_are_offered_to_no_run(listed: ServedPage) -> None:
    page = listed.page
    expect(page.locator(".ltr-run", has_text="learning rate found")).to_contain_text("finder")
    expect(page.get_by_role("button", name="Use these settings")).to_have_count(4)
    finders = page.locator(".ltr-run", has_text=re.compile("finder|stopped|failed"))
    expect(finders).to_have_count(3)
    expect(finders.get_by_role("button", name="Use these settings")).to_have_count(0)
    for mark in finders.locator(".ltr-run-mark").all():
        mark.check()
    listed.part("runs_compare").click()
    expect(page.locator(".ltr-table tbody tr")).not_to_have_count(0)
    expect(listed.part("comparison").get_by_role("button", name="Use these settings")).to_have_count(0)


def test_runs_are_compared_and_their_settings_used_again(listed: ServedPage) -> None:
    served, page = listed, listed.page
    # A run of 0.3 / 0.4: the same in the list, beside its save and in the verdict's words.
    page.locator(".ltr-run", has_text="held-out gain 25.0 %").get_by_role("button", name="Show").click()
    expect(page.locator(".ltr-better")).to_have_text("+25 %")
    for mark in marks_of(served).all():
        mark.check()
    served.part("runs_compare").click()
    compared, rows = served.part("comparison"), page.locator(".ltr-table tbody tr")
    expect(rows).to_have_count(2)
    expect(compared).to_be_focused()
    compared.get_by_role("button", name="Close").press("Enter")
    expect(served.part("runs_compare")).to_be_focused()
    served.part("runs_compare").press("Enter")
    # 1 - 0.205 / 0.4 and the deviation of 50 and 47.5.
    expect(page.locator(".ltr-table tr[data-best]")).to_contain_text(re.compile(r"best.*0\.0003.*48\.8 ± 1\.8 %"))
    expect(compared).to_contain_text("larger than the spread of seeds")
    expect(compared.locator(".lora-train-plot path")).to_have_count(4)
    expect(compared.locator("figure img")).to_have_count(4)
    page.set_viewport_size({"width": 390, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.set_viewport_size({"width": 1280, "height": 900})
    rows.filter(has_text="best").get_by_role("button", name="Use these settings").click()
    expect(served.part("learning_rate").locator("input").first).to_have_value("0.0003")


def test_a_sweep_is_queued_once(served: ServedPage, tmp_path: Path) -> None:
    page = served.page
    page.get_by_text("2 Train", exact=True).click()
    for name, value in (("output_name", "zorbi"), ("train_data_dir", str(images(tmp_path / "data")))):
        served.part(name).locator("textarea, input").first.fill(value)
    expect(served.part("summary").first).to_contain_text("3 pictures")
    served.part("sweep").locator("summary").click()
    for number, values in ((0, "1e-4, 1e-3"), (1, "1 2 3")):
        page.locator(".lora-train-sweep-row").nth(number).locator("input").nth(1).fill(values)
    expect(served.part("sweep").get_by_role("status")).to_contain_text("6 runs")
    served.part("network_dim").locator("input").first.fill("0")
    served.part("network_dim").locator("input").first.blur()
    expect(served.part("sweep_add")).to_be_disabled()
    served.part("network_dim").locator("input").first.fill("4")
    served.part("network_dim").locator("input").first.blur()
    expect(served.part("sweep_add")).to_be_enabled()
    served.part("sweep_add").dblclick()
    expect(page.locator(".lora-train-queue-list li")).to_have_count(6)
    expect(served.part("sweep_add")).to_be_enabled()
    expect(served.part("answer").first).to_have_text("")
    assert {entry.sweep.name for entry in queue_for(served.host, served.runner).entries()} == {"zorbi"}


def test_a_run_is_deleted_with_its_lora_by_the_keyboard_too(listed: ServedPage) -> None:
    served, page, marks = listed, listed.page, marks_of(listed)
    marks.first.check()
    served.part("runs_delete").click()
    asking = page.get_by_role("alertdialog", name=re.compile(r"^Delete 1 run .*MB are freed"))
    loras = asking.get_by_role("checkbox")
    expect(served.part("runs_keep")).to_be_focused()
    loras.press("Space")
    expect(asking).to_contain_text(re.compile(r"zzk0\.000[13]-[12]\.safetensors"))
    expect(loras).to_be_focused()
    page.keyboard.press("Escape")
    expect(asking).to_be_hidden()
    expect(served.part("runs_delete")).to_be_focused()
    served.part("runs_delete").press("Enter")
    expect(asking).to_be_visible()
    expect(loras).not_to_be_checked()
    expect(asking).not_to_contain_text("null")
    served.part("runs_sure").click()
    expect(marks).to_have_count(3)
    assert len(list(served.host.runs_folder.glob("zzk*"))) == 3
    assert len(list(served.host.lora_folder.glob("*.safetensors"))) == 4
