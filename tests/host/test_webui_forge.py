"""The model of Forge and Neo is leased as it lies there, on stand-ins for their modules; tests/webui asks the real ones."""

from __future__ import annotations

import dataclasses
import gc
import importlib
import runpy
import sys
import threading
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lib_lora_train.errors import HostError, ModelError
from lib_lora_train.events import Stage
from lib_lora_train.host import placement
from lib_lora_train.model import frozen
from lib_lora_train.model.family import FAMILIES
from tests.model import small_checkpoints

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "lib_lora_train.host.webui"
CPU = torch.device("cpu")


def tree(tensors: Mapping[str, Tensor]) -> nn.Module:
    """Modules with these parameters, as inference tensors."""
    root = nn.Module()
    with torch.inference_mode():
        for name, tensor in tensors.items():
            *path, leaf = name.split(".")
            module = root
            for step in path:
                if not hasattr(module, step):
                    module.add_module(step, nn.Module())
                module = getattr(module, step)
            module.register_parameter(leaf, nn.Parameter(tensor.clone()))
    for module in root.modules():
        if hasattr(module, "to_q"):
            module.heads = 4
    return root


class Patcher:
    """backend.patcher.base.ModelPatcher as far as it is used; `merge` is what painting with a LoRA does."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.lora_loader = model, SimpleNamespace(backup={})

    def merge(self) -> None:
        with torch.inference_mode():
            for name, parameter in list(self.model.named_parameters())[:3]:
                self.lora_loader.backup[name] = parameter
                self._put(name, nn.Parameter(parameter + 1))

    def refresh_loras(self) -> None:
        for name, parameter in self.lora_loader.backup.items():
            self._put(name, parameter)
        self.lora_loader.backup = {}

    def _put(self, name: str, parameter: nn.Parameter) -> None:
        owner, _, leaf = name.rpartition(".")
        setattr(self.model.get_submodule(owner), leaf, parameter)


class Objects(SimpleNamespace):
    """backend.diffusion_engine.base.ForgeObjects."""

    def shallow_copy(self) -> Objects:
        return Objects(**vars(self))


ENGINES = {"sd1": ("StableDiffusion", ["clip_l"]), "sd2": ("StableDiffusion2", ["clip_h"]),
           "sdxl": ("StableDiffusionXL", ["clip_l", "clip_g"])}


def engine_of(checkpoint: Mapping[str, Tensor], *, family: str = "sd1", kind: str = "") -> Any:
    """backend.diffusion_engine.sd15.StableDiffusion, that of another family, or what is called `kind` instead."""
    unet, vae, texts = FAMILIES[family].parts(checkpoint)
    name, parts = ENGINES[family]
    encoders = nn.Module()
    for part, text in zip(parts, texts, strict=True):
        encoders.add_module(part, encoder_of(text, part))
    engine = type(kind or name, (), {f"is_{family}": not kind})()
    engine.forge_objects_original = bare = Objects(
        unet=Patcher(nn.Module()), clip=SimpleNamespace(cond_stage_model=encoders, patcher=Patcher(encoders)),
        vae=SimpleNamespace(first_stage_model=tree(vae)))
    bare.vae.first_stage_model.scaling_factor = FAMILIES[family].latent_scale
    bare.unet.model.diffusion_model = tree(unet)
    bare.unet.model.predictor = SimpleNamespace(prediction_type="epsilon", alphas_cumprod=torch.linspace(0.99, 0.01, 1000))
    engine.model_config = SimpleNamespace(ztsnr=False)
    for part, end in zip(parts, ["_l", "_g"] if len(parts) > 1 else [""], strict=True):
        setattr(engine, f"text_processing_engine{end}", TextEngine(getattr(encoders, part)))
    return engine


class TextEngine:
    """backend.text_processing.classic_engine.ClassicTextProcessingEngine."""

    id_start, id_end, comma_token = 1, 2, None

    def __init__(self, text_encoder: nn.Module) -> None:
        self.text_encoder = text_encoder

    def tokenize(self, texts: list[str]) -> list[list[int]]:
        return [[3] for _ in texts]


def encoder_of(text: Mapping[str, Tensor], part: str) -> nn.Module:
    """backend.nn.clip.IntegratedCLIP. SD2's last layer is left out: its output is not used."""
    layers = 1 + max(int(name.split(".")[3]) for name in text if ".layers." in name)
    if part == "clip_h":
        layers -= 1
        text = {name: tensor for name, tensor in text.items() if f".layers.{layers}." not in name}
    encoder = nn.Module()
    encoder.transformer = tree(text)
    encoder.transformer.config = SimpleNamespace(num_attention_heads=2, hidden_act="gelu", num_hidden_layers=layers)
    if part != "clip_g":  # made for each encoder, and never written where the checkpoint has none
        encoder.transformer.text_projection = tree({"weight": torch.full((4, 4), torch.nan)})
    encoder.logit_scale = nn.Parameter(torch.tensor(torch.nan))
    embeddings = encoder.transformer.text_model.embeddings
    wrapper = nn.Module()
    wrapper.weight, wrapper.wrapped = embeddings.token_embedding.weight, embeddings.token_embedding
    embeddings.token_embedding = wrapper
    return encoder


