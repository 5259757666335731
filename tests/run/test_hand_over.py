"""The model is given to others between two steps, and what is learnt does not depend on it."""

from __future__ import annotations

import contextlib
import gc
import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lib_lora_train import events
from lib_lora_train.adapters.flat import FlatWeights
from lib_lora_train.adapters.lora import LoRALayer
from lib_lora_train.dataset.progress import ShouldStop
from lib_lora_train.errors import HostError, Interrupted
from lib_lora_train.host import placement
from lib_lora_train.host.port import LeasedModel, never
from lib_lora_train.host.standalone import StandaloneHost
from lib_lora_train.model.ops.layers import Layers
from lib_lora_train.settings import parse
from lib_lora_train.training.optimizers import RunOptimizer
from tests.jobs import run_settings
from tests.pretended_card import CARD, CPU, PretendedCard


class BusyHost(StandaloneHost):
    """A host whose model others want, too: before each piece of work that `wants` names by its number.

    Others leave ruins: what was lent before holds no numbers afterwards, and the model lies elsewhere in memory.
    """

    def __init__(self, checkpoint: Path, folder: Path, *, wants: Callable[[int], bool] = lambda _: True) -> None:
        super().__init__(checkpoint, lora_folder=folder / "loras", runs_folder=folder / "runs")
        self.asked = self.handed = 0
        self.after: Callable[[], None] = lambda: None
        self._wants = wants
        self.leased: LeasedModel | None = None

    @contextlib.contextmanager
    def lease(self, *, stop: ShouldStop = never) -> Iterator[LeasedModel]:
        with super().lease() as leased:
            leased.tensors = {name: tensor.clone() for name, tensor in leased.tensors.items()}
            leased.others_waiting, leased.yield_model = self.others_waiting, lambda report: self.yield_model(leased, stop)
            self.leased = leased
            yield leased

    def others_waiting(self) -> bool:
        self.asked += 1
        return self._wants(self.asked)

    def yield_model(self, leased: LeasedModel, stop: ShouldStop):
        self.handed += 1
        moved = {name: tensor.clone() for name, tensor in leased.tensors.items()}
        for tensor in leased.tensors.values():
            tensor.fill_(torch.nan if tensor.is_floating_point() else 0)
        leased.tensors = moved
        torch.rand(3), torch.set_grad_enabled(True)
        self.after()
        return None if stop() else leased.tensors


def learnt(seen: list[events.Event]) -> int:
    """Steps that were reported."""
    return sum(isinstance(event, events.Step) for event in seen)


def settings(images: Path, name: str = "zzk", **changes: object):
    return parse({"train_data_dir": str(images), "output_name": name, "resolution": "64", "min_bucket_reso": 64,
                  "num_repeats": 1, "max_train_steps": 4, "sample_images": False, "validation": False, "network_dim": 4,
                  "save_precision": "float", "learning_rate": 1e-3, **changes})


@pytest.mark.parametrize("changes", [
    {"validation": True}, {"network_train_unet_only": False, "train_batch_size": 2},
    {"color_aug": True, "shuffle_caption": True}, {"base_weights": "int8"}, {"channels_last": "on"}],
    ids=["cached and measured", "with text encoder", "encoded anew", "on copies in eight bits", "on copies laid out anew"])
def test_the_result_is_byte_for_byte_that_of_a_run_nobody_interrupted(images, tiny_file, tmp_path, changes):
    # The same host, since a CPU computes in another order where tensors begin at another multiple of 64 bytes.
    quiet = BusyHost(tiny_file, tmp_path / "quiet", wants=lambda _: False)
    alone = load_file(run_settings(settings(images, **changes), quiet, report=lambda _: None, stop=lambda: "").path)
    busy = BusyHost(tiny_file, tmp_path / "busy")
    finished = run_settings(settings(images, **changes), busy, report=lambda _: None, stop=lambda: "")
    shared = load_file(finished.path)
    # Before each of at least four steps, and between the images that are encoded before.
    assert finished.outcome == "done" and busy.handed > 4
    assert alone.keys() == shared.keys()
    assert all(torch.equal(alone[key], shared[key]) for key in alone)


