"""The lender's tensors are used where they lie, and come back as they were lent."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lib_lora_train.adapters.lora import LoRALayer
from lib_lora_train.model.frozen import FrozenModel, build
from lib_lora_train.model.ops.convolution import frozen_conv2d
from lib_lora_train.model.ops.linear import frozen_linear
from lib_lora_train.model.ops.weights import borrowed
from lib_lora_train.model.sd.text import size_vector
from tests.model.small_checkpoints import CONTEXT, FAMILIES, HINTS, POOLED, checkpoint, tokenizers


def trained_layer(weight: Tensor) -> LoRALayer:
    """One of rank 1 that changes something."""
    generator = torch.Generator().manual_seed(0)
    down, up = torch.empty(1, weight.shape[1]), torch.empty(weight.shape[0], 1)
    return LoRALayer(down.uniform_(-1, 1, generator=generator).mul_(weight.shape[1] ** -0.5), up.normal_(std=0.1), alpha=1.0)


def adapters_of(model: FrozenModel) -> dict[str, dict[str, LoRALayer]]:
    """One for each layer that is usually trained."""
    def trained(name: str, tensor: Tensor) -> bool:
        return name.endswith(".weight") and tensor.ndim > 1 and any(
            part in name for part in (".attn", ".ff.", ".proj_", "self_attn", ".mlp."))

    return {component: {name.removesuffix(".weight"): trained_layer(tensor) for name, tensor in tensors.items()
                        if trained(name, tensor)} for component, tensors in model.components.items()}


def model_of(family: str, tensors: dict[str, Tensor]) -> FrozenModel:
    return build(tensors, hints=HINTS[family], tokenizers=tokenizers(family))


def loss_of(model: FrozenModel, adapters: dict[str, dict[str, LoRALayer]], *, dtype: torch.dtype = torch.float32,
            checkpointing: bool = False) -> Tensor:
    """One training step's loss, through text encoders and UNet."""
    text = model.text.encode([model.text.tokenize("11 22")], adapters=adapters, dtype=dtype)
    y = None if text.pooled is None else size_vector(text.pooled, original=(64, 64), crop=(0, 0), target=(64, 64))
    x = torch.randn(1, 4, 8, 16).to(dtype)
    prediction = model.unet(x, torch.tensor([500]), text.context, y, adapters=adapters["unet"],
                            checkpointed=model.unet.checkpointable if checkpointing else ())
    return prediction.float().square().mean()


def step(model: FrozenModel, *, dtype: torch.dtype = torch.float32, checkpointing: bool = False) -> Tensor:
    """The loss after its backward pass, which must have reached the adapters with gradients that are numbers."""
    adapters = adapters_of(model)
    loss = loss_of(model, adapters, dtype=dtype, checkpointing=checkpointing)
    loss.backward()
    trained = [factor for layers in adapters.values() for layer in layers.values() for factor in layer.parameters()]
    reached = [factor.grad for factor in trained if factor.grad is not None]
    assert len(reached) >= 0.8 * len(trained)  # the last layers of SD2's and SDXL's text encoders are not used
    assert all(gradient.isfinite().all() for gradient in reached) and any(gradient.any() for gradient in reached)
    return loss


@pytest.mark.parametrize("family", FAMILIES)
def test_every_tensor_of_unet_and_vae_lies_where_it_was(family: str) -> None:
    tensors = checkpoint(family)
    model = model_of(family, tensors)
    for prefix, ours in (("model.diffusion_model.", model.unet.tensors), ("first_stage_model.", model.vae.tensors)):
        lent = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        assert set(ours) == set(lent)
        for name, tensor in ours.items():
            assert tensor.data_ptr() == lent[name].data_ptr() and tensor.shape == lent[name].shape


@pytest.mark.parametrize("family", FAMILIES)
def test_every_tensor_of_the_text_encoders_lies_inside_a_borrowed_storage(family: str) -> None:
    tensors = checkpoint(family)
    storages = {tensor.untyped_storage().data_ptr() for tensor in tensors.values()}
    model = model_of(family, tensors)
    for encoder in model.text.encoders:
        assert all(tensor.untyped_storage().data_ptr() in storages for tensor in encoder.tensors.values())
    if family != "sd2":  # CLIP-L has the names and shapes already
        first, prefix = model.text.encoders[0], "conditioner.embedders.0" if family == "sdxl" else "cond_stage_model"
        for name, tensor in first.tensors.items():
            assert tensor.data_ptr() == tensors[f"{prefix}.transformer.{name}"].data_ptr()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_step_leaves_no_gradient_and_no_flag_behind(family: str, checkpointing: bool) -> None:
    tensors = checkpoint(family)
    flags = {name: tensor.requires_grad for name, tensor in tensors.items()}
    values = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    assert any(flags.values())
    step(model_of(family, tensors), checkpointing=checkpointing)
    for name, tensor in tensors.items():
        assert tensor.grad is None and tensor.requires_grad == flags[name]
        assert torch.equal(tensor, values[name])


def test_nothing_borrowed_can_get_a_gradient() -> None:
    model = model_of("sdxl", checkpoint("sdxl"))
    for tensors in (*model.components.values(), model.vae.tensors):
        assert not any(tensor.requires_grad for tensor in tensors.values())


