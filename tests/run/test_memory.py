"""What the plan is told of a run, on the page and in the run, and how the leased model makes room for it."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lib_lora_train.adapters import file
from lib_lora_train.adapters.embedding import WordEmbedding
from lib_lora_train.adapters.network import AdapterNetwork
from lib_lora_train.adapters.targets import find_targets
from lib_lora_train.api import service
from lib_lora_train.api.service import plan
from lib_lora_train.dataset.examples import Example
from lib_lora_train.events import Planned, Warned
from lib_lora_train.host import placement, standalone
from lib_lora_train.host.port import LeasedModel
from lib_lora_train.host.standalone import StandaloneHost
from lib_lora_train.inputs.vae_batches import VaeBatches, encoding_bytes
from lib_lora_train.memory.device import budget_of
from lib_lora_train.model import frozen
from lib_lora_train.model.family import detect
from lib_lora_train.model.sd.text import TextConditioner
from lib_lora_train.model.sd.vae import VAE
from lib_lora_train.run import memory
from lib_lora_train.run.memory import encoding_budget, parts_not_needed, planned_layers, reachable_decoder
from lib_lora_train.settings import parse
from lib_lora_train.settings.dataset_config import subsets_of
from lib_lora_train.training import train_step
from tests.jobs import run_settings
from tests.pretended_card import CPU, PretendedCard

GPU = torch.device("cuda", 0)


def settings(images: Path, **changes: object) -> dict[str, object]:
    return {"train_data_dir": str(images), "output_name": "zzk", "resolution": "64", "min_bucket_reso": 64, "num_repeats": 1,
            "max_train_steps": 1, "network_dim": 4, "save_state": False, "sample_images": False,
            "validation": False, **changes}


@pytest.mark.parametrize("changes", [
    {}, {"network_train_unet_only": False}, {"network_train_unet_only": False, "text_encoder_lr": 0.0}, {"random_crop": True}],
    ids=["plain", "text trained", "text with no rate", "encoded in steps"])
def test_the_page_and_the_run_make_the_same_plan(images, host, changes):
    values = settings(images, memory_budget=4, **changes)
    said = plan(values, host=host)["estimate"].partition(" · ")[2]
    seen: list[object] = []
    run_settings(parse(values), host, report=seen.append, stop=lambda: "")
    assert [event.memory for event in seen if isinstance(event, Planned)] == [said]


def test_a_lora_that_is_continued_is_planned_with_the_ranks_of_its_file(host, tmp_path):
    with host.lease() as leased:
        model = frozen.build(leased.tensors, hints=leased.hints, tokenizers=leased.tokenizers)
    network = AdapterNetwork.build(
        find_targets(model.components, family=model.architecture.family, text_encoder=True), rank=7, alpha=1, seed=0)
    network.embeddings = (WordEmbedding.initial("zzk", count=2, text="cat", conditioner=model.text),)
    path = tmp_path / "before.safetensors"
    file.save(path, network.state_dict(), {}, dtype=torch.float32)
    chosen = parse({"network_weights": str(path), "network_dim": 4})
    outline = host.outline()
    layers = planned_layers(chosen, outline.tensors, detect(outline.tensors, outline.hints))
    assert {layer.target.key: layer.rank for layer in layers} == {target.key: 7 for target in network.targets}


def test_what_no_step_needs_is_what_is_cached_and_not_trained():
    def parts(**changes: object) -> set[str]:
        settings = parse(changes)
        (subset,) = subsets_of(settings)
        examples = [Example(Path("a.png"), "a, b", 1, "", 64, 64, subset=subset)]
        return set(parts_not_needed(settings, GPU, examples=examples))
    assert parts() == {"vae", "text"} and parts(shuffle_caption=True) == {"vae"} == parts(network_train_unet_only=False)
    assert parts(network_train_unet_only=False, text_encoder_lr=0.0) == {"vae", "text"}
    assert parts(train_trigger_embedding=True, trigger_word="zzk") == {"vae"}
    assert parts(color_aug=True) == parts(random_crop=True) == {"text"}
    assert parts_not_needed(parse({}), torch.device("cpu"), examples=[]) == frozenset()


def test_pictures_are_encoded_where_room_is_short_while_unet_and_text_encoders_wait(monkeypatch, host):
    free = [100]
    monkeypatch.setattr(memory, "free_bytes", lambda device: free[0])
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)

    def moved(parts):
        free[0] += 1000
        return leased.tensors
    with host.lease() as leased:
        model = dataclasses.replace(
            frozen.build(leased.tensors, hints=leased.hints, tokenizers=leased.tokenizers), device=GPU)
        monkeypatch.setattr(placement, "device_of", lambda tensor: GPU)
        asked: list[set[str]] = []
        monkeypatch.setattr(leased, "reload_parts", lambda parts: asked.append(set(parts)) or leased.tensors)
        monkeypatch.setattr(leased, "offload_parts", lambda parts: asked.append(set(parts)) or moved(parts))
        budget = encoding_budget("vae", parse({}), model, leased, AdapterNetwork([], {}))
        assert budget(100) == 100 and asked == [{"vae"}]
        assert budget(101) == 1100 and asked[1:] == [{"vae"}, {"unet", "text"}]
        # A budget that the model alone fills leaves nothing.
        assert encoding_budget("text", parse({"memory_budget": 0.47}), model, leased, AdapterNetwork([], {}))(1) == 0
        assert asked[3:] == [{"text"}, {"unet", "vae"}]
        everything = sum(t.numel() * t.element_size() for part in (*model.components.values(), model.vae.tensors)
                         for t in part.values())
        most = encoding_budget("vae", parse({"memory_budget": 1}), model, leased, AdapterNetwork([], {}))
        free[0] = 1 << 40
        assert most(1) == budget_of(1, torch.device("cpu"), ours=0) - everything - memory.CONTEXT - memory.WORKSPACES


@pytest.mark.parametrize(("free", "moves"), [(1 << 40, []), (0, [("off", {"unet", "text"})])], ids=["room", "no room"])
def test_a_sample_is_decoded_by_the_vae_and_each_part_is_where_it_was_afterwards(monkeypatch, host, free, moves):
    monkeypatch.setattr(memory, "free_bytes", lambda device: free)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    asked: list[tuple[str, set[str]]] = []
    with host.lease() as leased:
        model = dataclasses.replace(
            frozen.build(leased.tensors, hints=leased.hints, tokenizers=leased.tokenizers), device=GPU)
        on_gpu = set(map(id, placement.tensors_of(leased.tensors, {"unet"})))
        monkeypatch.setattr(placement, "device_of", lambda tensor: GPU if id(tensor) in on_gpu else CPU)
        monkeypatch.setattr(leased, "reload_parts", lambda parts: asked.append(("on", set(parts))) or leased.tensors)
        monkeypatch.setattr(leased, "offload_parts", lambda parts: asked.append(("off", set(parts))) or leased.tensors)
        for fails in (False, True):
            asked.clear()
            with pytest.raises(ZeroDivisionError) if fails else contextlib.nullcontext(), \
                    reachable_decoder(parse({}), model, leased, AdapterNetwork([], {})) as bring:
                bring((64, 64))
                assert asked == [("on", {"vae"}), *moves]
                assert 1 / (not fails)
            assert asked[1 + len(moves):] == [("off", {"vae", "text"}), ("on", {"unet"})]
            assert model.unet.tensors and model.vae.tensors


def test_the_time_is_estimated_where_the_device_is_idle_and_without_one_the_memory_still_is(monkeypatch, images, host):
    monkeypatch.setattr(service, "matrix_rate", lambda device, dtype, idle: 1e12 if idle() else None)
    time, _, memory_text = plan(settings(images), host=host)["estimate"].partition(" · ")
    assert time.startswith("about") and memory_text
    with host.lease():  # a run is on
        assert plan(settings(images), host=host)["estimate"] == memory_text


def test_eight_bits_without_a_card_are_said_to_save_nothing(images, host):
    seen: list[object] = []
    run_settings(parse(settings(images, base_weights="int8")), host, report=seen.append, stop=lambda: "")
    assert any("saves no memory" in event.message for event in seen if isinstance(event, Warned))


def test_room_is_asked_for_once_for_each_size_of_pictures_that_a_card_encodes():
    asked: list[int] = []
    work = VaeBatches(None, device=GPU, batch_size=0, warn=print, budget=lambda needed: asked.append(needed) or 1 << 40)
    assert [work.at_once(size) for size in ((256, 256), (512, 512), (256, 256))] == [8, 2, 8]
    assert asked == [encoding_bytes((256, 256)), encoding_bytes((512, 512))]
    VaeBatches(None, device=GPU, batch_size=4, warn=print, budget=lambda needed: asked.append(needed) or 0).at_once((256, 256))
    assert asked[2] == 4 * encoding_bytes((256, 256))


def test_parts_come_and_go_in_the_order_in_which_they_are_needed(monkeypatch, images, host):
    moves: list[tuple[str, set[str]]] = []

    def watched(name: str):
        original = getattr(LeasedModel, name)
        return lambda leased, parts: moves.append((name, set(parts))) or original(leased, parts)
    for name in ("offload_parts", "reload_parts"):
        monkeypatch.setattr(LeasedModel, name, watched(name))
    monkeypatch.setattr(memory, "parts_not_needed", lambda chosen, device, examples: frozenset({"vae", "text"}))
    run_settings(parse(settings(images)), host, report=lambda event: None, stop=lambda: "")
    first, *others = moves
    assert first == ("reload_parts", {"vae"})
    assert [move for move in others if move != first] == [
        ("offload_parts", {"vae"}), ("reload_parts", {"text"}), ("offload_parts", {"vae", "text"}), ("reload_parts", {"unet"})]


def test_only_the_part_in_use_is_on_the_gpu(monkeypatch, images, tiny_file, tmp_path):
    # What is computed on is the GPU here, so the CPU needs another name.
    card, seen = PretendedCard(gpu=CPU, cpu=torch.device("meta")), {"vae": set(), "text": set(), "unet": set()}
    for name, replacement in (("device_of", card.device_of), ("copy_to", card.copy_to), ("CPU", card.cpu)):
        monkeypatch.setattr(placement, name, replacement)
    monkeypatch.setattr(memory, "parts_not_needed", lambda chosen, device, examples: frozenset({"vae", "text"}))
    lent: dict[str, torch.Tensor] = {}

    def loaded(path: Path) -> dict[str, torch.Tensor]:
        lent.update({name: card.copy_to(tensor, card.cpu).detach() for name, tensor in load_file(path).items()})
        return lent
    monkeypatch.setattr(standalone, "load_file", loaded)

    def watch(owner: object, name: str, part: str) -> None:
        original = getattr(owner, name)

        def watched(*arguments: object, **named: object) -> object:
            first = arguments[-1]
            if not (isinstance(first, torch.Tensor) and first.is_meta):  # shapes alone are computed without weights
                seen[part].add(frozenset(other for other in placement.PARTS if any(
                    card.device_of(tensor) == CPU for tensor in placement.tensors_of(lent, {other}))))
            return original(*arguments, **named)
        monkeypatch.setattr(owner, name, watched)
    watch(VAE, "encode", "vae")
    watch(TextConditioner, "encode", "text")
    watch(train_step, "denoising_loss", "unet")
    host = StandaloneHost(tiny_file, lora_folder=tmp_path, runs_folder=tmp_path / "runs", device=CPU)
    run_settings(parse(settings(images)), host, report=lambda event: None, stop=lambda: "")
    assert seen == {part: {frozenset({part})} for part in seen}
