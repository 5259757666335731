"""The client in tools/client.py against the server of the page without a WebUI, and the list of routes in docs/api.md."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import uvicorn

from lib_lora_train.run.runner import Runner
from lib_lora_train.ui.standalone import listen, make_app
from tests.fake_host import FakeHost, FakeJob, images
from tools import api_docs
from tools.client import LoraTrain, Refusal


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    runner, listener = Runner(), listen("127.0.0.1", 0)
    listener.listen(100)
    app = make_app(FakeHost(tmp_path), login=("me", "secret"), runner=runner)
    served = uvicorn.Server(uvicorn.Config(app, log_level="error"))
    thread = threading.Thread(target=served.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    yield f"http://localhost:{listener.getsockname()[1]}"
    runner.stop(save=False)
    assert runner.wait(60)
    served.should_exit = True
    thread.join(60)


def test_a_program_plans_trains_watches_and_queues_with_the_client(server: str, tmp_path: Path, job: FakeJob):
    job.advance(FakeJob.TOTAL)
    client, seen = LoraTrain(server, user="me", password="secret"), []
    settings = {"output_name": "zzk", "train_data_dir": str(images(tmp_path / "pictures"))}
    assert client.post("plan", {"settings": settings})["pictures"] == 3
    run = client.train(settings, every=0.01, on_status=seen.append)
    assert (run["name"], run["outcome"], run["steps"]) == ("zzk", "done", FakeJob.TOTAL)
    assert all(status["run"] == run["id"] for status in seen)
    assert client.get("report", {"run": run["id"]})[:2] == b"PK"
    client.post("queue/hold", {"held": True})
    entry = client.post("queue/add", {"settings": {**settings, "output_name": "later"}})["id"]
    assert [(one["id"], one["state"]) for one in client.get("queue")["entries"]] == [(entry, "waiting")]
    client.post("queue/remove", {"id": entry})


def test_a_refusal_is_its_sentence_with_its_status(server: str):
    with pytest.raises(Refusal) as refused:
        LoraTrain(server, user="me", password="wrong").get("status")
    assert refused.value.status == 401
    with pytest.raises(Refusal) as refused:
        LoraTrain(server, user="me", password="secret").post("plan", {"settings": {"lerning_rate": 1}})
    assert refused.value.status == 400 and "learning_rate" in str(refused.value)


def test_what_each_route_takes_and_gives_is_written_down():
    told = "\n".join(api_docs.details().values())
    # "POST create … POST close": two may stand on a line; "POST undo, redo" is both.
    listed = {f"{method} {name}" for method, names in re.findall(r"\b(GET|POST)\s+([\w/-]+(?:, [\w/-]+)*)", told)
              for name in names.split(", ")}
    missing = [f"{method} {route}" for method, route, _ in api_docs.routes()
               if f"{method} {route}" not in listed and f"{method} {route.removeprefix('studio/')}" not in listed]
    assert not missing
