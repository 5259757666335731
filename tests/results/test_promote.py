"""A save becomes the LoRA, and nothing that was there is lost: no weights, no words of the user's, no image."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch
from PIL import Image

from lib_lora_train import events
from lib_lora_train.adapters import file
from lib_lora_train.adapters.file import read_metadata
from lib_lora_train.api import service
from lib_lora_train.errors import HostError, LoraFileError, LoraTrainError, OutputError, SettingError
from lib_lora_train.host.standalone import StandaloneHost
from lib_lora_train.results.grid import Cell, Column, Grid, Prompt, SampleOptions
from lib_lora_train.results.overview import overview
from lib_lora_train.results.promote import delete, dress, promote
from lib_lora_train.results.saves import saves_of
from lib_lora_train.run.runner import Runner
from lib_lora_train.settings.allowed_paths import AllowedPaths
from tests.results.written_run import Run

KEY = "lora_unet_a.lora_down.weight"


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Saves after the steps 40, 80 and 100, whose weights are 40, 80 and 100, and samples of all but the last."""
    run = Run(tmp_path)
    for at in (40, 80):
        run.save(f"zzk-step{at:08d}", at, value=at)
        run.sample(at)
    run.save("zzk", 100, final=True, value=100)
    run.record.close()
    return run


def taken(run: Run, save: str = "zzk-step00000040", weight: float = 0.8) -> dict:
    return promote(run.folder, save, weight=weight, host=run.host)


def value(path: Path) -> float:
    return float(safetensors.torch.load_file(path)[KEY][0, 0])


def files(run: Run) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in run.host.lora_folder.iterdir()}


def card_of(lora: Path) -> dict:
    return json.loads(lora.with_suffix(".json").read_text(encoding="utf-8"))


def card(run: Run, name: str = "zzk") -> dict:
    return card_of(run.host.lora_folder / f"{name}.safetensors")


def test_the_save_that_is_taken_has_the_loras_name_and_the_former_one_that_of_its_step(run: Run) -> None:
    result = taken(run)
    loras = run.host.lora_folder
    assert {path.stem: value(path) for path in loras.glob("*.safetensors")} == {
        "zzk": 40, "zzk-step00000040": 40, "zzk-step00000080": 80, "zzk-step00000100": 100}
    # The WebUI lists a LoRA under this name.
    assert {read_metadata(path)["ss_output_name"] == path.stem for path in loras.glob("*.safetensors")} == {True}
    assert (Path(result["path"]), Path(result["kept"])) == (loras / "zzk.safetensors", loras / "zzk-step00000100.safetensors")
    assert (result["lora_text"], result["prompt"]) == ("<lora:zzk:0.8>", "prompt 0 <lora:zzk:0.8>")
    assert (result["width"], result["height"]) == (64, 64)


def test_ids_stay_and_any_save_can_be_taken_next(run: Run) -> None:
    before = {path.name: value(path) for path in run.host.lora_folder.iterdir()}
    for save, expected in (("zzk-step00000040", 40), ("zzk-step00000080", 80), ("zzk", 100), ("zzk", 100)):
        taken(run, save)
        assert value(run.host.lora_folder / "zzk.safetensors") == expected
        saves = {one.id: one for one in saves_of(run.folder)}
        assert {name: (one.exists, value(one.path)) for name, one in saves.items()} == {
            "zzk-step00000040": (True, 40), "zzk-step00000080": (True, 80), "zzk": (True, 100)}
        assert [name for name, one in saves.items() if one.is_result] == [save]
    after = {path.name: value(path) for path in run.host.lora_folder.glob("*.safetensors")}
    assert after == {**before, "zzk-step00000100.safetensors": 100}


def test_what_the_file_says_of_itself_is_right_under_its_new_name(run: Run) -> None:
    path = Path(taken(run)["path"])
    metadata, source = read_metadata(path), read_metadata(run.host.lora_folder / "zzk-step00000040.safetensors")
    assert metadata["modelspec.sai_model_spec"] == "1.0.1" and metadata["modelspec.title"] == "zzk"
    assert metadata["modelspec.trigger_phrase"] == "zzk girl"
    data = path.read_bytes()
    body = data[8 + int.from_bytes(data[:8], "little"):]
    assert metadata["modelspec.hash_sha256"] == "0x" + metadata["sshs_model_hash"] == "0x" + hashlib.sha256(body).hexdigest()
    alone = safetensors.torch.save(safetensors.torch.load_file(path), {
        key: text for key, text in metadata.items() if key.startswith("ss_")})
    assert metadata["sshs_legacy_hash"] == hashlib.sha256(alone[0x100000:0x110000]).hexdigest()[:8]
    assert all(metadata[key] == source[key] for key in source if key.startswith("ss_") and key != "ss_output_name")
    kind, _, encoded = metadata["modelspec.thumbnail"].partition(",")
    assert kind == "data:image/jpeg;base64" and len(encoded) < 20_000


