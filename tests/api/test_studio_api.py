"""The studio's routes: what each answers, how it refuses, and that no image and no path gets where it should not."""

from __future__ import annotations

import io
import json
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from PIL import Image

from lib_lora_train import api
from lib_lora_train.errors import HostError, Interrupted
from lib_lora_train.run.planning import plan_dataset
from lib_lora_train.run.runner import Runner
from lib_lora_train.settings import parse
from lib_lora_train.settings.allowed_paths import AllowedPaths
from lib_lora_train.studio import thumbs, uploads
from lib_lora_train.studio.importing.collect import Collected
from lib_lora_train.studio.session import studio_for
from lib_lora_train.studio.tasks import Task
from tests.fake_host import FakeHost, FakeJob
from tests.interrupted_save import FINISHED, interrupt_save

TOKEN = "page-token"
PAGE = {"X-Lora-Train": TOKEN}
COLOURS = ("red", "green", "blue")


class Desk:
    """A server, asked as the page asks."""

    def __init__(self, folder: Path, *, api_enabled: bool = False) -> None:
        self.folder, self.host, self.runner = folder, FakeHost(folder), Runner()
        app = FastAPI()
        api.install(app, runner=self.runner, host=self.host, token=TOKEN, api_enabled=api_enabled, credentials={})
        self.client = TestClient(app, base_url="http://localhost")
        self.studio = studio_for(self.host, self.runner)

    def get(self, name: str, **query: str):
        return self.client.get(f"{api.PREFIX}/studio/{name}", params=query, headers=PAGE)

    def post(self, name: str, body: object = None):
        return self.client.post(f"{api.PREFIX}/studio/{name}", json=body or {}, headers=PAGE)

    def upload(self, name: str, data: bytes, *, batch: str = "one", headers: dict[str, str] | None = None):
        return self.client.post(f"{api.PREFIX}/studio/upload", params={"name": name, "batch": batch}, content=data,
                                headers={"Content-Type": "application/octet-stream", **(PAGE if headers is None else headers)})

    def done(self, answer) -> dict:
        """The task that `answer` started, after its end."""
        assert answer.status_code == 200, answer.text
        assert self.studio.tasks.wait(60)
        task = self.get("state").json()["task"]
        assert task["id"] == answer.json()["id"] and not task["running"]
        return task

    def images(self, **body: object) -> list[dict]:
        return self.post("pictures", body).json()["pictures"]

    def filled(self) -> Desk:
        """A dataset "zzk" of red.png, green.png and blue.png, with captions."""
        assert self.post("create", {"name": "zzk", "concept": "zzk girl"}).status_code == 200
        assert self.done(self.post("import", {"paths": [str(sources(self.folder / "sources"))]}))["outcome"] == "done"
        return self


def sources(folder: Path) -> Path:
    folder.mkdir()
    for colour in COLOURS:
        (folder / f"{colour}.png").write_bytes(png(colour))
        (folder / f"{colour}.txt").write_text(f"{colour}, square", encoding="utf-8")
    return folder


def png(colour: str, size: tuple[int, int] = (320, 200)) -> bytes:
    held = io.BytesIO()
    Image.new("RGB", size, colour).save(held, "PNG")
    return held.getvalue()


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    made = Desk(tmp_path)
    yield made
    made.studio.tasks.stop()
    made.runner.stop(save=False)
    assert made.studio.tasks.wait(60) and made.runner.wait(60)


def asked_to_train(desk: Desk, folder: Path | str):
    """What the server says to Train."""
    settings = {"output_name": "x", "train_data_dir": str(folder)}
    return desk.client.post(f"{api.PREFIX}/start", json={"settings": settings}, headers=PAGE)


def train_on(desk: Desk, folder: Path | str) -> None:
    """A training that goes on until the test ends."""
    started = asked_to_train(desk, folder)
    assert started.status_code == 200, started.text


def dataset_folder(desk: Desk) -> Path:
    return Path(desk.get("state").json()["dataset"]["folder"])


def test_before_anything_is_open_there_is_a_list_and_nothing_else(desk: Desk):
    state = desk.get("state").json()
    assert state["dataset"] is None and state["datasets"] == [] and state["task"] is None
    assert {"infotext", "filename", "template"} <= {source["name"] for source in state["sources"]}
    for name in ("pictures", "tags", "undo", "save", "use", "remove"):
        refused = desk.post(name, {"ids": ["a.png"]})
        assert refused.status_code == 400 and "No dataset is open" in refused.json()["error"]
    assert list(desk.folder.iterdir()) == [desk.host.lora_folder]  # asking makes nothing


def test_images_and_captions_are_brought_in_and_the_originals_stay(desk: Desk):
    desk.filled()
    state = desk.get("state").json()
    assert state["dataset"]["pictures"] == 3 and state["dataset"]["trigger_word"] == "zzk girl"
    assert state["datasets"] == [{"name": "zzk", "pictures": 3}]
    assert state["task"]["message"] == "3 pictures added." and state["task"]["done"] == state["task"]["total"] == 3
    shown = desk.images()
    assert [(p["name"], p["caption"], p["width"], p["height"]) for p in shown] == [
        (f"{colour}.png", f"{colour}, square", 320, 200) for colour in sorted(COLOURS)]
    assert {path.name: path.read_bytes() for path in (desk.folder / "sources").iterdir()} == {
        **{f"{c}.png": png(c) for c in COLOURS}, **{f"{c}.txt": f"{c}, square".encode() for c in COLOURS}}
    # kohya's layout: a folder N_concept of images and captions.
    numbered, = dataset_folder(desk).glob("*_zzk girl")
    assert (numbered / "red.txt").read_text(encoding="utf-8") == "red, square"


def test_what_cannot_be_used_is_named_and_the_rest_is_taken(desk: Desk):
    folder = sources(desk.folder / "mixed")
    (folder / "broken.png").write_bytes(png("red")[:60])
    (folder / "again.png").write_bytes(png("red"))
    desk.post("create", {"name": "a", "concept": "a"})
    task = desk.done(desk.post("import", {"paths": [str(folder)]}))
    assert {Path(problem["picture"]).name for problem in task["problems"]} >= {"broken.png"}
    assert len(task["problems"]) == 2 and len(desk.images()) == 3


