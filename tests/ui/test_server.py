"""The server without a WebUI: whom it answers, and that its page asks nobody else."""

from __future__ import annotations

import re
import socket
from pathlib import Path
from types import SimpleNamespace

import pytest
from fastapi.testclient import TestClient

from lib_lora_train.__main__ import main
from lib_lora_train.errors import HostError, SettingError
from lib_lora_train.host.exposure import is_loopback
from lib_lora_train.host.standalone import listening_allowed_paths
from lib_lora_train.run.runner import Runner
from lib_lora_train.ui import standalone
from lib_lora_train.ui.standalone import listen, make_app, parse_login
from tests.fake_host import FakeHost


@pytest.fixture
def client(tmp_path: Path) -> TestClient:
    return TestClient(make_app(FakeHost(tmp_path), runner=Runner()), base_url="http://localhost:7860")


def test_the_page_loads_our_script_and_nothing_from_elsewhere(client: TestClient):
    page = client.get("/")
    assert page.status_code == 200 and 'src="./lora-train/v1/page.js"' in page.text
    assert not re.findall(r'<(?:script|link|img)[^>]*(?:src|href)\s*=\s*"https?:', page.text)
    assert "default-src 'self'" in page.headers["content-security-policy"]
    assert int(page.headers["content-length"]) == len(page.content)
    theme = client.get("/theme.css").text
    assert "fonts.googleapis" not in theme and "@import" not in theme
    assert "loraTrain" in client.get("/lora-train/v1/page.js").text
    assert ".lora-train" in client.get("/lora-train/v1/page.css").text


@pytest.mark.parametrize("host", ["evil.example", "evil.example:7860", "localhost.evil.example", "10.0.0.7:7860", ""])
def test_a_foreign_name_for_this_machine_is_refused(client: TestClient, host: str):
    for path in ("/", "/config", "/lora-train/v1/status"):
        assert client.get(path, headers={"Host": host}).status_code == 403


@pytest.mark.parametrize("host", ["localhost", "localhost:1", "127.0.0.1:7860", "[::1]:7860", "LOCALHOST:7860"])
def test_the_loopback_names_are_served(client: TestClient, host: str):
    assert client.get("/lora-train/v1/status", headers={"Host": host}).status_code == 200


def test_a_page_of_another_site_cannot_reach_gradio_or_the_api(client: TestClient):
    for origin in ("https://evil.example", "http://localhost:1234", "null"):
        assert client.get("/config", headers={"Origin": origin}).status_code == 403
        assert client.post("/run/predict", json={}, headers={"Origin": origin}).status_code == 403
    assert client.get("/config", headers={"Origin": "http://localhost:7860"}).status_code == 200


def test_gradios_file_routes_are_closed(client: TestClient):
    for path in ("/file=pyproject.toml", "/file/pyproject.toml", "/upload"):
        assert client.get(path).status_code == 403


def test_nothing_listens_to_other_machines_without_a_password(tmp_path: Path):
    host = FakeHost(tmp_path)
    for address in ("0.0.0.0", "192.168.1.2", "::", "nas.local", ""):
        with pytest.raises(HostError, match="password"):
            make_app(host, runner=Runner(), address=address)


class Listening:
    """The page as another machine sees it; the last user and password that `serve` chose."""

    def __init__(self, folder: Path) -> None:
        self.app = make_app(FakeHost(folder), runner=Runner(), address="0.0.0.0", login=("ann", "pw:1"))

    def client(self) -> TestClient:
        return TestClient(self.app, base_url="http://nas.local:1")


@pytest.fixture
def listening(tmp_path: Path) -> Listening:
    return Listening(tmp_path)


def test_elsewhere_than_on_the_loopback_address_any_name_is_served_to_whoever_logs_in(listening: Listening):
    client = listening.client()
    assert client.get("/config", headers={"Origin": "https://evil.example"}).status_code == 403
    assert client.post("/login", data={"username": "ann", "password": "guess"}).status_code == 400
    assert client.get("/config").status_code == 401
    assert client.post("/login", data={"username": "ann", "password": "pw:1"}).status_code == 200
    assert client.get("/config").status_code == 200


