"""The routes for files of settings and presets."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lib_lora_train import api
from lib_lora_train.settings import flat, parse
from lib_lora_train.settings.importing import import_bytes
from lib_lora_train.settings.presets import presets
from tests.api.test_api import PAGE, Desk
from tests.fake_host import FakeJob, interrupted_run

FILE = {**PAGE, "Content-Type": "application/octet-stream"}


@pytest.fixture
def desk(tmp_path: Path, job: FakeJob) -> Desk:
    return Desk(tmp_path, job)


def read(desk: Desk, data: bytes, name: str, headers: dict[str, str] = FILE):
    return desk.client.post(f"{api.PREFIX}/settings/read", params={"name": name}, content=data, headers=headers)


def test_a_file_is_read_and_each_of_its_names_told(desk: Desk):
    told = read(desk, json.dumps({"LoRA_type": "Standard", "epoch": 3, "nonsense": "<b>"}).encode(), "k.json").json()
    assert (told["program"], told["foreign"], told["values"]["max_train_epochs"]) == ("kohya_ss", True, 3)
    kinds = {entry["name"]: entry["kind"] for entry in told["entries"]}
    assert kinds.keys() == {"LoRA_type", "epoch", "nonsense"} and (kinds["epoch"], kinds["nonsense"]) == ("changed", "refused")
    assert read(desk, b"lerning_rate = 1", "a.toml").status_code == 400
    assert read(desk, b"\x00", "a.safetensors").status_code == 400
    assert read(desk, b"seed = 1", "a.toml", {"Content-Type": "application/octet-stream"}).status_code == 403
    assert read(desk, b"seed = 1", "a.toml", PAGE).status_code == 415


def test_settings_go_out_as_a_file_that_is_read_back(desk: Desk):
    given = {"network_dim": 5, "training_comment": 'a "b" é', "max_train_steps": None}
    sent = desk.post("settings/file", {"settings": given}, PAGE)
    assert dict(import_bytes(sent.content, name="a.toml").values) == flat(parse(given))
    assert "attachment" in sent.headers["content-disposition"]
    run = interrupted_run(desk.host, parse({"output_name": "zzk", "network_dim": 7}), step=3)
    sent = desk.get(f"settings/file?run={run}", PAGE)
    assert import_bytes(sent.content, name="a.toml").values["network_dim"] == 7
    for wrong in ("../x", "nobody", ""):
        assert desk.get(f"settings/file?run={wrong}", PAGE).status_code == 400
    assert desk.post("settings/file", {"settings": {"network_dim": 0}}, PAGE).status_code == 400


def test_presets_are_listed_saved_renamed_shared_and_deleted(desk: Desk):
    assert desk.post("presets/save", {"name": "Mine é", "settings": {"network_dim": 5}}, PAGE).json() == {
        "name": "Mine é", "version": 1}
    listed = desk.get("presets", PAGE).json()["presets"]
    assert [(preset["name"], preset["own"]) for preset in listed] == [*((p.name, False) for p in presets()), ("Mine é", True)]
    assert desk.post("presets/rename", {"name": "Mine é", "to": "Ours"}, PAGE).json()["name"] == "Ours"
    assert b"network_dim = 5" in desk.get("presets/file?name=Ours", PAGE).content
    assert b"network_dim" in desk.get("presets/file?name=Style", PAGE).content
    assert desk.post("presets/delete", {"name": "Ours"}, PAGE).json()["name"] == "Ours"
    for name, body in (("presets/delete", {"name": "Ours"}), ("presets/delete", {"name": "Style"}),
                       ("presets/save", {"name": "../x"}), ("presets/save", {"name": 3}),
                       ("presets/save", {"name": "x", "settings": {"zzz": 1}}),
                       ("presets/rename", {"name": "Style", "to": "x"})):
        assert desk.post(name, body, PAGE).status_code == 400, (name, body)
    assert desk.get("presets/file?name=../../x", PAGE).status_code == 400
    for name in ("presets/save", "presets/delete", "settings/file"):
        assert desk.post(name, {"name": "x"}).status_code == 403  # neither the page nor a program that may
    assert [path.name for path in desk.folder.iterdir() if path.name not in ("loras", "presets", "runs")] == []
