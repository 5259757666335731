"""Parts of a model move off the device and come back as they were. The device is a pretended one."""

from __future__ import annotations

import gc
import hashlib
import traceback
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from lib_lora_train.errors import TrainingError
from lib_lora_train.host import placement, standalone
from lib_lora_train.host.standalone import StandaloneHost
from tests.pretended_card import CARD, CPU, PretendedCard

Facts = tuple[str, torch.dtype, tuple[int, ...], bool, bool]


@pytest.fixture
def host(card, tiny_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StandaloneHost:
    """It trains on the GPU; its file's weights are read onto the CPU."""
    monkeypatch.setattr(standalone, "load_file", lambda path: {
        name: card.copy_to(tensor, CPU).detach() for name, tensor in load_file(path).items()})
    return StandaloneHost(tiny_file, lora_folder=tmp_path, runs_folder=tmp_path / "runs", device=CARD)


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Iterator[PretendedCard]:
    pretended = PretendedCard()
    monkeypatch.setattr(placement, "device_of", pretended.device_of)
    monkeypatch.setattr(placement, "copy_to", pretended.copy_to)
    yield pretended


def facts(tensor: Tensor) -> Facts:
    content = tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    return (hashlib.sha256(content).hexdigest(), tensor.dtype, tensor.stride(), tensor.requires_grad, tensor.is_inference())


def offload(tensors: list[Tensor], misplaced: placement.MisplacedTensors | None = None) -> AbstractContextManager[None]:
    """Where they are now is their original device."""
    originals = {tensor: placement.device_of(tensor) for tensor in tensors}
    return placement.moved(originals, CPU, placement.MisplacedTensors() if misplaced is None else misplaced)


def refusing(card: PretendedCard, *, device: torch.device, after: int, times: int = 10**9) -> Callable[..., Tensor]:
    """In the place of `card.copy_to`: `device` takes `after` more tensors and refuses the next `times`."""
    left = [after, times]

    def onto(tensor: Tensor, place: torch.device) -> Tensor:
        if place == device and left[0] == 0 and left[1]:
            left[1] -= 1
            raise torch.cuda.OutOfMemoryError(f"{device} out of memory")
        if place == device and left[0]:
            left[0] -= 1
        return card.copy_to(tensor, place)
    return onto


def some_tensors() -> list[Tensor]:
    """A trainable weight, a half one in another layout, whole numbers, an inference tensor, an empty one."""
    with torch.inference_mode():
        inference = torch.nn.Parameter(torch.randn(3, 5), requires_grad=False)
    return [torch.nn.Parameter(torch.randn(4, 4)), torch.randn(2, 3, 3, 3).half().to(memory_format=torch.channels_last),
            torch.arange(7), inference, torch.empty(0)]


def test_offloaded_tensors_are_elsewhere_and_afterwards_as_they_were(card):
    tensors = some_tensors()
    before = [facts(tensor) for tensor in tensors]
    with offload(tensors):
        assert [card.device_of(tensor) for tensor in tensors[:-1]] == [CPU] * 4
        assert [facts(tensor) for tensor in tensors] == before
    assert [card.device_of(tensor) for tensor in tensors[:-1]] == [CARD] * 4
    assert [facts(tensor) for tensor in tensors] == before


def test_where_everything_is_on_the_cpu_already_nothing_moves():
    tensors = some_tensors()
    places = [tensor.data_ptr() for tensor in tensors]
    with offload(tensors):
        assert [tensor.data_ptr() for tensor in tensors] == places
    placement.move(tensors, CPU)
    assert [tensor.data_ptr() for tensor in tensors] == places


def test_the_memory_is_free_once_the_tensors_are_offloaded(card):
    class Watched(Tensor):
        """A tensor whose views can be found."""

    tensor = torch.randn(3).as_subclass(Watched)
    was = tensor.data_ptr()
    with offload([tensor]):
        gc.collect()
        assert not [thing for thing in gc.get_objects() if type(thing) is Watched and thing.data_ptr() == was]


def test_an_exception_inside_brings_everything_back(card):
    tensors = some_tensors()
    before = [facts(tensor) for tensor in tensors]
    with pytest.raises(ZeroDivisionError), offload(tensors):
        raise ZeroDivisionError
    assert [facts(tensor) for tensor in tensors] == before
    assert [card.device_of(tensor) for tensor in tensors[:-1]] == [CARD] * 4


def test_where_there_is_no_room_nothing_has_moved(card):
    tensors = [torch.randn(3) for _ in range(4)]
    placement.copy_to = refusing(card, device=CPU, after=2)
    with pytest.raises(RuntimeError, match="out of memory"), offload(tensors):
        raise AssertionError("nothing runs")
    assert [card.device_of(tensor) for tensor in tensors] == [CARD] * 4
    assert card.moves == [CPU, CPU, CARD, CARD]


def test_what_finds_no_room_on_its_device_comes_at_the_next_try(card):
    tensors, misplaced = [torch.randn(3) for _ in range(4)], placement.MisplacedTensors()
    tensors.append(torch.nn.Parameter(tensors[1]))
    before = [facts(tensor) for tensor in tensors]
    placement.copy_to = refusing(card, device=CARD, after=1, times=1)
    with offload(tensors, misplaced):
        pass
    assert [card.device_of(tensor) for tensor in tensors] == [CARD, CPU, CPU, CPU, CPU] and len(misplaced) == 4
    assert misplaced.retry() and len(misplaced) == 0
    assert [card.device_of(tensor) for tensor in tensors] == [CARD] * 5
    assert [facts(tensor) for tensor in tensors] == before
    assert tensors[1].data_ptr() == tensors[4].data_ptr(), "they were tied"


def test_a_misplaced_tensor_stays_one_as_long_as_there_is_no_room_and_its_owner_keeps_it(card):
    kept, dropped, misplaced = torch.randn(3), torch.randn(3), placement.MisplacedTensors()
    placement.copy_to = refusing(card, device=CARD, after=0)
    with offload([kept, dropped], misplaced):
        pass
    del dropped
    assert not misplaced.retry() and len(misplaced) == 1 and card.device_of(kept) == CPU
    placement.copy_to = card.copy_to
    assert misplaced.retry() and card.device_of(kept) == CARD


def test_another_failure_than_a_full_card_is_not_hidden(card):
    def broken(tensor: Tensor, device: torch.device) -> Tensor:
        if device == CARD:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return card.copy_to(tensor, device)
    placement.copy_to = broken
    with pytest.raises(RuntimeError, match="illegal"), offload([torch.randn(3)]):
        pass


def test_an_error_with_cleared_frames_holds_nothing_and_still_tells_where_it_came_from():
    class Large:
        """Something whose end can be seen."""

    seen: list[weakref.ref[Large]] = []

    def fails() -> None:
        large = Large()
        seen.append(weakref.ref(large))
        raise ZeroDivisionError

    def translates() -> None:
        large = Large()
        seen.append(weakref.ref(large))
        try:
            fails()
        except ZeroDivisionError as error:
            raise TrainingError("it failed") from error

    try:
        translates()
    except TrainingError as error:
        assert all(reference() is not None for reference in seen)
        placement.clear_frames(error)
        told = "".join(traceback.format_exception(type(error), error, error.__traceback__))
    assert [reference() for reference in seen] == [None, None]
    assert "in translates" in told and "in fails" in told


def test_a_card_without_a_number_is_the_current_one(monkeypatch, tiny_file, tmp_path):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert [placement.indexed(torch.device(name)) for name in ("cuda", "cuda:1", "cpu")] == [
        torch.device("cuda", 3), torch.device("cuda", 1), CPU]
    for device in (None, torch.device("cuda")):
        host = StandaloneHost(tiny_file, lora_folder=tmp_path, runs_folder=tmp_path / "runs", device=device)
        assert host.outline().device == torch.device("cuda", 3)


def test_tied_weights_stay_tied(card):
    weight = torch.nn.Parameter(torch.randn(4, 4))
    other = torch.nn.Parameter(weight.data)
    with offload([weight, other, weight]):
        assert weight.data_ptr() == other.data_ptr()
        assert card.moves == [CPU]
    assert weight.data_ptr() == other.data_ptr()
    with torch.no_grad():
        weight.fill_(2)
    assert other.eq(2).all()


def test_what_others_place_meanwhile_stays_where_they_put_it(card):
    mine, theirs = torch.randn(3), torch.randn(3)
    with offload([mine, theirs]):
        theirs.data = on_card = card.copy_to(theirs.data, CARD)
    assert theirs.data_ptr() == on_card.data_ptr()
    assert card.device_of(mine) == CARD


def test_the_stand_alone_host_has_on_its_device_what_was_asked_for_and_nothing_else(card, host):
    with host.lease() as leased:
        before = {name: facts(tensor) for name, tensor in leased.tensors.items()}
        assert all(card.device_of(tensor) == CPU for tensor in leased.tensors.values())
        now = leased.reload_parts({"unet"})
        assert now.keys() == before.keys()
        there = {name for name, tensor in now.items() if card.device_of(tensor) == CARD}
        assert there == {name for name in before if name.startswith("model.diffusion_model.")}
        assert all(leased.tensors[name].data_ptr() == now[name].data_ptr() for name in before), "the old place is held"
    with host.lease() as leased:
        assert {name for name, tensor in leased.tensors.items() if card.device_of(tensor) == CARD} == there
        assert {name: facts(tensor) for name, tensor in leased.tensors.items()} == before


def test_what_was_offloaded_can_be_reloaded_and_offloaded_again(card, host):
    with host.lease() as leased:
        before = {name: facts(tensor) for name, tensor in leased.tensors.items()}
        leased.reload_parts(placement.PARTS)
        leased.offload_parts({"unet", "text"})
        now = leased.reload_parts({"unet", "vae"})
        away = {name for name, tensor in placement.weights_of(now).items() if card.device_of(tensor) == CPU}
        assert away == {name for name in before if name.startswith("cond_stage_model.")}
        assert {name: facts(tensor) for name, tensor in now.items()} == before
        again = leased.offload_parts({"unet"})
        assert card.device_of(again["model.diffusion_model.out.2.weight"]) == CPU


@pytest.mark.parametrize("full", [CPU, CARD])
def test_a_full_machine_is_said_in_our_words_and_nothing_has_moved(card, host, full):
    with host.lease() as leased:
        if full == CPU:
            leased.reload_parts({"vae"})
        before = {name: card.device_of(tensor) for name, tensor in leased.tensors.items()}
        placement.copy_to = refusing(card, device=full, after=3)
        with pytest.raises(TrainingError, match="moving parts of the model (off|back to) the device"):
            leased.offload_parts({"vae"}) if full == CPU else leased.reload_parts({"vae"})
        assert {name: card.device_of(tensor) for name, tensor in leased.tensors.items()} == before
