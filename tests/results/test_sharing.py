"""What is given to others of a save: a folder for Civitai, and a commit on the Hugging Face hub, pushed with the real client
library to a server of the test's that speaks as much of the hub's HTTP as that takes."""

from __future__ import annotations

import base64
import hashlib
import http.server
import json
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import safetensors.torch
import yaml
from huggingface_hub.utils import reset_sessions
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from lib_lora_train.__main__ import main
from lib_lora_train.adapters.file import read_metadata
from lib_lora_train.api.results import ResultsRequest, results_for
from lib_lora_train.errors import HostError, LoraTrainError, OutputError, SettingError
from lib_lora_train.results import sharing
from lib_lora_train.results.hub import push
from lib_lora_train.results.sharing import SharedLora, export_for_civitai
from lib_lora_train.run.runner import Runner
from lib_lora_train.settings.allowed_paths import AllowedPaths
from tests.results.written_run import Run

SAVE, TOKEN = "zzk-step00000040", "hf_0123456789secret"
PROMPT = 'zzk girl, "smiling": yes | no'


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A save after step 40 with one sample, whose words say how it was made."""
    run = Run(tmp_path, values={"network_dim": 8, "training_comment": "nobody else's",
                                "train_data_dir": str(tmp_path / "pics")})
    run.save(SAVE, 40, value=40)
    name = run.sample(40, prompt=PROMPT)
    text = PngInfo()
    text.add_text("parameters", f"{PROMPT} <lora:zzk:1>\nSteps: 20, Sampler: Euler, Size: 64x32")
    Image.new("RGB", (64, 32), (40, 0, 0)).save(run.folder / name, pnginfo=text)
    run.save("zzk", 100, final=True, value=100)
    run.record.close()
    return run


class Hub:
    """The hub: repositories with their files. `refuse` is {path's part: status} of what it refuses."""

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.objects: dict[str, bytes] = {}
        self.refuse: dict[str, int] = {}
        hub = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                self.answer("POST")

            def do_GET(self) -> None:
                self.answer("GET")

            def do_PUT(self) -> None:
                self.answer("PUT")

            def answer(self, method: str) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                status, data = hub.reply(method, self.path, body, token=self.headers.get("Authorization", ""))
                sent = json.dumps(data).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(sent)))
                self.send_header("Content-Type", "application/json")
                self.end_headers()
                self.wfile.write(sent)

            def log_message(self, *_: object) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def reply(self, method: str, path: str, body: bytes, *, token: str) -> tuple[int, object]:
        for part, status in self.refuse.items():
            if part in path:
                return status, {"error": "refused"}
        if method == "PUT":
            self.objects[path.rpartition("/")[2]] = body
            return 200, {}
        if token != f"Bearer {TOKEN}":
            return 401, {"error": "Invalid credentials"}
        if path == "/api/repos/create":
            wanted = json.loads(body)
            name = f"{wanted['organization'] or 'me'}/{wanted['name']}"
            known = name in self.repositories
            self.repositories.setdefault(name, {".gitattributes": b""})
            self.private.setdefault(name, wanted["private"])
            return (409 if known else 200), {"url": f"{self.url}/{name}"}
        if path == "/api/validate-yaml":
            assert yaml.safe_load(json.loads(body)["content"].split("---")[1])
            return 200, {"errors": [], "warnings": []}
        if path.endswith("/info/lfs/objects/batch"):
            return 200, {"transfer": "basic", "objects": [
                {**wanted, "actions": {"upload": {"href": f"{self.url}/lfs/{wanted['oid']}"}}}
                for wanted in json.loads(body)["objects"]]}
        name, _, rest = path.removeprefix("/api/models/").partition("/")
        name, rest = f"{name}/{rest.partition('/')[0]}", rest.partition("/")[2]
        if rest.startswith("tree/"):
            return 200, [{"type": "file", "path": file, "size": 1, "oid": "1"} for file in self.repositories[name]]
        if rest.startswith("preupload/"):
            return 200, {"files": [{"path": one["path"], "shouldIgnore": False, "uploadMode": "regular" if one[
                "path"].endswith(".md") else "lfs"} for one in json.loads(body)["files"]]}
        if not rest:
            if name not in self.repositories:
                return 404, {"error": "not found"}
            return 200, {"id": name, "private": self.private.get(name, False)}
        assert rest.startswith("commit/"), path
        for line in map(json.loads, body.decode().splitlines()):
            value = line["value"]
            if line["key"] == "file":
                self.repositories[name][value["path"]] = base64.b64decode(value["content"])
            if line["key"] == "lfsFile":
                self.repositories[name][value["path"]] = self.objects[value["oid"]]
                assert hashlib.sha256(self.objects[value["oid"]]).hexdigest() == value["oid"]
        return 200, {"commitUrl": f"{self.url}/{name}/commit/1", "commitOid": "1"}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    made = Hub()
    monkeypatch.setenv("HF_ENDPOINT", made.url)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", made.url)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)  # which the tests' command sets
    reset_sessions()
    yield made
    reset_sessions()
    made.server.shutdown()
    made.server.server_close()