def test_nobody_is_asked_where_the_user_refuses(images, tiny_file, tmp_path):
    busy = BusyHost(tiny_file, tmp_path)
    run_settings(settings(images, yield_to_generations=False), busy, report=lambda _: None, stop=lambda: "")
    assert busy.handed == 0


@pytest.mark.parametrize("changes", [{}, {"base_weights": "int8"}, {"channels_last": "on"}],
                         ids=["borrowed", "in eight bits", "laid out anew"])
def test_who_stops_while_others_have_the_model_keeps_what_was_learnt(images, tiny_file, tmp_path, changes):
    busy, stopped, seen = BusyHost(tiny_file, tmp_path, wants=lambda _: learnt(seen) == 3), [], []

    busy.after = lambda: stopped.append("save")
    finished = run_settings(settings(images, **changes), busy, report=seen.append, stop=lambda: "".join(stopped))
    assert (finished.outcome, finished.steps) == ("stopped", 3)
    whole = run_settings(settings(images, "whole", max_train_steps=3, lr_scheduler="constant"), busy, report=lambda _: None,
                    stop=lambda: "")
    # The schedule differs with the length of the run; the names and shapes are what a file of three steps has.
    assert load_file(finished.path).keys() == load_file(whole.path).keys()


def test_who_stops_while_pictures_are_encoded_leaves_nothing_behind(images, tiny_file, tmp_path):
    busy, stopped = BusyHost(tiny_file, tmp_path), []
    busy.after = lambda: stopped.append("save")
    with pytest.raises(Interrupted):
        run_settings(settings(images), busy, report=lambda _: None, stop=lambda: "".join(stopped))
    assert not list(busy.lora_folder.iterdir())


def test_a_model_that_does_not_come_back_ends_the_run_with_what_was_learnt(images, tiny_file, tmp_path):
    seen = []
    busy = BusyHost(tiny_file, tmp_path, wants=lambda _: sum(isinstance(event, events.Step) for event in seen) == 3)

    def unload() -> None:
        raise HostError("The WebUI's model was unloaded", remedy="choose it again")
    busy.after = unload
    with pytest.raises(HostError, match="was unloaded.*zzk-step00000003"):
        run_settings(settings(images), busy, report=seen.append, stop=lambda: "")
    kept, = busy.lora_folder.iterdir()
    assert all(torch.isfinite(tensor).all() for tensor in load_file(kept).values())


@pytest.mark.parametrize("steps", [0, 1])
def test_nothing_of_the_lent_memory_is_held_while_others_have_it(images, tiny_file, tmp_path, steps):
    """What the trainer kept a view of could not be freed by a host that moves its model away to make room."""
    class Watched(torch.Tensor):
        """A tensor that can be watched; every view of it is one, too."""

    lent: set[int] = set()
    alive: list[int] = []

    class WatchingHost(BusyHost):
        @contextlib.contextmanager
        def lease(self, *, stop: ShouldStop = never):
            with super().lease(stop=stop) as leased:
                leased.tensors = {name: tensor.as_subclass(Watched) for name, tensor in leased.tensors.items()}
                lent.update(map(id, leased.tensors.values()))
                yield leased

        def yield_model(self, leased, stop):
            gc.collect()
            # What is computed from watched tensors is watched, too; here it is about the lent memory.
            memory = {tensor.untyped_storage().data_ptr() for tensor in leased.tensors.values()}
            alive.append(sum(type(thing) is Watched and id(thing) not in lent
                             and thing.untyped_storage().data_ptr() in memory for thing in gc.get_objects()))
            return super().yield_model(leased, stop)
    seen = []
    host = WatchingHost(tiny_file, tmp_path, wants=lambda asked: asked >= 4 and not alive and learnt(seen) == steps)
    run_settings(settings(images, max_train_steps=2, validation=True), host, report=seen.append, stop=lambda: "")
    assert alive == [0]


