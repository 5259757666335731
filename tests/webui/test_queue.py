"""The queue in a real WebUI, from its page: each run on its own checkpoint, the user's one back at the end, and what a kill
leaves behind."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.browser import expect, needs_browser, opened_page
from tests.webui.running import WebUI, fill, running, until
from tests.webui.test_page import MANY, PATIENCE_MS, Tab
from tools import tiny_checkpoint

pytestmark = needs_browser
QUEUE = "/lora-train/v1/queue"


def entries(webui: WebUI) -> dict[str, dict[str, Any]]:
    return {entry["name"]: entry for entry in webui.get(QUEUE)["entries"]}


def ended(webui: WebUI, *, seconds: float = 240) -> dict[str, str]:
    """How each ended, once none waits."""
    def states() -> dict[str, str]:
        found = {name: entry["state"] for name, entry in entries(webui).items()}
        return {} if {"waiting", "running"} & set(found.values()) else found
    return until(states, what="the queue is empty", seconds=seconds)


def chosen(webui: WebUI) -> str:
    return webui.get("/sdapi/v1/options")["sd_model_checkpoint"].split(" ")[0]


def trained_on(webui: WebUI) -> dict[str, str]:
    """The checkpoint of each run that came as far as having one."""
    records = {run["name"]: (webui.data / "lora_train_runs" / run["id"] / "events.jsonl").read_text(encoding="utf-8")
               for run in webui.get("/lora-train/v1/runs")["runs"]}
    found = {name: re.search(r'"checkpoint": "(\w+)"', record) for name, record in records.items()}
    return {name: match[1] for name, match in found.items() if match}


def add_from_page(tab: Tab, dataset: Path, name: str, *, steps: int = 3) -> None:
    """Put the fields' run at the end of the queue, on the checkpoint that is loaded now."""
    tab.fill(name, dataset, steps=steps)
    tab.part("queue_add").click()
    until(lambda: name in entries(tab.webui) or tab.part("answer").inner_text(), what=f"{name} is in the queue")
    assert tab.part("answer").inner_text() == ""


def row(tab: Tab, name: str):
    """Its line in the page's queue."""
    return tab.page.locator(".lora-train-queue-list li", has=tab.page.get_by_text(name, exact=True))


def press(tab: Tab, name: str) -> None:
    tab.part("queue").get_by_role("button", name=name, exact=True).click()


def compare(tab: Tab, *names: str):
    """The lines of the table that page 3 makes of these runs."""
    tab.turn("3 Results")
    tab.part("runs").locator("summary").click()
    for name in names:
        run = tab.page.locator(".ltr-run", has=tab.page.get_by_text(name, exact=True))
        run.get_by_role("checkbox").check()
    tab.part("runs_compare").click()
    return tab.part("comparison").locator("tbody tr")


def test_each_trains_on_its_checkpoint_and_one_that_fails_stops_nobody(
        tmp_path: Path, dataset: Path, browser: object) -> None:
    """Also after the WebUI is killed in the middle of a run: the page offers to go on with that one, the others are trained."""
    data = tmp_path / "data"
    fill(data)
    tiny_checkpoint.write(data / "models" / "Stable-diffusion", name="second", seed=1)
    lost = shutil.copytree(dataset, tmp_path / "lost")
    server = running(data)
    webui = next(server)
    webui.post(f"{QUEUE}/hold", {"held": True})
    with opened_page(browser, patience_ms=PATIENCE_MS) as page:
        tab = Tab(webui, page)
        tab.open()
        add_from_page(tab, lost, "lost")
        with webui.option("sd_model_checkpoint", "second.safetensors"):
            add_from_page(tab, dataset, "elsewhere")
        tab.part("fold_save").locator(".label-wrap").first.click()
        tab.box("save_state").check()
        tab.box("save_every_n_steps").fill("2")
        add_from_page(tab, dataset, "long", steps=MANY)
        add_from_page(tab, dataset, "last")
        shutil.rmtree(lost)
        assert chosen(webui) == "tiny.safetensors"
        press(tab, "Go on with the queue")
        expect(row(tab, "long")).to_contain_text("is being trained")
        until(lambda: (webui.get("/lora-train/v1/status")["step"] or {"step": 0})["step"] > 4, what="it trains", seconds=120)
        expect(row(tab, "lost")).to_contain_text("failed")
        expect(row(tab, "lost")).to_contain_text("does not exist")
        expect(row(tab, "elsewhere")).to_contain_text("done")
        expect(row(tab, "last")).to_contain_text("waits")
    assert trained_on(webui) == {"elsewhere": "second", "long": "tiny"} and chosen(webui) == "tiny.safetensors"
    webui.process.kill()
    with pytest.raises(StopIteration):
        next(server)

    server = running(data)
    webui = next(server)
    with opened_page(browser, patience_ms=PATIENCE_MS) as page:
        assert ended(webui) == {"lost": "failed", "elsewhere": "done", "long": "interrupted", "last": "done"}
        tab = Tab(webui, page)
        tab.open()
        interrupted = entries(webui)["long"]
        row(tab, "long").get_by_role("button", name="Resume", exact=True).click()
        expect(row(tab, "long")).to_contain_text("is being trained")
        now = until(
            lambda: (found := webui.get("/lora-train/v1/status"))["run"] == interrupted["run"] and found["step"] and found,
            what="it goes on", seconds=120)
        assert now["planned"]["resumed_at"] >= 2
        tab.part("stop_save").click()
        expect(row(tab, "long")).to_contain_text("stopped")
        lines = compare(tab, "elsewhere", "last")
        expect(lines).to_have_count(2)
        for name in ("elsewhere", "last"):
            expect(lines.filter(has=tab.page.get_by_role("rowheader", name=name))).to_be_visible()
    assert (webui.loras / "long.safetensors").is_file()
    server.close()