def test_the_card_has_the_webuis_entries(run: Run) -> None:
    taken(run)
    written = card(run)
    assert {"description", "sd version", "activation text", "preferred weight", "negative text", "notes"} <= set(written)
    assert (written["sd version"], written["activation text"], written["preferred weight"]) == ("SD1", "zzk girl", 0.8)
    assert float(written["preferred weight"]) == 0.8 and "zzk-step00000040" in written["notes"]


def test_what_the_user_wrote_on_the_card_stays_and_what_we_wrote_follows(run: Run) -> None:
    mine = {"description": "my own words", "sd version": "Unknown", "negative text": "", "notes": "", "preferred weight": 0,
            "activation text": "zzk, é\u4e2d", "favourite": [1, {"a": None}]}
    path = run.host.lora_folder / "zzk.json"
    path.write_text(json.dumps(mine), encoding="utf-8")
    taken(run)
    first = card(run)
    assert {name: first[name] for name in ("description", "activation text", "favourite")} == {
        name: mine[name] for name in ("description", "activation text", "favourite")}
    assert (first["sd version"], first["preferred weight"]) == ("SD1", 0.8)
    # As the WebUI's editor does: all is read, some of it changed, all is written.
    path.write_text(json.dumps({**first, "preferred weight": 1.1}), encoding="utf-8")
    taken(run, "zzk-step00000080", 0.6)
    second = card(run)
    assert second["preferred weight"] == 1.1 and "zzk-step00000080" in second["notes"]
    assert {name: second[name] for name in ("description", "activation text", "favourite")} == {
        name: mine[name] for name in ("description", "activation text", "favourite")}


@pytest.mark.parametrize("damaged", [b"{\"notes\": \"all I know", b"[1]", b"\xff\xfe", b"[" * 100_000, b""])
def test_a_damaged_card_is_told_and_nothing_is_written(run: Run, damaged: bytes) -> None:
    (run.host.lora_folder / "zzk.json").write_bytes(damaged)
    before = files(run)
    with pytest.raises(OutputError):
        taken(run)
    assert files(run) == before


def test_the_preview_is_that_of_the_save_and_goes_with_it(run: Run) -> None:
    preview = Path(taken(run)["preview"])
    assert preview == run.host.lora_folder / "zzk.preview.png"
    assert Image.open(preview).getpixel((0, 0)) == (40, 0, 0)
    taken(run, "zzk-step00000080")
    assert Image.open(preview).getpixel((0, 0)) == (80, 0, 0)
    assert taken(run, "zzk")["preview"] == "" and not preview.exists()  # which has no sample: another's would not be true


def test_without_a_sample_the_preview_is_the_grids_at_the_nearest_weight(run: Run) -> None:
    columns = (Column(), *(Column("zzk", weight, part) for weight, part in ((0.8, "unet"), (0.5, ""), (0.7, ""), (1.0, ""))))
    prompts = Prompt("a cat", triggered=False), Prompt("zzk girl", triggered=True)
    grid = Grid(columns, prompts, (1,), SampleOptions(size=(8, 8)),
                tuple(Cell(column, prompt, 1, f"grid/{column}{prompt}.png") for column in range(5) for prompt in range(2)))
    (run.folder / "grid").mkdir()
    (run.folder / "grid" / "cells.json").write_text(json.dumps(dataclasses.asdict(grid)), encoding="utf-8")
    for cell in grid.cells:
        Image.new("RGB", (8, 8), (cell.column, cell.prompt, 0)).save(run.folder / cell.file)
    result = taken(run, "zzk", 0.75)
    assert Image.open(result["preview"]).getpixel((0, 0)) == (3, 1, 0)
    assert result["prompt"] == "zzk girl <lora:zzk:0.75>"
    found = overview(run.folder)
    assert found["saves"][-1]["preview"] == "grid/41.png"
    assert (found["grid"]["progress"], found["grid"]["scores"]) == ({"done": 10, "total": 10}, [])


@pytest.mark.parametrize("name", ["zzk.png", "zzk.preview.png", "zzk.preview.jpeg"])
def test_an_image_that_the_user_chose_stays(run: Run, name: str) -> None:
    chosen = run.host.lora_folder / name
    taken(run)  # ours is there already, and the user replaces it or sets another beside it
    Image.new("RGB", (8, 8), "blue").save(chosen)
    before = chosen.read_bytes()
    taken(run, "zzk-step00000080")
    assert chosen.read_bytes() == before