def test_what_is_trained_leaves_the_gpu_while_others_have_the_model_and_comes_back_the_same(
        images, tiny_file, tmp_path, monkeypatch):
    changes = {"network_train_unet_only": False, "mixed_precision": "bf16"}  # with copies in half precision
    kinds = (LoRALayer, FlatWeights, RunOptimizer)
    others = [thing for thing in gc.get_objects() if type(thing) in kinds]  # of other tests, whose logged errors hold them
    not_ours = set(map(id, others))

    def trained() -> list[torch.Tensor]:
        """All tensors of the LoRA's layers, of their buffers and of the optimizer, but for single numbers."""
        gc.collect()
        found: list[torch.Tensor | None] = []
        for thing in (thing for thing in gc.get_objects() if id(thing) not in not_ours):
            if type(thing) is LoRALayer:
                found += [*thing.parameters(), *(thing.delta().working or ())]
            elif type(thing) is FlatWeights:
                found += [thing.values, thing.gradient, thing.working, *(group.parameter for group in thing.groups)]
            elif type(thing) is RunOptimizer:
                found += [value for value in thing.state().values() if value.ndim]
        found += [tensor.grad for tensor in found if isinstance(tensor, torch.nn.Parameter)]
        return [tensor for tensor in found if tensor is not None and tensor.numel() > 1]

    class WatchingHost(BusyHost):
        def yield_model(self, leased, stop):
            seen.append([card.device_of(tensor) for tensor in trained()])
            return super().yield_model(leased, stop)
    quiet = BusyHost(tiny_file, tmp_path / "quiet", wants=lambda _: False)
    alone = load_file(run_settings(settings(images, **changes), quiet, report=lambda _: None, stop=lambda: "").path)
    seen, card = [], PretendedCard()
    monkeypatch.setattr(placement, "device_of", card.device_of)
    monkeypatch.setattr(placement, "copy_to", card.copy_to)
    busy = WatchingHost(tiny_file, tmp_path / "busy")
    shared = load_file(run_settings(settings(images, **changes), busy, report=lambda _: None, stop=lambda: "").path)
    assert {device for devices in seen for device in devices} == {CPU}
    assert len(seen[-1]) > 2 * len(seen[0]) > 0, "the last is of the training, the first is not"
    assert CARD in card.moves and all(torch.equal(alone[key], shared[key]) for key in alone)


@pytest.mark.parametrize("changes", [{"validation": True}, {"base_weights": "int8"}],
                         ids=["measured", "with copies of its own"])
def test_nothing_of_a_run_is_held_when_the_model_goes_back(images, tiny_file, tmp_path, changes):
    """The parts that lie aside need the room of the LoRA, its moments and our own copies."""
    def held() -> set[int]:
        gc.collect()
        return {id(thing) for thing in gc.get_objects() if type(thing) in (Layers, LoRALayer, FlatWeights, RunOptimizer)}

    left: list[set[int]] = []

    class LenderHost(BusyHost):
        @contextlib.contextmanager
        def lease(self, *, stop: ShouldStop = never):
            with super().lease(stop=stop) as leased:
                before = held()
                yield leased
                left.append(held() - before)

        def yield_model(self, leased, stop):
            assert held(), "the watch sees nothing"
            return super().yield_model(leased, stop)
    host = LenderHost(tiny_file, tmp_path, wants=lambda asked: asked == 4)
    run_settings(settings(images, **changes), host, report=lambda _: None, stop=lambda: "")
    assert host.handed == 1 and left == [set()]


def test_the_tensors_that_were_lent_first_are_left_as_others_made_them(images, tiny_file, tmp_path):
    busy = BusyHost(tiny_file, tmp_path, wants=lambda asked: asked % 2 == 0)
    with busy.lease() as borrowed:
        before = {name: digest(tensor) for name, tensor in borrowed.tensors.items()}
    run_settings(settings(images), busy, report=lambda _: None, stop=lambda: "")
    assert {name: digest(tensor) for name, tensor in busy.leased.tensors.items()} == before


def digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()).hexdigest()
