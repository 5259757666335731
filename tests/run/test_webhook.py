"""The notice of a run's end, sent to a server of the test's."""

from __future__ import annotations

import http.server
import json
import queue
import threading
from collections.abc import Iterator

import gradio
import pytest
from fastapi.testclient import TestClient

from lib_lora_train.api import service
from lib_lora_train.api.queue import QueueRequest, enqueue, keep_webhook, queue_for
from lib_lora_train.errors import HostError, SettingError
from lib_lora_train.run import queue as queue_module
from lib_lora_train.run import runner as runner_module
from lib_lora_train.run.runner import Runner
from lib_lora_train.run.webhook import webhook_of
from lib_lora_train.settings.allowed_paths import AllowedPaths
from tests.fake_host import FakeHost, FakeJob, images


class Chat:
    """A server that keeps what it is sent, and answers with the next of `answers`, then 204."""

    def __init__(self) -> None:
        self.received: queue.Queue[dict[str, object]] = queue.Queue()
        self.answers: list[int] = []
        chat = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                chat.received.put(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                self.send_response(chat.answers.pop(0) if chat.answers else 204)
                self.send_header("Location", "/elsewhere")
                self.end_headers()

            def do_GET(self) -> None:
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.address = f"http://127.0.0.1:{self.server.server_port}/hooks/very-secret"


@pytest.fixture
def chat() -> Iterator[Chat]:
    made = Chat()
    yield made
    made.server.shutdown()
    made.server.server_close()


@pytest.fixture
def host(tmp_path, monkeypatch) -> FakeHost:
    monkeypatch.setattr(queue_module, "_POLL_SECONDS", 1e6)
    return FakeHost(tmp_path)


def trained(host: FakeHost, monkeypatch) -> str:
    """The outcome of a run on that host."""
    job, runner = FakeJob(), Runner()
    job.TOTAL = 1
    job.advance(1)
    monkeypatch.setattr(runner_module, "run_job", job)
    service.start({"output_name": "zzk", "train_data_dir": str(images(host.lora_folder.parent / "pictures"))},
                  runner=runner, host=host)
    assert runner.wait(60)
    return runner.status().finished.outcome


def test_the_end_of_a_run_is_sent_as_json_that_chats_show_too_and_names_no_folder(host, chat, monkeypatch):
    host.runs_folder.mkdir()
    webhook_of(host.runs_folder).keep(chat.address)
    assert trained(host, monkeypatch) == "done"
    sent = chat.received.get(timeout=60)
    assert {name: sent[name] for name in ("name", "outcome", "step", "file")} == {
        "name": "zzk", "outcome": "done", "step": 1, "file": "zzk.safetensors"}
    assert sent["run"].startswith("zzk-") and sent["content"] == sent["text"] and "done" in sent["text"]
    assert str(host.lora_folder.parent) not in json.dumps(sent)


def test_it_is_tried_twice_and_a_server_that_is_gone_costs_one_warning_and_no_run(host, chat, monkeypatch, caplog):
    host.runs_folder.mkdir()
    webhook = webhook_of(host.runs_folder)
    webhook.keep(chat.address)
    chat.answers = [500]
    webhook.test()
    assert [chat.received.get(timeout=60)["outcome"] for _ in range(2)] == ["test", "test"]
    chat.server.shutdown()
    chat.server.server_close()
    assert trained(host, monkeypatch) == "done"
    webhook.wait()
    told = [entry.getMessage() for entry in caplog.records if "notice of zzk" in entry.getMessage()]
    assert len(told) == 1 and webhook.problem and "very-secret" not in told[0]
    with pytest.raises(HostError):
        keep_webhook(chat.address, host=host)


@pytest.mark.parametrize("status", [301, 302, 303])
def test_a_notice_that_is_redirected_did_not_arrive(host, chat, status):
    host.runs_folder.mkdir()
    webhook = webhook_of(host.runs_folder)
    webhook.keep(chat.address)
    chat.answers = [status, status]
    with pytest.raises(HostError, match=str(status)):
        webhook.test()


@pytest.mark.filterwarnings("ignore")
def test_gradio_serves_the_address_to_nobody_where_it_serves_the_folder(host, chat):
    host.runs_folder.mkdir()
    (host.runs_folder / "webhook.json").write_text(json.dumps({"webhook": chat.address}))  # as it was named at first
    (host.runs_folder / "queue.json").write_text("{}")
    assert webhook_of(host.runs_folder).address() == chat.address
    with gradio.Blocks() as page:
        gradio.Textbox()
    page.allowed_paths, page.blocked_paths = [str(host.lora_folder.parent)], []
    client = TestClient(gradio.routes.App.create_app(page))
    assert client.get(f"/file={host.runs_folder}/queue.json").status_code == 200
    assert client.get(f"/file={host.runs_folder}/webhook.json").status_code != 200
    first, = (path.name for path in host.runs_folder.glob("webhook*"))
    webhook_of(host.runs_folder).keep(chat.address)
    second, = (path.name for path in host.runs_folder.glob("webhook*"))
    assert first != second and min(map(len, (first, second))) > len("webhook-.json") + 31  # 192 bits as base64
    assert webhook_of(host.runs_folder).address() == chat.address
    webhook_of(host.runs_folder).keep("")
    assert not list(host.runs_folder.glob("webhook*"))


def test_a_queued_run_that_cannot_begin_is_told_too(host, chat):
    host.runs_folder.mkdir()
    webhook_of(host.runs_folder).keep(chat.address)
    folder = images(host.lora_folder.parent / "pictures")
    waiting = queue_for(host, Runner())
    enqueue(QueueRequest(settings={"output_name": "zzk", "train_data_dir": str(folder)}), queue=waiting, host=host)
    folder.rename(folder.with_name("elsewhere"))
    waiting.check()
    sent = chat.received.get(timeout=60)
    assert (sent["name"], sent["outcome"], sent["run"]) == ("zzk", "failed", "") and str(folder) not in sent["message"]
    waiting.close()


@pytest.mark.parametrize("address", ["file:///etc/passwd", "ftp://example.com/x", "discord.com/api", "https://", "http://[::1",
                                     "https://user:word@example.com/x", "https://example.com/a b", "https://example.com/é"])
def test_an_address_that_is_none_is_refused_and_others_cannot_change_it(host, address, tmp_path):
    with pytest.raises(SettingError):
        keep_webhook(address, host=host)
    host.allowed = AllowedPaths((tmp_path,), (tmp_path,), "")
    with pytest.raises(SettingError, match="others can reach"):
        keep_webhook("https://example.com/x", host=host)
    assert webhook_of(host.runs_folder).address() == ""