def test_captions_that_are_imported_later_are_shown_and_can_be_saved_over(desk: Desk):
    desk.post("create", {"name": "zzk", "concept": "zzk girl"})
    folder = sources(desk.folder / "sources")
    for caption in folder.glob("*.txt"):
        caption.rename(caption.with_suffix(".later"))
    desk.done(desk.post("import", {"paths": [str(folder)]}))
    (folder / "red.later").rename(folder / "red.txt")
    (folder / "odd.txt").write_text("nobody's", encoding="utf-8")
    task = desk.done(desk.post("import", {"paths": [str(folder)]}))
    assert {p["id"]: p["caption"] for p in desk.images()} == {"red.png": "red, square", "green.png": "", "blue.png": ""}
    assert any("1 text file fits no picture (odd.txt)" in problem["text"] for problem in task["problems"])
    desk.post("caption", {"id": "red.png", "text": "changed"})
    assert desk.post("save", {}).json()["conflicts"] == []


@pytest.mark.parametrize("name", ["../x", "..", "/tmp/x", "a/b", "nowhere", "", r"C:\x", "zzk\0"])
def test_only_a_dataset_of_the_list_is_opened(desk: Desk, name: str):
    desk.filled()
    desk.post("close")
    (desk.folder / "x").mkdir()
    refused = desk.post("open", {"name": name})
    assert refused.status_code == 400 and desk.get("state").json()["dataset"] is None
    assert desk.post("open", {"name": "zzk"}).status_code == 200


def test_opening_says_what_became_of_an_interrupted_save(desk: Desk, monkeypatch: pytest.MonkeyPatch):
    desk.filled()
    folder = dataset_folder(desk)
    caption, = folder.glob("*/red.txt")

    def opened_after(*, theirs: str) -> list[str]:
        """What opening says after a save of "new" was broken off, and another program wrote `theirs`."""
        assert desk.post("close").status_code == 200
        interrupt_save(folder, "red.png", "new", monkeypatch)
        if theirs:
            caption.write_text(theirs, encoding="utf-8")
        return desk.post("open", {"name": "zzk"}).json()["notes"]

    assert opened_after(theirs="") == [FINISHED]
    assert caption.read_text(encoding="utf-8") == "new"
    assert desk.post("open", {"name": "zzk"}).json() == {"notes": []}  # it is open
    caption.write_text("old", encoding="utf-8")
    note, = opened_after(theirs="theirs")
    assert "could not be finished for 1 caption that another program changed" in note
    assert str(folder / ".studio" / "backup") in note and caption.read_text(encoding="utf-8") == "theirs"
    desk.post("close")
    assert desk.post("open", {"name": "zzk"}).json() == {"notes": []}


def test_what_is_odd_about_a_captions_file_is_told_with_its_image(desk: Desk):
    desk.filled()
    place, = dataset_folder(desk).glob("*_zzk girl")
    desk.post("close")
    (place / "red.txt").write_bytes(b"caf\x81 \xff")
    (place / "green.txt").write_text("green\nfield", encoding="utf-8")
    (place / "blue.caption").write_text("sky", encoding="utf-8")
    desk.post("open", {"name": "zzk"})

    def told() -> dict[str, tuple[str, list[str]]]:
        return {p["id"]: (p["caption_problem"], p["problems"]) for p in desk.images()}

    odd = {"green.png": ("Of green.txt the first line is edited; without Wildcards (enable_wildcard) only that is used.", []),
           "blue.png": ("blue.caption does not count, because there is blue.txt too.", [])}
    unreadable = told()["red.png"]
    assert told() == {**odd, "red.png": unreadable}
    assert "red.txt is not UTF-8" in unreadable[0] and unreadable[1] == ["unreadable_caption"]
    assert [p["id"] for p in desk.images(filter={"problem": "any"})] == ["red.png"]
    desk.post("caption", {"id": "red.png", "text": "red"})
    assert told() == {**odd, "red.png": ("", [])}
    # A caption that is taken away takes the lines below it along.
    desk.post("caption", {"id": "green.png", "text": ""})
    assert desk.post("save").json() == {"written": 2, "conflicts": []}
    assert told()["green.png"] == ("", ["no_caption"])


@pytest.mark.parametrize("name", ["", "  ", "///"])
def test_a_dataset_needs_a_name(desk: Desk, name: str):
    assert desk.post("create", {"name": name, "concept": ""}).status_code == 400
    assert not desk.host.datasets_folder.exists() or list(desk.host.datasets_folder.iterdir()) == []


def test_a_name_that_is_taken_is_refused_in_any_case(desk: Desk):
    desk.filled()
    assert desk.post("create", {"name": "ZZK", "concept": "a"}).status_code == 400


def test_edits_are_undone_and_redone_and_reach_the_disk_with_save_only(desk: Desk):
    desk.filled()
    caption, = dataset_folder(desk).glob("*/red.txt")
    edit = {"edit": {"kind": "add_tags", "tags": ["smile"], "at": "end"}, "filter": {"all_of": ["red"]}}
    assert desk.post("edit", edit).json() == {"changed": 1}
    state = desk.get("state").json()["dataset"]
    assert state["unsaved"] == 1 and "smile" in state["can_undo"] and state["can_redo"] == ""
    assert [p["changed"] for p in desk.images(filter={"changed_only": True})] == [True]
    assert caption.read_text(encoding="utf-8") == "red, square"
    assert "smile" in desk.post("undo").json()["label"] and desk.get("state").json()["dataset"]["unsaved"] == 0
    assert "smile" in desk.post("redo").json()["label"]
    assert desk.post("save").json() == {"written": 1, "conflicts": []}
    assert caption.read_text(encoding="utf-8") == "red, square, smile"
    assert desk.post("caption", {"id": "red.png", "text": "one\ntwo"}).json() == {"changed": 1}
    assert desk.images(filter={"text": "two"})[0]["caption"] == "one two"
    assert desk.post("tags", {"filter": {}}).json() == {"tags": [["square", 2], ["blue", 1], ["green", 1], ["one two", 1]],
                                                        "total": 4}


def test_a_caption_that_somebody_else_changed_is_named_and_kept(desk: Desk):
    desk.filled()
    caption, = dataset_folder(desk).glob("*/red.txt")
    desk.post("caption", {"id": "red.png", "text": "ours"})
    caption.write_text("theirs, longer", encoding="utf-8")
    assert desk.post("save").json() == {"written": 0, "conflicts": ["red.txt"]}
    refused = desk.post("use")
    assert refused.status_code == 409 and "red.txt" in refused.json()["error"]
    assert caption.read_text(encoding="utf-8") == "theirs, longer"
    assert desk.post("save", {"overwrite": True}).json() == {"written": 1, "conflicts": []}
    assert caption.read_text(encoding="utf-8") == "ours"


