"""What is done with the WebUI's captioners, on stand-ins for its modules; tests/webui asks the real ones."""

from __future__ import annotations

import contextlib
import importlib
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from lib_lora_train.errors import HostError, Interrupted
from lib_lora_train.tagging.options import TagOptions

NAME = "lib_lora_train.host.webui.captioners"
CPU = torch.device("cpu")
PICTURE = Image.new("RGB", (64, 32), "red")


class Interrogator:
    """modules.interrogate.InterrogateModels as far as it is used, writing down what is done with it."""

    dtype, blip_model = "before", None

    def __init__(self, done: list[str], lock: threading.Lock) -> None:
        self.done, self.lock = done, lock

    def load_blip_model(self) -> torch.nn.Module:
        self.done.append("load")
        return torch.nn.Linear(1, 1)

    def generate_caption(self, image: Image.Image) -> str:
        assert self.lock.locked() and self.dtype == next(self.blip_model.parameters()).dtype
        return f"a picture of {image.size}"

    def unload(self) -> None:
        self.done.append("unload")


class Danbooru:
    """modules.deepbooru.DeepDanbooru likewise."""

    model: Any = None

    def __init__(self, done: list[str], lock: threading.Lock) -> None:
        self.done, self.lock = done, lock

    def start(self) -> None:
        if self.model is None:
            self.done.append("load")
            self.model = Network(self.lock)

    def stop(self) -> None:
        self.done.append("unload")


class Network(torch.nn.Linear):
    """What it asks: in the queue, with 512 pixels to a side, from 0 to 1, in the network's own numbers."""

    tags = ["long_hair", "solo", "rating:safe"]

    def __init__(self, lock: threading.Lock) -> None:
        super().__init__(1, 1, dtype=torch.float64)
        self.lock = lock

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        assert self.lock.locked() and batch.shape[1:] == (512, 512, 3) and batch.max() == 1
        assert batch.dtype == torch.float64
        return torch.tensor([[0.4, 0.6, 0.1]]).repeat(len(batch), 1)


@pytest.fixture
def webui(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """A WebUI of stand-ins whose files are all there: `.captioners` is the module under test, `.done` what was done."""
    for folder, file in (("BLIP", "model_base.pth"), ("torch_deepdanbooru", "model.pt")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / file).write_bytes(b"")
    done: list[str] = []
    lock = threading.Lock()
    interrogator, danbooru = Interrogator(done, lock), Danbooru(done, lock)
    stand_ins = {
        "call_queue": SimpleNamespace(queue_lock=lock),
        "devices": SimpleNamespace(device=CPU, dtype=torch.float32, device_interrogate=CPU, autocast=contextlib.nullcontext),
        "images": SimpleNamespace(resize_image=lambda mode, image, width, height: image.resize((width, height))),
        "paths": SimpleNamespace(models_path=str(tmp_path), paths={"BLIP": "here"}),
        "shared": SimpleNamespace(interrogator=interrogator, cmd_opts=SimpleNamespace(no_half=False))}
    modules = ModuleType("modules")
    vars(modules).update(stand_ins)
    monkeypatch.setitem(sys.modules, "modules", modules)
    for name, module in (("interrogate", SimpleNamespace()), ("deepbooru", SimpleNamespace(model=danbooru))):
        monkeypatch.setitem(sys.modules, f"modules.{name}", module)
    assert NAME not in sys.modules, "only the WebUI imports it"
    captioners = importlib.import_module(NAME)
    monkeypatch.setattr(captioners, "tokenizer_is_there", lambda: True)
    access = SimpleNamespace(current=lambda: None, unload=lambda _: done.append("room" if lock.locked() else "unlocked"))
    yield SimpleNamespace(captioners=captioners, access=access, done=done, lock=lock, models=tmp_path,
                          interrogator=interrogator, danbooru=danbooru, paths=stand_ins["paths"])
    del sys.modules[NAME]
    del sys.modules["lib_lora_train.host.webui"].captioners


@pytest.fixture(params=[0, 1], ids=["blip", "deepdanbooru"])
def source(webui: SimpleNamespace, request: pytest.FixtureRequest) -> Any:
    return webui.captioners.captioners(webui.access)[request.param]


def test_a_captioner_is_loaded_asked_in_the_queue_and_unloaded(webui: SimpleNamespace, source: Any):
    assert source.missing() == ""
    with source.open(TagOptions(general_threshold=0.5), CPU) as captioner:
        assert not webui.lock.locked()
        found = captioner.describe([PICTURE, PICTURE])
        assert not webui.lock.locked()
    # Room is made for it before it is loaded, and before each batch.
    assert webui.done == ["room", "load", "room", "unload"] and webui.interrogator.dtype == "before"
    assert len(found) == 2 and found[0] == found[1]
    if source.name == "blip":
        assert found[0].text == "a picture of (64, 32)" and found[0].tags == ()
    else:
        # The threshold is ours; a rating is always told.
        assert [(tag.name, tag.category) for tag in found[0].tags] == [("solo", "general"), ("safe", "rating")]


def test_a_failure_leaves_nothing_loaded_changed_or_locked(webui: SimpleNamespace, source: Any):
    with pytest.raises(ZeroDivisionError), source.open(TagOptions(), CPU):
        raise ZeroDivisionError
    assert webui.done[-1] == "unload" and webui.interrogator.dtype == "before" and not webui.lock.locked()


def test_a_failure_while_it_is_described_frees_the_queue(webui: SimpleNamespace, source: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Interrogator, "generate_caption", lambda self, image: 1 / 0)
    with source.open(TagOptions(), CPU) as captioner:
        monkeypatch.setattr(Network, "forward", lambda self, batch: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            captioner.describe([PICTURE])
        assert not webui.lock.locked()
    assert webui.done[-1] == "unload"


def test_a_wait_behind_other_work_ends_when_it_is_to_stop(webui: SimpleNamespace, source: Any):
    with webui.lock, pytest.raises(Interrupted), source.open(TagOptions(), CPU, should_stop=lambda: True):
        pass
    assert "load" not in webui.done and webui.interrogator.dtype == "before"


@pytest.mark.parametrize(("take_away", "said"), [
    (lambda webui: (webui.models / "BLIP" / "model_base.pth").unlink(), "model_base_caption_capfilt_large.pth"),
    (lambda webui: webui.paths.paths.clear(), "code"),
    (lambda webui: setattr(webui.captioners, "tokenizer_is_there", lambda: False), "bert-base-uncased"),
    (lambda webui: (webui.models / "torch_deepdanbooru" / "model.pt").unlink(), "model-resnet_custom_v3.pt")])
def test_what_is_missing_is_one_sentence_and_nothing_is_loaded(webui: SimpleNamespace, take_away: Any, said: str):
    take_away(webui)
    (source,) = [source for source in webui.captioners.captioners(webui.access) if source.missing()]
    assert said in source.missing()
    with pytest.raises(HostError) as refused, source.open(TagOptions(), CPU):
        pass
    assert str(refused.value) == source.missing() and webui.done == []


def test_a_webui_that_has_removed_its_captioners_offers_none(webui: SimpleNamespace, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delitem(sys.modules, "modules.deepbooru")
    assert [source.name for source in webui.captioners.captioners(webui.access)] == ["blip"]


def test_a_captioner_that_the_forges_manage_by_a_patcher_of_its_own_is_not_left_without_one(webui: SimpleNamespace):
    webui.interrogator.blip_patcher = None
    blip, _ = webui.captioners.captioners(webui.access)
    with blip.open(TagOptions(), CPU) as captioner:
        assert captioner.describe([PICTURE])
    assert webui.interrogator.blip_model is None
