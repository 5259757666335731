"""The page "2 Train" in a real browser, where the server answers late: a press counts, and what was asked last is shown."""

from __future__ import annotations

from typing import Any

from tests.browser import expect, needs_browser
from tests.fake_host import FakeJob
from tests.ui.test_page import Served, served  # noqa: F401 - the fixture

pytestmark = needs_browser


class Held:
    """Holds back gradio's answers of a page, the first of those to come."""

    def __init__(self, page: Any, most: int = 1) -> None:
        self._page, self._most = page, most
        self.routes: list[Any] = []
        page.route("**/run/predict", self._hold)

    def _hold(self, route: Any) -> None:
        if len(self.routes) < self._most:
            self.routes.append(route)
        else:
            route.continue_()

    def wait(self) -> None:
        """Until as many as are to be held are."""
        while len(self.routes) < self._most:
            self._page.wait_for_timeout(20)

    def release(self) -> None:
        with self._page.expect_response("**/run/predict"):
            for route in self.routes:
                route.continue_()


def test_a_button_stays_where_it_is_while_a_plan_is_awaited_and_answered(served: Served):  # noqa: F811
    page, overwrite = served.page, served.part("overwrite_it")
    (served.host.lora_folder / "zzk.safetensors").write_bytes(b"older")
    served.open()
    served.fill()
    expect(served.line("summary")).to_contain_text("Train will ask before replacing it")
    served.part("start").click()
    expect(overwrite).to_be_visible()
    expect(served.line("summary")).to_contain_text("Train will ask before replacing it")
    served.job.advance(FakeJob.TOTAL)

    held = Held(page)
    page.evaluate("window.loraTrain.planSoon()")
    held.wait()
    overwrite.hover()
    page.mouse.down()
    held.release()
    expect(page.locator("#lora_train_summary .pending")).to_have_count(0)
    page.mouse.up()
    expect(page.locator("#lora_train_live")).to_contain_text("zzk is ready.")
    assert (served.host.lora_folder / "zzk.safetensors").read_bytes() == b"a LoRA"