def test_unsaved_captions_keep_the_dataset_open(desk: Desk):
    desk.filled()
    desk.post("caption", {"id": "red.png", "text": "ours"})
    for name, body in (("close", {}), ("create", {"name": "b", "concept": "b"})):
        refused = desk.post(name, body)
        assert refused.status_code == 409 and "not saved" in refused.json()["error"]
    assert desk.get("state").json()["dataset"]["name"] == "zzk"
    assert desk.post("close", {"discard": True}).status_code == 200


def test_a_request_about_a_dataset_that_another_page_has_left_is_refused_and_changes_nothing(desk: Desk):
    desk.filled()
    assert desk.post("create", {"name": "other"}).status_code == 200  # by another page
    desk.done(desk.post("import", {"paths": [str(desk.folder / "sources")]}))
    assert desk.post("caption", {"id": "red.png", "text": "of the other page"}).json() == {"changed": 1}
    text = {"id": "red.png", "text": "of this page"}
    answers = [desk.post(f"{name}?dataset=zzk", body) for name, body in (
        ("caption", text), ("pictures", {}), ("save", {}), ("remove", {"ids": ["red.png"]}), ("use", {}),
        ("close", {"discard": True}), ("open", {"name": "zzk", "discard": True}), ("create", {"name": "new", "discard": True}))]
    answers += [desk.get("thumb", id="red.png", dataset="zzk"), desk.client.post(
        f"{api.PREFIX}/studio/put-mask?id=red.png&dataset=zzk", content=png("white"),
        headers={"Content-Type": "application/octet-stream", **PAGE})]
    assert [answer.status_code for answer in answers] == [409] * len(answers)
    assert "zzk" in answers[0].json()["error"] and "other was opened" in answers[0].json()["error"]
    state = desk.get("state", dataset="zzk").json()["dataset"]
    assert (state["name"], state["unsaved"], state["pictures"]) == ("other", 1, 3)
    assert next(image for image in desk.images() if image["id"] == "red.png")["caption"] == "of the other page"
    assert not desk.images()[0]["masked"] and desk.post("save").json()["written"] == 1
    # Back in the dataset it meant, the same request is taken.
    assert desk.post("open?dataset=zzk", {"name": "zzk"}).status_code == 200
    assert desk.post("caption?dataset=zzk", text).json() == {"changed": 1}
    assert desk.post("caption", {"id": "red.png", "text": "of a program that names none"}).json() == {"changed": 1}


def test_removed_images_come_back_with_undo(desk: Desk):
    desk.filled()
    desk.post("caption", {"id": "red.png", "text": "edited"})
    assert desk.post("remove", {"ids": ["red.png", "blue.png"]}).json() == {"removed": 2}
    assert [p["name"] for p in desk.images()] == ["green.png"]
    assert not list(dataset_folder(desk).glob("*/red.*"))
    assert desk.get("thumb", id="red.png").status_code == 400
    assert "2 pictures" in desk.post("undo").json()["label"]
    assert [(p["name"], p["caption"]) for p in desk.images()] == [
        ("blue.png", "blue, square"), ("green.png", "green, square"), ("red.png", "edited")]
    assert desk.get("thumb", id="red.png").status_code == 200
    desk.post("redo")
    assert len(desk.images()) == 1


def test_the_gallery_is_paged_and_sorted(desk: Desk):
    desk.filled()
    assert [p["name"] for p in desk.images(offset=1, limit=1)] == ["green.png"]
    assert desk.post("pictures", {"offset": 1, "limit": 1}).json()["total"] == 3
    desk.post("caption", {"id": "red.png", "text": ""})
    assert desk.images(sort="problems")[0]["name"] == "red.png"
    assert [p["name"] for p in desk.images(filter={"problem": "no_caption"})] == ["red.png"]
    assert [p["name"] for p in desk.images(sort="score")] == ["blue.png", "green.png", "red.png"]


WRONG = (
    ("pictures", {"sort": "colour"}), ("pictures", {"limit": -1}), ("pictures", {"limit": "many"}),
    ("pictures", {"offset": 0.5}), ("edit", {"edit": {"kind": "shout"}, "ids": []}),
    ("pictures", {"filter": {"colour": "red"}}), ("pictures", {"filter": {"regex": "("}}), ("pictures", {"filter": "all"}),
    ("pictures", {"filter": {"all_of": "red"}}), ("tags", {"filter": {"text": 3}}),
    ("edit", {"edit": {"kind": "sort_tags"}}), ("edit", {"edit": "sort", "filter": {}}), ("edit", {}),
    ("edit", {"edit": {"kind": "deduplicate"}, "ids": ["nobody.png"]}), ("caption", {"id": "../red.png", "text": "x"}),
    ("caption", {"id": "red.png", "text": 3}), ("remove", {}), ("remove", {"ids": [3]}), ("remove", {"ids": ["nobody.png"]}),
    ("save", {"overwrite": "yes"}), ("tokens", {"text": None}), ("import", {}), ("import", {"paths": []}),
    ("import", {"paths": ["/no/such/folder"]}), ("import", {"paths": ["a\0b"]}), ("import-uploads", {"batch": "../x"}),
    ("import-uploads", {"batch": "unknown"}), ("tag", {"source": "nobody", "filter": {}}), ("tag", {"source": "infotext"}),
    ("tag", {"source": "infotext", "filter": {}, "options": {"colour": 1}}), ("tag", {"source": "infotext", "ids": []}),
    ("open", {}), ("create", {"name": 3}), ("check", {"settings": {"nonsense": 1}}), ("check", {"settings": "all"}),
    ("shape", {"shape": {"mode": "star"}, "filter": {}}), ("shape", {"shape": {}}), ("shape", {"shape": {}, "ids": ["no.png"]}),
    ("shape", {"shape": {"side": "big"}, "filter": {}}), ("shape-preview", {"id": "red.png", "shape": {"side": 3}}),
    ("shape-preview", {"id": "../red.png", "shape": {}}), ("crop", {"id": "red.png"}),
    ("crop", {"id": "red.png", "box": [0, 0, 2, 2]}),
    ("crop", {"id": "red.png", "box": [0, 0, "a", 9]}), ("crop", {"id": "no.png", "box": [0, 0, 99, 99]}), ("flip", {"id": ""}),
    ("split", {"id": "red.png"}), ("split", {"id": "red.png", "tile": 1}), ("unshape", {"ids": ["no.png"]}),
    ("check-captions", {"filter": {}, "seeds": -1}), ("check-captions", {}),
    ("check-captions", {"filter": {"text": "nowhere"}}),
    ("class-pictures", {}), ("class-pictures", {"prompts": ["a"], "count": 0}),
    ("class-pictures", {"prompts": ["a"], "size": [64, 9000]}),
)