@pytest.mark.parametrize("fault", [lambda: OSError(28, "No space left on device"), KeyboardInterrupt])
def test_a_take_that_is_cut_off_anywhere_loses_no_weights(run: Run, monkeypatch: pytest.MonkeyPatch, fault) -> None:
    replace, calls = os.replace, 0
    for cut_at in range(1, 20):
        left = cut_at

        def cut_off(source: Path, target: Path) -> None:
            nonlocal left
            left -= 1
            if not left:
                raise fault()
            replace(source, target)

        save = ("zzk-step00000040", "zzk-step00000080", "zzk")[cut_at % 3]
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", cut_off)
            try:
                taken(run, save)
            except (OutputError, KeyboardInterrupt):
                calls += 1
            else:
                if left > 0:
                    break
        there = {value(path) for path in run.host.lora_folder.glob("*.safetensors")}
        assert there == {40, 80, 100} and not list(run.host.lora_folder.glob(".*"))
        assert {one.id: value(one.path) for one in saves_of(run.folder)} == {
            "zzk-step00000040": 40, "zzk-step00000080": 80, "zzk": 100}
    assert calls >= 3


@pytest.mark.parametrize(("save", "weight", "error"), [
    ("nothing", 1, LoraFileError), ("../zzk", 1, LoraFileError), ("zzk.safetensors", 1, LoraFileError), ("", 1, LoraFileError),
    ("/etc/passwd", 1, LoraFileError), ("zzk\0", 1, LoraFileError), ("zzk-average", 1, LoraFileError),
    ("zzk", 0, SettingError), ("zzk", float("nan"), SettingError), ("zzk", 2.1, SettingError), ("zzk", -1, SettingError)])
def test_what_is_no_save_or_no_weight_is_refused(run: Run, save: str, weight: float, error: type[LoraTrainError]) -> None:
    before = files(run)
    with pytest.raises(error):
        taken(run, save, weight)
    assert files(run) == before


def other_lora(path: Path, later: float = 3600) -> None:
    file.save(path, {KEY: torch.ones(4, 2)}, {"ss_steps": "100", "ss_training_finished_at": str(time.time() + later)},
              dtype=torch.float16)


def lora_of_a_short_run_afterwards(path: Path) -> None:
    other_lora(path, later=3)


@pytest.mark.parametrize(("replaced", "how"), [
    ("zzk", other_lora), ("zzk", lora_of_a_short_run_afterwards), ("zzk", lambda path: path.write_bytes(b"something else")),
    ("zzk-step00000100", other_lora),
    ("zzk-step00000040", other_lora), ("zzk-step00000040", lambda path: path.write_bytes(b"damaged")),
    ("zzk-step00000040", Path.unlink)])
def test_no_other_lora_is_replaced_or_taken(run: Run, replaced: str, how) -> None:
    how(run.host.lora_folder / f"{replaced}.safetensors")
    before = files(run)
    with pytest.raises((LoraFileError, OutputError)):
        taken(run)
    assert files(run) == before


def test_while_a_training_of_that_name_is_under_way_nothing_is_taken(run: Run, tmp_path: Path) -> None:
    other, before = Run(tmp_path, run.host, run="zzk-20261122-120000"), files(run)
    with pytest.raises(HostError):
        taken(run)
    assert files(run) == before
    other.record.close()
    assert value(Path(taken(run)["path"])) == 40


def test_others_on_the_network_change_what_lies_in_their_folders_only(run: Run, tmp_path: Path) -> None:
    elsewhere = AllowedPaths((tmp_path,), (tmp_path / "elsewhere",), "ask its owner")
    run.host.allowed, before = elsewhere, files(run)
    for act in (lambda: taken(run), lambda: delete(run.folder, ["zzk-step00000040"], host=run.host)):
        with pytest.raises(SettingError):
            act()
    dress(run.folder, run.host.allowed)
    assert files(run) == before


def test_the_average_that_the_grid_made_is_taken_and_kept_like_any_save(run: Run) -> None:
    average = run.folder / "grid" / "zzk-average.safetensors"
    loras = run.host.lora_folder
    metadata = {**read_metadata(loras / "zzk.safetensors"), "ss_output_name": "zzk-average", "modelspec.merged_from": "a, b"}
    file.save(average, {KEY: torch.full((4, 2), 90.0)}, metadata, dtype=torch.float16)
    taken(run, "zzk-average")
    assert value(loras / "zzk.safetensors") == 90 and value(loras / "zzk-step00000100.safetensors") == 100
    assert {one.id: value(one.path) for one in saves_of(run.folder)}["zzk"] == 100
    average.unlink()
    assert Path(taken(run, "zzk-step00000040")["kept"]) == loras / "zzk-average.safetensors"
    assert value(loras / "zzk-average.safetensors") == 90


