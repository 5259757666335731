"""The UNet equals ldm's and diffusers', and gradients reach what is trained and nothing else."""

from __future__ import annotations

from collections.abc import Collection

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lib_lora_train.errors import SettingError
from lib_lora_train.model.components import unet_tensors
from lib_lora_train.model.family import family_of, unet_config
from lib_lora_train.model.layers import Layers, frozen_conv2d, frozen_linear
from lib_lora_train.model.text import size_vector
from lib_lora_train.model.unet import UNet, resnet, spatial_transformer
from tests.model.small_checkpoints import (
    CONTEXT,
    FAMILIES,
    HINTS,
    POOLED,
    checkpoint,
    diffusers_unet,
    ldm_names_of_unet,
    ldm_unet,
    randomised,
    relative_error,
)

SIZES = dict(original=(120, 200), crop=(3, 40), target=(96, 160))


def unet_of(tensors: dict[str, Tensor], family: str) -> UNet:
    config = unet_config(tensors, family=family, hints=HINTS[family])
    assert family_of({}, tensors) == family
    return UNet(tensors, config)


def inputs(family: str, *, height: int = 8, width: int = 16, chunks: int = 2) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Latents, timesteps, context and pooled vector of two pictures."""
    generator = torch.Generator().manual_seed(5)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    return draw(2, 4, height, width), torch.tensor([11, 987]), draw(2, 77 * chunks, CONTEXT[family]), draw(2, POOLED)


def vector(family: str, pooled: Tensor) -> Tensor | None:
    return size_vector(pooled, **SIZES) if family == "sdxl" else None


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_unet_equals_ldm(family: str, depth: int) -> None:
    theirs = randomised(ldm_unet(family, depth=depth))
    x, t, context, pooled = inputs(family)
    y = vector(family, pooled)
    ours = unet_of(theirs.state_dict(), family)(x, t, context, y)
    assert relative_error(ours, theirs(x, t, context=[context] * depth, y=y)) <= 1e-5


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_unet_equals_diffusers(family: str) -> None:
    theirs = randomised(diffusers_unet(family))
    x, t, context, pooled = inputs(family)
    ours = unet_of(ldm_names_of_unet(theirs.state_dict()), family)(x, t, context, vector(family, pooled))
    time_ids = torch.tensor([[*SIZES["original"], *SIZES["crop"], *SIZES["target"]]]).float().expand(2, -1)
    added = dict(text_embeds=pooled, time_ids=time_ids) if family == "sdxl" else None
    assert relative_error(ours, theirs(x, t, context, added_cond_kwargs=added).sample) <= 1e-5


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_blocks_equal_ldm_where_the_norms_epsilon_matters(family: str) -> None:
    theirs = randomised(ldm_unet(family))
    unet = unet_of(theirs.state_dict(), family)
    layers, context = Layers(unet.tensors), inputs(family)[2]
    generator = torch.Generator().manual_seed(8)
    x = torch.randn(2, 64, 8, 8, generator=generator) * 1e-3  # a variance of 1e-6, as small as the epsilons
    emb = torch.randn(2, 128, generator=generator)

    residual, transformer = theirs.input_blocks[5]
    ours = resnet(layers, "input_blocks.5.0", x, F.silu(emb))
    assert relative_error(ours, residual(x, emb)) <= 1e-5
    (_, block) = unet.config.input_blocks[5]
    ours = spatial_transformer(layers, block, x, context, heads=unet.config.heads(64))
    assert relative_error(ours, transformer(x, context)) <= 1e-5


@pytest.mark.parametrize("height, width", [(8, 8), (24, 8), (16, 24)])
@torch.no_grad()
def test_every_multiple_of_64_pixels_works_as_in_ldm(height: int, width: int) -> None:
    theirs = randomised(ldm_unet("sd1"))
    x, t, context, _ = inputs("sd1", height=height, width=width, chunks=1)
    assert relative_error(unet_of(theirs.state_dict(), "sd1")(x, t, context), theirs(x, t, context=context)) <= 1e-5


@pytest.mark.parametrize("family, height, width, step", [("sd1", 12, 16, 64), ("sdxl", 16, 18, 32)])
def test_other_sizes_are_refused_with_the_step_that_fits(family: str, height: int, width: int, step: int) -> None:
    x, t, context, pooled = inputs(family, height=height, width=width)
    unet = unet_of(unet_tensors(checkpoint(family)), family)
    with pytest.raises(SettingError, match=f"{width * 8}x{height * 8} .* multiples of {step}"):
        unet(x, t, context, vector(family, pooled))


@torch.no_grad()
def test_timesteps_may_be_fractions_and_of_any_dtype() -> None:
    theirs = randomised(ldm_unet("sd1"))
    unet = unet_of(theirs.state_dict(), "sd1")
    x, _, context, _ = inputs("sd1")
    t = torch.tensor([3.25, 700.5])
    assert relative_error(unet(x, t, context), theirs(x, t, context=context)) <= 1e-5
    whole = torch.tensor([3, 700])
    assert torch.equal(unet(x, whole, context), unet(x, whole.float(), context))


class Scaled:
    """An adapter with one trained number: (1 + s) times the frozen layer."""

    def __init__(self) -> None:
        self.s = torch.zeros((), requires_grad=True)

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return (1 + self.s) * frozen_linear(x, weight, bias)

    def conv2d(self, x: Tensor, weight: Tensor, bias: Tensor | None, *, stride: int, padding: int) -> Tensor:
        return (1 + self.s) * frozen_conv2d(x, weight, bias, stride=stride, padding=padding)


def every_layer(tensors: dict[str, Tensor]) -> dict[str, Scaled]:
    """An adapter for each linear and convolutional layer."""
    return {name.removesuffix(".weight"): Scaled() for name, tensor in tensors.items()
            if name.endswith(".weight") and tensor.ndim > 1}


def gradients(unet: UNet, family: str, adapters: dict[str, Scaled], *,
              recompute: Collection[str] = ()) -> tuple[Tensor, Tensor]:
    """The prediction, and the gradient of a fixed sum of it for each adapter."""
    x, t, context, pooled = inputs(family)
    prediction = unet(x, t, context, vector(family, pooled), adapters=adapters, recompute=recompute)
    weights = torch.randn(prediction.shape, generator=torch.Generator().manual_seed(9))
    found = torch.autograd.grad((prediction * weights).sum(), [adapter.s for adapter in adapters.values()])
    return prediction.detach(), torch.stack(found)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_layer_can_be_adapted_and_its_gradient_is_ldms(family: str) -> None:
    theirs = randomised(ldm_unet(family))
    unet = unet_of(theirs.state_dict(), family)
    adapters = every_layer(unet.tensors)
    _, ours = gradients(unet, family, adapters)

    # d/ds of (1 + s) W x + (1 + s) b at s = 0 is the sum of gradient times value over W and b.
    x, t, context, pooled = inputs(family)
    prediction = theirs(x, t, context=context, y=vector(family, pooled))
    (prediction * torch.randn(prediction.shape, generator=torch.Generator().manual_seed(9))).sum().backward()
    modules = dict(theirs.named_modules())
    expected = torch.stack([
        sum((p.grad * p).sum() for p in modules[name].parameters()).detach() for name in adapters])
    assert relative_error(ours, expected) <= 1e-4


@pytest.mark.parametrize("ends", [("",), (".attn1",), (".attn1", ".attn2", ".ff")], ids="+".join)
@pytest.mark.parametrize("family", FAMILIES)
def test_recomputing_changes_neither_prediction_nor_gradients(family: str, ends: tuple[str, ...]) -> None:
    unet = unet_of(unet_tensors(checkpoint(family)), family)
    adapters = every_layer(unet.tensors)
    plain, plain_gradients = gradients(unet, family, adapters)
    units = [unit for unit in unet.units if unit.endswith(ends)]
    again, again_gradients = gradients(unet, family, adapters, recompute=units)
    assert torch.equal(plain, again)
    assert torch.equal(plain_gradients, again_gradients)


def test_units_are_the_blocks_and_what_is_inside_the_transformer_blocks() -> None:
    units = unet_of(unet_tensors(checkpoint("sd1")), "sd1").units
    block = "middle_block.1.transformer_blocks.0"
    assert len(set(units)) == len(units) == 22 + 4 * 16  # SD1 has 22 residual and 16 transformer blocks
    assert [unit for unit in units if unit.startswith("middle_block")] == [
        "middle_block.0", block, f"{block}.attn1", f"{block}.attn2", f"{block}.ff", "middle_block.2"]


def test_what_is_recomputed_as_a_whole_is_not_recomputed_in_parts() -> None:
    unet = unet_of(unet_tensors(checkpoint("sd1")), "sd1")
    adapters = every_layer(unet.tensors)
    calls = []
    name = "middle_block.1.transformer_blocks.0.ff.net.2"
    frozen = adapters[name].linear
    adapters[name].linear = lambda *given: calls.append(1) or frozen(*given)
    gradients(unet, "sd1", adapters, recompute=unet.units)
    assert len(calls) == 2  # forward, and once in backward


def test_more_units_keep_fewer_activations() -> None:
    unet = unet_of(unet_tensors(checkpoint("sd1")), "sd1")
    adapters = every_layer(unet.tensors)

    def kept(*ends: str) -> int:
        sizes = []
        x, t, context, _ = inputs("sd1")
        with torch.autograd.graph.saved_tensors_hooks(lambda saved: sizes.append(saved.numel()) or saved, lambda s: s):
            unet(x, t, context, adapters=adapters, recompute=[unit for unit in unet.units if unit.endswith(ends)])
        return sum(sizes)

    nothing, attention, every = kept(), kept(".attn1"), kept("")
    assert every < attention < nothing and every < nothing / 3


def test_half_precision_activations_give_a_close_prediction_in_their_dtype() -> None:
    unet = unet_of(unet_tensors(checkpoint("sd1")), "sd1")
    x, t, context, _ = inputs("sd1")
    with torch.no_grad():
        exact, rounded = unet(x, t, context), unet(x.bfloat16(), t, context)
    assert rounded.dtype == torch.bfloat16
    assert F.cosine_similarity(exact.flatten(), rounded.float().flatten(), dim=0) > 0.999
