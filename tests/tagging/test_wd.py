"""WD taggers: loaded from the published formats, they say what timm says; anything else is refused in a sentence."""

from __future__ import annotations

import http.server
import importlib.machinery
import json
import os
import pickle
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from lib_lora_train.errors import LoraTrainError, ModelError
from lib_lora_train.tagging.options import TagOptions
from lib_lora_train.tagging.sources import find_source, wd_sources
from lib_lora_train.tagging.wd import FILES, WDSource, prepared, read_config
from tests.tagging import wd_files
from tests.tagging.wd_files import ARCHITECTURES, TAGS, write_config, write_tagger

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
ALL = TagOptions(general_threshold=0.0, character_threshold=0.0)


@pytest.fixture(scope="module")
def tagger(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, nn.Module]:
    """A folder with a small ViT, and timm's own model."""
    folder = tmp_path_factory.mktemp("taggers") / "wd-vit-tagger-v3"
    return folder, write_tagger(folder)


def copied(tagger: tuple[Path, nn.Module], place: Path) -> Path:
    return Path(shutil.copytree(tagger[0], place / "mine"))


def images() -> list[Image.Image]:
    """Noise, so that every pixel counts: higher, wider, and exactly as large as the model's own size."""
    random = np.random.default_rng(0)
    return [Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8))
            for width, height in ((70, 101), (150, 40), (64, 64), (31, 32))]


def published_scores(model: nn.Module, image: Image.Image, size: int) -> np.ndarray:
    """The model cards' recipe with timm's own transform: white square, bicubic, RGB to BGR, sigmoid."""
    from timm.data import create_transform, resolve_data_config

    side = max(image.size)
    canvas = Image.new("RGB", (side, side), (255, 255, 255))
    canvas.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    transform = create_transform(**resolve_data_config({
        "input_size": (3, size, size), "interpolation": "bicubic", "crop_pct": 1.0, "mean": (0.5,) * 3, "std": (0.5,) * 3}))
    batch = transform(canvas).unsqueeze(0)[:, [2, 1, 0]]
    with torch.inference_mode():
        return torch.sigmoid(model(batch))[0].numpy()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_scores_are_those_of_timm_for_every_kind_of_model_whatever_the_images_shape(tmp_path: Path, architecture: str):
    model = write_tagger(tmp_path / "t", architecture)
    size = ARCHITECTURES[architecture].get("img_size", wd_files.SIZE)
    with WDSource(tmp_path / "t").open(ALL, CPU) as loaded:
        ours = loaded.scores(images())
    theirs = np.stack([published_scores(model, image, size) for image in images()])
    assert theirs.std(axis=0).min() > 1e-3  # or any image would do
    np.testing.assert_allclose(ours, theirs, atol=2e-6)


def test_an_image_is_prepared_as_published(tagger: tuple[Path, nn.Module]):
    # By hand: a red image twice as wide as high stands between two white quarters; blue comes first, -1 to 1.
    values = prepared(Image.new("RGB", (128, 64), (255, 0, 0)), read_config(tagger[0] / "config.json"))
    assert values.shape == (3, 64, 64) and values.dtype == np.float32
    assert (values[:, 32, 32] == (-1, -1, 1)).all() and (values[:, 2, 32] == 1).all() and (values[:, 61, 32] == 1).all()
    assert (values[:, 18:46] == np.array([-1, -1, 1]).reshape(3, 1, 1)).all()


def test_tags_come_with_names_and_categories_the_surest_first(tagger: tuple[Path, nn.Module]):
    (image, *_) = images()
    scores = published_scores(tagger[1], image, wd_files.SIZE)
    with WDSource(tagger[0]).open(ALL, CPU) as loaded:
        (found,) = loaded.describe([image])
    kinds = {0: "general", 4: "character", 9: "rating"}
    expected = sorted(((name, float(score), kinds[number]) for (name, number), score in zip(TAGS, scores, strict=True)),
                      key=lambda tag: -tag[1])
    assert [(tag.name, tag.category) for tag in found.tags] == [(name, kind) for name, _, kind in expected]
    assert [tag.score for tag in found.tags] == pytest.approx([score for _, score, _ in expected], abs=2e-6)