def test_saves_are_deleted_with_what_is_ours_beside_them(run: Run) -> None:
    dress(run.folder, run.host.allowed)
    loras = run.host.lora_folder
    mine = loras / "zzk-step00000080.json"
    mine.write_text(json.dumps({**card(run, mine.stem), "notes": "mine"}), encoding="utf-8")
    assert delete(run.folder, ["zzk-step00000040", "zzk-step00000080"], host=run.host) == [
        "zzk-step00000040.safetensors", "zzk-step00000080.safetensors"]
    assert {path.name for path in loras.iterdir()} == {"zzk.safetensors", "zzk.json", mine.name}
    assert delete(run.folder, ["zzk-step00000040"], host=run.host) == []  # gone already


@pytest.mark.parametrize("ids", [["zzk"], ["zzk-step00000040", "../zzk"], ["zzk-step00000080", "zzk-step00000040"]])
def test_what_is_not_the_runs_to_delete_stays_and_so_does_the_rest(run: Run, ids: list[str]) -> None:
    (run.host.lora_folder / "zzk-step00000040.safetensors").write_bytes(b"a file of somebody else")
    before = files(run)
    with pytest.raises(LoraFileError):
        delete(run.folder, ids, host=run.host)
    assert files(run) == before


def test_events_that_name_files_of_others_delete_nothing(run: Run, tmp_path: Path) -> None:
    foreign = tmp_path / "loras" / "of_somebody.safetensors"
    other_lora(foreign)
    secret = tmp_path / "secret.txt"
    secret.write_text("secret", encoding="utf-8")
    for path in (foreign, secret):
        run.record.write(events.Saved(str(path), 100, 1, False))
        with pytest.raises(LoraFileError):
            delete(run.folder, [path.stem], host=run.host)
    assert foreign.exists() and secret.exists()


def test_every_save_gets_a_card_and_an_image_and_the_users_stay(run: Run) -> None:
    loras = run.host.lora_folder
    (loras / "zzk-step00000080.json").write_text("damaged", encoding="utf-8")
    Image.new("RGB", (8, 8), "blue").save(loras / "zzk-step00000040.png")
    dress(run.folder, run.host.allowed)
    assert {path.name for path in loras.iterdir() if path.suffix != ".safetensors"} == {
        "zzk.json", "zzk-step00000040.json", "zzk-step00000040.png", "zzk-step00000080.json"}
    assert card(run, "zzk-step00000040")["activation text"] == "zzk girl"
    assert "preferred weight" not in card(run, "zzk-step00000040")
    (loras / "zzk-step00000080.json").unlink()
    dress(run.folder, run.host.allowed)
    once = files(run)
    assert "zzk-step00000080.preview.png" in once
    dress(run.folder, run.host.allowed)
    assert files(run) == once


def test_the_page_shows_which_save_is_the_lora(run: Run) -> None:
    taken(run)
    found = overview(run.folder)
    shown = {save["id"]: (save["is_result"], save["lora_text"]) for save in found["saves"]}
    assert shown == {"zzk-step00000040": (True, "<lora:zzk-step00000040:1>"),
                     "zzk-step00000080": (False, "<lora:zzk-step00000080:1>"), "zzk": (False, "<lora:zzk-step00000100:1>")}
    assert found["result"]["lora_text"] == "<lora:zzk:1>"
    assert json.dumps(taken(run, "zzk"))


def test_a_run_ends_with_cards_and_any_of_its_saves_can_be_taken(host: StandaloneHost, images: Path) -> None:
    settings = {"train_data_dir": str(images), "output_name": "zzk", "trigger_word": "zzk", "resolution": "64",
                      "num_repeats": 1, "min_bucket_reso": 64, "network_dim": 1, "max_train_steps": 4, "save_every_n_steps": 2,
                      "validation": False, "sample_images": False, "save_every_n_epochs": 0}
    runner = Runner()
    folder = host.runs_folder / service.start(settings, runner=runner, host=host)
    assert runner.wait(60) and runner.status().finished.outcome == "done"
    first, last = saves_of(folder)
    assert (first.own, last.own, last.is_result) == (True, True, True)
    assert card_of(first.path)["activation text"] == card_of(last.path)["activation text"] == "zzk"
    weights, final = (safetensors.torch.load_file(save.path) for save in (first, last))
    result = promote(folder, first.id, weight=1, host=host)
    for path, expected in ((result["path"], weights), (result["kept"], final)):
        found = safetensors.torch.load_file(path)
        assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected)
    assert result["prompt"] == "zzk <lora:zzk:1>" and card_of(Path(result["path"]))["preferred weight"] == 1
