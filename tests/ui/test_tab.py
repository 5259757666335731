"""The tab as it is built, and what its buttons do, without a browser."""

from __future__ import annotations

import json
import re
from pathlib import Path

import gradio as gr
import pytest
from PIL import Image

from lib_lora_train.errors import counted
from lib_lora_train.results import start
from lib_lora_train.run import runner as runner_module
from lib_lora_train.run.presets import save_preset
from lib_lora_train.run.runner import Runner
from lib_lora_train.settings import DECLARATIONS, Settings, flat, parse
from lib_lora_train.settings.dataset_config import subsets_of
from lib_lora_train.settings.presets import NO_PRESET, presets
from lib_lora_train.ui import handlers as handlers_module
from lib_lora_train.ui.fields import element_id, field, shown
from lib_lora_train.ui.handlers import Handlers, OpenPage
from lib_lora_train.ui.layout import build_tab
from tests.fake_host import FakeHost, FakeJob, images
from tests.jobs import plan_of

NAMES = tuple(name for name in DECLARATIONS if name != "preset")
TOKEN = "page-token"


@pytest.fixture
def host(tmp_path: Path) -> FakeHost:
    return FakeHost(tmp_path)


@pytest.fixture
def handlers(host: FakeHost) -> Handlers:
    return Handlers(runner=Runner(), host=host, names=(*NAMES, "preset"), defaults=flat(Settings()), token=TOKEN)


def values(**changed: object) -> list[object]:
    chosen = {**flat(Settings()), **changed}
    return [chosen[name] for name in (*NAMES, "preset")]


def plan(handlers: Handlers, chosen: list[object], preset: str = NO_PRESET, page: OpenPage | None = None) -> list:
    """(summary, draft, refusal, button, preset, curve) on `page`, or on one of its own."""
    *answered, number = handlers.plan(TOKEN, page or OpenPage(), "7", preset, *chosen)
    assert number in ("7", gr.update())
    return answered


def pick(handlers: Handlers, name: str) -> list:
    """[about, update of each field] after a press on that entry of the list."""
    return handlers.apply_preset(OpenPage(), gr.SelectData(None, {"index": 0, "value": name}))


def changed(updates: list) -> dict[str, object]:
    """The fields that a list of gradio updates changes, by name."""
    return {name: update["value"] for name, update in zip(NAMES, updates, strict=True) if "value" in update}