def test_a_change_of_the_lenders_weights_is_seen() -> None:
    tensors = checkpoint("sd1")
    model = model_of("sd1", tensors)
    x, t, context = torch.randn(1, 4, 8, 8), torch.tensor([1]), torch.randn(1, 77, CONTEXT["sd1"])
    before = model.unet(x, t, context)
    with torch.no_grad():
        tensors["model.diffusion_model.out.2.bias"] += 1
    assert torch.allclose(model.unet(x, t, context), before + 1, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_inference_tensors_are_borrowed_without_a_copy_and_can_be_trained_on(family: str) -> None:
    with torch.inference_mode():
        tensors = {name: tensor.detach().clone() for name, tensor in checkpoint(family).items()}
    assert all(tensor.is_inference() for tensor in tensors.values())
    model = model_of(family, tensors)
    for name, tensor in model.unet.tensors.items():
        assert tensor.data_ptr() == tensors[f"model.diffusion_model.{name}"].data_ptr()
    assert step(model).isfinite()


def test_an_inference_view_keeps_offset_and_strides() -> None:
    with torch.inference_mode():
        lent = torch.arange(24.0).reshape(4, 6)[1:, 2:].t()
    ours = borrowed(lent)
    assert torch.equal(ours, lent.clone()) and ours.data_ptr() == lent.data_ptr() and not ours.is_inference()


# --- casts ------------------------------------------------------------------------------------------------------------

def bytes_kept(function: Callable[[], object], lent: dict[str, Tensor]) -> int:
    """Bytes of the distinct storages that autograd keeps while `function` runs, those that were lent not counted."""
    lent_storages = {tensor.untyped_storage().data_ptr() for tensor in lent.values()}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(saved: Tensor) -> Tensor:
        storage = saved.untyped_storage()
        if storage.data_ptr() not in lent_storages:
            kept[storage.data_ptr()] = storage  # holding it keeps its address from being used again
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
        function()
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("family, stored", [("sd2", torch.bfloat16), ("sdxl", torch.float16)])
def test_casts_of_weights_are_not_kept_for_backward(family: str, stored: torch.dtype) -> None:
    exact = {name: tensor.detach() for name, tensor in checkpoint(family).items()}
    halves = {name: tensor.to(stored) if tensor.is_floating_point() else tensor for name, tensor in exact.items()}

    def kept_of(tensors: dict[str, Tensor]) -> int:
        model = model_of(family, tensors)
        adapters = adapters_of(model)
        return bytes_kept(lambda: loss_of(model, adapters), tensors)

    assert kept_of(halves) <= kept_of(exact)


def test_a_kept_cast_would_be_noticed() -> None:
    x, weight = torch.randn(3, 32, requires_grad=True), torch.randn(64, 32).half()
    assert bytes_kept(lambda: F.linear(x, weight.float()), {"weight": weight}) >= 64 * 32 * 4
    assert bytes_kept(lambda: frozen_linear(x, weight, None), {"weight": weight}) == 0


@pytest.mark.parametrize("stored", [torch.float32, torch.float16])
@pytest.mark.parametrize("stride, padding, size", [(1, 1, 3), (2, 1, 3), (2, 0, 3), (1, 0, 1)])
def test_the_gradient_through_a_frozen_convolution_is_torchs(stored: torch.dtype, stride: int, padding: int,
                                                            size: int) -> None:
    weight, bias = torch.randn(6, 4, size, size).to(stored), torch.randn(6).to(stored)
    x = torch.randn(2, 4, 9, 8, requires_grad=True)
    expected = F.conv2d(x, weight.float(), bias.float(), stride=stride, padding=padding)
    ours = frozen_conv2d(x, weight, bias, stride=stride, padding=padding)
    direction = torch.randn_like(ours)
    assert torch.allclose(ours, expected, atol=1e-5)
    assert torch.allclose(*(torch.autograd.grad(y, x, direction)[0] for y in (ours, expected)), atol=1e-5)


def test_gradients_with_half_weights_are_those_of_the_same_weights_in_fp32() -> None:
    halves = {name: tensor.detach().half() if tensor.is_floating_point() else tensor.detach()
              for name, tensor in checkpoint("sdxl").items()}
    exact = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in halves.items()}
    context, pooled = torch.randn(1, 77, CONTEXT["sdxl"]), torch.randn(1, POOLED)
    y = size_vector(pooled, original=(64, 64), crop=(0, 0), target=(64, 64))
    found = []
    for tensors in (halves, exact):
        x = torch.ones(1, 4, 8, 8, requires_grad=True)
        model_of("sdxl", tensors).unet(x, torch.tensor([30]), context, y).square().sum().backward()
        found.append(x.grad)
    assert (found[0] - found[1]).abs().max() <= 1e-5 * found[1].abs().max()


def test_half_precision_steps_give_finite_gradients() -> None:
    halves = {name: tensor.detach().bfloat16() if tensor.is_floating_point() else tensor.detach()
              for name, tensor in checkpoint("sd1").items()}
    assert step(model_of("sd1", halves), dtype=torch.bfloat16).isfinite()