def test_what_is_wrong_is_said_in_one_sentence_and_changes_nothing(desk: Desk):
    desk.filled()
    before = desk.get("state").json()["version"]
    for name, body in WRONG:
        refused = desk.post(name, body)
        assert refused.status_code == 400, (name, body, refused.text)
        sentence = refused.json()["error"]
        assert sentence.endswith(".") and "\n" not in sentence and "Traceback" not in sentence, (name, body, sentence)
        assert desk.get("state").json()["version"] == before and len(desk.images()) == 3, (name, body)


def test_thumbnails_are_small_made_once_and_anew_when_the_image_changes(desk: Desk):
    desk.filled()
    kept = dataset_folder(desk) / ".studio" / "thumbs"
    assert not kept.exists()  # none is made before somebody looks
    answer = desk.get("thumb", id="red.png")
    assert answer.headers["content-type"] == "image/jpeg" and answer.headers["x-content-type-options"] == "nosniff"
    assert Image.open(io.BytesIO(answer.content)).size == (256, 160)
    made, = kept.rglob("*.jpg")
    made.write_bytes(b"what is kept is what is sent")
    assert desk.get("thumb", id="red.png").content == b"what is kept is what is sent"
    image, = dataset_folder(desk).glob("*/red.png")
    before = desk.images(filter={"all_of": ["red"]})[0]["stamp"]
    image.write_bytes(png("red", (64, 640)))
    assert Image.open(io.BytesIO(desk.get("thumb", id="red.png").content)).size == (26, 256)
    assert len(list(kept.rglob("*.jpg"))) == 1 and desk.images(filter={"all_of": ["red"]})[0]["stamp"] != before
    assert Image.open(io.BytesIO(desk.get("picture", id="red.png").content)).size == (64, 640)


def test_no_byte_of_a_file_reaches_the_browser_as_it_is(desk: Desk):
    desk.filled()
    image, = dataset_folder(desk).glob("*/red.png")
    script = b"<html><script>alert(1)</script>"
    image.write_bytes(png("red") + script)
    for name in ("thumb", "picture"):
        answer = desk.get(name, id="red.png")
        assert answer.status_code == 200 and script not in answer.content
        assert answer.headers["content-type"] == "image/jpeg" and "sandbox" in answer.headers["content-security-policy"]
    image.write_bytes(script)
    for name in ("thumb", "picture"):
        assert desk.get(name, id="red.png").status_code == 400
    assert desk.images(filter={"all_of": ["red"]})[0]["problems"] == ["broken"]


@pytest.mark.parametrize("name", ["../zzk", "..", "/etc/passwd", "dataset.json", "red.txt", "10_zzk girl/red.png", ""])
def test_only_the_datasets_own_images_are_shown(desk: Desk, name: str):
    desk.filled()
    for route in ("thumb", "picture"):
        assert desk.get(route, id=name).status_code == 400


def test_uploads_come_in_together_and_leave_nothing_behind(desk: Desk):
    desk.post("create", {"name": "sent", "concept": "sent"})
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w") as archive:
        archive.writestr("inner/green.png", png("green"))
    sent = [("red.png", png("red")), ("red.txt", b"a caption"), ("more.zip", held.getvalue()),
            ("../../b l\u00fce\u732b.png", png("blue"))]
    for count, (name, data) in enumerate(sent, start=1):
        assert desk.upload(name, data).json() == {"received": count}
    task = desk.done(desk.post("import-uploads", {"batch": "one"}))
    assert task["problems"] == [] and task["result"]["count"] == 3
    assert {p["name"]: p["caption"] for p in desk.images()}["red.png"] == "a caption"
    assert not list((dataset_folder(desk) / ".studio" / "uploads").iterdir())
    assert sorted(path.name for path in desk.folder.iterdir()) == ["datasets", "loras"]
    assert desk.post("import-uploads", {"batch": "one"}).status_code == 400


def test_only_the_page_sends_files_and_only_as_bytes(tmp_path: Path):
    desk = Desk(tmp_path, api_enabled=True)
    desk.post("create", {"name": "a", "concept": "a"})
    assert desk.upload("a.png", png("red"), headers={}).status_code == 403
    assert desk.upload("a.png", png("red"), headers={"X-Lora-Train": "guess"}).status_code == 403
    for kind in ("text/plain", "multipart/form-data; boundary=x", "application/json", "image/png"):
        assert desk.upload("a.png", png("red"), headers={**PAGE, "Content-Type": kind}).status_code == 415
    assert desk.upload("a.png", png("red"), headers={**PAGE, "Sec-Fetch-Site": "cross-site"}).status_code == 403
    assert not (dataset_folder(desk) / ".studio" / "uploads").exists()


def test_uploads_are_limited_in_count_and_size(desk: Desk, monkeypatch: pytest.MonkeyPatch):
    desk.post("create", {"name": "a", "concept": "a"})
    monkeypatch.setattr(uploads, "MAX_BYTES", 3 << 20)
    too_large = desk.upload("a.png", b"x" * (4 << 20))
    assert too_large.status_code == 400 and "too large" in too_large.json()["error"]
    # Also where the sender does not say how much there is.
    endless = desk.client.post(f"{api.PREFIX}/studio/upload", params={"name": "a.png", "batch": "one"},
                               content=(b"x" * (1 << 20) for _ in range(4)),
                               headers={**PAGE, "Content-Type": "application/octet-stream"})
    assert endless.status_code == 400 and "too large" in endless.json()["error"]
    monkeypatch.setattr(uploads, "MOST_FILES", 2)
    assert [desk.upload("a.png", png("red")).status_code for _ in range(3)] == [200, 200, 400]
    monkeypatch.setattr(uploads, "MOST_TOGETHER", 1000)
    assert desk.upload("b.png", png("red", (800, 800)), batch="two").status_code == 400
    assert len(list((dataset_folder(desk) / ".studio" / "uploads").iterdir())) == 2
    for batch in ("", "../x", "x" * 65, "a b"):
        assert desk.upload("a.png", png("red"), batch=batch).status_code == 400
    assert desk.upload("", png("red"), batch="three").status_code == 400


def test_captions_made_land_unsaved_as_one_step(desk: Desk):
    desk.filled()
    task = desk.done(desk.post("tag", {"source": "filename", "filter": {}, "options": {"trigger_word": "zzk"}}))
    assert task["result"] == {"changed": 3} and "not saved" in task["message"]
    assert [p["caption"] for p in desk.images()] == ["zzk, blue", "zzk, green", "zzk, red"]
    assert desk.get("state").json()["dataset"]["unsaved"] == 3
    desk.post("undo")
    assert desk.get("state").json()["dataset"]["unsaved"] == 0
    names = {option["name"] for option in desk.get("tag-options").json()["options"]}
    assert {"mode", "trigger_word", "general_threshold"} <= names