def test_without_the_password_nothing_but_the_login_is_shown_and_no_job_is_reached(listening: Listening):
    client = listening.client()
    page = client.get("/")
    assert page.status_code == 200 and "auth_required" in page.text and "lora_train" not in page.text.replace("lora-train", "")
    for cookies in ({}, {"access-token": "guess"}, {"access-token-unsecure": "guess"}):
        stranger = listening.client()
        stranger.cookies.update(cookies)
        assert stranger.get("/config").status_code == stranger.get("/info").status_code == 401
        for number in range(12):
            assert stranger.post("/run/predict", json={"fn_index": number, "data": []}).status_code == 401
        for name in ("status", "runs", "settings"):
            assert stranger.get(f"/lora-train/v1/{name}").status_code == 401
        assert stranger.post("/lora-train/v1/start", json={"settings": {}}).status_code == 401
    # A program may use the same user and password.
    assert client.get("/lora-train/v1/status", auth=("ann", "pw:1")).status_code == 200


def test_a_login_is_a_user_and_a_password():
    assert parse_login("ann:a:b") == ("ann", "a:b")
    for text in ("", "ann", "ann:", ":pw", " :pw", " ann:pw"):
        with pytest.raises(SettingError, match="USER:PASSWORD"):
            parse_login(text)


def test_a_password_is_made_up_and_printed_where_none_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    served: list[object] = []
    monkeypatch.setattr(standalone, "make_app", lambda *_, **options: served.append(options["login"]))
    monkeypatch.setattr(standalone.uvicorn, "Config", lambda *_, **__: None)
    monkeypatch.setattr(standalone.uvicorn, "Server", lambda _: SimpleNamespace(run=lambda sockets: sockets[0].close()))
    host = FakeHost(tmp_path)
    standalone.serve(host, port=0)
    assert served.pop() is None and "password" not in capsys.readouterr().out
    host.allowed = listening_allowed_paths("0.0.0.0", tmp_path / "loras", tmp_path / "data")
    for _ in range(2):
        standalone.serve(host, port=0, address="0.0.0.0")
    printed = capsys.readouterr().out
    (user, first), (_, second) = served
    assert user in printed and first in printed and second in printed and first != second and len(first) >= 16
    assert str(tmp_path / "data") in printed and "--allow" in printed


def test_a_page_that_listens_keeps_to_its_folders(tmp_path: Path):
    assert listening_allowed_paths("127.0.0.1", tmp_path) is None
    allowed = listening_allowed_paths("0.0.0.0", tmp_path / "loras", tmp_path / "data")
    assert allowed is not None and allowed.writing == (tmp_path / "loras",)
    assert allowed.may_read(tmp_path / "data" / "x") and allowed.may_read(tmp_path / "loras" / "runs")
    assert not allowed.may_read(tmp_path) and not allowed.may_read(Path("/etc"))


def test_folders_that_are_allowed_where_all_are_is_a_sentence(tmp_path: Path):
    with pytest.raises(SettingError, match="--allow is of no use at localhost"):
        listening_allowed_paths("localhost", tmp_path, tmp_path / "data")


def test_a_page_is_not_served_for_a_checkpoint_that_cannot_be_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["ui", "--checkpoint", str(tmp_path / "none.safetensors"), "--port", "0"]) != 0
    assert "none.safetensors does not exist; check the path." in capsys.readouterr().err


def test_what_is_a_loopback_address():
    assert all(map(is_loopback, ("localhost", "127.0.0.1", "127.1.2.3", "::1", "[::1]")))
    assert not any(map(is_loopback, ("", "0.0.0.0", "192.168.1.2", "localhost.example", "::", "127.0.0.1.example")))


def test_a_port_in_use_is_a_sentence():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        with pytest.raises(HostError, match="--port"):
            listen("127.0.0.1", other.getsockname()[1])


@pytest.mark.parametrize("command", [["ui"], ["demo"]])
def test_a_port_that_cannot_be_is_a_sentence_before_anything_is_begun(command, tmp_path, capsys):
    for port in ("99999", "-1"):
        assert main([*command, "--output-dir", str(tmp_path), "--port", port]) == 1
        assert "--port" in capsys.readouterr().err and not list(tmp_path.iterdir())