def nothing(*_: object, **__: object) -> None:
    """In the place of what is not looked at."""


@pytest.fixture
def forge(tiny_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """A Forge that has not painted yet. `.choose(name)` is its drop-down, `.paint()` what the next picture does first."""
    lock, loads = threading.Lock(), []
    checkpoint = load_file(tiny_file)

    def info(name: str) -> SimpleNamespace:
        return SimpleNamespace(filename=str(tiny_file.with_name(name)), name_for_extra=name, title=name, sha256="", hash="")
    infos = {name: info(name) for name in (tiny_file.name, "other.safetensors", "broken.safetensors")}
    data = SimpleNamespace(sd_model=SimpleNamespace(), forge_loading_parameters={}, forge_hash="")

    def reload() -> None:
        wanted = data.forge_loading_parameters
        assert lock.locked()
        if data.forge_hash != str(wanted):
            data.sd_model = None
            if "broken" in wanted["checkpoint_info"].filename:
                raise ValueError("Failed to recognize model type!")
            loads.append(wanted["checkpoint_info"].name_for_extra)
            data.sd_model, data.forge_hash = engine_of(checkpoint), str(wanted)
            data.sd_model.sd_checkpoint_info = wanted["checkpoint_info"]

    networks = ModuleType("networks")
    networks.load_networks = lambda names, text, unet: None
    extension = type("Lora", (), {"__module__": "forge_lora"})()
    monkeypatch.setitem(sys.modules, "forge_lora", SimpleNamespace(networks=networks))
    state = SimpleNamespace(begin=nothing, end=nothing, interrupted=False, stopping_generation=False)
    modules, backend = ModuleType("modules"), ModuleType("backend")
    vars(modules).update(
        devices=SimpleNamespace(device=CPU), extra_networks=SimpleNamespace(extra_network_registry={"lora": extension}),
        processing=SimpleNamespace(), sd_models=SimpleNamespace(model_data=data, forge_model_reload=reload),
        progress=SimpleNamespace(add_task_to_queue=nothing, finished_tasks=[], pending_tasks={}, start_task=nothing,
                                 finish_task=nothing),
        shared=SimpleNamespace(state=state, opts=SimpleNamespace(
            CLIP_stop_at_last_layers=2, comma_padding_backtrack=16, sd_noise_schedule="Default")))
    backend.memory_management = SimpleNamespace(unload_all_models=nothing)
    monkeypatch.setitem(sys.modules, "modules", modules)
    monkeypatch.setitem(sys.modules, "backend", backend)
    before = set(sys.modules)
    access = importlib.import_module(f"{PACKAGE}.backend")
    lease = importlib.import_module(f"{PACKAGE}.lease")

    def choose(name: str) -> None:
        data.forge_loading_parameters = {"checkpoint_info": infos[name], "additional_modules": [], "unet_storage_dtype": None}

    def paint() -> Any:
        with lock:
            reload()
        return data.sd_model
    choose(tiny_file.name)
    yield SimpleNamespace(access=access, data=data, lock=lock, choose=choose, paint=paint, loads=loads, name=tiny_file.name,
                          checkpoint=checkpoint, info=infos, lease=lambda: lease.WebUILease(
                              access, lease.QueueLock(lock), placement.MisplacedTensors()))
    for name in set(sys.modules) - before:
        if name.startswith(f"{PACKAGE}."):
            del sys.modules[name]
            vars(sys.modules[PACKAGE]).pop(name.rpartition(".")[2], None)


def test_what_is_leased_is_the_checkpoint_by_reference_and_can_be_trained_on(forge):
    engine = forge.paint()
    with (lease := forge.lease()).leased():
        names = {name for name in forge.checkpoint if not name.endswith("position_ids")}
        assert set(lease.tensors) == names
        assert all(torch.equal(lease.tensors[name], forge.checkpoint[name]) for name in names)
        own = {parameter.data_ptr() for module in forge.access.modules(engine) for parameter in module.parameters()}
        assert {tensor.data_ptr() for tensor in lease.tensors.values()} <= own
        assert all(tensor.is_inference() for tensor in lease.tensors.values())
        model = frozen.build(lease.tensors, hints=lease.hints, tokenizers=lease.tokenizers)
        assert (model.architecture.family.name, model.architecture.unet.num_heads) == ("sd1", 4)
        assert (lease.clip_skip, lease.comma_padding_backtrack) == (2, 16)
        # An inference tensor cannot be saved for backward; what is computed with can.
        x = torch.zeros(1, 4, 8, 8, requires_grad=True)
        model.unet(x, torch.zeros(1), torch.zeros(1, 77, model.architecture.unet.context_dim), None).sum().backward()
        assert x.grad is not None
    assert not forge.lock.locked()


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_each_family_computes_what_its_checkpoint_does(forge, family):
    checkpoint = small_checkpoints.checkpoint(family)
    engine = engine_of(checkpoint, family=family)
    hints = dataclasses.replace(small_checkpoints.HINTS[family], text_activations=("gelu",) * len(FAMILIES[family].text))
    leased, own = (frozen.build(tensors, hints=hints) for tensors in (forge.access.collect(engine), checkpoint))
    for part, expected in zip((leased.unet, leased.vae), (own.unet, own.vae), strict=True):
        assert part.tensors.keys() == expected.tensors.keys()
        assert all(torch.equal(tensor, expected.tensors[name]) for name, tensor in part.tensors.items())
    ids = [torch.randint(0, 500, (1, 1, 77), generator=torch.Generator().manual_seed(0))] * len(own.text.encoders)
    condition, expected = leased.text.encode_ids(ids), own.text.encode_ids(ids)
    assert torch.equal(condition.context, expected.context)
    assert family != "sdxl" or torch.equal(condition.pooled, expected.pooled)


def test_what_it_is_shows_before_it_is_loaded_and_the_lease_loads_it(forge):
    webui = importlib.import_module(f"{PACKAGE}.model_access")
    assert forge.access.current() is None
    checkpoint, outline = webui.describe_pending(forge.access.pending())
    assert (checkpoint.name, checkpoint.family, checkpoint.refusal) == (forge.name, "sd1", "") and outline is not None
    assert forge.loads == []
    with (lease := forge.lease()).leased():
        assert lease.checkpoint.family == "sd1" and forge.access.pending() is None
    assert forge.loads == [forge.name]


def test_a_file_whose_header_tells_that_it_is_not_trained_on_is_refused_before_it_is_loaded(forge, tmp_path):
    webui = importlib.import_module(f"{PACKAGE}.model_access")
    path = tmp_path / "flux.safetensors"
    save_file({"model.diffusion_model.double_blocks.0.img_attn.qkv.weight": torch.zeros(2, 2)}, path)
    pickled = tmp_path / "pickled.ckpt"
    pickled.write_bytes(b"")
    info = SimpleNamespace(filename=str(path), name_for_extra="flux", title="flux", sha256="", hash="")
    with pytest.raises(ModelError, match="a Flux model"):
        webui.refuse_pending(info)
    assert "Flux" in webui.describe_pending(info)[0].refusal
    webui.refuse_pending(SimpleNamespace(**{**vars(info), "filename": str(pickled)}))  # what it is shows later


def test_a_checkpoint_that_the_host_cannot_load_is_a_sentence(forge):
    forge.choose("broken.safetensors")
    with pytest.raises(HostError, match="Failed to recognize"), forge.lease().leased():
        raise AssertionError("nothing is leased")
    assert not forge.lock.locked() and forge.access.current() is None


def test_a_lora_that_was_merged_before_is_out_of_the_weights_and_stays_out(forge):
    engine = forge.paint()
    for patcher in (engine.forge_objects_original.unet, engine.forge_objects_original.clip.patcher):
        patcher.merge()
    with (lease := forge.lease()).leased():
        assert all(torch.equal(lease.tensors[name], forge.checkpoint[name]) for name in lease.tensors)
        lease.queue.yield_to_others = lambda stop: engine.forge_objects_original.unet.merge()  # a picture in between
        tensors = lease.yield_model(lambda _: None)
        assert all(torch.equal(tensors[name], forge.checkpoint[name]) for name in tensors)
    assert not engine.forge_objects_original.unet.lora_loader.backup


def test_the_wish_for_another_checkpoint_does_not_disturb_and_its_loading_is_waited_out(forge):
    told, first = [], weakref.ref(forge.paint().text_processing_engine)

    def others(stop: object) -> None:
        forge.lock.release()
        forge.paint()
        forge.lock.acquire()

    def report(event: object) -> None:  # the user sees whom it waits for, and chooses again
        told.append(event)
        forge.choose(forge.name)
    with (lease := forge.lease()).leased():
        forge.choose("other.safetensors")
        lease.version_check.check()
        lease.queue.yield_to_others = lambda stop: None  # whoever waited painted nothing
        assert lease.yield_model(told.append) is not None and not told and forge.loads == [forge.name]
        lease.queue.yield_to_others = others
        assert lease.yield_model(report) is not None
        gc.collect()
        assert first() is None and lease.tokenizers[0].encode("a") == [3]  # of what was loaded first nothing is kept
    assert forge.loads == [forge.name, "other.safetensors", forge.name]
    assert [type(event) for event in told] == [Stage] and forge.name in told[0].name


def test_embeddings_that_become_fp32_with_the_first_picture_are_the_same_weights(forge):
    with (lease := forge.lease()).leased():
        text = forge.data.sd_model.forge_objects_original.clip.cond_stage_model.clip_l.transformer.text_model
        with torch.inference_mode():
            text.embeddings.position_embedding.half()

        def first_picture(stop: object) -> None:
            with torch.inference_mode():
                text.embeddings.position_embedding.float()
        lease.queue.yield_to_others = first_picture
        assert lease.yield_model(lambda _: None) is not None


def test_a_parameter_in_the_place_of_a_leased_one_is_noticed(forge):
    engine = forge.paint()
    with (lease := forge.lease()).leased():
        lease.version_check.check()
        placement.move(list(engine.forge_objects_original.vae.first_stage_model.parameters()), CPU)
        lease.version_check.check()
        engine.forge_objects_original.unet.merge()
        with pytest.raises(HostError):
            lease.version_check.check()


class Packed(Tensor):
    """A tensor that holds its numbers as it likes, as Neo's QuantizedTensor."""


def packed(parameter: Tensor) -> Tensor:
    return nn.Parameter(parameter.detach().clone().as_subclass(Packed), requires_grad=False)


def gguf(parameter: Tensor) -> Tensor:
    stored = nn.Parameter(parameter.detach().clone())
    stored.gguf_cls = type("Q4_0", (), {})
    return stored


def nf4(parameter: Tensor) -> Tensor:
    stored = nn.Parameter(torch.zeros(8, dtype=torch.uint8), requires_grad=False)
    stored.quant_type, stored.bnb_quantized = "nf4", True
    return stored


def fp8(parameter: Tensor) -> Tensor:
    return nn.Parameter(parameter.detach().to(torch.float8_e4m3fn), requires_grad=False)


@pytest.mark.parametrize(("store", "said"), [(packed, "Packed"), (gguf, "GGUF (Q4_0)"), (nf4, "nf4"), (fp8, "fp8")])
def test_compressed_weights_are_refused_by_how_they_are_stored(forge, store, said):
    engine = forge.paint()
    layer = engine.forge_objects_original.unet.model.diffusion_model.get_submodule("middle_block.0.in_layers.2")
    layer.weight = store(layer.weight)
    assert forge.access.describe(engine).family == "" and said in forge.access.describe(engine).refusal
    with pytest.raises(ModelError) as refused, forge.lease().leased():
        raise AssertionError("nothing is leased")
    assert said in str(refused.value) and not forge.lock.locked()


@pytest.mark.parametrize(("kind", "said"), [("Flux", "a Flux model"), ("StableDiffusion3", "Stable Diffusion 3"),
                                            ("Anima", "an Anima model"), ("StableDiffusionXLRefiner", "refiner")])
def test_other_kinds_are_refused_by_name(forge, kind, said):
    engine = forge.data.sd_model = engine_of(forge.checkpoint, kind=kind)
    engine.sd_checkpoint_info = forge.info[forge.name]
    forge.data.forge_hash = str(forge.data.forge_loading_parameters)
    checkpoint = forge.access.describe(engine)
    assert checkpoint.family == "" and said in checkpoint.refusal and checkpoint.refusal.count(".") <= 3
    with pytest.raises(ModelError, match=said), forge.lease().leased():
        raise AssertionError("nothing is leased")


def test_a_webui_that_is_not_known_shows_a_tab_with_a_sentence(monkeypatch: pytest.MonkeyPatch):
    registered: dict[str, list[Any]] = {name: [] for name in ("ui_tabs", "ui_settings", "app_started", "script_unloaded")}
    modules, callbacks = ModuleType("modules"), ModuleType("modules.script_callbacks")
    for name, found in registered.items():
        setattr(callbacks, f"on_{name}", found.append)
    monkeypatch.setitem(sys.modules, "modules", modules)
    monkeypatch.setitem(sys.modules, "modules.script_callbacks", callbacks)
    runpy.run_path(str(ROOT / "scripts" / "lora_train.py"))
    (build,) = registered["ui_tabs"]
    ((tab, title, _),) = build()
    said = [block.value for block in tab.blocks.values() if getattr(block, "elem_id", "") == "lora_train_unsupported"]
    assert title == "Train LoRA" and len(said) == 1 and "Forge" in said[0]
    assert not registered["app_started"]
