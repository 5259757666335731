"""The folders a run may touch where others reach the page."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from PIL import Image

from lib_lora_train.api import service
from lib_lora_train.errors import DatasetError, SettingError
from lib_lora_train.host.exposure import is_loopback, reached_by_others
from lib_lora_train.run.planning import plan_dataset
from lib_lora_train.run.runner import Runner
from lib_lora_train.settings import DECLARATIONS, parse
from lib_lora_train.settings.allowed_paths import AllowedPaths, check_allowed, inside
from tests.fake_host import FakeHost, images

needs_links = pytest.mark.skipif(sys.platform == "win32", reason="making links wants a privilege there")
INSIDE, OUTSIDE = "allowed", "elsewhere"


@pytest.fixture
def allowed(tmp_path: Path) -> AllowedPaths:
    (tmp_path / INSIDE / "loras").mkdir(parents=True)
    (tmp_path / OUTSIDE).mkdir()
    return AllowedPaths((tmp_path / INSIDE,), (tmp_path / INSIDE / "loras",), "ask its owner")


def test_a_folder_is_inside_with_all_below_it_whether_or_not_it_exists(allowed: AllowedPaths):
    (folder,) = allowed.reading
    for path in (folder, folder / "x", folder / "a" / "b", folder / ".." / INSIDE, f"{folder}/./x", f"{folder}//x"):
        assert inside(str(path), allowed.reading), path


def test_nothing_else_is_inside_however_it_is_spelt(allowed: AllowedPaths):
    (folder,) = allowed.reading
    for path in ("", "/", "..", folder.parent, folder / "..", folder / ".." / OUTSIDE, f"{folder}2", f"{folder}/../{INSIDE}2",
                 folder / "x" / ".." / "..", f"{folder}\0/../..", f"~/{INSIDE}", f"/{folder}"[1:].upper() + "!",
                 f"file://{folder}"):
        assert not inside(str(path), allowed.reading), path


@pytest.mark.parametrize("path", [
    r"\\server\share\pictures", "//server/share/pictures", r"\\?\C:\allowed", r"\\.\C:\allowed", r"\??\C:\allowed",
    "//?/C:/allowed", r"\\?\UNC\server\share", "C:allowed", "C:", "c:..\\x", r"\\localhost\c$\allowed",
    r"\\.\PhysicalDrive0", r"\\.\pipe\x", "//./COM1"])
def test_windows_ways_past_the_drives_are_outside_by_their_spelling_alone(path: str, monkeypatch: pytest.MonkeyPatch):
    # The question alone would send the user's credentials to that server.
    monkeypatch.setattr(os.path, "realpath", lambda *_, **__: pytest.fail("the file system was asked"))
    assert not inside(path, [Path("/allowed"), Path("C:/allowed"), Path(r"\\server\share2")])


def test_a_share_that_is_allowed_is_inside_in_any_case_and_its_neighbours_are_not(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(os.path, "realpath", lambda path, **_: path.lower().replace("\\", "/"))
    shares = [r"\\nas\pictures"]
    assert inside(r"\\NAS\Pictures\dogs", shares) and inside("//nas/pictures", shares)
    assert not inside(r"\\nas\pictures2", shares) and not inside(r"\\nas2\pictures", shares)


@needs_links
def test_links_lead_where_they_lead(allowed: AllowedPaths, tmp_path: Path):
    (folder,), outside = allowed.reading, tmp_path / OUTSIDE
    (folder / "out").symlink_to(outside)
    (outside / "in").symlink_to(folder)
    (folder / "loop").symlink_to(folder / "loop")
    assert not inside(str(folder / "out"), allowed.reading)
    assert not inside(str(folder / "out" / "new"), allowed.reading)
    assert inside(str(outside / "in" / "x"), allowed.reading)
    # `..` behind a link is the target's, not the link's.
    (folder / "deep").mkdir()
    (outside / "a").mkdir()
    (folder / "deep" / "far").symlink_to(outside / "a")
    assert not inside(str(folder / "deep" / "far" / ".."), allowed.reading)


def test_every_path_among_the_settings_is_confined(allowed: AllowedPaths, tmp_path: Path):
    paths = [name for name, declaration in DECLARATIONS.items() if declaration.is_path]
    assert {"train_data_dir", "reg_data_dir", "network_weights", "output_dir"} <= set(paths)
    named = [name for name, declaration in DECLARATIONS.items() if not declaration.choices]  # a choice names no path
    assert not [name for name in named if name.endswith(("_dir", "_folder", "_file", "_weights")) and name not in paths]
    for name in paths:
        with pytest.raises(SettingError, match="ask its owner"):
            check_allowed(parse({name: str(tmp_path / OUTSIDE)}), allowed)
        check_allowed(parse({name: str(tmp_path / INSIDE / "loras" / "x")}), allowed)
        check_allowed(parse({name: str(tmp_path / OUTSIDE)}), None)
    with pytest.raises(SettingError):
        check_allowed(parse({"output_dir": str(tmp_path / INSIDE / "pictures")}), allowed)


def test_a_refusal_does_not_tell_whether_the_folder_exists(allowed: AllowedPaths, tmp_path: Path):
    said = []
    for name in (OUTSIDE, "nothing-here"):
        with pytest.raises(SettingError) as refused:
            check_allowed(parse({"train_data_dir": str(tmp_path / name)}), allowed)
        said.append(str(refused.value).replace(name, "…"))
    assert said[0] == said[1]


def test_page_and_api_start_plan_and_look_up_names_within_the_fence_only(allowed: AllowedPaths, tmp_path: Path):
    host = FakeHost(tmp_path)
    secret = images(tmp_path / OUTSIDE / "secret")
    values = {"output_name": "zzk", "train_data_dir": str(secret)}
    assert service.plan(values, host=host)["pictures"] == 3
    host.allowed, host.lora_folder = allowed, tmp_path / INSIDE / "loras"
    for refused in (lambda: service.plan(values, host=host), lambda: service.start(values, runner=Runner(), host=host),
                    lambda: service.name_taken(parse({"output_name": "x", "output_dir": str(secret)}), host)):
        with pytest.raises(SettingError, match="cannot be used"):
            refused()
    assert not (tmp_path / "runs").exists()
    good = images(tmp_path / INSIDE / "good")
    assert service.plan({**values, "train_data_dir": str(good)}, host=host)["pictures"] == 3


@needs_links
def test_links_inside_a_dataset_that_lead_out_are_passed_over_and_told(allowed: AllowedPaths, tmp_path: Path):
    folder, outside = tmp_path / INSIDE / "data", tmp_path / OUTSIDE
    folder.mkdir()
    Image.new("RGB", (64, 64)).save(folder / "own.png")
    Image.new("RGB", (64, 64)).save(outside / "theirs.png")
    (outside / "secret").write_text("password", encoding="utf-8")
    (folder / "theirs.png").symlink_to(outside / "theirs.png")
    (folder / "own.txt").symlink_to(outside / "secret")
    settings = parse({"train_data_dir": str(folder), "output_name": "x"})
    found = plan_dataset(settings, family="sd1", allowed=allowed)
    assert [(e.path.name, e.caption) for e in found.dataset.examples] == [("own.png", "")]
    assert any("links to folders that are not allowed" in warning for warning in found.warnings)
    assert {e.path.name for e in plan_dataset(settings, family="sd1").dataset.examples} == {"own.png", "theirs.png"}
    (folder / ".lora_train_cache").symlink_to(outside)
    with pytest.raises(DatasetError, match="link"):
        plan_dataset(parse({"train_data_dir": str(folder), "cache_latents_to_disk": True}), family="sd1", allowed=allowed)


@pytest.mark.parametrize("flags", [
    {"listen": True}, {"share": True}, {"ngrok": "token"}, {"server_name": "0.0.0.0"}, {"gradio_auth": "a:b"},
    {"gradio_auth_path": "x"}, {"api_auth": "a:b"}, {"subpath": "sd"}, {"hide_ui_dir_config": True}])
def test_a_webui_that_listens_is_shared_or_has_a_login_is_reached_by_others(flags: dict[str, object]):
    assert reached_by_others(flags, {})


def test_a_webui_started_plainly_is_one_persons_own():
    plain = {"listen": False, "share": False, "ngrok": None, "server_name": None, "gradio_auth": None, "api": True}
    assert not reached_by_others(plain, {}) and not reached_by_others(plain, {"GRADIO_SERVER_NAME": "127.0.0.1"})
    assert reached_by_others(plain, {"GRADIO_SERVER_NAME": "0.0.0.0"})
    assert all(map(is_loopback, ("localhost", "127.0.0.1", "127.1.2.3", "::1", "[::1]")))
