"""The page "1 Dataset" in a real browser, with the real studio behind it: from a folder of mixed images to training."""

from __future__ import annotations

import importlib.util
import re
import shutil
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from lib_lora_train import api
from lib_lora_train.dataset.caption_files import TEXT_SUFFIXES
from lib_lora_train.errors import DatasetError
from lib_lora_train.run import runner as runner_module
from lib_lora_train.studio.session import studio_for
from tests.browser import ServedPage, expect, needs_browser, opened_page
from tests.fake_host import FakeJob
from tests.interrupted_save import FINISHED, interrupt_save
from tests.mixed_pictures import ADDED, COUNT, mixed_pictures

pytestmark = needs_browser
PATIENCE_MS = 90_000
SHIPPED = Path(__file__).resolve().parents[2] / "lib_lora_train" / "demo"
EVIL = "<img src=x onerror=window.evil=1>"


class StudioPage(ServedPage):
    """The studio's parts of the page."""

    def open(self, query: str = "") -> None:
        self.page.goto(self.url + query)
        expect(self.part("choose").or_(self.part("dataset")).first).to_be_visible()

    def forget(self) -> None:
        """As on the first visit of a new server."""
        # First of all away from the page, which would ask for the pictures of a dataset that is being removed.
        self.page.goto(f"{self.url.rstrip('/')}{api.PREFIX}/page.css")  # of the page's origin, and without its script
        self.page.evaluate("localStorage.clear(); sessionStorage.clear()")
        self.page.set_viewport_size({"width": 1280, "height": 900})
        studio = studio_for(self.host, self.runner)
        studio.tasks.stop()
        assert studio.tasks.wait(60)
        studio.close(discard=True)
        while self.host.datasets_folder.exists():  # what was asked for before may still be answered
            shutil.rmtree(self.host.datasets_folder, ignore_errors=True)

    def tiles(self):
        return self.page.locator(".lts-tile")

    def said(self):
        return self.page.locator(".lts-notice")

    def bring_in(self, folder: Path, *, name: str = "emoji", trigger: str = "zzk") -> None:
        """A new dataset from a folder, looked at."""
        self.part("new_name").fill(name)
        self.part("new_trigger").fill(trigger)
        self.part("import_path").fill(str(folder))
        self.part("import").click()
        self.looked_at()

    def looked_at(self) -> None:
        expect(self.page.locator(".lts-summary")).to_be_visible()
        self.part("step_check").click()
        expect(self.page.locator(".lts-summary")).to_be_hidden()

    def captions(self, name: str = "emoji") -> dict[str, str]:
        """What is on the disk, by the image's name."""
        found = (self.host.datasets_folder / name).glob("*_*/*.txt")
        return {path.stem: path.read_text(encoding="utf-8").strip() for path in found}


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return mixed_pictures(tmp_path_factory.mktemp("mixed") / "my pictures", scale=0.5)


@pytest.fixture
def fresh(browser: object, tmp_path: Path) -> Iterator[StudioPage]:
    """A server and a page of the test's own."""
    with opened_page(browser, patience_ms=PATIENCE_MS) as page, StudioPage(tmp_path, page) as made:
        yield made


@pytest.fixture(scope="module")
def shared(browser: object, tmp_path_factory: pytest.TempPathFactory) -> Iterator[StudioPage]:
    with opened_page(browser, patience_ms=PATIENCE_MS) as page, StudioPage(tmp_path_factory.mktemp("studio"), page) as made:
        yield made


@pytest.fixture
def studio(shared: StudioPage, tmp_path: Path) -> StudioPage:
    """The module's server and page, without a dataset and with nothing remembered."""
    shared.forget()
    shared.folder = tmp_path
    return shared


