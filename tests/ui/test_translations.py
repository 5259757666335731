"""What the script makes of texts of the server's, with the real catalogues: each is its translation, filled."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest

from lib_lora_train.errors import SettingError
from lib_lora_train.run.sweep import expand
from lib_lora_train.settings import DECLARATIONS, named, parse
from tests.browser import needs_browser
from tools.localization import FIELD, JOINTS, LANGUAGES, SCRIPTS, catalogue

pytestmark = needs_browser
LOAD = """([script, localization, catalogue]) => {
    window.loraTrainLanguage = undefined;
    window.gradio_config = {components: [{props: {elem_id: "settings_json", value: JSON.stringify({localization})}}]};
    window.fetch = async () => ({ok: true, json: async () => catalogue});
    (0, eval)(script);
    return window.loraTrainLanguage.ready;
}"""
LABEL = "save_every_n_epochs"


class Speaker:
    """The script with one catalogue."""

    def __init__(self, page: Any, language: str) -> None:
        self.page, self.catalogue = page, catalogue(language)
        page.evaluate(LOAD, [(SCRIPTS / "lora_train_language.js").read_text(encoding="utf-8"), language, self.catalogue])

    def says(self, text: str) -> str:
        return self.page.evaluate("(text) => window.loraTrainLanguage.translated(text)", text)

    def label(self, name: str) -> str:
        """A setting as its name is filled into a text."""
        return self.catalogue["{label} ({setting})"].format(label=self.catalogue[DECLARATIONS[name].label], setting=name)


@pytest.fixture(params=LANGUAGES)
def speaker(request: pytest.FixtureRequest, browser: Any) -> Iterator[Speaker]:
    page = browser.new_page()
    yield Speaker(page, request.param)
    page.close()


def values_of(template: str, label: str) -> dict[str, str]:
    """A number or a word for each field, and `label` where the text begins with a setting."""
    def value(index: int, name: str) -> str:
        if re.match("number|seconds|counted_", name):
            return f"{index + 2} zebras" if name.startswith("counted_") else str(index + 2)
        return label if template.startswith(f"{{{name}}} = ") else f"x{index}"
    return {name: value(index, name) for index, name in enumerate(dict.fromkeys(FIELD.findall(template)))}


def filled(template: str, values: dict[str, str]) -> str:
    return FIELD.sub(lambda found: values[found[1]], template)


def test_a_text_of_several_parts_is_translated_as_one(speaker: Speaker):
    several = [text for text in speaker.catalogue if re.search("[.!?;:] ", text) and text not in JOINTS]
    assert len(several) > 500
    said = {text: speaker.says(filled(text, values_of(text, named(LABEL)))) for text in several}
    assert said == {text: filled(speaker.catalogue[text], values_of(text, speaker.label(LABEL))) for text in several}


@pytest.mark.parametrize("axes", [{"optimizer_type": ["NoSuch"]}, {"max_train_steps": [0]}, {"resolution": ["9"]},
                                  {"min_timestep": [900], "max_timestep": [100]}])
def test_the_refusal_of_a_sweep_is_translated_with_what_is_refused(speaker: Speaker, axes: dict[str, list[object]]):
    plain = {"output_name": "zzk", "max_train_epochs": 0}
    with pytest.raises(SettingError) as alone:
        parse({**plain, **{name: value for name, (value,) in axes.items()}})
    with pytest.raises(SettingError) as swept:
        expand(plain, axes=axes)
    told = speaker.says(str(alone.value))
    assert not re.search("[a-z]{3,} [a-z]{3,} [a-z]{3,}", told)
    before, after = speaker.catalogue["The sweep is refused because of {name}: {error}."].split("{error}")
    said = speaker.says(str(swept.value))
    assert said.startswith(before.partition("{name}")[0]) and said.endswith(told.rstrip(".。") + after)