def test_nothing_outside_the_allowed_folders_is_read(desk: Desk):
    inside, outside = desk.folder / "inside", sources(desk.folder / "outside")
    inside.mkdir()
    desk.host.allowed = AllowedPaths((desk.host.datasets_folder, inside), (desk.host.lora_folder,), "ask its owner")
    desk.post("create", {"name": "a", "concept": "a"})
    refusals = [desk.post("import", {"paths": [str(path)]}).json()["error"].replace(str(path), "P")
                for path in (outside, outside / "red.png", desk.folder / "nothing", inside / ".." / "outside")]
    assert len(set(refusals)) == 1 and "cannot be used" in refusals[0]  # the same whether or not it exists
    (inside / "link.png").symlink_to(outside / "red.png")
    (inside / "good.png").write_bytes(png("green"))
    desk.done(desk.post("import", {"paths": [str(inside)]}))
    assert [p["name"] for p in desk.images()] == ["good.png"]
    (desk.host.datasets_folder / "leads-out").symlink_to(outside)
    (outside / "dataset.json").write_text("{}", encoding="utf-8")
    assert desk.post("open", {"name": "leads-out"}).status_code == 400


SHIPPED = Path(__file__).resolve().parents[2] / "lib_lora_train" / "demo"


@pytest.mark.parametrize("name", ["style", "subject"])
def test_sample_pictures_are_copied_with_their_captions_and_nothing_is_written_where_they_come_from(desk: Desk, name: str):
    """Also where others reach the page, and the extension's own folder is none of those it is allowed."""
    desk.host.allowed = AllowedPaths((desk.host.datasets_folder,), (desk.host.lora_folder,), "ask its owner")
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in (SHIPPED / name).iterdir()}
    desk.post("create", {"name": "zzk", "concept": "zorbi"})
    task = desk.done(desk.post("import-samples", {"name": name}))
    assert task["outcome"] == "done" and task["problems"] == []
    numbered, = dataset_folder(desk).glob("*_zorbi")
    assert {path.name: path.read_bytes() for path in numbered.glob("*.png")} == {
        path.name: content for path, (content, _) in before.items() if path.suffix == ".png"}
    assert {image["name"]: image["caption"] for image in desk.images()} == {
        path.name: path.with_suffix(".txt").read_text(encoding="utf-8").strip() for path in before if path.suffix == ".png"}
    desk.post("remove", {"ids": [image["id"] for image in desk.images()]})
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in (SHIPPED / name).iterdir()} == before


@pytest.mark.parametrize("name", ["", "model", "..", "../demo/style", str(SHIPPED / "style")])
def test_only_the_sample_sets_are_brought_in_as_such(desk: Desk, name: str):
    desk.post("create", {"name": "zzk", "concept": "zzk"})
    assert desk.post("import-samples", {"name": name}).status_code == 400
    assert desk.images() == []


class Held:
    """A stand-in for `collect` that works until the test lets it, or until it is stopped."""

    def __init__(self) -> None:
        self.began, self.go_on = threading.Event(), threading.Event()

    def __call__(self, dataset, sources, *, may_read, on_progress, should_stop):
        on_progress(1, 3)
        self.began.set()
        while not self.go_on.wait(0.01):
            if should_stop():
                raise Interrupted("stopped while pictures were imported")
        return Collected((), (("a.png", "it is broken."),))


