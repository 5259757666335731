"""A run trains on top of other LoRAs as on a model that has them in its weights, and leaves the leased weights as they are."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lib_lora_train.adapters import file
from lib_lora_train.adapters.base import merged
from lib_lora_train.adapters.network import AdapterNetwork
from lib_lora_train.adapters.stack import WeightedLora, merge_into
from lib_lora_train.errors import LoraFileError, SettingError
from lib_lora_train.events import Step
from lib_lora_train.host.lease import frozen_model
from lib_lora_train.host.standalone import StandaloneHost
from lib_lora_train.run.memory import plan_for, planned_layers
from lib_lora_train.run.on_top import loras_on_top
from lib_lora_train.run.planning import plan_job
from lib_lora_train.run.selection import select
from lib_lora_train.settings import Settings, parse
from lib_lora_train.settings.allowed_paths import AllowedPaths
from tests.jobs import run_settings

UNET = "model.diffusion_model."
CHEAP = {"resolution": "64", "num_repeats": 1, "max_train_steps": 1, "network_dim": 2, "validation": False,
         "sample_images": False, "save_precision": "float", "save_state": False}


def network_on(host: StandaloneHost, path: Path, **values: object) -> AdapterNetwork:
    """A network with random numbers, and its file."""
    with host.lease() as leased:
        model = frozen_model(leased, Settings())
        chosen = parse({"network_dim": 2, **values}).network
        selected = select(chosen, model.components, family=model.architecture.family)
        network = AdapterNetwork.build(selected.targets, rank=2, alpha=2, seed=1, sizes=selected.sizes, kind=selected.kind)
        network.begin_at(model.components, network.layers)
    with torch.no_grad():
        for number, parameter in enumerate(network.parameters()):
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)))
    path.parent.mkdir(exist_ok=True)
    file.save(path, network.state_dict(), {"ss_base_model_version": "sd_v1"}, dtype=torch.float32)
    return network


@pytest.mark.parametrize("values", [{}, {"dora_wd": True, "conv_dim": 2}, {"network_module": "OFT"}], ids=str)
@torch.no_grad()
def test_the_model_computes_with_merged_copies_and_the_leased_weights_stay(host: StandaloneHost, tmp_path: Path,
                                                                          values: dict[str, object]) -> None:
    networks = [network_on(host, tmp_path / "first.safetensors"), network_on(host, tmp_path / "second.safetensors", **values)]
    loras = [WeightedLora(tmp_path / "first.safetensors", 1, 0.5), WeightedLora(tmp_path / "second.safetensors", 1, 0.8)]
    generator = torch.Generator().manual_seed(0)
    with host.lease() as leased:
        before = {name: tensor.clone() for name, tensor in leased.tensors.items()}
        expected = dict(before)
        for network, lora in zip(networks, loras, strict=True):
            network.set_multiplier(lora.unet_weight)
            for target in network.targets:
                name = f"{UNET}{target.module}.weight"
                expected[name] = merged(network.layers[target.key], expected[name])
        model = frozen_model(leased, Settings())
        merge_into(model, loras)
        x, t = torch.randn(1, 4, 8, 8, generator=generator), torch.tensor([500])
        context = torch.randn(1, 77, model.architecture.unet.context_dim, generator=generator)
        merged_model = frozen_model(dataclasses.replace(leased, tensors=expected), Settings())
        torch.testing.assert_close(model.unet(x, t, context), merged_model.unet(x, t, context), rtol=1e-4, atol=1e-5)
        assert all(torch.equal(leased.tensors[name], tensor) for name, tensor in before.items())
        model.release()  # as where the WebUI wants to paint meanwhile
        model.rebind(leased.tensors)
        torch.testing.assert_close(model.unet(x, t, context), merged_model.unet(x, t, context), rtol=1e-4, atol=1e-5)


def first_loss(host: StandaloneHost, images: Path, name: str, **values: object) -> float:
    seen: list[object] = []
    run_settings(parse({**CHEAP, "train_data_dir": str(images), "output_name": name, **values}), host, report=seen.append,
                 stop=lambda: "")
    return next(event.loss for event in seen if isinstance(event, Step))


def test_a_run_begins_where_the_other_loras_are_and_says_so_in_its_settings(host: StandaloneHost, images: Path) -> None:
    path = host.lora_folder / "style.safetensors"
    network_on(host, path)
    plain = first_loss(host, images, "plain")
    on_top = first_loss(host, images, "top", train_on_top_of="<lora:style:1>")
    assert on_top != plain
    plan = plan_job(parse({**CHEAP, "train_data_dir": str(images), "output_name": "x", "train_on_top_of": "<lora:style:1>"}),
                    host)
    assert plan.settings.network.train_on_top_of == f"{path.absolute()}:1"


def test_the_copies_are_counted_in_the_memory_plan(host: StandaloneHost, images: Path, tmp_path: Path) -> None:
    network, outline = network_on(host, tmp_path / "style.safetensors"), host.outline()
    settings = parse({**CHEAP, "train_data_dir": str(images), "output_name": "x"})
    plan = plan_job(settings, host)
    with host.lease() as leased:
        architecture = frozen_model(leased, settings).architecture

    def copies(loras: list[WeightedLora]) -> int:
        return plan_for(plan, tensors=outline.tensors, architecture=architecture, device=torch.device("cpu"),
                        dtype=torch.float32, layers=planned_layers(settings, outline.tensors, architecture),
                        on_top=loras).predicted.get("copies", 0)

    weights: list[Tensor] = [outline.tensors[f"{UNET}{target.module}.weight"] for target in network.targets]
    assert copies([]) == 0
    assert copies([WeightedLora(tmp_path / "style.safetensors")]) == sum(weight.numel() * 4 for weight in weights)


def test_weights_and_paths_are_read_and_what_is_not_understood_is_refused(host: StandaloneHost, tmp_path: Path) -> None:
    network_on(host, host.lora_folder / "a.safetensors")
    path = host.lora_folder / "a.safetensors"

    def found(text: str, *, family: str = "sd1", of: StandaloneHost = host) -> list[tuple[Path, float, float]]:
        loras = loras_on_top(parse({"train_on_top_of": text}), of, family=family)
        return [(lora.path, lora.text_weight, lora.unet_weight) for lora in loras]

    assert found("") == []
    assert found(f"<lora:a:0.5>, {path}; {path}:-0.25") == [(path, 0.5, 0.5), (path, 1, 1), (path, -0.25, -0.25)]
    assert found("<lora:a:0.5:0.7>") == [(path, 0.5, 0.7)]
    for text, error in (("a picture", SettingError), (f"{path}:much", SettingError), ("<lora:b:1>", LoraFileError),
                        (f"{tmp_path / 'none.safetensors'}:1", LoraFileError)):
        with pytest.raises(error):
            found(text)
    with pytest.raises(LoraFileError, match="SD2"):
        found("<lora:a:1>", family="sd2")
    narrow = StandaloneHost(tmp_path, lora_folder=host.lora_folder, runs_folder=tmp_path)
    narrow.allowed = AllowedPaths((tmp_path / "elsewhere",), (), "")
    with pytest.raises(SettingError, match="train_on_top_of"):
        found("<lora:a:1>", of=narrow)
