"""The WebUI's model is restored at the end of a lease, on stand-ins for its modules; tests/webui asks the real ones."""

from __future__ import annotations

import contextlib
import importlib
import logging
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from types import ModuleType, SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lib_lora_train.errors import HostError, Interrupted, TrainingError
from lib_lora_train.events import Event, Stage, Warned, shielded
from lib_lora_train.host import placement
from lib_lora_train.host.port import RenderRequest
from lib_lora_train.model.family import Hints
from tests.pretended_card import CPU, PretendedCard

CARD = torch.device("meta")  # a device that torch can name on any machine
PARTS = {"unet": "model.diffusion_model", "vae": "first_stage_model", "text": "cond_stage_model"}
NAMES = ("a1111", "host", "lease", "loras", "progress", "render")


class Card(PretendedCard):
    """`full` says when it takes nothing."""

    full: Callable[[], bool] = staticmethod(lambda: False)

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


class Generation:
    """modules.processing.StableDiffusionProcessingTxt2Img."""

    def __init__(self, seed: int, sampler_name: str, **others: object) -> None:
        self.seed = seed

    def close(self) -> None:
        """Nothing is kept."""


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Card:
    pretended = Card(gpu=CARD)
    monkeypatch.setattr(placement, "device_of", pretended.device_of)
    monkeypatch.setattr(placement, "copy_to", pretended.copy_to)
    return pretended


