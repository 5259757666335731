"""Parts of a model move off the device and come back as they were. The device is a pretended one."""

from __future__ import annotations

import gc
import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lib_lora_train.errors import TrainingError
from lib_lora_train.host import aside, standalone
from lib_lora_train.host.standalone import StandaloneHost
from tests.pretended_card import CARD, CPU, PretendedCard

Facts = tuple[str, torch.dtype, tuple[int, ...], bool, bool]


@pytest.fixture
def host(card, tiny_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StandaloneHost:
    """It trains on the card, where its file's weights lie once they are read."""
    load = standalone._load
    monkeypatch.setattr(standalone, "_load", lambda path, device: load(path, CPU))
    return StandaloneHost(tiny_file, lora_folder=tmp_path, runs_folder=tmp_path / "runs", device=CARD)


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Iterator[PretendedCard]:
    pretended = PretendedCard()
    monkeypatch.setattr(aside, "device_of", pretended.device_of)
    monkeypatch.setattr(aside, "onto", pretended.onto)
    yield pretended


def facts(tensor: Tensor) -> Facts:
    content = tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    return (hashlib.sha256(content).hexdigest(), tensor.dtype, tensor.stride(), tensor.requires_grad, tensor.is_inference())


def some_tensors() -> list[Tensor]:
    """A trainable weight, a half one in another layout, whole numbers, an inference tensor, an empty one."""
    with torch.inference_mode():
        inference = torch.nn.Parameter(torch.randn(3, 5), requires_grad=False)
    return [torch.nn.Parameter(torch.randn(4, 4)), torch.randn(2, 3, 3, 3).half().to(memory_format=torch.channels_last),
            torch.arange(7), inference, torch.empty(0)]


def test_aside_each_lies_elsewhere_and_afterwards_everything_is_as_it_was(card):
    tensors = some_tensors()
    before = [facts(tensor) for tensor in tensors]
    with aside.aside(tensors):
        assert [card.device_of(tensor) for tensor in tensors[:-1]] == [CPU] * 4
        assert [facts(tensor) for tensor in tensors] == before
    assert [card.device_of(tensor) for tensor in tensors[:-1]] == [CARD] * 4
    assert [facts(tensor) for tensor in tensors] == before


def test_where_everything_is_on_the_cpu_already_nothing_moves():
    tensors = some_tensors()
    places = [tensor.data_ptr() for tensor in tensors]
    with aside.aside(tensors):
        assert [tensor.data_ptr() for tensor in tensors] == places
    aside.move(tensors, CPU)
    assert [tensor.data_ptr() for tensor in tensors] == places


def test_the_memory_is_free_once_the_tensors_are_aside(card):
    class Watched(Tensor):
        """A tensor whose views can be found."""

    tensor = torch.randn(3).as_subclass(Watched)
    was = tensor.data_ptr()
    with aside.aside([tensor]):
        gc.collect()
        assert not [thing for thing in gc.get_objects() if type(thing) is Watched and thing.data_ptr() == was]


def test_an_exception_inside_brings_everything_back(card):
    tensors = some_tensors()
    before = [facts(tensor) for tensor in tensors]
    with pytest.raises(ZeroDivisionError), aside.aside(tensors):
        raise ZeroDivisionError
    assert [facts(tensor) for tensor in tensors] == before
    assert [card.device_of(tensor) for tensor in tensors[:-1]] == [CARD] * 4


def test_where_there_is_no_room_aside_nothing_has_moved(card):
    tensors = [torch.randn(3) for _ in range(4)]

    def full(tensor: Tensor, device: torch.device) -> Tensor:
        if device == CPU and card.moves.count(CPU) == 2:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return card.onto(tensor, device)
    aside.onto = full
    with pytest.raises(RuntimeError, match="can't allocate"), aside.aside(tensors):
        raise AssertionError("nothing runs")
    assert [card.device_of(tensor) for tensor in tensors] == [CARD] * 4
    assert card.moves == [CPU, CPU, CARD, CARD]


def test_a_full_card_is_asked_a_second_time(card):
    tensors = [torch.randn(3) for _ in range(3)]
    before = [facts(tensor) for tensor in tensors]
    refused = []

    def full_once(tensor: Tensor, device: torch.device) -> Tensor:
        if device == CARD and card.moves.count(CARD) == 1 and not refused:
            refused.append(device)
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return card.onto(tensor, device)
    aside.onto = full_once
    with aside.aside(tensors):
        pass
    assert refused and [card.device_of(tensor) for tensor in tensors] == [CARD] * 3
    assert [facts(tensor) for tensor in tensors] == before


def test_tied_weights_stay_tied(card):
    weight = torch.nn.Parameter(torch.randn(4, 4))
    other = torch.nn.Parameter(weight.data)
    with aside.aside([weight, other, weight]):
        assert weight.data_ptr() == other.data_ptr()
        assert card.moves == [CPU]
    assert weight.data_ptr() == other.data_ptr()
    with torch.no_grad():
        weight.fill_(2)
    assert other.eq(2).all()


def test_what_others_place_meanwhile_stays_where_they_put_it(card):
    mine, theirs = torch.randn(3), torch.randn(3)
    with aside.aside([mine, theirs]):
        theirs.data = on_card = card.onto(theirs.data, CARD)
    assert theirs.data_ptr() == on_card.data_ptr()
    assert card.device_of(mine) == CARD


def test_the_stand_alone_host_lends_what_it_set_aside_where_it_belongs_again(card, host):
    with host.borrow() as borrowed:
        before = {name: facts(tensor) for name, tensor in borrowed.tensors.items()}
        now = host.set_aside({"vae", "text"})
        assert now.keys() == before.keys()
        away = {name for name, tensor in now.items() if card.device_of(tensor) == CPU}
        assert away == {name for name in before if name.startswith(("first_stage_model.", "cond_stage_model."))}
        assert all(borrowed.tensors[name].data_ptr() == now[name].data_ptr() for name in before), "the old place is held"
    with host.borrow() as borrowed:
        assert all(card.device_of(tensor) == CARD for tensor in borrowed.tensors.values())
        assert {name: facts(tensor) for name, tensor in borrowed.tensors.items()} == before


def test_what_was_set_aside_can_be_brought_back_and_set_aside_again(card, host):
    with host.borrow() as borrowed:
        before = {name: facts(tensor) for name, tensor in borrowed.tensors.items()}
        host.set_aside({"unet", "text"})
        now = host.bring_back({"unet", "vae"})
        away = {name for name, tensor in now.items() if card.device_of(tensor) == CPU}
        assert away == {name for name in before if name.startswith("cond_stage_model.")}
        assert {name: facts(tensor) for name, tensor in now.items()} == before
        again = host.set_aside({"unet"})
        assert card.device_of(again["model.diffusion_model.out.2.weight"]) == CPU


def test_a_full_machine_is_said_in_our_words(card, host):
    with host.borrow():
        card.room = 3
        with pytest.raises(TrainingError, match="moving parts of the model off the device"):
            host.set_aside({"vae"})
