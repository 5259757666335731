"""The API: who may ask, what is answered, and how it refuses."""

from __future__ import annotations

import base64
import io
import json
import math
import zipfile
from pathlib import Path

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from lib_lora_train import api, events
from lib_lora_train.api import service
from lib_lora_train.run import runner as runner_module
from lib_lora_train.run.runner import Runner
from lib_lora_train.settings import DECLARATIONS, parse
from tests.fake_host import FakeHost, FakeJob, images, interrupted_run

TOKEN = "page-token"
PAGE = {"X-Lora-Train": TOKEN}


class Desk:
    """A server with a fake job behind it."""

    def __init__(self, folder: Path, job: FakeJob, *, api_enabled: bool = False, credentials: str = "",
                 login: object = None) -> None:
        self.host, self.runner, self.job, self.folder = FakeHost(folder), Runner(), job, folder
        app = FastAPI()
        api.install(app, runner=self.runner, host=self.host, token=TOKEN, api_enabled=api_enabled,
                    credentials=api.parse_credentials(credentials), logged_in=api.login_of(login) if login else None)
        self.client = TestClient(app, base_url="http://localhost")

    def get(self, name: str, headers: dict[str, str] | None = None):
        return self.client.get(f"{api.PREFIX}/{name}", headers=headers or {})

    def post(self, name: str, body: object, headers: dict[str, str] | None = None):
        return self.client.post(f"{api.PREFIX}/{name}", json=body, headers=headers or {})

    def good(self, **more: object) -> dict[str, object]:
        folder = self.folder / "pictures"
        data = folder if folder.is_dir() else images(folder)
        return {"settings": {"output_name": "zzk", "train_data_dir": str(data), **more}}


@pytest.fixture
def desk(tmp_path: Path, job: FakeJob):
    made = Desk(tmp_path, job)
    yield made
    made.runner.stop(save=False)
    assert made.runner.wait(10)