def test_what_is_below_its_threshold_is_left_out_but_ratings(tagger: tuple[Path, nn.Module]):
    with WDSource(tagger[0]).open(TagOptions(general_threshold=1, character_threshold=1), CPU) as loaded:
        (found,) = loaded.describe(images()[:1])
    assert {tag.name for tag in found.tags} == {"general", "sensitive", "questionable", "explicit"}


def test_the_model_is_let_go_also_when_the_work_fails(tagger: tuple[Path, nn.Module]):
    with pytest.raises(ZeroDivisionError), WDSource(tagger[0]).open(ALL, CPU) as loaded:
        raise ZeroDivisionError
    with pytest.raises(AssertionError, match="closed"):
        loaded.scores(images()[:1])


def test_a_long_strip_does_not_fill_the_memory(tagger: tuple[Path, nn.Module]):
    config = read_config(tagger[0] / "config.json")
    values = prepared(Image.new("RGB", (200_000, 8), (255, 0, 0)), config)
    assert values.shape == (3, 64, 64) and (values[:, 0, 0] == 1).all()


@pytest.mark.parametrize("absent", FILES)
def test_a_missing_file_is_named_with_its_place_and_nothing_is_fetched(
        tagger: tuple[Path, nn.Module], tmp_path: Path, absent: str, monkeypatch: pytest.MonkeyPatch):
    import huggingface_hub
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *_, **__: pytest.fail("fetched"))
    folder = copied(tagger, tmp_path)
    (folder / absent).unlink()
    (folder / "model.onnx").write_bytes(b"")
    source = WDSource(folder)
    assert absent in source.missing() and str(folder) in source.missing()
    with pytest.raises(ModelError) as refused, source.open(TagOptions(), CPU):
        pass
    assert str(refused.value) == source.missing()


def test_a_tagger_that_was_never_fetched_says_where_its_files_are_from(tmp_path: Path):
    sentence = WDSource(tmp_path / "wd-vit-tagger-v3").missing()
    assert "huggingface.co/SmilingWolf/wd-vit-tagger-v3" in sentence and all(name in sentence for name in FILES)


def test_without_timm_the_sentence_says_how_to_install_it(tagger: tuple[Path, nn.Module], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    source = WDSource(tagger[0])
    assert "pip install timm" in source.missing()
    with pytest.raises(ModelError, match="pip install timm"), source.open(TagOptions(), CPU):
        pass


def test_a_timm_that_cannot_be_imported_is_told(tagger: tuple[Path, nn.Module], monkeypatch: pytest.MonkeyPatch):
    broken = importlib.machinery.ModuleSpec("timm", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: broken)
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ModelError, match="does not work"), WDSource(tagger[0]).open(TagOptions(), CPU):
        pass


class Bomb:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return Path.touch, (self.target,)


def test_pickles_are_not_opened_under_any_name(tagger: tuple[Path, nn.Module], tmp_path: Path):
    target, folder = tmp_path / "ran", copied(tagger, tmp_path)
    for name in ("model.safetensors", "pytorch_model.bin", "model.pt"):
        (folder / name).write_bytes(pickle.dumps(Bomb(target)))
    with pytest.raises(ModelError, match="model.safetensors"), WDSource(folder).open(TagOptions(), CPU):
        pass
    assert not target.exists()


@pytest.mark.parametrize("arguments", [
    {"checkpoint_path": "PICKLE"}, {"pretrained": True}, {"pretrained_cfg": {"file": "PICKLE"}}, {"pretrained_cfg": "PICKLE"},
    {"pretrained_cfg_overlay": {"file": "PICKLE"}}, {"img_size": {"a": 1}}])
