"""Weights in eight bits: how far off they may be, and what computes with them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lib_lora_train.adapters.network import AdapterNetwork
from lib_lora_train.adapters.targets import find_targets
from lib_lora_train.model import frozen
from lib_lora_train.model.ops import quantised
from lib_lora_train.model.ops.quantised import is_kernel, quantise
from lib_lora_train.model.ops.weights import is_nhwc_kernel
from tests.model.small_checkpoints import FAMILIES, HINTS, checkpoint, full_size, tokenizers
from tools.bench.memory import peak_allocated

KINDS = [pytest.param("int8"), pytest.param("fp8", marks=pytest.mark.skipif(
    not hasattr(torch, "float8_e4m3fn"), reason="this torch has no fp8"))]
DEVICES = [pytest.param("cpu"), pytest.param("cuda", marks=pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a CUDA device"))]
SHAPES = [(48, 32), (16, 24, 3, 3), (16, 24, 1, 1)]


def weights(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """Channels of very different sizes, one of them zero, one with a single large weight."""
    generator = torch.Generator().manual_seed(seed)
    tensor = torch.randn(shape, generator=generator)
    tensor *= torch.logspace(-6, 1, shape[0]).reshape(-1, *[1] * (len(shape) - 1))
    tensor[3] = 0
    tensor[5].view(-1)[0] = 40.0
    return tensor


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", SHAPES)
def test_an_int8_weight_is_off_by_half_of_its_channels_step_at_most(shape, device):
    exact = weights(shape).double()
    dense = quantise(exact.float().to(device), "int8").dense(torch.float32).cpu().double()
    step = exact.flatten(1).abs().amax(dim=1) / 127  # 255 even steps over the channel's range
    assert ((dense - exact).flatten(1).abs().amax(dim=1) <= step * (0.5 + 1e-5)).all()


@pytest.mark.skipif(not hasattr(torch, "float8_e4m3fn"), reason="this torch has no fp8")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", SHAPES)
def test_an_fp8_weight_is_off_by_a_sixteenth_of_itself_at_most(shape, device):
    exact = weights(shape).double()
    dense = quantise(exact.float().to(device), "fp8").dense(torch.float32).cpu().double()
    # e4m3: three bits behind the point, so half of 2⁻³; below its smallest normal number 2⁻⁶ even steps of 2⁻⁹, of 448.
    step = exact.flatten(1).abs().amax(dim=1, keepdim=True) / 448
    allowed = torch.maximum(exact.flatten(1).abs() / 16, step / 1024)
    assert ((dense - exact).flatten(1).abs() <= allowed * (1 + 1e-5)).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_adds_only_its_own_rounding(kind, dtype):
    kernel = quantise(weights((48, 32)), kind)
    assert torch.equal(kernel.dense(dtype), kernel.dense(torch.float32).to(dtype))


@pytest.mark.parametrize("kind", KINDS)
def test_it_looks_like_what_it_replaces(kind):
    exact = weights((16, 24, 3, 3)).to(torch.float16).contiguous(memory_format=torch.channels_last)
    kernel = quantise(exact, kind)
    assert (kernel.shape, kernel.device, is_nhwc_kernel(kernel)) == (exact.shape, exact.device, True)
    assert not is_nhwc_kernel(quantise(exact.contiguous(), kind)) and not is_nhwc_kernel(quantise(exact.flatten(1), kind))
    assert kernel.nbytes == exact.numel() + 4 * 16
    assert kernel.dense(torch.float32).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stored", [torch.float32, torch.float16])
def test_it_takes_one_fp32_copy_beside_the_result_and_leaves_the_hosts_weight_alone(kind, stored):
    large, activities = torch.ones(64, 512, 3, 3, dtype=stored), [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        quantise(large, kind)
    assert peak_allocated(profile) <= 1.01 * large.numel() * (4 + 1)
    lent = weights((48, 32)).to(stored)
    before = lent.clone()
    quantise(lent, kind)
    assert torch.equal(lent, before)


@pytest.mark.parametrize("kind, most", [("int8", 0.01), ("fp8", 0.04)])
def test_a_layers_output_is_off_by_a_percent_or_so(kind, most):
    if kind == "fp8" and not hasattr(torch, "float8_e4m3fn"):
        pytest.skip("this torch has no fp8")
    generator = torch.Generator().manual_seed(1)
    linear, x = torch.randn(320, 640, generator=generator), torch.randn(77, 640, generator=generator)
    exact = F.linear(x, linear)
    assert (F.linear(x, quantise(linear, kind).dense(torch.float32)) - exact).norm() / exact.norm() < most
    conv, image = torch.randn(32, 64, 3, 3, generator=generator), torch.randn(2, 64, 8, 8, generator=generator)
    exact = F.conv2d(image, conv, padding=1)
    assert (F.conv2d(image, quantise(conv, kind).dense(torch.float32), padding=1) - exact).norm() / exact.norm() < most


@pytest.mark.parametrize("family", FAMILIES)
def test_nearly_all_of_a_published_unet_is_replaced_and_no_norm_bias_or_embedding(family):
    prefix = "model.diffusion_model."
    shapes = {name[len(prefix):]: t.shape for name, t in full_size(family).items() if name.startswith(prefix)}
    replaced = {name for name, shape in shapes.items() if is_kernel(name, len(shape))}
    assert sum(shapes[name].numel() for name in replaced) > 0.98 * sum(shape.numel() for shape in shapes.values())
    kept = shapes.keys() - replaced
    assert {name for name in kept if len(shapes[name]) > 1} == {
        name for name in shapes if name.endswith(".weight") and name.startswith(
            ("input_blocks.0.0.", "out.2.", "time_embed.", "label_emb."))}


@pytest.mark.parametrize(("family", "kind"), [
    ("sd1", "int8"), pytest.param("sdxl", "fp8", marks=pytest.mark.skipif(
        not hasattr(torch, "float8_e4m3fn"), reason="this torch has no fp8"))])
def test_a_lora_learns_on_a_quantised_base_and_serves_the_ordinary_one(family, kind):
    model = frozen.build(checkpoint(family), hints=HINTS[family], tokenizers=tokenizers(family))
    true = dict(model.unet.tensors)
    targets = find_targets(model.components, family=model.architecture.family, text_encoder=False)
    network = AdapterNetwork.build(targets, rank=4, alpha=4.0, seed=0)
    config = model.architecture.unet
    generator = torch.Generator().manual_seed(0)
    x, target = (torch.randn(2, 4, 8, 8, generator=generator) for _ in range(2))
    context = torch.randn(2, 77, config.context_dim, generator=generator)
    y = None if config.adm_channels is None else torch.randn(2, config.adm_channels, generator=generator)

    def loss() -> Tensor:
        prediction = model.unet(x, torch.tensor([100, 700]), context, y, adapters=network.adapters()["unet"])
        return (prediction - target).square().mean()

    copies = dict(quantised.quantised(model.unet.tensors, kind, device=torch.device("cpu")))
    model.unet.layers.replace(copies)
    assert model.unet.layers.copied_bytes == sum(true[name].numel() + 4 * len(true[name]) for name in copies)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2)
    losses = []
    for _ in range(8):
        losses.append(loss())
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.9 * losses[0]
    with torch.no_grad():
        on_quantised = loss()
        model.unet.layers.replace(true)
        assert abs(loss() - on_quantised) < 0.1 * (losses[0] - losses[-1])


def test_a_torch_without_fp8_is_told(monkeypatch):
    from lib_lora_train.errors import SettingError
    monkeypatch.delattr(torch, "float8_e4m3fn", raising=False)
    with pytest.raises(SettingError, match="int8"):
        quantise(weights((48, 32)), "fp8")
    assert quantise(weights((48, 32)), "int8").values.dtype == torch.int8