@pytest.fixture
def held(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> Held:
    desk.filled()
    stand_in = Held()
    monkeypatch.setattr("lib_lora_train.studio.operations.collect", stand_in)
    assert desk.post("import", {"paths": [str(desk.folder / "sources")]}).status_code == 200
    assert stand_in.began.wait(60)
    return stand_in


def test_a_second_task_is_refused_and_what_images_must_hold_still_for(desk: Desk, held: Held):
    task = desk.get("state").json()["task"]
    assert (task["running"], task["done"], task["total"]) == (True, 1, 3)
    for name, body in (("import", {"paths": [str(desk.folder)]}), ("tag", {"source": "filename", "filter": {}}),
                       ("remove", {"ids": ["red.png"]}), ("close", {}), ("create", {"name": "b", "concept": "b"}), ("use", {})):
        refused = desk.post(name, body)
        assert refused.status_code == 409 and "busy" in refused.json()["error"], name
    # Captions can be edited and saved meanwhile: nothing is locked.
    assert desk.post("caption", {"id": "red.png", "text": "new"}).status_code == 200
    assert desk.post("save").json()["written"] == 1
    assert len(desk.images()) == 3 and desk.get("thumb", id="red.png").status_code == 200
    held.go_on.set()
    assert desk.studio.tasks.wait(60)
    task = desk.get("state").json()["task"]
    assert task["outcome"] == "done" and task["problems"] == [{"picture": "a.png", "text": "it is broken."}]


def test_a_task_is_stopped(desk: Desk, held: Held):
    assert desk.post("stop-task").json() == {"stopping": True}
    assert desk.studio.tasks.wait(60)
    task = desk.get("state").json()["task"]
    assert task["outcome"] == "stopped" and not task["running"]
    assert desk.post("stop-task").json() == {"stopping": False}
    assert desk.post("remove", {"ids": ["red.png"]}).status_code == 200


def test_an_undo_that_would_move_images_waits_for_the_work(desk: Desk, monkeypatch: pytest.MonkeyPatch):
    desk.filled()
    desk.post("remove", {"ids": ["red.png"]})
    stand_in = Held()
    monkeypatch.setattr("lib_lora_train.studio.operations.collect", stand_in)
    desk.post("import", {"paths": [str(desk.folder / "sources")]})
    assert stand_in.began.wait(60)
    assert desk.post("undo").status_code == 409 and len(desk.images()) == 2
    desk.post("stop-task")
    assert desk.studio.tasks.wait(60)
    assert desk.post("undo").status_code == 200 and len(desk.images()) == 3


def test_while_a_training_reads_the_dataset_nothing_is_written_to_it(desk: Desk, job: FakeJob):
    desk.filled()
    train_on(desk, dataset_folder(desk))
    desk.post("caption", {"id": "red.png", "text": "new"})
    for name, body in (("save", {}), ("import", {"paths": [str(desk.folder / "sources")]}), ("remove", {"ids": ["red.png"]}),
                       ("use", {}), ("shape", {"shape": {}, "filter": {}}), ("unshape", {"ids": ["red.png"]}),
                       ("flip", {"id": "red.png"}), ("split", {"id": "red.png", "tile": 128}),
                       ("crop", {"id": "red.png", "box": [0, 0, 99, 99]}), ("check-captions", {"filter": {}}),
                       ("class-pictures", {"prompts": ["a girl"]})):
        refused = desk.post(name, body)
        assert refused.status_code == 409 and "training is running" in refused.json()["error"], name
    assert desk.get("state").json()["training"] is True
    # What only looks may go on.
    assert desk.done(desk.post("check"))["outcome"] == "done"
    assert desk.post("shape-preview", {"id": "red.png", "shape": {}}).status_code == 200
    desk.runner.stop(save=False)
    assert desk.runner.wait(60)
    assert desk.post("save").json()["written"] == 1


def test_a_training_on_images_that_are_being_imported_is_refused_and_starts_afterwards(desk: Desk, held: Held, job: FakeJob):
    refused = asked_to_train(desk, dataset_folder(desk))
    assert refused.status_code == 409 and "studio is busy (Importing" in refused.json()["error"]
    assert not desk.runner.running()
    train_on(desk, desk.folder / "sources")  # other images, and an import leaves the model alone
    desk.runner.stop(save=False)
    held.go_on.set()
    assert desk.studio.tasks.wait(60) and desk.runner.wait(60)
    train_on(desk, dataset_folder(desk))
    desk.runner.stop(save=False)
    assert desk.runner.wait(60)


def test_no_training_starts_while_the_studio_has_the_model(desk: Desk, job: FakeJob):
    desk.filled()
    began, go_on = threading.Event(), threading.Event()

    def work(task: Task) -> str:
        began.set()
        assert go_on.wait(60)
        return "done."
    desk.studio.tasks.start("Checking captions", work, with_model=True)
    assert began.wait(60)
    refused = asked_to_train(desk, desk.folder / "sources")
    assert refused.status_code == 409 and "Checking captions" in refused.json()["error"]
    with pytest.raises(HostError), desk.runner.other_model():
        pass
    go_on.set()
    assert desk.studio.tasks.wait(60)
    train_on(desk, desk.folder / "sources")
    desk.runner.stop(save=False)
    assert desk.runner.wait(60)


def test_a_training_on_other_images_is_in_nobodys_way(desk: Desk, job: FakeJob):
    desk.filled()
    train_on(desk, desk.folder / "sources")
    assert desk.post("remove", {"ids": ["red.png"]}).status_code == 200
    assert desk.post("save").status_code == 200


def test_use_saves_and_gives_what_a_training_needs(desk: Desk, job: FakeJob):
    desk.filled()
    desk.post("caption", {"id": "red.png", "text": "new"})
    settings = desk.post("use").json()
    # 3 images shown 500 times each over 10 epochs: 1500 in all.
    assert settings == {"train_data_dir": str(dataset_folder(desk)), "trigger_word": "zzk girl", "num_repeats": 0,
                        "max_train_epochs": 10, "repeats": 50}
    assert (dataset_folder(desk) / "50_zzk girl" / "red.txt").read_text(encoding="utf-8") == "new"
    plan = desk.client.post(f"{api.PREFIX}/plan", headers=PAGE, json={"settings": {
        **{k: v for k, v in settings.items() if k != "repeats"}, "output_name": "x"}}).json()
    assert (plan["pictures"], plan["steps"]) == (3, 1500) and "num_repeats" not in " ".join(plan["warnings"])
    # The captions can be undone over the new name of their folder.
    assert desk.post("undo").json()["label"] and desk.images(filter={"all_of": ["red"]})
    assert desk.post("save").json() == {"written": 1, "conflicts": []}


def test_a_page_that_is_built_anew_finds_the_same_studio(desk: Desk):
    desk.filled()
    desk.post("caption", {"id": "red.png", "text": "not saved"})
    app = FastAPI()
    api.install(app, runner=desk.runner, host=desk.host, token="another", api_enabled=False, credentials={})
    state = TestClient(app).get(f"{api.PREFIX}/studio/state", headers={"X-Lora-Train": "another"}).json()
    assert state["dataset"]["name"] == "zzk" and state["dataset"]["unsaved"] == 1


def test_repeats_follow_the_number_of_images_unless_somebody_chose_them(desk: Desk):
    desk.filled()
    # 1500 images shown in all, over 10 epochs: 3 images 50 times, 4 images 38 times.
    assert desk.get("state").json()["dataset"]["repeats"] == 50
    more = desk.folder / "more"
    more.mkdir()
    (more / "grey.png").write_bytes(png("grey"))
    desk.done(desk.post("import", {"paths": [str(more)]}))
    assert desk.get("state").json()["dataset"]["repeats"] == 38
    desk.post("close")
    folder, = (desk.host.datasets_folder / "zzk").glob("38_*")
    folder.rename(folder.with_name("7_zzk girl"))
    desk.post("open", {"name": "zzk"})
    (more / "white.png").write_bytes(png("white"))
    desk.done(desk.post("import", {"paths": [str(more)]}))
    assert desk.get("state").json()["dataset"]["repeats"] == 7 and len(desk.images()) == 5


def test_an_image_is_shown_while_its_folder_gets_another_name(desk: Desk, monkeypatch: pytest.MonkeyPatch):
    desk.filled()
    full_size, once = thumbs.full_size, []

    def renamed_meanwhile(path: Path) -> bytes:
        if not once:
            once.append(desk.post("use"))
        return full_size(path)
    dataset = desk.get("state").json()["dataset"]
    folder, = (desk.host.datasets_folder / "zzk").glob("50_*")
    folder.rename(folder.with_name("7_zzk girl"))
    desk.post("close"), desk.post("open", {"name": "zzk"})
    monkeypatch.setattr(thumbs, "full_size", renamed_meanwhile)
    assert desk.get("picture", id="red.png").status_code == 200 and once[0].status_code == 200
    assert dataset["repeats"] == desk.get("state").json()["dataset"]["repeats"] == 50


def test_tokens_are_counted_as_the_webui_cuts_them(desk: Desk):
    # CLIP: "a photo" is two tokens; 80 words of one token each need a second chunk of 75.
    assert desk.post("tokens", {"text": "a photo"}).json() == {"tokens": 2, "chunks": 1}
    assert desk.post("tokens", {"text": "a " * 80}).json() == {"tokens": 80, "chunks": 2}
    assert desk.post("tokens", {"text": ""}).json() == {"tokens": 0, "chunks": 1}


def test_tokens_are_counted_with_the_hosts_own_vocabulary(desk: Desk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    # One that has letters only, where CLIP's has the word.
    letters = ["z", "e", "b", "r", "a</w>", "<|startoftext|>", "<|endoftext|>"]
    (tmp_path / "vocab.json").write_text(json.dumps({letter: number for number, letter in enumerate(letters)}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    monkeypatch.setattr(desk.host, "tokenizer_folder", lambda: tmp_path)
    assert desk.post("tokens", {"text": "zebra"}).json() == {"tokens": 5, "chunks": 1}


def test_a_report_says_what_is_wrong_and_knows_when_it_is_old(desk: Desk):
    desk.filled()
    assert desk.get("crops").status_code == 400
    desk.post("caption", {"id": "red.png", "text": ""})
    task = desk.done(desk.post("check"))
    report = desk.get("state").json()["dataset"]["report"]
    assert task["outcome"] == "done" and task["message"] == report["summary"] and report["fresh"]
    # 320×200 is too small for 512; captions count as they are edited, saved or not.
    assert report["counts"]["small"] == 3 and report["counts"]["empty_caption"] == 1
    assert report["to_look_at"] == 3
    assert report["proposal"] == {"pictures": 3, "repeats": 50, "epochs": 10, "steps": 1500, "batch": 1} and report["advice"]
    assert [p["name"] for p in desk.images(filter={"problem": "empty_caption"})] == ["red.png"]
    assert Image.open(io.BytesIO(desk.get("crops").content)).format == "JPEG"
    desk.post("caption", {"id": "red.png", "text": "red again"})
    report = desk.get("state").json()["dataset"]["report"]
    assert not report["fresh"] and "empty_caption" not in report["counts"]
    assert desk.post("use").json()["repeats"] == 50
    for side, small in (("192", 0), ("512", 3)):  # at another size, of the same pictures
        desk.done(desk.post("check", {"settings": {"resolution": side}}))
        assert desk.get("state").json()["dataset"]["report"]["counts"].get("small", 0) == small


def test_findings_are_looked_at_anew_in_the_background_and_in_nobodys_way(desk: Desk):
    desk.filled()
    task = desk.done(desk.post("check"))
    desk.post("caption", {"id": "red.png", "text": ""})
    assert not desk.get("state").json()["dataset"]["report"]["fresh"]
    assert desk.post("check", {"background": True, "settings": {"resolution": "192"}}).status_code == 200
    assert desk.studio.second_look.wait(60)
    state = desk.get("state").json()
    report = state["dataset"]["report"]
    assert report["fresh"] and "192×192" in report["summary"] and any("red.png" in text for text in report["advice"])
    assert state["task"] == task  # it is none


def test_a_look_in_the_background_ends_for_who_changes_pictures(desk: Desk, monkeypatch: pytest.MonkeyPatch):
    desk.filled()
    began = threading.Event()

    def examine(folder, *, should_stop, **_):
        began.set()
        while not should_stop():
            pass
        raise Interrupted("stopped while the pictures were examined")
    monkeypatch.setattr("lib_lora_train.studio.operations.examine", examine)
    assert desk.post("check", {"background": True}).status_code == 200
    assert began.wait(60)
    assert desk.post("check", {"background": True}).status_code == 409
    assert desk.post("remove", {"ids": ["red.png"]}).status_code == 200
    assert not desk.studio.reading.locked() and desk.studio.second_look.wait(60)


def test_a_look_in_the_background_does_not_begin_beside_a_task(desk: Desk, held: Held):
    assert desk.post("check", {"background": True}).status_code == 409


def test_a_shape_is_seen_before_it_is_written_and_taken_off_again(desk: Desk):
    desk.filled()
    before = {path.name: path.read_bytes() for path in dataset_folder(desk).glob("*/*.png")}
    shape = {"mode": "square", "side": 128, "focus": "centre"}
    seen = desk.post("shape-preview", {"id": "red.png", "shape": shape})
    assert Image.open(io.BytesIO(seen.content)).size == (128, 128) and seen.headers["cache-control"] == "no-store"
    assert {path.name: path.read_bytes() for path in dataset_folder(desk).glob("*/*.png")} == before
    task = desk.done(desk.post("shape", {"ids": ["red.png", "green.png"], "shape": shape}))
    assert task["result"] == {"count": 2} and task["outcome"] == "done"
    assert [(p["name"], p["width"], p["shaped"]) for p in desk.images()] == [
        ("blue.png", 320, False), ("green.png", 128, True), ("red.png", 128, True)]
    assert desk.get("state").json()["dataset"]["shaped"] == 2
    assert Image.open(io.BytesIO(desk.get("picture", id="red.png").content)).size == (128, 128)
    assert desk.post("unshape", {"ids": ["red.png", "green.png"]}).json() == {"done": 2, "skipped": []}
    assert {path.name: path.read_bytes() for path in dataset_folder(desk).glob("*/*.png")} == before
    assert desk.get("state").json()["dataset"]["shaped"] == 0


def test_one_image_is_cut_mirrored_and_split(desk: Desk):
    desk.filled()
    image, = dataset_folder(desk).glob("*/red.png")
    left_half = Image.new("RGB", (320, 200), "red")
    left_half.paste((0, 0, 255), (0, 0, 160, 200))
    left_half.save(image)
    assert desk.post("crop", {"id": "red.png", "box": [0, 0, 200, 200]}).status_code == 200
    assert Image.open(image).size == (200, 200)
    assert desk.post("flip", {"id": "red.png"}).json() == {"id": "red.png"}
    with Image.open(image) as file:
        mirrored = file.convert("RGB")
    assert mirrored.getpixel((199, 0)) == (0, 0, 255) and mirrored.getpixel((0, 0)) == (255, 0, 0)
    copied = desk.post("flip", {"id": "green.png", "copy": True}).json()["id"]
    assert copied != "green.png" and desk.get("thumb", id=copied).status_code == 200
    desk.post("caption", {"id": "blue.png", "text": "edited, not saved"})
    tiles = desk.post("split", {"id": "blue.png", "tile": 200}).json()["ids"]
    shown = {p["name"]: p for p in desk.images()}
    assert set(shown) == {"red.png", "green.png", copied, *tiles} and len(tiles) == 2
    assert all((shown[tile]["width"], shown[tile]["height"], shown[tile]["caption"]) == (200, 200, "edited, not saved")
               for tile in tiles)
    desk.post("undo")
    assert "blue.png" in {p["name"] for p in desk.images()}


@pytest.fixture
def model_desk(desk: Desk, host) -> Desk:
    """A desk whose host lends a small model and paints."""
    desk.filled()
    for name in ("checkpoint", "lease", "interrupted", "report", "outline"):
        setattr(desk.host, name, getattr(host, name))
    return desk


SMALL = {"resolution": "64", "min_bucket_reso": 64, "max_bucket_reso": 64}


def test_captions_are_checked_with_the_loaded_model(model_desk: Desk):
    asked = {"filter": {}, "seeds": 1, "steps": 1, "worst": 2, "settings": SMALL}
    task = model_desk.done(model_desk.post("check-captions", asked))
    assert task["outcome"] == "done" and task["result"]["checked"] == 3, task
    shown = model_desk.images(sort="score")
    scores = [p["score"] for p in shown]
    assert scores == sorted(scores) and all(0 <= score <= 100 for score in scores)
    assert [p["painted"] for p in shown] == [1, 1, 0]  # the worst are painted
    assert all(0 <= p["likeness"] <= 100 for p in shown[:2]) and shown[2]["likeness"] is None
    answer = model_desk.get("checked", id=shown[0]["id"], n="0")
    assert answer.status_code == 200 and Image.open(io.BytesIO(answer.content)).size == (64, 64)
    for query in ({"id": shown[2]["id"], "n": "0"}, {"id": shown[0]["id"], "n": "-1"}, {"id": "no.png", "n": "0"},
                  {"id": shown[0]["id"], "n": "../0"}):
        assert model_desk.get("checked", **query).status_code == 400
    # A score is of the caption that was judged.
    model_desk.post("caption", {"id": shown[0]["id"], "text": "something else"})
    assert [p["score"] for p in model_desk.images(filter={"text": "something else"})] == [None]
    model_desk.post("undo")
    assert [p["score"] for p in model_desk.images(sort="score")] == scores


def test_preservation_images_are_painted_beside_the_dataset(model_desk: Desk):
    asked = {"prompts": ["a girl"], "count": 2, "size": 64, "steps": 1}
    task = model_desk.done(model_desk.post("class-pictures", asked))
    folder = Path(task["result"]["reg_data_dir"])
    assert folder.parent == model_desk.host.datasets_folder and task["result"]["made"] == 2
    assert len(list((folder / "1_class").glob("*.png"))) == len(list((folder / "1_class").glob("*.txt"))) == 2
    assert model_desk.done(model_desk.post("class-pictures", asked))["result"]["found"] == 2
    # It is no dataset of its own.
    assert [d["name"] for d in model_desk.get("state").json()["datasets"]] == ["zzk"]


def test_without_a_model_nothing_is_painted(desk: Desk):
    desk.filled()
    desk.host.checkpoint = lambda: None
    for name, body in (("check-captions", {"filter": {}}), ("class-pictures", {"prompts": ["a girl"]})):
        refused = desk.post(name, body)
        assert refused.status_code == 409 and "No model" in refused.json()["error"]


def test_a_mask_is_kept_beside_its_image(desk: Desk):
    desk.filled()
    half = Image.new("L", (320, 200), 0)
    half.paste(255, (0, 0, 160, 200))
    held = io.BytesIO()
    half.save(held, "PNG")

    def send(name: str, data: bytes):
        return desk.client.post(f"{api.PREFIX}/studio/put-mask", params={"id": name}, content=data,
                                headers={**PAGE, "Content-Type": "application/octet-stream"})
    assert desk.get("mask", id="red.png").status_code == 400
    assert send("red.png", held.getvalue()).status_code == 200
    assert [p["masked"] for p in desk.images()] == [False, False, True]
    kept = Image.open(dataset_folder(desk) / "masks" / "red.png")
    assert (kept.mode, kept.getpixel((0, 0)), kept.getpixel((319, 0))) == ("L", 255, 0)
    assert Image.open(io.BytesIO(desk.get("mask", id="red.png").content)).size == (320, 200)
    for name, data in (("no.png", held.getvalue()), ("red.png", png("red", (10, 10))), ("red.png", b"no picture"),
                       ("../red.png", held.getvalue())):
        assert send(name, data).status_code == 400
    assert not list((dataset_folder(desk) / ".studio" / "uploads").iterdir())
    assert desk.post("remove-mask", {"id": "red.png"}).status_code == 200
    assert not any(p["masked"] for p in desk.images())


def test_pictures_are_held_out_by_draw_and_by_wish_and_the_training_does_the_same(desk: Desk):
    (desk.folder / "more").mkdir()
    for index in range(13):
        (desk.folder / "more" / f"{index}.png").write_bytes(png(f"#{index:02}{index:02}ff", (64, 64)))
    desk.filled()
    assert desk.get("state").json()["dataset"]["held_out"]["pictures"] == 0
    assert desk.post("hold-out", {"ids": ["red.png"], "held_out": True}).status_code == 400, "three are too few"
    desk.done(desk.post("import", {"paths": [str(desk.folder / "more")]}))

    def held() -> set[str]:
        found = {image["id"] for image in desk.images() if image["held_out"]}
        folder = dataset_folder(desk)
        plan = plan_dataset(parse({"train_data_dir": str(folder)}), family="")
        assert found == {image.example.path.name for image in plan.held_out}
        assert len(found) == desk.get("state").json()["dataset"]["held_out"]["pictures"]
        return found

    drawn, version = held(), desk.get("state").json()["version"]
    first, other = min(drawn), min({image["id"] for image in desk.images()} - drawn)
    assert len(drawn) == 2
    assert desk.post("hold-out", {"ids": [other], "held_out": True}).json() == {"held_out": 3}
    assert desk.post("hold-out", {"ids": [first], "held_out": False}).json() == {"held_out": 2}
    assert held() == drawn - {first} | {other} and desk.get("state").json()["version"] > version
    # At least 100 visits each of the 14 that are trained, 1500 in all.
    assert desk.post("use").json()["repeats"] == 11 and held() == drawn - {first} | {other}, "the folder has another name now"
    refused = desk.post("hold-out", {"filter": {}, "held_out": True})
    assert refused.status_code == 400 and "10" in refused.json()["error"] and held() == drawn - {first} | {other}
    (dataset_folder(desk) / "held_out.json").write_bytes(b"{")
    assert desk.post("hold-out", {"ids": [first, other], "held_out": None}).json() == {"held_out": 2} and held() == drawn
    assert not (dataset_folder(desk) / "held_out.json").exists()
    assert desk.post("hold-out", {"ids": ["none.png"], "held_out": True}).status_code == 400
    desk.done(desk.post("check", {"settings": {"validation_split": 0}}))
    assert not [image for image in desk.images() if image["held_out"]]
    assert desk.post("hold-out", {"ids": [first], "held_out": True}).status_code == 400