def test_a_configuration_cannot_make_timm_open_another_file(
        tagger: tuple[Path, nn.Module], tmp_path: Path, arguments: dict[str, object]):
    target, folder = tmp_path / "ran", copied(tagger, tmp_path)
    (tmp_path / "evil.pt").write_bytes(pickle.dumps(Bomb(target)))
    text = json.dumps({**ARCHITECTURES["vit_tiny_patch16_224"], **arguments}).replace("PICKLE", str(tmp_path / "evil.pt"))
    write_config(folder, "vit_tiny_patch16_224", model_args=json.loads(text))
    with pytest.raises(ModelError, match=next(iter(arguments))), WDSource(folder).open(TagOptions(), CPU):
        pass
    assert not target.exists()


def spoil_weights(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["norm.weight"]
    save_file(tensors, folder / "model.safetensors")


def reshape_head(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, "head.weight": tensors["head.weight"][:3].clone()}, folder / "model.safetensors")


@pytest.mark.parametrize(("spoil", "said"), [
    (lambda f: (f / "config.json").write_text("{", encoding="utf-8"), "config.json"),
    (lambda f: (f / "config.json").write_text("[]", encoding="utf-8"), "config.json"),
    (lambda f: (f / "config.json").write_bytes(b"\xff\xfe\x00"), "config.json"),
    (lambda f: write_config(f, "vit_tiny_patch16_224", architecture="hf-hub:evil/model"), "hf-hub:evil/model"),
    (lambda f: write_config(f, "vit_tiny_patch16_224", architecture="resnet_of_tomorrow"), "resnet_of_tomorrow"),
    (lambda f: write_config(f, "vit_tiny_patch16_224", model_args={"no_such_thing": 1}), "no_such_thing"),
    (lambda f: write_config(f, "vit_tiny_patch16_224", pretrained_cfg={"input_size": [1, 64, 64]}), "config.json"),
    (lambda f: write_config(f, "vit_tiny_patch16_224", pretrained_cfg={"input_size": [3, 64, 10**7]}), "config.json"),
    (lambda f: (f / "selected_tags.csv").write_text("tag_id,name\n1,x\n", encoding="utf-8"), "selected_tags.csv"),
    (lambda f: (f / "selected_tags.csv").write_text("tag_id,name,category,count\n1,x,0,1\n", encoding="utf-8"), "do not fit"),
    (lambda f: (f / "selected_tags.csv").write_bytes(b"\xff\xfe\x00"), "selected_tags.csv"),
    (lambda f: (f / "selected_tags.csv").write_bytes(b""), "selected_tags.csv"),
    (lambda f: (f / "model.safetensors").write_bytes(b"<html>"), "model.safetensors"),
    (lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-100]), "model.safetensors"),
    (spoil_weights, "norm.weight"),
    (reshape_head, "head.weight"),
])
def test_a_damaged_file_is_named_in_one_sentence(tagger: tuple[Path, nn.Module], tmp_path: Path, spoil, said: str):
    folder = copied(tagger, tmp_path)
    spoil(folder)
    with pytest.raises(ModelError) as refused, WDSource(folder).open(TagOptions(), CPU):
        pass
    assert said in str(refused.value) and "\n" not in str(refused.value)


def test_surplus_buffers_of_older_versions_are_no_reason_to_refuse(tagger: tuple[Path, nn.Module], tmp_path: Path):
    folder = copied(tagger, tmp_path)
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, "layers.0.attn_mask": torch.zeros(2)}, folder / "model.safetensors")
    with WDSource(folder).open(ALL, CPU) as loaded:
        assert len(loaded.describe(images()[:1])[0].tags) == len(TAGS)