def test_the_folders_of_a_dataset_are_listed_as_they_are_trained_to_be_changed(handlers: Handlers, tmp_path: Path):
    for name in ("set/10_red cat", "set/20240101_holiday", "set/masks", "set/empty"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("set/10_red cat/a.png", "set/20240101_holiday/b.png", "set/masks/b.png"):
        Image.new("RGB", (64, 64)).save(tmp_path / name)
    chosen = values(train_data_dir=str(tmp_path / "set"), trigger_word="zzk")
    update, refusal, _ = handlers.list_folders(TOKEN, OpenPage(), *chosen)
    settings = parse({"train_data_dir": str(tmp_path / "set"), "dataset_config": update["value"]})
    found = [(s.image_dir, s.dataset.num_repeats, s.class_tokens, s.dataset.trigger_word) for s in subsets_of(settings)]
    assert found == [("10_red cat", 10, "red cat", "zzk"), ("20240101_holiday", 1, "", "zzk")] and not refusal
    folder = str(tmp_path / "set")
    for token, given in (("other", chosen), (TOKEN, values(train_data_dir=folder, dataset_config="x")), (TOKEN, values()),
                         (TOKEN, values(train_data_dir=str(tmp_path / "set" / "empty")))):
        update, refusal, _ = handlers.list_folders(token, OpenPage(), *given)
        assert "value" not in update and refusal


def test_every_setting_is_on_the_page_exactly_once(host: FakeHost):
    tab = build_tab(runner=Runner(), host=host, token="token")
    ids = [getattr(block, "elem_id", None) for block in tab.blocks.values()]
    assert [ids.count(element_id(name)) for name in DECLARATIONS] == [1] * len(DECLARATIONS)
    given = [block.elem_id for block in tab.blocks.values() if getattr(block, "elem_id", None)]
    assert len(given) == len(set(given))


def test_each_field_shows_its_default_label_and_help(host: FakeHost):
    tab = build_tab(runner=Runner(), host=host, token="token")
    by_id = {block.elem_id: block for block in tab.blocks.values() if getattr(block, "elem_id", None)}
    for name, declaration in DECLARATIONS.items():
        component = by_id[element_id(name)]
        assert component.value == (declaration.default or None if declaration.zero else declaration.default), name
        assert (component.label, component.webui_tooltip) == (declaration.label, declaration.help)
        # What the page shows at first is possible as it stands.
        assert shown(declaration, component.value)


def test_nothing_of_the_page_gets_into_the_webuis_stored_defaults(host: FakeHost):
    tab = build_tab(runner=Runner(), host=host, token="token")
    for block in tab.blocks.values():
        stored = (gr.Slider, gr.Radio, gr.Checkbox, gr.Textbox, gr.Number, gr.Dropdown, gr.Button)
        assert not isinstance(block, stored) or block.do_not_save_to_config, block


def test_the_token_travels_in_the_pages_configuration_which_the_hosts_login_protects(host: FakeHost):
    tab = build_tab(runner=Runner(), host=host, token="s3cret")
    holders = [c for c in tab.get_config_file()["components"] if "s3cret" in json.dumps(c["props"], default=str)]
    assert [holder["props"]["elem_id"] for holder in holders] == ["lora_train_token"]


def test_a_field_hands_on_what_was_typed_for_the_settings_to_judge():
    rank = field(DECLARATIONS["network_dim"], 16)
    assert rank.preprocess(1.5) == 1.5 and rank.preprocess(-3) == -3


def test_a_preset_changes_only_what_it_names(handlers: Handlers):
    for preset in presets():
        about, *updates = pick(handlers, preset.name)
        assert changed(updates) == {name: value or None if DECLARATIONS[name].zero else value
                                    for name, value in preset.values.items()}
        assert preset.description in about


def test_the_preset_in_force_is_shown_after_a_reload_and_as_changed_once_one_of_its_settings_is(handlers: Handlers):
    style = next(preset for preset in presets() if preset.name == "Style")
    chosen = {**flat(Settings()), **style.values}
    *_, draft, _, _, shown_now, _ = plan(handlers, values(**style.values), preset="Style, changed")
    assert shown_now["value"] == "Style"
    assert handlers.restore(OpenPage(), draft)[3]["value"] == "Style"
    other = values(**{**style.values, "network_dim": 77})
    *_, draft, _, _, shown_now, _ = plan(handlers, other, preset="Style")
    assert shown_now["value"] == "Style, changed"
    _, _, about, shown_now, *updates = handlers.restore(OpenPage(), draft)
    assert shown_now["value"] == "Style, changed" and style.description in about and changed(updates)["network_dim"] == 77
    # It can be picked again, under its own name.
    assert plan(handlers, other, preset="Style, changed")[4] == gr.update()
    rank = style.values["network_dim"]
    assert "Style" in shown_now["choices"] and changed(pick(handlers, "Style")[1:])["network_dim"] == rank
    # Settings without a name, those of a run, are those of the preset that they equal.
    assert handlers.restore(OpenPage(), json.dumps(chosen))[3]["value"] == "Style"
    assert handlers.restore(OpenPage(), "")[3]["value"] == NO_PRESET


def test_one_of_a_thing_is_not_several(handlers: Handlers, tmp_path: Path):
    folder = images(tmp_path / "pictures")
    summary = plan(handlers, values(train_data_dir=str(folder), num_repeats=1, max_train_epochs=1))[0]
    assert "3 pictures × 1 repeat, 1 epoch, 1 bucket at 512×512 = 3 steps" in summary
    texts = [path.read_text(encoding="utf-8") for path in Path(handlers_module.__file__).parents[1].rglob("*.py")]
    assert not [text for text in texts if "picture(s)" in text]
    assert (counted(1, "entry", "entries"), counted(2, "entry", "entries"), counted(1000, "step")) == (
        "1 entry", "2 entries", "1,000 steps")


def test_a_learning_rate_of_0_is_answered_in_a_sentence_in_place_of_the_older_message(handlers: Handlers, tmp_path: Path):
    folder = str(images(tmp_path / "pictures"))
    for answer in (plan(handlers, values(train_data_dir=folder, learning_rate=0))[0],
                   handlers.start(TOKEN, OpenPage(), *values(train_data_dir=folder, learning_rate=0))[0]):
        assert "Nothing would be trained: all learning rates are 0; raise Learning rate (learning_rate)." in answer


def test_a_defect_while_planning_or_starting_leaves_no_older_message_standing(handlers: Handlers, monkeypatch, tmp_path: Path):
    def broken(*_, **__):
        raise ZeroDivisionError("division by zero")
    for name in ("plan", "start"):
        monkeypatch.setattr(handlers_module.service, name, broken)
    chosen = values(train_data_dir=str(images(tmp_path / "pictures")))
    assert "Planning ended unexpectedly: ZeroDivisionError" in plan(handlers, chosen)[0]
    assert "Starting ended unexpectedly: ZeroDivisionError" in handlers.start(TOKEN, OpenPage(), *chosen)[0]


def test_a_file_that_was_read_fills_the_fields_and_of_another_program_also_what_it_does_not_name(handlers: Handlers):
    def filled(**told: object) -> tuple[str, dict]:
        _, preset, *updates = handlers.fill(TOKEN, OpenPage(), json.dumps(told))
        return preset.get("value", ""), changed(updates)
    name, fields = filled(values={"network_dim": 4, "train_data_dir": "x"}, foreign=True)
    assert fields["network_dim"] == 4 and fields["train_data_dir"] == "x" and name == f"{NO_PRESET}, changed"
    assert fields["keep_tokens"] == 1 and not {"output_name", "trigger_word"} & fields.keys()
    assert filled(values={"network_dim": 4}, foreign=False)[1] == {"network_dim": 4}
    assert filled(values=3)[1] == filled()[1] == {}
    for token, incoming in (("guess", '{"values": {"network_dim": 4}}'), (TOKEN, "{"), (TOKEN, "[1]"), (TOKEN, "null")):
        assert changed(handlers.fill(token, OpenPage(), incoming)[2:]) == {}


def test_a_preset_of_the_users_is_offered_recorded_with_its_version_and_told_of_when_it_was_updated(
        handlers: Handlers, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    folder = handlers.host.presets_folder
    save_preset("Mine", {"network_dim": 5}, folder)
    about, *updates = pick(handlers, "Mine")
    assert changed(updates)["network_dim"] == 5 and "own" in about
    _, draft, *_ = plan(handlers, values(network_dim=5), preset="Mine")
    save_preset("Mine", {"network_dim": 6}, folder)
    for kept in (draft, json.dumps({**flat(Settings()), "network_dim": 5, "preset": "Mine (version 1)"})):
        _, _, about, shown_now, *updates = handlers.restore(OpenPage(), kept)
        assert changed(updates)["network_dim"] == 5 and shown_now["value"] == "Mine, changed"
        assert "version 2" in about and "version 1" in about and "Rank (network_dim) 5 → 6" in about
    job = FakeJob()
    monkeypatch.setattr(runner_module, "run_job", job)
    chosen = values(output_name="zzk", train_data_dir=str(images(tmp_path / "pictures")), network_dim=6, preset="Mine")
    assert handlers.start(TOKEN, OpenPage(), *chosen)[0] == ""
    handlers.runner.stop(save=False)
    assert handlers.runner.wait(10) and job.seen.save.preset == "Mine (version 2)"
    chosen = values(output_name="zzl", train_data_dir=str(tmp_path / "pictures"), network_dim=7, preset="Mine, changed")
    assert handlers.start(TOKEN, OpenPage(), *chosen)[0] == ""
    handlers.runner.stop(save=False)
    assert handlers.runner.wait(10) and job.seen.save.preset == "Mine (version 2), changed"


def test_steps_and_repeats_of_0_are_an_empty_field_and_an_empty_field_is_0(handlers: Handlers):
    assert DECLARATIONS["max_train_steps"].zero == DECLARATIONS["num_repeats"].zero == "auto"
    for name in ("max_train_steps", "num_repeats"):
        assert field(DECLARATIONS[name], 0).value is None and field(DECLARATIONS[name], 7).value == 7
        for empty in (None, "", "auto", 0, "0"):
            assert flat(parse({name: empty}))[name] == 0
    draft = json.dumps({"max_train_steps": 0, "num_repeats": None, "network_dim": 4})
    assert changed(handlers.restore(OpenPage(), draft)[4:]) == {"max_train_steps": None, "num_repeats": None, "network_dim": 4}


def test_default_puts_back_everything_but_names_and_folders(handlers: Handlers):
    _, *updates = pick(handlers, NO_PRESET)
    put_back = changed(updates)
    assert put_back["network_dim"] == 16 and put_back["max_train_steps"] is None
    assert not {"output_name", "train_data_dir", "trigger_word", "output_dir"} & set(put_back)


def test_the_summary_tells_the_steps_and_what_was_typed_is_remembered(handlers: Handlers, tmp_path: Path):
    folder = images(tmp_path / "pictures")
    chosen = values(train_data_dir=str(folder), num_repeats=2, max_train_epochs=3, overwrite=True, resume="zzk-1")
    summary, draft, *_ = plan(handlers, chosen)
    assert "= 18 steps" in summary
    kept = changed(handlers.restore(OpenPage(), draft)[4:])
    assert kept["train_data_dir"] == str(folder) and kept["num_repeats"] == 2
    # A permission to overwrite is for once, and so is the wish to go on with a run.
    assert not {"overwrite", "resume"} & set(kept)


def test_the_browsers_memory_may_hold_anything(handlers: Handlers):
    for draft in ("", "{", "[1]", "null", '"x"'):
        assert changed(handlers.restore(OpenPage(), draft)[4:]) == {}
    odd = {"network_dim": "16", "flip_aug": 1, "lr_scheduler": "wild", "output_name": None, "gone": 3, "seed": 7}
    assert changed(handlers.restore(OpenPage(), json.dumps(odd))[4:]) == {"seed": 7}


@pytest.mark.parametrize("draft", ['{"preset": "Style", "preset_version": "abc"}', '{"preset": "Style", "preset_version": [1]}',
                                   '{"preset": "Style", "preset_version": 1e400}', "[" * 100_000])
def test_a_damaged_memory_of_the_browser_leaves_the_fields_as_they_are(handlers: Handlers, draft: str):
    assert handlers.restore(OpenPage(), draft)[0] == "restored"


def test_a_late_answer_to_the_pages_first_question_changes_no_field(handlers: Handlers):
    asked, draft = OpenPage(), json.dumps({"max_train_steps": 7})
    assert changed(handlers.restore(asked, draft)[4:]) == {"max_train_steps": 7}
    # The script asks again until it sees an answer; by then the user may have typed.
    assert changed(handlers.restore(asked, draft)[4:]) == {}
    assert changed(handlers.restore(OpenPage(), draft)[4:]) == {"max_train_steps": 7}  # another page


def test_without_a_memory_the_running_jobs_settings_come_back(handlers: Handlers, monkeypatch):
    job = FakeJob()
    monkeypatch.setattr(runner_module, "run_job", job)
    handlers.runner.start(plan_of(parse({"output_name": "zzk", "network_dim": 5})), handlers.host)
    handlers.runner.stop(save=False)
    assert handlers.runner.wait(10)
    kept = changed(handlers.restore(OpenPage(), "")[4:])
    assert kept["output_name"] == "zzk" and kept["network_dim"] == 5


def test_what_a_user_typed_is_never_html(handlers: Handlers):
    evil = "<img src=x onerror=alert(1)>"
    summary, *_ = plan(handlers, values(train_data_dir=evil))
    answer, _ = handlers.start(TOKEN, OpenPage(), *values(output_name=evil))
    for shown_text in (summary, answer):
        assert "<img" not in shown_text and "&lt;img" in shown_text


def test_a_taken_name_is_refused_and_the_button_to_overwrite_it_shows(handlers: Handlers, monkeypatch, tmp_path: Path):
    job = FakeJob()
    monkeypatch.setattr(runner_module, "run_job", job)
    (handlers.host.lora_folder / "zzk.safetensors").write_bytes(b"older")
    chosen = values(output_name="zzk", train_data_dir=str(images(tmp_path / "pictures")))
    assert "already; Train will ask" in plan(handlers, chosen)[0]
    page = OpenPage()
    answer, button = handlers.start(TOKEN, page, *chosen)
    assert "already" in answer and "or overwrite it." in answer and button["visible"] is True
    assert not handlers.runner.running()
    other, _ = handlers.start_overwriting(TOKEN, OpenPage(), *chosen)
    assert "already" in other and not handlers.runner.running()  # a page that was not asked
    nothing, button = handlers.start_overwriting(TOKEN, page, *chosen)
    assert nothing == "" and button["visible"] is False
    # It is the LoRA that is being made.
    assert "already" not in plan(handlers, chosen)[0]
    handlers.runner.stop(save=False)
    assert handlers.runner.wait(10) and job.seen.save.overwrite is True


def test_a_permission_to_overwrite_is_for_the_lora_it_was_given_for(handlers: Handlers, tmp_path: Path):
    for name in ("zzk", "precious"):
        (handlers.host.lora_folder / f"{name}.safetensors").write_bytes(b"older")
    folder = str(images(tmp_path / "pictures"))
    page = OpenPage()
    handlers.start(TOKEN, page, *values(output_name="zzk", train_data_dir=folder))
    answer, button = handlers.start_overwriting(TOKEN, page, *values(output_name="precious", train_data_dir=folder))
    assert "&#x27;precious&#x27; already" in answer and button["visible"] is True
    assert not handlers.runner.running()


def test_a_refusal_goes_when_what_it_refused_is_changed(handlers: Handlers, tmp_path: Path):
    # Settings unlike any preset's: the plan calls the preset by another name than the start was given.
    refused = values(train_data_dir=str(images(tmp_path / "pictures")), network_dim=3)
    page = OpenPage()
    answer, _ = handlers.start(TOKEN, page, *refused)
    assert "no name" in answer
    for preset in (NO_PRESET, f"{NO_PRESET}, changed"):
        assert plan(handlers, [*refused[:-1], preset], preset, page)[2:4] == [answer, gr.update(visible=False)]
    mended = values(train_data_dir=str(tmp_path / "pictures"), output_name="zzk")
    for later in (mended, refused):  # what was refused once may be possible now
        assert plan(handlers, later, page=page)[2:4] == ["", gr.update(visible=False)]


def test_a_plan_that_was_asked_for_before_a_refusal_and_comes_later_leaves_it(handlers: Handlers, monkeypatch, tmp_path: Path):
    page, folder = OpenPage(), str(images(tmp_path / "pictures"))
    (handlers.host.lora_folder / "zzk.safetensors").write_bytes(b"older")
    handlers.start(TOKEN, page, *values(train_data_dir=folder))
    taken, seen, refuse = values(train_data_dir=folder, output_name="zzk"), [], handlers_module.service.start

    def slow(chosen, **others):
        seen.append(plan(handlers, taken, page=page)[2:4])
        refuse(chosen, **others)
    monkeypatch.setattr(handlers_module.service, "start", slow)
    answer, button = handlers.start(TOKEN, page, *taken)
    assert seen == [[gr.update(), gr.update()]]  # before it is known
    assert "already" in answer and plan(handlers, taken, page=page)[2:4] == [answer, button]


def test_what_else_is_refused_stands_until_a_setting_changes(handlers: Handlers, monkeypatch, tmp_path: Path):
    job, page = FakeJob(), OpenPage()
    monkeypatch.setattr(runner_module, "run_job", job)
    (handlers.host.lora_folder / "zzk.safetensors").write_bytes(b"older")
    chosen = values(train_data_dir=str(images(tmp_path / "pictures")), output_name="zzk")
    empty = values(train_data_dir=str(tmp_path), output_name="zzk", dataset_config="x")
    handlers.start(TOKEN, page, *chosen)
    handlers.runner.start(plan_of(parse({"output_name": "other"})), handlers.host)
    for press, given in ((lambda: handlers.start_overwriting(TOKEN, page, *chosen)[0], chosen),
                         (lambda: handlers.list_folders(TOKEN, page, *empty)[1], empty),
                         (lambda: handlers.find_rate(TOKEN, page, *chosen)[0], chosen)):
        refusal = press()
        assert refusal and plan(handlers, given, page=page)[2:4] == [refusal, gr.update(visible=False)]
        assert plan(handlers, values(), page=page)[2:4] == ["", gr.update(visible=False)]
    handlers.runner.stop(save=False)
    assert handlers.runner.wait(10)


def test_a_plan_that_took_long_does_not_take_a_newer_refusal_away(handlers: Handlers, monkeypatch, tmp_path: Path):
    folder, page = str(images(tmp_path / "pictures")), OpenPage()
    handlers.start(TOKEN, page, *values(train_data_dir=folder))
    while_planning = handlers_module.service.plan

    def slow(chosen, **others):
        found = while_planning(chosen, **others)
        handlers.start(TOKEN, page, *values(train_data_dir=folder, output_name="a/b"))
        return found
    monkeypatch.setattr(handlers_module.service, "plan", slow)
    late = handlers.plan(TOKEN, page, "", NO_PRESET, *values(train_data_dir=folder, network_dim=4))
    assert list(late) == [gr.update()] * 7


def test_a_newer_question_of_a_page_ends_its_older_one_and_no_other_pages():
    page, other = OpenPage(), OpenPage()
    first = page.ask()
    other.ask()
    assert not first()
    page.ask()
    assert first()


def test_another_refusal_shows_no_button_to_overwrite(handlers: Handlers):
    answer, button = handlers.start(TOKEN, OpenPage(), *values(output_name="a/b"))
    assert "cannot be used" in answer and button["visible"] is False


def test_nothing_is_read_or_started_for_who_does_not_know_the_pages_token(handlers: Handlers, tmp_path: Path,
                                                                          monkeypatch: pytest.MonkeyPatch):
    # gradio answers any request that names a function by its number, also one that a foreign page made the browser send.
    chosen = values(output_name="zzk", train_data_dir=str(images(tmp_path / "pictures")))
    for module, name in ((handlers_module.service, "plan_dataset"), (start, "plan_job"), (start, "plan_finder")):
        monkeypatch.setattr(module, name, lambda *_, **__: pytest.fail("a folder was read"))
    for token in ("", "guess", None, TOKEN[:-1], [TOKEN], "\ud800"):
        answers = (handlers.plan(token, OpenPage(), "", NO_PRESET, *chosen)[0],
                   handlers.start(token, OpenPage(), *chosen)[0],
                   handlers.start_overwriting(token, OpenPage(), *chosen)[0], handlers.find_rate(token, OpenPage(), *chosen)[0])
        assert all("reload the page" in answer for answer in answers)
    assert handlers.runner.status() is None


def test_the_curve_beside_the_schedule_is_the_learning_rate_that_the_training_is_given(handlers):
    """transformers' linear schedule with a quarter of warm-up over 41 steps, as points from the left to the right."""
    def drawn(**changes):
        html = handlers.plan(TOKEN, OpenPage(), "", NO_PRESET, *values(train_data_dir="", max_train_steps=41, **changes))[5]
        points = re.findall(r"([\d.]+),(-?[\d.]+)", re.search('points="([^"]*)"', html)[1])
        return html, [(float(x), float(y)) for x, y in points]
    _, points = drawn(lr_scheduler="linear", lr_warmup_steps=10)
    height = max(y for _, y in points)
    expected = [step / 10 if step < 10 else (41 - step) / 31 for step in range(41)]
    assert [1 - y / height for _, y in points] == pytest.approx(expected, abs=0.002)
    assert [x for x, _ in points] == pytest.approx([8 * step for step in range(41)], abs=0.06)
    html, constant = drawn(lr_scheduler="constant", learning_rate=3e-4)
    assert {y for _, y in constant} == {0.0} and "0.0003" in html and "<script" not in html
    assert drawn(lr_scheduler="rex")[1] != points
    own = handlers.plan(TOKEN, OpenPage(), "", NO_PRESET, *values(optimizer_type="Adafactor"))[5]
    assert "Adafactor" in own and "points" not in own
    assert handlers.plan(TOKEN, OpenPage(), "", NO_PRESET, *values(optimizer_type="no<b>such"))[5] == ""