def test_a_pushed_lora_is_one_commit_with_a_page_that_says_what_it_is_and_nothing_of_this_machine(run: Run, hub: Hub):
    tasks = results_for(run.host, Runner())
    tasks.push(ResultsRequest(run=run.folder.name, save=SAVE, huggingface_repo_id="me/zorbi", name="zorbi",
                              license="cc-by-4.0"))
    assert tasks.tasks.wait(60)
    assert f"{hub.url}/me/zorbi" in tasks.task()["message"]
    files = hub.repositories["me/zorbi"]
    assert set(files) == {".gitattributes", "README.md", "zorbi.safetensors", "images/zorbi-1.png"} and hub.private["me/zorbi"]
    assert float(next(iter(safetensors.torch.load(files["zorbi.safetensors"]).values()))[0, 0]) == 40
    _, front, text = files["README.md"].decode().split("---\n", 2)
    facts = yaml.safe_load(front)
    assert facts["tags"] == ["lora", "stable-diffusion", "text-to-image"] and facts["license"] == "cc-by-4.0"
    assert facts["instance_prompt"] == "zzk girl" and facts["base_model"] == "stable-diffusion-v1-5/stable-diffusion-v1-5"
    assert facts["widget"] == [{"text": PROMPT, "output": {"url": "images/zorbi-1.png"}}]
    assert "| network_dim | `8` |" in text and "<lora:zorbi:1>" in text
    everything = files["README.md"] + files["zorbi.safetensors"] + files["images/zorbi-1.png"]
    assert str(run.folder.parent.parent).encode() not in everything and b"nobody" not in files["README.md"]
    assert TOKEN not in str(tasks.task()) and not list(run.folder.glob("hub-*"))


def test_a_repository_that_holds_files_is_not_written_to_unless_that_is_allowed(run: Run, hub: Hub):
    hub.repositories["me/zorbi"] = {"README.md": b"mine"}
    shared = SharedLora.of(run.folder, SAVE)
    with pytest.raises(OutputError, match="holds files already"):
        push(shared, "me/zorbi", private=True)
    assert hub.repositories["me/zorbi"] == {"README.md": b"mine"}
    push(shared, "me/zorbi", private=True, overwrite=True)
    assert set(hub.repositories["me/zorbi"]) == {"README.md", "zzk.safetensors", "images/zzk-1.png"}


def test_what_is_to_be_private_is_not_pushed_to_a_repository_that_is_public(run: Run, hub: Hub):
    hub.repositories["me/zorbi"], hub.private["me/zorbi"] = {".gitattributes": b""}, False
    with pytest.raises(OutputError, match="public"):
        push(SharedLora.of(run.folder, SAVE), "me/zorbi", private=True)
    assert set(hub.repositories["me/zorbi"]) == {".gitattributes"}


@pytest.mark.parametrize(("refuse", "words"), [
    ({"repos/create": 401}, "login is not accepted"), ({"repos/create": 403}, "may not write"), ({"/lfs/": 413}, "too large"),
    ({"commit/": 403}, "may not write"), ({"tree/": 418}, "418")])
def test_what_the_hub_refuses_is_one_sentence_without_the_token(run: Run, hub: Hub, refuse: dict, words: str):
    hub.refuse = refuse
    with pytest.raises(LoraTrainError) as refused:
        push(SharedLora.of(run.folder, SAVE), "me/zorbi", private=True)
    assert words in str(refused.value) and "\n" not in str(refused.value) and TOKEN not in str(refused.value)
    assert not list(run.folder.glob("hub-*"))


def test_without_network_login_or_a_usable_name_it_is_refused_in_a_sentence(run: Run, hub: Hub, monkeypatch):
    shared = SharedLora.of(run.folder, SAVE)
    for repository in ("", "a b", "me/zorbi/x", "https://huggingface.co/me/zorbi", "../x"):
        with pytest.raises(SettingError):
            push(shared, repository, private=True)
    hub.server.shutdown()
    hub.server.server_close()
    with pytest.raises(HostError, match="check the connection"):
        push(shared, "me/zorbi", private=True)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(HostError, match="huggingface-cli login"):
        push(shared, "me/zorbi", private=True)
    run.host.allowed = AllowedPaths((run.folder,), (run.folder,), "")
    with pytest.raises(SettingError, match="others can reach"):
        results_for(run.host, Runner()).push(ResultsRequest(run=run.folder.name, save=SAVE, huggingface_repo_id="me/zorbi"))


def test_a_folder_for_civitai_holds_the_lora_its_images_with_their_words_and_a_description(run: Run, tmp_path: Path, capsys):
    assert main(["export", str(run.folder), SAVE, "--name", "zorbi", "--weight", "0.8", "--to", str(tmp_path / "out")]) == 0
    folder = Path(capsys.readouterr().out.strip())
    assert sorted(path.name for path in folder.iterdir()) == ["description.txt", "zorbi-1.png", "zorbi.safetensors"]
    with Image.open(folder / "zorbi-1.png") as image:
        assert image.info["parameters"] == f"{PROMPT} <lora:zorbi:1>\nSteps: 20, Sampler: Euler, Size: 64x32"
    metadata = read_metadata(folder / "zorbi.safetensors")
    assert metadata["ss_output_name"] == metadata["modelspec.title"] == "zorbi"
    text = (folder / "description.txt").read_text(encoding="utf-8")
    assert all(words in text for words in ("Trigger words: zzk girl", "Stable Diffusion 1.5", "Recommended weight: 0.8",
                                           "<lora:zorbi:0.8>", "network_dim: 8", PROMPT))
    assert "nobody" not in text and str(tmp_path) not in text
    (folder / "description.txt").write_text("mine")
    assert main(["export", str(run.folder), SAVE, "--name", "zorbi", "--to", str(tmp_path / "out")]) == 2
    assert "zorbi exists" in capsys.readouterr().err and (folder / "description.txt").read_text() == "mine"


def test_a_full_disk_leaves_no_half_folder(run: Run, tmp_path: Path, monkeypatch):
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(sharing.file, "save", full)
    with pytest.raises(OutputError, match="No space left"):
        export_for_civitai(SharedLora.of(run.folder, SAVE), tmp_path / "out" / "zzk")
    assert not list((tmp_path / "out").iterdir())
    shutil.rmtree(tmp_path / "out")
