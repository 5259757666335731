"""The faults of tests/run/test_faults.py in a real WebUI, which is afterwards what it was, to the last pixel."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.injection import FAULTS, PLACES, Place
from tests.webui.running import WebUI, fill, running
from tests.webui.test_training import PROMPT, train

ORDINARY = [name for name in FAULTS if name != "Ctrl+C"]  # which comes to the main thread, and that is not ours here
# Every place with one fault and the next one with the next; one place with all of them.
CASES = [(place, ORDINARY[number % len(ORDINARY)]) for number, place in enumerate(PLACES)]
CASES += [(place, fault) for place in PLACES if place.name == "in the middle of a later step" for fault in ORDINARY
          if (place, fault) not in CASES]


@pytest.fixture(scope="module")
def webui(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WebUI]:
    """A WebUI of its own: a fault that did harm would spoil the tests of others."""
    data = tmp_path_factory.mktemp("faulty")
    fill(data)
    yield from running(data)


@pytest.fixture(scope="module")
def before(webui: WebUI, dataset: Path) -> dict[str, Any]:
    assert train(webui, dataset, "used", max_train_steps=2)["outcome"] == "done"
    return {"with LoRA": webui.sample(f"{PROMPT} <lora:used:1>"), "picture": webui.sample(PROMPT),
            "model": webui.get("/probe/model")}


@pytest.mark.parametrize("place, fault", CASES, ids=lambda value: value.name if isinstance(value, Place) else value)
def test_after_any_fault_the_webui_is_as_it_was_and_says_what_happened(
        webui: WebUI, dataset: Path, before: dict[str, Any], place: Place, fault: str) -> None:
    surroundings = webui.get("/probe/surroundings")
    webui.post("/probe/inject", {"place": place.name, "fault": fault})
    try:
        finished = train(webui, dataset, "zzk", max_train_steps=3, save_every_n_steps=2, overwrite=True)
    finally:
        webui.post("/probe/heal")
    assert webui.get("/probe/surroundings") == surroundings
    assert webui.get("/probe/model") == before["model"]
    assert webui.sample(PROMPT) == before["picture"]
    expected = "done" if place.survives(fault) else "failed"
    assert finished["outcome"] == expected and finished["message"].count("\n") == 0, finished
    run = webui.get("/lora-train/v1/runs")["runs"][0]
    assert (run["outcome"], run["message"]) == (finished["outcome"], finished["message"])


def test_after_all_of_them_a_run_and_a_lora_are_as_good_as_ever(
        webui: WebUI, dataset: Path, before: dict[str, Any]) -> None:
    assert train(webui, dataset, "last", max_train_steps=2)["outcome"] == "done"
    assert webui.sample(f"{PROMPT} <lora:used:1>") == before["with LoRA"] == webui.sample(f"{PROMPT} <lora:last:1>")
    assert webui.sample(PROMPT) == before["picture"]
