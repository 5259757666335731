"""The server without a WebUI: whom it answers, and that its page asks nobody else."""

from __future__ import annotations

import re
import socket
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from lib_lora_train.errors import HostError
from lib_lora_train.runner import Runner
from lib_lora_train.ui.standalone import is_loopback, listen, make_app
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


def test_elsewhere_than_on_the_loopback_address_any_name_is_served(tmp_path: Path):
    client = TestClient(make_app(FakeHost(tmp_path), runner=Runner(), address="0.0.0.0"), base_url="http://nas.local:1")
    assert client.get("/lora-train/v1/status").status_code == 200
    assert client.get("/config", headers={"Origin": "https://evil.example"}).status_code == 403


def test_what_is_a_loopback_address():
    assert all(map(is_loopback, ("localhost", "127.0.0.1", "127.1.2.3", "::1", "[::1]")))
    assert not any(map(is_loopback, ("", "0.0.0.0", "192.168.1.2", "localhost.example", "::", "127.0.0.1.example")))


def test_a_port_in_use_is_a_sentence():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        with pytest.raises(HostError, match="--port"):
            listen("127.0.0.1", other.getsockname()[1])
