"""The WebUI's model is restored at the end of a lease, on stand-ins for its modules; tests/webui asks the real ones."""

from __future__ import annotations

import importlib
import logging
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from lib_lora_train.errors import HostError, TrainingError
from lib_lora_train.events import Event, Warned
from lib_lora_train.host import placement
from lib_lora_train.model.family import Hints
from tests.pretended_card import CPU, PretendedCard

CARD = torch.device("meta")  # a device that torch can name on any machine
PARTS = {"unet": "model.diffusion_model", "vae": "first_stage_model", "text": "cond_stage_model"}
NAMES = ("lease", "loras", "model", "progress", "render")


class Card(PretendedCard):
    """`full` says when it takes nothing."""

    full: Callable[[], bool] = staticmethod(lambda: False)

    def device_of(self, tensor: Tensor) -> torch.device:
        return CPU if tensor.data_ptr() in self.on_cpu else CARD

    def copy_to(self, tensor: Tensor, device: torch.device) -> Tensor:
        if device == CARD and self.full():
            raise RuntimeError("CUDA out of memory")
        return super().copy_to(tensor, device)


class Part(nn.Module):
    """A part of the model, which moves as a module does."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(3, 3)), nn.Parameter(torch.randn(3))

    def to(self, device: torch.device) -> Part:
        placement.move(self.parameters(), device)
        return self


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Card:
    pretended = Card()
    monkeypatch.setattr(placement, "device_of", pretended.device_of)
    monkeypatch.setattr(placement, "copy_to", pretended.copy_to)
    return pretended


@pytest.fixture
def webui(card: Card, monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """A WebUI with a loaded model: `.lease` is the module under test, `.lock` the queue's."""
    sd_model = nn.Module()
    sd_model.model = Part()
    del sd_model.model.weight, sd_model.model.bias
    sd_model.model.diffusion_model, sd_model.first_stage_model, sd_model.cond_stage_model = Part(), Part(), Part()
    sd_model.sd_checkpoint_info, sd_model.lowvram = SimpleNamespace(filename="tiny"), False
    nothing, devices = (lambda *_, **__: None), SimpleNamespace(device=CPU)
    state = SimpleNamespace(begin=nothing, end=nothing, interrupted=False, stopping_generation=False)
    modules = ModuleType("modules")
    vars(modules).update(
        devices=devices, lowvram=SimpleNamespace(send_everything_to_cpu=nothing), processing=SimpleNamespace(),
        extra_networks=SimpleNamespace(extra_network_registry={}),
        progress=SimpleNamespace(add_task_to_queue=nothing, finished_tasks=[], pending_tasks={}, start_task=nothing,
                                 finish_task=nothing),
        sd_models=SimpleNamespace(model_data=SimpleNamespace(sd_model=sd_model),
                                  select_checkpoint=lambda: sd_model.sd_checkpoint_info),
        shared=SimpleNamespace(sd_model=sd_model, state=state,
                               opts=SimpleNamespace(CLIP_stop_at_last_layers=1, comma_padding_backtrack=20)))
    monkeypatch.setitem(sys.modules, "modules", modules)
    lease = importlib.import_module("lib_lora_train.host.a1111.lease")
    monkeypatch.setattr(lease, "detect", nothing)  # it is no Stable Diffusion
    for name, answer in (("hints", Hints()), ("describe", None), ("tokenizers", None)):
        monkeypatch.setattr(lease.model, name, lambda _, answer=answer: answer)
    yield SimpleNamespace(lease=lease, sd_model=sd_model, devices=devices, lock=threading.Lock(), misplaced=placement.MisplacedTensors())
    for name in NAMES:
        sys.modules.pop(f"lib_lora_train.host.a1111.{name}", None)
        vars(sys.modules["lib_lora_train.host.a1111"]).pop(name, None)


def new_lease(webui: SimpleNamespace):
    return webui.lease.WebUILease(webui.lease.QueueLock(webui.lock), webui.misplaced)


def on_card(webui: SimpleNamespace, card: Card) -> set[str]:
    """Parts that lie there wholly."""
    return {part for part, name in PARTS.items()
            if all(card.device_of(tensor) == CARD for tensor in webui.sd_model.get_submodule(name).parameters())}


def test_what_was_set_aside_is_home_at_the_end_and_while_others_have_the_model(webui, card):
    seen = []
    with (lease := new_lease(webui)).leased():
        lease._device = CARD  # the WebUI takes its model, as torch does, to be on the CPU
        lease.offload_parts({"vae", "text"})
        assert on_card(webui, card) == {"unet"}
        lease.reload_parts({"vae"})
        assert on_card(webui, card) == {"unet", "vae"}
        lease.offload_parts({"vae"})
        lease.queue.yield_to_others = lambda stop: seen.append(on_card(webui, card))
        assert lease.yield_model(report=lambda _: None, stop=lambda: False) is not None
        assert on_card(webui, card) == {"unet"}
    assert seen == [set(PARTS)] and on_card(webui, card) == set(PARTS) and not webui.lock.locked()


def test_parts_that_the_webui_keeps_off_the_card_do_not_go_home_by_way_of_it(webui, card):
    webui.sd_model.lowvram, webui.devices.device = True, CARD  # --medvram
    for name in PARTS.values():
        webui.sd_model.get_submodule(name).to(CPU)
    card.moves.clear()
    with (lease := new_lease(webui)).leased():
        assert on_card(webui, card) == set(PARTS) and card.moves == [CARD] * 6
        lease.offload_parts({"vae", "text"})
    assert on_card(webui, card) == set() and card.moves == [CARD] * 6 + [CPU] * 6


def test_what_a_failed_work_held_is_gone_before_the_model_needs_its_room(webui, card):
    class Large:
        """What fills the card until it is forgotten."""

    alive: list[weakref.ref[Large]] = []
    card.full = lambda: any(reference() is not None for reference in alive)

    def work() -> None:
        large = Large()
        alive.append(weakref.ref(large))
        raise TrainingError("The memory ran out")

    with pytest.raises(TrainingError), (lease := new_lease(webui)).leased():
        lease.offload_parts({"vae", "text"})
        work()
    assert alive and on_card(webui, card) == set(PARTS) and len(webui.misplaced) == 0


def test_a_model_that_finds_no_room_is_told_once_and_comes_home_with_the_next_lease(webui, card, caplog):
    with caplog.at_level(logging.WARNING), (lease := new_lease(webui)).leased():
        lease.offload_parts({"vae", "text"})
        card.full = lambda: True
    said, = caplog.messages
    assert "not on the card" in said and "Load SD checkpoint to VRAM" in said
    assert on_card(webui, card) == {"unet"} and not webui.lock.locked()
    with pytest.raises(HostError, match="not on the card"), new_lease(webui).leased():
        raise AssertionError("nothing is leased")
    card.full = lambda: False
    with new_lease(webui).leased():
        assert on_card(webui, card) == set(PARTS)


def test_who_trains_is_told_that_others_find_no_whole_model(webui, card):
    seen: list[Event] = []
    with (lease := new_lease(webui)).leased():
        lease.offload_parts({"vae"})
        card.full = lambda: not seen
        lease.queue.yield_to_others = lambda stop: None
        lease.yield_model(report=seen.append, stop=lambda: False)
    assert [type(event) for event in seen] == [Warned] and on_card(webui, card) == set(PARTS)
