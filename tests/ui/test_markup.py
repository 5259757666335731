"""What people, files and other programs call things is shown as they call it, and never becomes part of the page.

In a real browser, with names that would run a script if they were markup, at every place that shows a name.
"""

from __future__ import annotations

import io
import json
import re
import sys
import zipfile
from pathlib import Path

import pytest
from PIL import Image

from lib_lora_train import events
from lib_lora_train.host.port import Checkpoint
from lib_lora_train.run import runner as runner_module
from tests.browser import expect, needs_browser
from tests.ui.test_page import Served, served  # noqa: F401 - the fixture

pytestmark = [needs_browser, pytest.mark.skipif(sys.platform == "win32", reason="its files cannot have such names")]


def evil(where: str) -> str:
    """Markup that runs as soon as it is one, three ways, without a character that a file's name cannot hold."""
    return f"<img src=x onerror=\"window.ran='{where}'\"><svg onload=\"window.ran='{where}'\"><b class=\"evil\">{where}"


def assert_quiet(served: Served) -> None:  # noqa: F811
    served.page.wait_for_load_state("networkidle")
    assert served.page.evaluate("window.ran") is None
    expect(served.page.locator(".evil, img[src=x]")).to_have_count(0)


def test_names_of_files_captions_words_and_runs_are_only_text(served: Served):  # noqa: F811
    folder = served.folder / "pictures"
    folder.mkdir()
    Image.new("RGB", (64, 64)).save(folder / "good.png")
    for name in (evil("picture"), evil("second")):
        (folder / f"{name}.png").write_bytes(b"no picture")
    (folder / f"{evil('inner folder')}").mkdir()
    Image.new("RGB", (8, 8)).save(folder / evil("inner folder") / "1.png")
    (folder / "good.txt").write_text(evil("caption"), encoding="utf-8")
    served.host.checkpoint = lambda: Checkpoint(evil("checkpoint"), evil("title"), "sd1", vae_name=evil("VAE"))
    served.open()
    expect(served.line("model")).to_contain_text('class="evil">checkpoint')
    served.fill(trigger=evil("trigger"))
    # The plan's warnings and the refusal: gradio's HTML components.
    expect(served.line("summary")).to_contain_text('class="evil">picture')
    expect(served.line("summary")).to_contain_text('class="evil">inner folder')
    served.box("output_name").fill(evil("run"))
    served.part("start").click()
    expect(served.line("answer")).to_contain_text('class="evil">run')
    assert_quiet(served)
    (folder / "good.txt").write_bytes(b"\xff" + evil("caption").encode())
    (folder / "good.txt").rename(folder / f"{evil('file')}.txt")
    Image.new("RGB", (64, 64)).save(folder / f"{evil('file')}.png")
    served.box("output_name").fill("other")
    served.box("output_name").blur()
    expect(served.line("summary")).to_contain_text('class="evil">file')
    assert_quiet(served)
    # The browser's own memory of the fields, restored.
    served.page.reload()
    expect(served.box("trigger_word")).to_have_value(evil("trigger"))
    assert_quiet(served)


def test_what_a_run_tells_is_only_text(served: Served, monkeypatch: pytest.MonkeyPatch):  # noqa: F811
    def job(settings, host, *, report, stop, sample_now, save_now, paused, folder=None):
        report(events.Planned(3, 1, 10, 10, 2, evil("summary"), evil("size"), evil("checkpoint"), 42))
        report(events.Stage(evil("stage"), 1, 3))
        report(events.Warned(evil("warning")))
        for step in (1, 2):
            report(events.Step(step, 2, 1, 1, 0.5, 0.5, 1e-4, 0.0, 2.0, 1.0))
            report(events.Saved(f"/loras/{evil('path')}-{step}.safetensors", step, 1, step == 2))
        return events.Finished("failed", evil("message"), "", 2)

    monkeypatch.setattr(runner_module, "run_job", job)
    served.open()
    served.fill(trigger=evil("trigger"))
    served.part("start").click()
    live = served.page.locator("#lora_train_live")
    expect(live).to_contain_text('class="evil">message')
    expect(live).to_contain_text('class="evil">path')
    expect(served.page.locator(".lora-train-warnings li").last).to_contain_text('class="evil">warning')
    for detail in served.page.locator("#lora_train details").all():
        detail.evaluate("element => element.open = true")
    expect(served.page.locator(".lora-train-curve svg")).to_be_visible()
    assert_quiet(served)
    served.page.route(re.compile("lora-train/v1/status"), lambda route: route.fulfill(
        status=500, content_type="application/json", body=json.dumps({"error": evil("error")})))
    served.page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")
    expect(live).to_contain_text('class="evil">error')
    assert_quiet(served)


def test_one_click_downloads_the_report(served: Served):  # noqa: F811
    served.open()
    served.fill()
    served.job.advance(served.job.TOTAL)
    served.part("start").click()
    expect(served.page.locator("#lora_train_live")).to_contain_text("zzk is ready.")
    with served.page.expect_download() as download:
        served.part("report").click()
    assert download.value.suggested_filename == "lora-train-report.zip"
    with zipfile.ZipFile(io.BytesIO(Path(download.value.path()).read_bytes())) as archive:
        assert {"about.txt", "report.json", "settings.toml", "events.jsonl"} <= set(archive.namelist())
        assert str(served.folder) not in "".join(archive.read(name).decode() for name in archive.namelist())