@pytest.fixture
def webui(card: Card, monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """A WebUI with a loaded model: `.lease` is the module under test, `.lock` the queue's, `.shown()` whether a job is."""
    sd_model = nn.Module()
    sd_model.model = Part()
    del sd_model.model.weight, sd_model.model.bias
    sd_model.model.diffusion_model, sd_model.first_stage_model, sd_model.cond_stage_model = Part(), Part(), Part()
    sd_model.sd_checkpoint_info, sd_model.lowvram = SimpleNamespace(filename="tiny"), False
    nothing, devices, lock = (lambda *_, **__: None), SimpleNamespace(device=CARD), threading.Lock()
    state = SimpleNamespace(job="", interrupted=False, stopping_generation=False)
    state.begin, state.end = lambda job: setattr(state, "job", job), lambda: setattr(state, "job", "")
    pending, running, processing = {}, [], SimpleNamespace(StableDiffusionProcessingTxt2Img=Generation)
    modules = ModuleType("modules")
    vars(modules).update(
        devices=devices, lowvram=SimpleNamespace(send_everything_to_cpu=nothing), processing=processing,
        call_queue=SimpleNamespace(queue_lock=lock), scripts=SimpleNamespace(ScriptRunner=object),
        sd_samplers=SimpleNamespace(all_samplers_map={"Euler": None}),
        extra_networks=SimpleNamespace(extra_network_registry={}),
        progress=SimpleNamespace(add_task_to_queue=lambda task: pending.update({task: 0}), finished_tasks=[],
                                 pending_tasks=pending, start_task=running.append, finish_task=running.remove),
        sd_models=SimpleNamespace(model_data=SimpleNamespace(sd_model=sd_model),
                                  select_checkpoint=lambda: sd_model.sd_checkpoint_info),
        shared=SimpleNamespace(sd_model=sd_model, state=state,
                               opts=SimpleNamespace(CLIP_stop_at_last_layers=1, comma_padding_backtrack=20)))
    monkeypatch.setitem(sys.modules, "modules", modules)
    lease = importlib.import_module("lib_lora_train.host.webui.lease")
    a1111 = importlib.import_module("lib_lora_train.host.webui.a1111")
    monkeypatch.setattr(lease, "detect", nothing)  # it is no Stable Diffusion
    for name, answer in (("hints", Hints()), ("describe", None), ("tokenizers", ())):
        monkeypatch.setattr(a1111, name, lambda _, answer=answer: answer)
    yield SimpleNamespace(lease=lease, access=a1111, sd_model=sd_model, lock=lock, processing=processing, state=state,
                          misplaced=placement.MisplacedTensors(), shown=lambda: bool(state.job or pending or running))
    for name in NAMES:
        sys.modules.pop(f"lib_lora_train.host.webui.{name}", None)
        vars(sys.modules["lib_lora_train.host.webui"]).pop(name, None)


def new_lease(webui: SimpleNamespace):
    return webui.lease.WebUILease(webui.access, webui.lease.QueueLock(webui.lock), webui.misplaced)


def on_card(webui: SimpleNamespace, card: Card) -> set[str]:
    """Parts that lie there wholly."""
    return {part for part, name in PARTS.items()
            if all(card.device_of(tensor) == CARD for tensor in webui.sd_model.get_submodule(name).parameters())}


def test_what_was_offloaded_is_back_at_the_end_and_while_others_have_the_model(webui, card):
    seen = []
    with (lease := new_lease(webui)).leased():
        lease.offload_parts({"vae", "text"})
        assert on_card(webui, card) == {"unet"}
        lease.reload_parts({"vae"})
        assert on_card(webui, card) == {"unet", "vae"}
        lease.offload_parts({"vae"})
        lease.queue.yield_to_others = lambda stop: seen.append(on_card(webui, card))
        assert lease.yield_model(lambda _: None) is not None
        assert on_card(webui, card) == {"unet"}
    assert seen == [set(PARTS)] and on_card(webui, card) == set(PARTS) and not webui.lock.locked()


def test_what_the_file_says_is_leased_beside_what_the_webui_holds(webui, tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors"
    save_file({"ztsnr": torch.zeros(0)}, path, {"modelspec.prediction_type": "v"})
    webui.sd_model.sd_checkpoint_info.filename = str(path)
    monkeypatch.setattr(webui.access, "hints", lambda _: Hints(prediction_type="epsilon", zero_terminal_snr=False))
    with (lease := new_lease(webui)).leased():
        hints = lease.hints
    assert (hints.prediction_type, hints.zero_terminal_snr) == ("epsilon", False)  # the WebUI decides
    assert (hints.file_prediction_type, hints.file_zero_terminal_snr) == ("v_prediction", True)


@pytest.fixture
def medvram(webui, card):
    """The WebUI with --medvram, between two generations; its GPU has room for one part of the model, and not for two."""
    webui.sd_model.lowvram = True
    for name in PARTS.values():
        webui.sd_model.get_submodule(name).to(CPU)
    card.moves.clear()
    # A part has two tensors.
    card.full = lambda: sum(card.device_of(tensor) == CARD for tensor in webui.sd_model.parameters()) >= 2
    return webui


def test_a_model_kept_off_the_gpu_is_there_by_the_part_that_is_in_use_and_by_none_while_others_have_it(medvram, card):
    """SDXL under --medvram does not fit into the GPU as a whole, before the training or after a generation."""
    seen: list[set[str]] = []
    with (lease := new_lease(medvram)).leased():
        lease.queue.yield_to_others = lambda stop: seen.append(on_card(medvram, card))
        assert on_card(medvram, card) == set() and card.moves == []
        for part in ("vae", "text", "unet"):
            lease.reload_parts({part})
            assert on_card(medvram, card) == {part}
            assert lease.yield_model(lambda _: None) is not None
            assert on_card(medvram, card) == {part}
            if part != "unet":
                lease.offload_parts({part})
        assert card.moves.count(CARD) == 12, "each part twice, with two tensors"
    assert seen == [set()] * 3 and on_card(medvram, card) == set() and len(medvram.misplaced) == 0


def test_parts_that_the_webui_keeps_off_the_gpu_do_not_come_back_to_it_by_an_offload_that_is_undone(medvram, card):
    with (lease := new_lease(medvram)).leased():
        lease.reload_parts({"unet"})
        lease.offload_parts(set(PARTS))
        moves = [CARD] * 2 + [CPU] * 2
        assert card.moves == moves
    assert on_card(medvram, card) == set() and card.moves == moves


def test_a_part_that_finds_no_room_is_told_and_leaves_the_model_where_the_webui_keeps_it(medvram, card):
    with pytest.raises(TrainingError), (lease := new_lease(medvram)).leased():
        lease.reload_parts({"unet"})
        lease.reload_parts({"text"})
    assert on_card(medvram, card) == set() and len(medvram.misplaced) == 0 and not medvram.lock.locked()


def test_what_torch_keeps_unused_is_the_gpus_again_when_others_get_the_model(webui, card, monkeypatch):
    freed = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: freed.append(on_card(webui, card)))
    webui.sd_model.first_stage_model.to(CPU)  # as an unloaded checkpoint
    with (lease := new_lease(webui)).leased():
        lease.reload_parts({"vae"})
        freed.clear()
        lease.queue.yield_to_others = lambda stop: freed.append("yielded")
        lease.yield_model(lambda _: None)
        assert freed[:2] == [{"unet", "text"}, "yielded"]


def test_what_a_failed_work_held_is_gone_before_the_model_needs_its_room(webui, card):
    class Large:
        """What fills the GPU until it is forgotten."""

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


def test_a_model_that_finds_no_room_is_told_once_and_comes_back_with_the_next_lease(webui, card, caplog):
    with caplog.at_level(logging.WARNING), (lease := new_lease(webui)).leased():
        lease.offload_parts({"vae", "text"})
        card.full = lambda: True
    said, = caplog.messages
    assert "not on the GPU" in said and "Load SD checkpoint to VRAM" in said
    assert on_card(webui, card) == {"unet"} and not webui.lock.locked()
    with pytest.raises(HostError, match="not on the GPU"), new_lease(webui).leased():
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
        lease.yield_model(seen.append)
    assert [type(event) for event in seen] == [Warned] and on_card(webui, card) == set(PARTS)


def test_a_weight_that_is_written_in_place_is_noticed_and_one_that_is_moved_is_not(webui, card):
    with (lease := new_lease(webui)).leased():
        lease.version_check.check()
        lease.offload_parts({"vae"})
        lease.version_check.check()
        with torch.no_grad():
            webui.sd_model.first_stage_model.bias.add_(0)
        with pytest.raises(HostError):
            lease.version_check.check()


def test_weights_that_others_changed_are_not_trained_on(webui, card):
    def change(stop: object) -> None:
        with torch.no_grad():
            webui.sd_model.model.diffusion_model.weight[0, 0] += 1

    with pytest.raises(HostError), (lease := new_lease(webui)).leased():
        lease.queue.yield_to_others = change
        lease.yield_model(lambda _: None)
    assert not webui.lock.locked() and not webui.shown()


@pytest.mark.parametrize("block", ["queued", "running"])
def test_an_exception_takes_a_job_off_the_display(webui, block):
    display = webui.lease.ProgressDisplay()
    with pytest.raises(ZeroDivisionError), getattr(display, block)():
        assert webui.shown()
        raise ZeroDivisionError
    assert not webui.shown()


def test_an_exception_brings_a_part_back_that_was_moved_to_the_device(medvram, card):
    with pytest.raises(ZeroDivisionError), (lease := new_lease(medvram)).leased():
        lease.reload_parts({"text"})
        assert on_card(medvram, card) == {"text"}
        raise ZeroDivisionError
    assert on_card(medvram, card) == set()


@pytest.mark.parametrize("keeps_parts_off", [False, True])
@pytest.mark.parametrize("error", ["CUDA out of memory", "CUDA error: unspecified launch failure"])
def test_whichever_move_fails_the_model_is_whole_after_the_lease(webui, card, monkeypatch, keeps_parts_off, error):
    webui.sd_model.lowvram = keeps_parts_off
    for name in PARTS.values() if keeps_parts_off else ():
        webui.sd_model.get_submodule(name).to(CPU)
    before, moves = on_card(webui, card), 0

    def work(lease) -> None:
        lease.queue.yield_to_others = lambda stop: None
        for name, parts in (("reload", {"vae"}), ("offload", {"vae", "unet"}), ("reload", {"unet"})):
            getattr(lease, f"{name}_parts")(parts)
            lease.yield_model(lambda _: None)

    for failing in range(100):
        moves = 0

        def copy_to(tensor, device, failing=failing):
            nonlocal moves
            moves += 1
            if moves == failing + 1:
                raise RuntimeError(error)
            return card.copy_to(tensor, device)
        monkeypatch.setattr(placement, "copy_to", copy_to)
        with contextlib.suppress(TrainingError, RuntimeError), (lease := new_lease(webui)).leased():
            work(lease)
        assert on_card(webui, card) == before and len(webui.misplaced) == 0, f"move {failing} failed"
        assert not webui.lock.locked() and not webui.shown()
        if moves <= failing:
            return
    raise AssertionError("there is no end of moves")


@pytest.fixture
def host(webui, monkeypatch):
    for name in ("paths", "launch_utils"):
        monkeypatch.setattr(sys.modules["modules"], name, SimpleNamespace(data_path="", models_path=""), raising=False)
    monkeypatch.setattr(sys.modules["modules"].shared, "cmd_opts", SimpleNamespace(lowvram=False), raising=False)
    for name in ("allowed_paths", "captioners"):
        monkeypatch.setitem(sys.modules, f"lib_lora_train.host.webui.{name}", ModuleType(name))
    return importlib.import_module("lib_lora_train.host.webui.host").WebUIHost()


def test_the_webui_is_idle_while_nobody_holds_its_queue_and_asking_does_not_hold_it(webui, host):
    assert host.idle() and host.idle() and not webui.lock.locked()
    with webui.lock:  # a generation
        assert not host.idle()
    with host.lease():
        assert not host.idle()


def test_rendering_is_a_generation_in_the_queue(webui, host):
    def process(generation: Generation) -> SimpleNamespace:
        assert webui.lock.locked() and webui.shown()
        return SimpleNamespace(images=[generation.seed])
    webui.processing.process_images = process
    assert host.render(RenderRequest("a", seed=5, count=2)) == [5, 6]
    assert not webui.lock.locked() and not webui.shown()
    with pytest.raises(HostError):
        host.render(RenderRequest("a", sampler="none"))
    with pytest.raises(HostError), host.lease():
        host.render(RenderRequest("a"))  # its lock would never come


def test_a_list_of_loras_that_cannot_be_refreshed_is_logged_and_fails_no_run(webui, host, monkeypatch, caplog):
    def failing(access: object) -> None:
        raise ZeroDivisionError
    monkeypatch.setattr("lib_lora_train.host.webui.loras.refresh", failing)
    host.refresh_loras()
    assert "could not be refreshed" in caplog.text and "ZeroDivisionError" in caplog.text and not webui.lock.locked()


def test_a_display_that_fails_hides_no_changed_model(webui, host, monkeypatch):
    def failing(display: object, event: Event) -> None:
        raise ZeroDivisionError
    monkeypatch.setattr(webui.lease.ProgressDisplay, "show", failing)
    report = shielded(host.report)
    with host.lease():
        report(Stage("Encoding pictures", 1, 2))  # what only shows ends nothing
        with torch.no_grad():
            webui.sd_model.first_stage_model.bias.add_(0)
        with pytest.raises(HostError, match="changed"):
            report(Stage("Encoding pictures", 2, 2))


@pytest.mark.parametrize("how", ["it fails", "no memory", "interrupted", "stop"])
def test_a_rendering_that_ends_early_leaves_the_webui_as_it_was(webui, host, how):
    def process(generation: Generation) -> SimpleNamespace:
        if how in ("it fails", "no memory"):
            raise ZeroDivisionError if how == "it fails" else MemoryError
        webui.state.interrupted = how == "interrupted"
        return SimpleNamespace(images=[None])
    webui.processing.process_images = process
    expected = {"it fails": ZeroDivisionError, "no memory": TrainingError}.get(how, Interrupted)
    with pytest.raises(expected):
        host.render(RenderRequest("a", count=3), stop=lambda: how == "stop")
    assert not webui.lock.locked() and not webui.shown() and not webui.state.interrupted
