"""The page "2 Train" in a real browser, where the server answers late: a press counts, and what was asked last is shown."""

from __future__ import annotations

from typing import Any

from tests.browser import expect, needs_browser
from tests.fake_host import FakeJob
from tests.ui.test_page import Served, served  # noqa: F401 - the fixture

pytestmark = needs_browser


class Held:
    """The next question of gradio's to the server, held back on its way there; with `answered`, its answer on the way back."""

    def __init__(self, page: Any, *, answered: bool = False) -> None:
        self._page, self._answered, self._held = page, answered, []
        page.route("**/run/predict", self._hold)

    def _hold(self, route: Any) -> None:
        if self._held:
            route.continue_()
        else:
            self._held.append(route)
            self._held.append(route.fetch() if self._answered else None)

    def wait(self) -> None:
        while len(self._held) < 2:
            self._page.wait_for_timeout(20)

    def release(self) -> None:
        route, answer = self._held
        with self._page.expect_response("**/run/predict"):
            route.fulfill(response=answer) if answer else route.continue_()


def opened(served: Served) -> None:  # noqa: F811
    """The page with its fields filled, and all that it asks answered."""
    served.open()
    served.fill()
    served.page.wait_for_function("""() => {
        const value = (name) => document.querySelector(`#lora_train_${name} :is(input, textarea)`).value;
        return value("number") && value("number") === value("planned");
    }""")


def type_in(served: Served, name: str, text: str) -> None:  # noqa: F811
    served.box(name).fill(text)
    served.box(name).blur()


def test_a_button_stays_where_it_is_while_a_plan_is_awaited_and_answered(served: Served):  # noqa: F811
    page, overwrite = served.page, served.part("overwrite_it")
    (served.host.lora_folder / "zzk.safetensors").write_bytes(b"older")
    opened(served)
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


def test_what_is_typed_while_a_plan_is_awaited_is_planned_as_well(served: Served):  # noqa: F811
    opened(served)
    held = Held(served.page)
    type_in(served, "num_repeats", "2")
    held.wait()
    served.page.evaluate("""document.querySelector("#lora_train_plan").addEventListener(
        "click", () => { window.pressed = true; })""")
    type_in(served, "num_repeats", "7")
    served.page.wait_for_function("window.pressed")  # in vain: gradio asks nothing while an answer of that button is awaited
    held.release()
    expect(served.line("summary")).to_contain_text("× 7 repeats")


def test_an_answer_that_was_overtaken_does_not_stay(served: Served):  # noqa: F811
    opened(served)
    held = Held(served.page, answered=True)
    type_in(served, "num_repeats", "2")
    held.wait()
    type_in(served, "num_repeats", "7")
    served.part("start").click()  # a plan of its own follows
    expect(served.line("summary")).to_contain_text("× 7 repeats")
    served.page.evaluate("""() => {
        const summary = document.querySelector("#lora_train_summary");
        new MutationObserver(() => { window.older = window.older || summary.textContent.includes("× 2 repeats"); }).observe(
            summary, {childList: true, characterData: true, subtree: true});
    }""")
    held.release()
    served.page.wait_for_function("window.older")
    expect(served.line("summary")).to_contain_text("× 7 repeats")