@pytest.fixture
def few(studio: StudioPage, tmp_path: Path) -> StudioPage:
    """Five small images with captions, opened."""
    folder = tmp_path / "few"
    folder.mkdir()
    for number, caption in enumerate(("zzk, red, smile", "zzk, red", "zzk, blue, smile", EVIL, "")):
        Image.radial_gradient("L").rotate(70 * number).resize((300, 200 + 40 * number)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(caption, encoding="utf-8")
    studio.open()
    studio.bring_in(folder)
    expect(studio.tiles()).to_have_count(5)
    return studio


def test_thirty_mixed_pictures_become_a_captioned_and_cropped_dataset_and_a_training(
        fresh: StudioPage, mixed: Path, monkeypatch: pytest.MonkeyPatch):
    job, studio = FakeJob(), fresh
    monkeypatch.setattr(runner_module, "run_job", job)
    before = {path.name: path.read_bytes() for path in mixed.iterdir()}
    studio.open()
    studio.part("new_name").fill("emoji")
    studio.part("new_trigger").fill("zzkmoji")
    studio.part("upload").set_input_files(sorted(mixed.iterdir()))

    # The report comes by itself; it names what stayed out and what is the same.
    summary = studio.page.locator(".lts-summary")
    expect(summary).to_contain_text(f"{ADDED} pictures")
    problems = studio.page.locator(".lts-progress")
    expect(problems).to_contain_text("broken.png")
    expect(problems).to_contain_text("copy-of-the-first.png")
    expect(studio.page.locator(".lts-chip", has_text="nearly the same")).to_be_visible()
    expect(studio.part("step_shape")).to_be_enabled()
    studio.part("step_shape").click()
    expect(studio.page.locator(".lts-sample img").first).to_be_visible()
    studio.page.get_by_role("button", name="Squares").click()
    studio.part("shape").click()
    # Squares lose nothing in a square bucket, so captions are next.
    expect(studio.part("step_shape")).to_have_attribute("data-done", "true")
    expect(studio.part("step_shape")).to_contain_text("Done")
    studio.part("next").click()
    studio.page.locator("[data-source=filename]").click()
    expect(studio.part("tag_trigger_word")).to_have_value("zzkmoji")
    # What is opened while captions are written stays open when they are.
    studio.page.evaluate("for (const part of ['tag', 'step_train']) document.getElementById('lora_train_' + part).click()")
    expect(studio.part("save")).to_contain_text(str(ADDED))
    assert studio.captions().get("tiger-face", "") == ""

    # A tenth is held out, each picture switched by a press.
    held, tools = studio.page.locator(".lts-tile:has(.lts-held)"), studio.page.locator(".lts-editor")
    expect(held).to_have_count(3)
    held.first.click()
    tools.get_by_role("button", name="Train on it").click()
    expect(held).to_have_count(2)
    tools.get_by_role("button", name="Hold out").click()
    expect(held).to_have_count(3)

    studio.part("use").click()
    expect(studio.part("start")).to_be_visible()
    folder = studio.host.datasets_folder / "emoji"
    expect(studio.page.locator("#lora_train_train_data_dir textarea, #lora_train_train_data_dir input")).to_have_value(
        str(folder))
    expect(studio.page.locator("#lora_train_trigger_word textarea, #lora_train_trigger_word input")).to_have_value("zzkmoji")
    expect(studio.page.locator("#lora_train_summary").first).to_contain_text(f"3 of {ADDED} pictures kept back")
    studio.part("start").click()
    expect(studio.part("stop")).to_be_enabled()

    assert job.seen is not None and Path(job.seen.dataset.train_data_dir) == folder
    captions = studio.captions()
    assert len(captions) == ADDED and all(caption.startswith("zzkmoji") for caption in captions.values())
    shapes = set()
    for path in folder.glob("*_zzkmoji/*.*"):
        if path.suffix != ".txt":
            with Image.open(path) as image:
                shapes.add(image.width == image.height)
    assert shapes == {True}
    assert {path.name: path.read_bytes() for path in mixed.iterdir()} == before and len(before) == COUNT


def test_a_zip_and_dropped_files_are_brought_in_alike(studio: StudioPage, mixed: Path, tmp_path: Path):
    archive = tmp_path / "cats and hats.zip"
    with zipfile.ZipFile(archive, "w") as made:
        for path in sorted(mixed.glob("b*.png"))[:4]:
            made.write(path, path.name)
    studio.open()
    studio.part("upload").set_input_files(archive)
    # Nobody gave it a name.
    expect(studio.part("dataset")).to_have_value(re.compile("cats and hats"))
    studio.looked_at()
    there = studio.tiles().count()
    studio.page.evaluate("""async () => {
        const canvas = Object.assign(document.createElement("canvas"), {width: 300, height: 200});
        const ink = canvas.getContext("2d");
        for (let n = 0; n < 40; n++) {
            ink.fillStyle = `hsl(${n * 9}, 90%, 50%)`;
            ink.fillRect(n * 7, n * 5, 60, 40);
        }
        const blob = await new Promise((done) => canvas.toBlob(done));
        const transfer = new DataTransfer();
        transfer.items.add(new File([blob], "dropped.png", {type: "image/png"}));
        const options = {dataTransfer: transfer, bubbles: true, cancelable: true};
        for (const name of ["dragenter", "dragover", "drop"]) {
            document.querySelector("#lora_train_gallery").dispatchEvent(new DragEvent(name, options));
        }
    }""")
    expect(studio.tiles()).to_have_count(there + 1)
    studio.looked_at()


def test_captions_are_filtered_by_tags_changed_together_undone_and_saved(few: StudioPage):
    tags = few.page.locator(".lts-tag")
    tags.filter(has_text="smile").locator(".lts-tag-name").click()
    expect(few.tiles()).to_have_count(2)
    few.part("edit_box").locator("summary").click()
    few.part("edit").select_option("Add tags at the end")
    few.part("edit_tags").fill("happy, outdoors")
    few.part("apply").click()
    expect(few.said()).to_contain_text("2 captions changed")
    expect(few.part("save")).to_contain_text("2")
    tags.filter(has_text="smile").locator(".lts-tag-name").click()
    expect(few.tiles()).to_have_count(3)
    few.page.get_by_role("button", name="Show all").click()
    expect(few.tiles()).to_have_count(5)
    assert few.captions()["0"] == "zzk, red, smile"

    few.part("undo").click()
    expect(few.part("save")).to_be_disabled()
    few.part("redo").click()
    few.part("save").click()
    expect(few.said()).to_contain_text("2 captions saved")
    assert few.captions()["0"] == "zzk, red, smile, happy, outdoors"
    assert few.captions()["1"] == "zzk, red"


def test_the_keyboard_moves_selects_removes_and_takes_back(few: StudioPage):
    few.tiles().first.click()
    few.page.keyboard.press("ArrowRight")
    expect(few.tiles().nth(1)).to_have_attribute("aria-selected", "true")
    expect(few.part("caption")).to_have_value("zzk, red")
    few.page.keyboard.press("Shift+ArrowRight")
    expect(few.page.locator(".lts-count").first).to_have_text("2 selected")
    few.page.keyboard.press("Delete")
    expect(few.tiles()).to_have_count(3)
    few.page.keyboard.press("Control+z")
    expect(few.tiles()).to_have_count(5)
    few.page.keyboard.press("Control+y")
    expect(few.tiles()).to_have_count(3)


def test_one_caption_is_written_counted_and_saved_with_the_keyboard(few: StudioPage):
    few.tiles().nth(1).click()
    caption = few.part("caption")
    caption.fill("zzk, red, a very long walk")
    expect(few.page.locator(".lts-tokens")).to_contain_text("tokens")
    few.page.keyboard.press("Control+s")
    expect(few.said()).to_contain_text("1 caption saved")
    assert few.captions()["1"] == "zzk, red, a very long walk"
    # In a text, Ctrl+Z is the browser's own.
    caption.fill("zzk, green")
    few.page.keyboard.press("Enter")
    expect(few.part("caption")).to_have_value("zzk, blue, smile")
    expect(few.part("save")).to_contain_text("1")


def test_each_dataset_keeps_its_own_trigger_word_and_unsaved_captions_are_asked_about(few: StudioPage, tmp_path: Path):
    answers = []

    def answer(dialog) -> None:
        answers.append(dialog.message)
        (dialog.accept if len(answers) > 1 else dialog.dismiss)()
    few.page.on("dialog", answer)
    few.part("step_caption").click()
    expect(few.part("tag_trigger_word")).to_have_value("zzk")
    # Some have captions: those are not written over unless that is asked for.
    expect(few.part("tag_mode")).to_have_value("Only where there is none")
    few.page.locator("[data-source=template]").click()
    few.part("tag").click()
    expect(few.part("save")).to_contain_text("1")
    few.part("dataset").select_option("New dataset")
    expect(few.part("dataset")).to_have_value("emoji")
    few.part("dataset").select_option("New dataset")
    few.bring_in(tmp_path / "few", name="second", trigger="qqx")
    few.page.remove_listener("dialog", answer)
    assert len(answers) == 2 and "1 changed caption" in answers[0]
    few.part("step_caption").click()
    expect(few.part("tag_trigger_word")).to_have_value("qqx")
    assert not few.captions().get("4")


def test_captions_are_written_only_once_their_options_are_known(few: StudioPage):
    held: list[Any] = []
    few.page.route("**/studio/tag-options*", lambda route: held.append(route))
    few.part("step_caption").click()
    expect(few.part("tag")).to_be_visible()
    expect(few.part("tag")).to_be_disabled()
    held[0].continue_()
    expect(few.part("tag")).to_be_enabled()
    few.page.unroute("**/studio/tag-options*")


def test_what_is_written_stays_when_another_page_opens_another_dataset(few: StudioPage, browser: object, tmp_path: Path):
    written = "zzk, red, written for long"
    few.tiles().nth(1).click()
    few.part("caption").fill(written)
    with opened_page(browser, patience_ms=PATIENCE_MS) as page:
        page.goto(few.url)
        page.locator("#lora_train_dataset").select_option("New dataset")
        page.locator("#lora_train_new_name").fill("second")
        page.locator("#lora_train_import_path").fill(str(tmp_path / "few"))
        page.locator("#lora_train_import").click()
        expect(page.locator(".lts-tile")).to_have_count(5)
        expect(page.locator(".lts-summary")).to_be_visible()
        # The first page does not go along, and what it sends does not reach the pictures of the same names.
        few.page.locator(".lts-file").click()
        few.part("caption").press("Tab")
        elsewhere = few.part("elsewhere")
        expect(elsewhere).to_contain_text("second")
        expect(few.part("dataset")).to_have_value("emoji")
        expect(few.part("caption")).to_have_value(written)
        few.tiles().nth(2).click()
        few.tiles().nth(1).click()
        expect(few.part("caption")).to_have_value(written)
        few.part("reopen").click()
        expect(elsewhere).to_be_hidden()
        expect(few.part("save")).to_contain_text("1")
        expect(few.part("caption")).to_have_value(written)
        few.part("save").click()
        expect(few.said()).to_contain_text("1 caption saved")
        # Now the second page is asked, and goes where the first one is.
        page.locator(".lts-tile").first.click()
        page.locator("#lora_train_caption").fill("of the second page")
        page.locator("#lora_train_caption").press("Tab")
        expect(page.locator("#lora_train_elsewhere")).to_contain_text("emoji")
        page.on("dialog", lambda dialog: dialog.accept())
        page.locator("#lora_train_follow").click()
        expect(page.locator("#lora_train_dataset")).to_have_value("emoji")
        expect(page.locator("#lora_train_elsewhere")).to_be_hidden()
    assert few.captions()["1"] == written
    assert few.captions("second")["0"] == "zzk, red, smile" and few.captions("second")["1"] == "zzk, red"


def test_a_name_of_ones_own_stays_and_that_of_another_datasets_lora_does_not(few: StudioPage):
    name, folder = few.page.locator("#lora_train_output_name input, #lora_train_output_name textarea").first, "train_data_dir"
    trained = few.page.locator(f"#lora_train_{folder} input, #lora_train_{folder} textarea").first

    def use() -> None:
        few.part("step_train").click()
        few.part("use").click()
        expect(few.part("start")).to_be_visible()
        expect(trained).to_have_value(str(few.host.datasets_folder / "emoji"))

    use()
    expect(name).to_have_value("emoji")
    name.fill("emoji v2")
    few.page.get_by_role("button", name="1 Dataset").click()
    use()
    expect(name).to_have_value("emoji v2")
    # As after a reload, when the fields show the last run's.
    trained.fill("another dataset")
    name.fill("another LoRA")
    few.page.get_by_role("button", name="1 Dataset").click()
    use()
    expect(name).to_have_value("emoji")


def test_what_a_caption_says_is_never_html(few: StudioPage):
    evil = few.tiles().nth(3)
    expect(evil).to_contain_text("onerror")
    evil.click()
    expect(few.part("caption")).to_have_value(EVIL)
    expect(few.page.locator(".lts-tag", has_text="onerror")).to_be_visible()
    assert few.page.evaluate("window.evil") is None


def test_what_is_odd_about_a_captions_file_stands_above_it_until_it_is_replaced(few: StudioPage):
    few.part("dataset").select_option("New dataset")
    place, = (few.host.datasets_folder / "emoji").glob("*_zzk")
    (place / "0.txt").write_bytes(b"caf\x81 \xff")
    (place / "1.txt").write_text("zzk, red\nat home", encoding="utf-8")
    few.page.locator(".lts-card").click()
    wrong = few.page.locator(".lts-wrong")
    few.tiles().nth(1).click()
    expect(wrong).to_have_text("Of 1.txt the first line is edited; without Wildcards (enable_wildcard) only that is used.")
    few.tiles().nth(2).click()
    expect(few.part("caption")).to_have_value("zzk, blue, smile")
    expect(wrong).to_be_hidden()
    few.tiles().first.click()
    expect(wrong).to_contain_text("Caption cannot be read")
    expect(wrong).to_contain_text("0.txt is not UTF-8 text")
    few.part("caption").fill("zzk")
    few.part("caption").blur()
    expect(wrong).to_be_hidden()
    expect(few.part("caption")).to_have_value("zzk")


def test_opening_a_dataset_says_that_an_interrupted_save_was_finished(few: StudioPage, monkeypatch: pytest.MonkeyPatch):
    few.part("dataset").select_option("New dataset")
    few.bring_in(few.folder / "few", name="second")
    folders = {name: few.host.datasets_folder / name for name in ("emoji", "second")}
    # From the list of datasets in the head, which closes the other one.
    interrupt_save(folders["emoji"], "1.png", "mended", monkeypatch)
    few.part("dataset").select_option("emoji")
    expect(few.said()).to_have_text(FINISHED)
    expect(few.tiles().nth(1)).to_contain_text("mended")
    # From the page before a dataset is open; what was said is said once.
    few.part("dataset").select_option("New dataset")
    expect(few.said()).to_be_hidden()
    interrupt_save(folders["second"], "2.png", "this too", monkeypatch)
    few.page.locator(".lts-card", has_text="second").click()
    expect(few.said()).to_have_text(FINISHED)
    expect(few.tiles().nth(2)).to_contain_text("this too")


def test_a_crop_by_hand_keeps_what_is_inside_the_frame(few: StudioPage):
    few.tiles().first.click()
    few.part("crop").click()
    few.page.get_by_role("button", name="1:1").click()
    stage = few.page.locator(".lts-cut")
    stage.scroll_into_view_if_needed()
    few.part("crop_it").click()
    expect(few.page.locator(".lts-editor")).to_contain_text("200×200")
    few.page.locator(".lts-editor").get_by_role("button", name="Uncrop").click()
    expect(few.page.locator(".lts-editor")).to_contain_text("300×200")


def test_a_painted_mask_lies_beside_the_image_is_said_to_count_with_masked_loss_and_can_be_taken_away(few: StudioPage):
    used = "Masks count where Masked loss (masked_loss) is on"
    few.tiles().first.click()
    few.part("mask").click()
    expect(few.part("masks_used")).to_contain_text(used)
    few.page.get_by_role("button", name="Broad").click()
    cover = few.part("cover")
    cover.scroll_into_view_if_needed()
    box = cover.bounding_box()
    middle = box["y"] + box["height"] / 2
    few.page.mouse.move(box["x"] + 2, middle)
    few.page.mouse.down()
    few.page.mouse.move(box["x"] + box["width"] - 2, middle, steps=4)
    few.page.mouse.up()
    few.part("mask_it").click()
    expect(few.said()).to_contain_text("mask is kept")
    expect(few.said()).to_contain_text(used)
    badge = few.page.locator(".lts-tile .lts-badge", has_text="mask")
    expect(badge).to_have_attribute("title", re.compile(re.escape(used)))
    expect(few.page.locator(".lts-wrong")).to_contain_text(used)
    path = few.host.datasets_folder / "emoji" / "masks" / "0.png"
    with Image.open(path) as mask:
        assert (mask.mode, mask.size) == ("L", (300, 200))
        assert [mask.getpixel((150, y)) for y in (5, 100, 195)] == [255, 0, 255]
    few.part("mask").click()
    few.part("unmask").click()
    expect(few.page.locator(".lts-tile .lts-badge", has_text="mask")).to_have_count(0)
    assert not path.exists()


def test_captions_are_filtered_by_any_tag_and_by_how_tags_begin_and_end(few: StudioPage):
    few.page.get_by_text("More filters").click()
    for name, text, count in (("any_of", "blue, smile", 2), ("prefix", "bl", 1), ("suffix", "ile", 2), ("regex", "red$", 1)):
        few.part(f"filter_{name}").fill(text)
        expect(few.tiles()).to_have_count(count)
        few.page.get_by_role("button", name="Show all").click()
        expect(few.tiles()).to_have_count(5)
    few.part("filter_regex").fill("(")
    expect(few.said()).to_have_class(re.compile("lts-problem"))


def test_a_file_that_is_no_image_does_not_keep_the_others_out(few: StudioPage, tmp_path: Path):
    image, program = tmp_path / "new.png", tmp_path / "setup.exe"
    Image.linear_gradient("L").resize((400, 300)).save(image)
    program.write_bytes(b"MZ")
    few.part("step_add").click()
    few.part("upload").set_input_files([program, image])
    expect(few.tiles()).to_have_count(6)
    expect(few.page.locator("#lts")).to_contain_text("setup.exe")
    few.looked_at()


def test_a_double_click_brings_pictures_in_once(studio: StudioPage, tmp_path: Path):
    for number in range(3):
        Image.radial_gradient("L").rotate(70 * number).save(tmp_path / f"{number}.png")
    studio.open()
    studio.part("new_name").fill("emoji")
    studio.part("import_path").fill(str(tmp_path))
    studio.part("import").dblclick()
    expect(studio.tiles()).to_have_count(3)
    expect(studio.said()).to_be_hidden()
    expect(studio.part("dataset").locator("option")).to_have_text(["emoji", "New dataset"])


@pytest.mark.parametrize("sample, name, trigger", [("style", "sticker style", "sticker"), ("subject", "zorbi", "zorbi")])
def test_an_empty_page_offers_sample_pictures_which_become_a_dataset_with_captions_and_trigger_word(
        studio: StudioPage, sample: str, name: str, trigger: str):
    captions = {path.stem: path.with_suffix(".txt").read_text(encoding="utf-8").strip()
                for path in (SHIPPED / sample).glob("*.png")}
    studio.open()
    expect(studio.part(f"sample_{sample}")).to_contain_text(f"{len(captions)} ")
    studio.part(f"sample_{sample}").press("Enter")
    expect(studio.tiles()).to_have_count(len(captions))
    studio.looked_at()
    assert studio.captions(name) == captions
    assert list((studio.host.datasets_folder / name).glob(f"*_{trigger}"))  # kohya's layout
    studio.part("step_add").click()
    expect(studio.part("choose")).to_be_visible()
    expect(studio.part(f"sample_{sample}")).to_be_hidden()


def test_sample_pictures_overwrite_nothing_take_the_fields_and_are_offered_where_all_pictures_are_gone(few: StudioPage):
    captions, folder = few.captions(), few.host.datasets_folder
    few.part("dataset").select_option("New dataset")
    few.part("new_name").fill("Emoji")
    few.part("new_trigger").fill("mine")
    few.part("sample_subject").click()
    expect(few.tiles()).to_have_count(12)
    few.looked_at()
    assert few.captions() == captions
    assert list((folder / "Emoji 2").glob("*_mine"))
    few.part("gallery").press("Control+a")
    few.part("gallery").press("Delete")
    expect(few.tiles()).to_have_count(0)
    few.part("step_add").click()
    few.part("sample_style").click()
    expect(few.tiles()).to_have_count(24)
    expect(few.part("dataset").locator("option")).to_have_text(["emoji", "Emoji 2", "New dataset"])


def test_a_new_dataset_of_a_name_that_is_taken_leaves_the_open_one_open(few: StudioPage):
    studio = studio_for(few.host, few.runner)
    with pytest.raises(DatasetError, match="There is a dataset called 'Emoji' already"):
        studio.create("Emoji", concept="")
    with studio.using() as session:
        assert len(session.names) == 5


def test_files_dropped_during_an_upload_are_refused_in_a_sentence(studio: StudioPage, tmp_path: Path):
    for number in range(2):
        Image.radial_gradient("L").rotate(70 * number).save(tmp_path / f"{number}.png")
    held, released = [], []
    studio.page.route("**/studio/upload?*", lambda route: route.continue_() if released else held.append(route))
    studio.open()
    studio.part("upload").set_input_files([tmp_path / "0.png"])
    expect(studio.page.locator(".lts-progress")).to_contain_text("Uploading 0/1")
    studio.part("upload").last.set_input_files([tmp_path / "1.png"])
    expect(studio.said()).to_have_text("Pictures are being uploaded already; add these afterwards.")
    released.append(True)
    for route in held:
        route.continue_()
    expect(studio.tiles()).to_have_count(1)


def test_captions_in_json_can_be_chosen_with_the_pictures(studio: StudioPage):
    studio.open()
    assert set(TEXT_SUFFIXES) <= set(studio.part("upload").get_attribute("accept").split(","))


def test_a_refusal_is_read_on_the_page(studio: StudioPage, tmp_path: Path):
    studio.open()
    studio.part("import_path").fill(str(tmp_path / "missing"))
    studio.part("import").click()
    expect(studio.page.locator("#lts")).to_contain_text(re.compile("does not exist|not there|cannot be"))


def test_the_pages_remember_which_was_open(few: StudioPage):
    few.page.get_by_text("2 Train", exact=True).click()
    few.page.reload()
    expect(few.part("start")).to_be_visible()
    few.page.get_by_text("1 Dataset", exact=True).click()
    expect(few.tiles()).to_have_count(5)
    few.page.reload()
    expect(few.part("step_check")).to_be_visible()
    expect(few.part("start")).to_be_hidden()


def test_on_a_phone_nothing_is_wider_than_the_screen(few: StudioPage):
    few.page.set_viewport_size({"width": 390, "height": 800})
    few.open("?__theme=dark")
    for step in ("add", "check", "shape", "caption", "train"):
        few.part(f"step_{step}").click()
        expect(few.page.locator(f"[data-panel={step}]")).to_be_visible()
        assert few.page.evaluate("document.documentElement.scrollWidth") <= 390, step
        few.part(f"step_{step}").click()
    few.tiles().nth(1).click()
    expect(few.part("caption")).to_be_in_viewport()
    assert few.page.evaluate("document.documentElement.scrollWidth") <= 390


def test_the_column_beside_the_pictures_stays_in_sight_when_the_page_is_scrolled(few: StudioPage):
    few.page.set_viewport_size({"width": 1280, "height": 200})
    few.open()
    top = few.page.locator(".lts-side").evaluate("""column => {
        scrollTo(0, scrollY + column.parentElement.getBoundingClientRect().top + 40);
        return column.getBoundingClientRect().top;
    }""")
    assert 0 <= top < 50


def test_findings_are_looked_at_anew_by_themselves_after_a_change(few: StudioPage):
    check = few.part("step_check")
    few.tiles().nth(4).click()
    few.part("caption").fill("zzk, green")
    few.part("caption").blur()
    expect(check).to_contain_text("Changed since")
    expect(check).not_to_contain_text("Changed since")
    # Nobody asked for it, so nothing opens.
    expect(few.page.locator(".lts-panel")).to_be_hidden()
    check.click()
    expect(few.page.locator(".lts-summary")).to_contain_text("5 pictures")
    expect(few.page.locator(".lts-few")).to_contain_text("fewer than 12 pictures, crops")
    expect(few.page.get_by_role("button", name="Hold out")).to_have_count(0)
    expect(few.page.locator(".lts-advice")).not_to_contain_text("no caption file")


def test_do_they_fit_works_at_the_size_chosen_for_training_and_shows_the_time_left(
        few: StudioPage, monkeypatch: pytest.MonkeyPatch):
    seen, go_on = [], threading.Event()

    def check_captions(host, items, *, settings, on_progress, should_stop, **_):
        seen.append(settings.dataset.resolution)
        on_progress(1, 10)
        clock.now += 60
        on_progress(2, 10)
        assert go_on.wait(60)
        yield from ()
    clock = SimpleNamespace(now=0.0, monotonic=lambda: clock.now)
    monkeypatch.setattr("lib_lora_train.studio.operations.caption_check.check_captions", check_captions)
    monkeypatch.setattr("lib_lora_train.studio.tasks.time", clock)
    few.page.get_by_text("2 Train", exact=True).click()
    box = few.part("resolution").locator("input, textarea").first
    box.fill("384")
    box.blur()
    expect(few.page.locator("#lora_train_draft textarea, #lora_train_draft input")).to_have_value(re.compile('"384"'))
    few.page.get_by_text("1 Dataset", exact=True).click()
    few.part("step_caption").click()
    few.part("check_captions").click()
    # One of ten units took a minute; each of the five captions measured is 10 passes, each of the five painted 2 × 20.
    expect(few.page.locator(".lts-progress .progress")).to_have_text("Checking captions 2/10 · 23:00 left")
    assert seen == ["384"]
    few.part("stop_task").click()
    expect(few.page.locator(".lts-progress .progress")).to_have_text("Stopping")
    expect(few.part("stop_task")).to_be_disabled()
    go_on.set()


def test_a_double_click_begins_work_once_and_is_no_refusal(few: StudioPage, monkeypatch: pytest.MonkeyPatch):
    begun, go_on = [], threading.Event()

    def check_captions(host, items, **_):
        begun.append(len(items))
        assert go_on.wait(60)
        yield from ()
    monkeypatch.setattr("lib_lora_train.studio.operations.caption_check.check_captions", check_captions)
    few.tiles().nth(1).click()
    fits = few.page.get_by_role("button", name="Fits?")
    fits.dblclick()
    expect(few.page.locator(".lts-progress")).to_contain_text("Checking captions")
    fits.click()
    expect(few.said()).to_be_hidden()
    # Another wish is refused while it goes on.
    few.tiles().nth(2).click()
    fits.click()
    expect(few.said()).to_contain_text("The studio is busy (Checking captions)")
    assert begun == [1]
    go_on.set()


def test_a_captioner_that_looks_at_pictures_is_in_sight_with_what_it_needs(few: StudioPage):
    few.part("step_caption").click()
    tagger = few.page.locator("[data-source^='wd:']")
    expect(tagger).to_be_visible()
    expect(few.page.locator("[data-source=filename]")).to_have_attribute("aria-checked", "true")
    tagger.click()
    expect(few.page.locator(".lts-need")).to_contain_text("is not there" if importlib.util.find_spec("timm") else "timm")
    expect(few.part("tag")).to_be_disabled()


@pytest.mark.parametrize("width", [1280, 390])
def test_badges_leave_a_small_picture_in_sight_and_the_circle_that_selects_it(few: StudioPage, tmp_path: Path, width: int):
    narrow = tmp_path / "narrow.png"
    Image.radial_gradient("L").resize((60, 240)).save(narrow)
    few.part("step_add").click()
    few.part("import_path").fill(str(narrow))
    few.part("import").click()
    few.page.set_viewport_size({"width": width, "height": 900})
    tile = few.page.locator(".lts-tile[data-id='narrow.png']")
    expect(tile.locator(".lts-warn")).to_be_visible()
    whole, badges, mark = (part.bounding_box() for part in (tile, tile.locator(".lts-badges"), tile.locator(".lts-mark")))
    assert badges["x"] >= mark["x"] + mark["width"]
    assert badges["width"] * badges["height"] <= 0.1 * whole["width"] * whole["height"]