def basic(user: str, password: str) -> dict[str, str]:
    return {"Authorization": "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()}


def test_nobody_but_the_page_may_ask_while_the_api_is_off(desk: Desk):
    assert desk.get("status", PAGE).status_code == 200
    for refused in (desk.get("status"), desk.get("status", {"X-Lora-Train": "guess"}), desk.get("runs"),
                    desk.post("start", desk.good()), desk.post("stop", {})):
        assert refused.status_code == 403
        assert list(refused.json()) == ["error"]
    assert not desk.runner.running()


def test_with_a_user_and_a_password_nothing_else_will_do(tmp_path: Path, job: FakeJob):
    desk = Desk(tmp_path, job, api_enabled=True, credentials="ann:one:1, bob:zwei")
    assert desk.get("status", basic("ann", "one:1")).status_code == 200
    assert desk.get("status", basic("bob", "zwei")).status_code == 200
    assert desk.get("status", PAGE).status_code == 200
    for headers in ({}, basic("ann", "zwei"), basic("eve", ""), basic("", ""), {"Authorization": "Basic ???"},
                    {"Authorization": "Bearer x"}):
        refused = desk.get("status", headers)
        assert refused.status_code == 401 and refused.headers["www-authenticate"] == "Basic"
    # A wrong token is not answered with a password box, and a right password does not make up for it.
    wrong = desk.get("status", {"X-Lora-Train": "guess", **basic("bob", "zwei")})
    assert wrong.status_code == 403 and "www-authenticate" not in wrong.headers


def test_another_web_page_cannot_post(tmp_path: Path, job: FakeJob):
    desk = Desk(tmp_path, job, api_enabled=True)
    assert desk.post("stop", {}, {"Origin": "http://localhost"}).status_code == 200
    assert desk.post("stop", {}, {"Origin": "https://evil.example"}).status_code == 403
    assert desk.post("stop", {}, {"Origin": "null"}).status_code == 403


@pytest.mark.parametrize("kind", ["", "text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x",
                                  "text/plain; charset=application/json"])
def test_what_a_foreign_page_can_send_unasked_starts_nothing(tmp_path: Path, job: FakeJob, kind: str):
    desk = Desk(tmp_path, job, api_enabled=True)
    body = json.dumps(desk.good()).encode()
    for headers in ({}, PAGE):
        # A Blob without a type is sent without the header.
        typed = {**headers, "Content-Type": kind} if kind else headers
        sent = desk.client.post(f"{api.PREFIX}/start", content=body, headers=typed)
        assert sent.status_code == 415
    assert not desk.runner.running() and desk.get("runs", PAGE).json() == {"runs": []}


def test_a_browser_that_says_the_request_is_another_sites_is_believed(tmp_path: Path, job: FakeJob):
    desk = Desk(tmp_path, job, api_enabled=True)
    for site in ("cross-site", "same-site"):
        for headers in ({}, PAGE):
            assert desk.post("start", desk.good(), {"Sec-Fetch-Site": site, **headers}).status_code == 403
            assert desk.get("status", {"Sec-Fetch-Site": site, **headers}).status_code == 403
    assert not desk.runner.running()
    # The page itself behind a proxy that renames the server; and a program, which sends neither header.
    renamed = {"Sec-Fetch-Site": "same-origin", "Origin": "https://outside.example", **PAGE}
    assert desk.post("stop", {}, renamed).status_code == 200
    assert desk.post("stop", {}).status_code == 200


class Login:
    """What gradio's application tells of its login."""

    def __init__(self) -> None:
        self.auth, self.tokens = {"ann": "pw"}, {"session-of-ann": "ann"}


@pytest.mark.parametrize("credentials", ["", "bob:zwei"])
def test_where_the_page_asks_for_a_login_the_api_is_no_side_door(tmp_path: Path, job: FakeJob, credentials: str):
    desk = Desk(tmp_path, job, api_enabled=True, credentials=credentials, login=Login())
    for headers in ({}, PAGE, {"Cookie": "access-token=guess"}, {**PAGE, "Cookie": "access-token=guess"},
                    {**PAGE, "Cookie": "other=session-of-ann"}, basic("ann", "pw")):
        for answer in (desk.get("status", headers), desk.post("start", desk.good(), headers)):
            assert answer.status_code == 401, headers
            # A page's request never makes the browser ask for a password.
            assert ("www-authenticate" in answer.headers) == bool(credentials and "X-Lora-Train" not in headers)
    assert not desk.runner.running()
    for name in ("access-token", "access-token-unsecure"):
        session = {"Cookie": f"{name}=session-of-ann"}
        assert desk.get("status", {**PAGE, **session}).status_code == 200
        assert desk.get("status", session).status_code == (401 if credentials else 200)
    if credentials:
        assert desk.get("status", basic("bob", "zwei")).status_code == 200


@pytest.mark.parametrize(("name", "body"), [
    ("start", {}), ("start", {"settings": []}), ("start", []), ("stop", {"save": "yes"}),
    ("start", {"settings": {"network_dimm": 4}}), ("start", {"settings": {"output_name": "../x"}}),
    ("plan", {"settings": {}}), ("plan", {"settings": {"train_data_dir": "/no/such/folder"}}),
    ("plan", {"settings": {"train_batch_size": None}}),
])
def test_what_is_wrong_is_said_in_one_sentence(desk: Desk, name: str, body: object):
    refused = desk.post(name, body, PAGE)
    assert refused.status_code == 400
    assert list(refused.json()) == ["error"]
    sentence = refused.json()["error"]
    assert sentence.endswith(".") and "\n" not in sentence and "Traceback" not in sentence
    assert not desk.runner.running()


def test_a_body_that_is_no_json_or_far_too_long_is_refused(desk: Desk):
    headers = {**PAGE, "Content-Type": "application/json"}
    send = lambda content: desk.client.post(f"{api.PREFIX}/plan", content=content, headers=headers)  # noqa: E731
    assert send(b"{").status_code == 400
    assert send(b"[" * 100_000).status_code == 400
    assert send(b'{"a": "' + b"x" * (2 << 20) + b'"}').status_code == 413
    assert desk.get("status?after=-1", PAGE).status_code == 400


def test_a_run_is_started_watched_and_stopped(desk: Desk):
    desk.job.advance(3)
    started = desk.post("start", desk.good(trigger_word="zzk girl"), PAGE)
    assert started.status_code == 200
    again = desk.post("start", desk.good(output_name="other"), PAGE)
    assert again.status_code == 409 and "running already" in again.json()["error"]
    assert desk.post("save", {}, PAGE).json() == {"saving": True} and desk.runner.running()
    assert [desk.post("pause", body, PAGE).json() for body in ({}, {"paused": False})] == [{"pausing": True}] * 2
    assert desk.post("stop", {"save": True}, PAGE).json() == {"stopping": True}
    assert desk.runner.wait(10)
    status = desk.get("status", PAGE).json()
    assert status["run"] == started.json()["run"]
    assert (status["name"], status["running"], status["stopping"]) == ("zzk", False, "save")
    assert status["trigger_word"] == "zzk girl" and status["lora_text"] == "<lora:zzk:1>"
    assert status["saved"][-1]["lora_text"] == "<lora:zzk:1>" and Path(status["saved"][-1]["path"]).is_file()
    assert status["points"] == [[n, 1 / n, 1 / n] for n in range(1, len(status["points"]) + 1)]
    assert desk.post("stop", {"save": True}, PAGE).json() == {"stopping": False}
    assert desk.post("save", {}, PAGE).json() == {"saving": False}
    runs = desk.get("runs", PAGE).json()["runs"]
    assert [(run["name"], run["outcome"]) for run in runs] == [("zzk", "stopped")]


def test_only_points_after_the_asked_step_are_sent(desk: Desk):
    desk.job.advance(FakeJob.TOTAL)
    desk.post("start", desk.good(), PAGE)
    assert desk.runner.wait(10)
    points = desk.get("status?after=97", PAGE).json()["points"]
    assert [point[0] for point in points] == [98, 99, 100]


def test_a_name_that_exists_is_refused_before_anything_starts(desk: Desk):
    (desk.host.lora_folder / "zzk.safetensors").write_bytes(b"older")
    assert desk.post("plan", desk.good(), PAGE).json()["name_taken"] is True
    refused = desk.post("start", desk.good(), PAGE)
    assert refused.status_code == 400 and "already" in refused.json()["error"]
    assert desk.get("runs", PAGE).json() == {"runs": []}
    assert desk.post("plan", desk.good(overwrite=True), PAGE).json()["name_taken"] is False
    assert desk.post("start", desk.good(overwrite=True), PAGE).status_code == 200


def test_the_plan_counts_what_the_run_will_do(desk: Desk):
    plan = desk.post("plan", desk.good(num_repeats=4, max_train_epochs=5, train_batch_size=2), PAGE).json()
    # 3 images × 4 repeats in one bucket of 512×512, two at a time: 6 batches an epoch.
    assert (plan["pictures"], plan["buckets"], plan["batches_per_epoch"], plan["steps"]) == (3, 1, 6, 30)
    assert plan["resolution"] == [512, 512] and plan["summary"].endswith("= 30 steps")


def test_the_settings_can_be_built_from(desk: Desk):
    listed = {entry["name"]: entry for entry in desk.get("settings", PAGE).json()["settings"]}
    assert set(listed) == set(DECLARATIONS)
    rank = listed["network_dim"]
    assert (rank["area"], rank["type"], rank["default"], rank["minimum"], rank["label"]) == (
        "network", "int", 16, 1, "Rank")
    desk.post("plan", desk.good(**{name: entry["default"] for name, entry in listed.items()
                                   if name not in ("output_name", "train_data_dir")}), PAGE).raise_for_status()


def test_a_loss_that_is_no_number_is_still_json(desk: Desk, monkeypatch: pytest.MonkeyPatch):
    def fails(settings, host, *, report, stop, sample_now, save_now, paused, folder=None):
        report(events.Step(1, 2, 1, 1, math.nan, math.inf, 1e-4, 0.0, None, None))
        return events.Finished("failed", "The loss is not a number.", "", 1)
    monkeypatch.setattr(runner_module, "run_job", fails)
    desk.post("start", desk.good(), PAGE)
    assert desk.runner.wait(10)
    status = desk.get("status", PAGE)
    assert status.status_code == 200 and status.json()["points"] == [[1, None, None]]


def test_a_defect_is_answered_with_a_sentence_and_logged(desk: Desk, monkeypatch: pytest.MonkeyPatch, caplog):
    monkeypatch.setattr(service, "runs", lambda _: 1 / 0)
    answer = desk.get("runs", PAGE)
    assert answer.status_code == 500 and list(answer.json()) == ["error"]
    assert "ZeroDivisionError" not in answer.text and "ZeroDivisionError" in caplog.text


@pytest.mark.parametrize(("path", "text"), [
    ("/loras/zzk.safetensors", "<lora:zzk:1>"), (r"C:\loras\v1.2 b.safetensors", "<lora:v1.2 b:1>"),
    ("zzk-000010.safetensors", "<lora:zzk-000010:1>")])
def test_the_lora_is_called_by_its_files_name(path: str, text: str):
    assert service.lora_text(path) == text


def test_the_status_before_the_first_run_has_the_shape_of_every_other(desk: Desk):
    before = desk.get("status", PAGE).json()
    assert before["model"]["text"] == "base: dreamshaper_8 [879db523c3] · SD1 · VAE: baked"
    desk.job.advance(1)
    desk.post("start", desk.good(), PAGE)
    during = desk.get("status", PAGE).json()
    assert set(during) == set(before)
    assert json.dumps(during)


def test_an_interrupted_run_is_listed_and_goes_on_with_what_it_was_set_to(desk: Desk):
    chosen = parse({**desk.good()["settings"], "network_dim": 3, "max_train_steps": 100})
    run = interrupted_run(desk.host, chosen, step=10)
    listed, = desk.get("runs", PAGE).json()["runs"]
    assert (listed["id"], listed["outcome"], listed["steps"], listed["total"], listed["resume_step"]) == (
        run, "interrupted", 12, 100, 10)
    assert desk.post("start", {"resume": run, "settings": {"max_train_steps": 200}}, PAGE).json() == {"run": run}
    assert desk.get("runs", PAGE).json()["runs"][0]["outcome"] == "running"
    desk.post("stop", {"save": True}, PAGE)
    assert desk.runner.wait(10)
    seen = desk.job.seen
    assert (seen.network.network_dim, seen.optimizer.max_train_steps, seen.save.resume) == (3, 200, run)


@pytest.mark.parametrize("body, word", [
    ({"resume": "nobody"}, "no run called"), ({"resume": ""}, "resume"), ({"resume": 3}, "resume"),
    ({"resume": ".."}, "no run called"), ({"resume": "../runs/../pictures"}, "no run called"),
    ({"resume": "zzk-20261121-120000", "settings": {"network_dim": 4}}, "Rank (network_dim) is 4 and was 3"),
    ({"resume": "zzk-20261121-120000", "settings": {"max_train_steps": 5}}, "10 steps already"),
    ({"resume": "zzk-20261121-120000", "settings": {"nonsense": 5}}, "nonsense")])
def test_what_cannot_be_resumed_is_one_sentence_and_starts_nothing(desk: Desk, body: dict[str, object], word: str):
    interrupted_run(desk.host, parse({**desk.good()["settings"], "network_dim": 3, "max_train_steps": 100}), step=10)
    refused = desk.post("start", body, PAGE)
    assert refused.status_code == 400 and word in refused.json()["error"]
    assert not desk.runner.running()


def test_a_report_of_the_newest_or_a_named_run_is_a_zip_for_those_who_may_ask(desk: Desk):
    assert desk.get("report").status_code == 403
    desk.job.advance(FakeJob.TOTAL)
    run = desk.post("start", desk.good(), PAGE).json()["run"]
    assert desk.runner.wait(10)
    for name in ("report", f"report?run={run}"):
        answer = desk.get(name, PAGE)
        assert answer.status_code == 200 and answer.headers["content-type"] == "application/zip"
        assert "attachment" in answer.headers["content-disposition"]
        with zipfile.ZipFile(io.BytesIO(answer.content)) as archive:
            assert json.loads(archive.read("report.json"))["run"] == run
            assert str(desk.folder) not in "".join(archive.read(part).decode() for part in archive.namelist())
    (desk.folder / "settings.toml").write_text("x = 1", encoding="utf-8")
    for elsewhere in ("..", "../loras", str(desk.folder), f"{run}/..", ".", "nothing"):
        refused = desk.client.get(f"{api.PREFIX}/report", params={"run": elsewhere}, headers=PAGE)
        assert refused.status_code == 400 and list(refused.json()) == ["error"]