def test_an_answer_that_is_not_a_number_is_an_error(tagger: tuple[Path, nn.Module], tmp_path: Path):
    folder = copied(tagger, tmp_path)
    tensors = load_file(folder / "model.safetensors")
    tensors["head.bias"][3] = float("nan")
    save_file(tensors, folder / "model.safetensors")
    with WDSource(folder).open(ALL, CPU) as loaded, pytest.raises(ModelError, match="not a number"):
        loaded.describe(images()[:1])


def test_the_taggers_that_are_there_are_found_else_one_is_recommended(
        tagger: tuple[Path, nn.Module], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "no cache"))
    assert [s.name for s in wd_sources(tmp_path / "none")] == ["wd:wd-vit-tagger-v3"]
    assert wd_sources(tmp_path / "none")[0].missing()
    found = wd_sources(tagger[0].parent)
    assert [s.name for s in found] == ["wd:wd-vit-tagger-v3"] and found[0].missing() == ""
    copied(tagger, tmp_path)
    assert [s.name for s in wd_sources(tmp_path)] == ["wd:mine"]
    assert find_source("wd:wd-swinv2-tagger-v3", found).missing()  # known by name, can be fetched
    with pytest.raises(LoraTrainError, match="wd:wd-vit-tagger-v3"):
        find_source("wd:../../etc", found)


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of huggingface.co as fetching a file needs."""

    folder: Path
    asked: list[str] = []

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        self.asked.append(self.path)
        name = self.path.rpartition("/")[2]
        known = self.path == f"/SmilingWolf/wd-vit-tagger-v3/resolve/{'0' * 40}/{name}" or self.path == (
            f"/SmilingWolf/wd-vit-tagger-v3/resolve/main/{name}")
        data = (self.folder / name).read_bytes() if known and name in FILES else b""
        self.send_response(200 if data else 404)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("ETag", f'"{name}"')
        self.send_header("X-Repo-Commit", "0" * 40)
        self.end_headers()
        if body:
            self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub(tagger: tuple[Path, nn.Module]) -> Iterator[str]:
    Hub.folder, Hub.asked = tagger[0], []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


FETCH = """
import sys, torch
from pathlib import Path
from lib_lora_train.errors import LoraTrainError
from lib_lora_train.tagging.options import TagOptions
from lib_lora_train.tagging.sources import wd_sources
from lib_lora_train.tagging.wd import WDSource
folder = Path(sys.argv[1])
for name, download in [("wd-vit-tagger-v3", False), ("wd-vit-tagger-v3", True), ("wd-vit-tagger-v3", False),
                       ("wd-swinv2-tagger-v3", True), ("somebody-elses", True)]:
    source = WDSource(folder / name)
    try:
        with source.open(TagOptions(download=download), torch.device("cpu")):
            print("opened", source.missing(), [s.name for s in wd_sources(folder) if not s.missing()])
    except LoraTrainError as error:
        print("refused", error)
"""


def test_a_published_tagger_is_fetched_only_where_asked_for_and_found_again(hub: str, tmp_path: Path):
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FETCH, str(tmp_path / "taggers")], cwd=tmp_path, text=True, capture_output=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "HF_ENDPOINT": hub, "HF_HOME": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "0",
             "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1", "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    unasked, fetched, again, unreachable, unknown = done.stdout.splitlines()
    assert unasked.startswith("refused The tagger wd-vit-tagger-v3 is not there")
    assert fetched == again == "opened  ['wd:wd-vit-tagger-v3']"
    assert unreachable.startswith("refused The tagger wd-swinv2-tagger-v3 could not be fetched")
    assert unknown.startswith("refused The tagger somebody-elses is not there")
    # No pickle and no other program's file was asked for, and of nobody else.
    vit = [path for path in Hub.asked if path.startswith("/SmilingWolf/wd-vit-tagger-v3/")]
    assert {path.rpartition("/")[2] for path in vit} == set(FILES)
    assert all(path.startswith("/SmilingWolf/wd-swinv2-tagger-v3/") for path in set(Hub.asked) - set(vit))
