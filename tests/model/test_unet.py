"""The UNet equals ldm's and diffusers', and gradients reach what is trained and nothing else."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lib_lora_train.adapters.lora import LoRALayer
from lib_lora_train.adapters.network import AdapterNetwork
from lib_lora_train.adapters.targets import find_targets
from lib_lora_train.errors import SettingError
from lib_lora_train.model import family as families
from lib_lora_train.model.ops import convolution
from lib_lora_train.model.ops.layers import Layers
from lib_lora_train.model.ops.linear import frozen_linear, shared_linears
from lib_lora_train.model.sd.components import unet_tensors
from lib_lora_train.model.sd.detection import unet_config
from lib_lora_train.model.sd.text import size_vector
from lib_lora_train.model.sd.unet import UNet, resnet, spatial_transformer
from tests.model.plain_lora import WrittenOut
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
    config = unet_config(tensors, family=families.FAMILIES[family], hints=HINTS[family])
    return UNet(tensors, config)


def inputs(family: str, *, height: int = 8, width: int = 16, chunks: int = 2) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Latents, timesteps, context and pooled vector of two images."""
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


@pytest.mark.parametrize("way", ["COLUMNS_FROM", "WINOGRAD_FROM"])
def test_unet_and_its_gradient_equal_ldms_whichever_way_its_convolutions_go(monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    monkeypatch.setattr(convolution, way, 0)
    monkeypatch.setattr(convolution, "WINOGRAD_CHANNELS", 0)
    theirs = randomised(ldm_unet("sd1"))
    x, t, context, _ = inputs("sd1", height=16)
    x.requires_grad_()
    ours, expected = unet_of(theirs.state_dict(), "sd1")(x, t, context), theirs(x, t, context=context)
    assert relative_error(ours, expected) <= 1e-5
    found, right = (torch.autograd.grad(prediction.square().sum(), x)[0] for prediction in (ours, expected))
    assert relative_error(found, right) <= 1e-4


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


def every_layer(tensors: dict[str, Tensor]) -> dict[str, Scaled]:
    """An adapter for each linear layer; those around the transformers may be stored as 1x1 convolutions."""
    return {name.removesuffix(".weight"): Scaled() for name, tensor in tensors.items()
            if name.endswith(".weight") and (tensor.ndim == 2 or ".proj_" in name)}


def gradients(unet: UNet, family: str, adapters: dict[str, Scaled], *,
              checkpointed: Collection[str] = ()) -> tuple[Tensor, Tensor]:
    """The prediction, and the gradient of a fixed sum of it for each adapter."""
    x, t, context, pooled = inputs(family)
    prediction = unet(x, t, context, vector(family, pooled), adapters=adapters, checkpointed=checkpointed)
    weights = torch.randn(prediction.shape, generator=torch.Generator().manual_seed(9))
    found = torch.autograd.grad((prediction * weights).sum(), [adapter.s for adapter in adapters.values()])
    return prediction.detach(), torch.stack(found)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_linear_layer_can_be_adapted_and_its_gradient_is_ldms(family: str) -> None:
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


@pytest.mark.parametrize("ends", [("",), (".attn1", ".attn2", ".ff")], ids="+".join)
def test_recomputing_changes_neither_prediction_nor_gradients(ends: tuple[str, ...]) -> None:
    family = "sd1"
    unet = unet_of(unet_tensors(checkpoint(family)), family)
    adapters = every_layer(unet.tensors)
    plain, plain_gradients = gradients(unet, family, adapters)
    blocks = [block for block in unet.checkpointable if block.endswith(ends)]
    again, again_gradients = gradients(unet, family, adapters, checkpointed=blocks)
    assert torch.equal(plain, again)
    assert torch.equal(plain_gradients, again_gradients)


def test_checkpointable_are_the_blocks_and_what_is_inside_the_transformer_blocks() -> None:
    blocks = unet_of(unet_tensors(checkpoint("sd1")), "sd1").checkpointable
    block = "middle_block.1.transformer_blocks.0"
    assert len(set(blocks)) == len(blocks) == 22 + 4 * 16  # SD1 has 22 residual and 16 transformer blocks
    assert [block for block in blocks if block.startswith("middle_block")] == [
        "middle_block.0", block, f"{block}.attn1", f"{block}.attn2", f"{block}.ff", "middle_block.2"]


def test_what_is_recomputed_as_a_whole_is_not_recomputed_in_parts() -> None:
    unet = unet_of(unet_tensors(checkpoint("sd1")), "sd1")
    adapters = every_layer(unet.tensors)
    calls = []
    name = "middle_block.1.transformer_blocks.0.ff.net.2"
    frozen = adapters[name].linear
    adapters[name].linear = lambda *given: calls.append(1) or frozen(*given)
    gradients(unet, "sd1", adapters, checkpointed=unet.checkpointable)
    assert len(calls) == 2  # forward, and once in backward


def test_more_checkpointed_blocks_keep_fewer_activations() -> None:
    unet = unet_of(unet_tensors(checkpoint("sd1")), "sd1")
    adapters = every_layer(unet.tensors)

    def kept(*ends: str) -> int:
        sizes = []
        x, t, context, _ = inputs("sd1")
        with torch.autograd.graph.saved_tensors_hooks(lambda saved: sizes.append(saved.numel()) or saved, lambda s: s):
            chosen = [block for block in unet.checkpointable if block.endswith(ends)]
            unet(x, t, context, adapters=adapters, checkpointed=chosen)
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


# --- the LoRA's own layers, which share inputs and keep little ---------------------------------------------------------

def trained(unet: UNet, family: str) -> dict[str, LoRALayer]:
    """The layers that a run trains, with numbers in them."""
    targets = find_targets({"unet": unet.tensors}, family=families.FAMILIES[family], text_encoder=False)
    layers = AdapterNetwork.build(targets, rank=2, alpha=1, seed=3).adapters()["unet"]
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for layer in layers.values():
            layer.up.normal_(std=0.1, generator=generator)
    return layers


def trained_shapes(unet: UNet) -> dict[str, LoRALayer]:
    """The same on the meta device."""
    targets = find_targets({"unet": unet.tensors}, family=families.SD1, text_encoder=False)
    return AdapterNetwork.build(targets, rank=2, alpha=1, seed=3).to("meta").adapters()["unet"]


def loss_and_gradients(unet: UNet, family: str, adapters: dict[str, object], layers: dict[str, LoRALayer], *,
                       checkpointed: Collection[str] = ()) -> list[Tensor]:
    x, t, context, pooled = inputs(family)
    loss = unet(x, t, context, vector(family, pooled), adapters=adapters, checkpointed=checkpointed).square().mean()
    return [loss.detach(), *torch.autograd.grad(loss, [factor for layer in layers.values() for factor in layer.parameters()])]


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_fused_layers_give_the_gradients_of_those_written_out(family: str) -> None:
    unet = unet_of(unet_tensors(checkpoint(family)), family)
    layers = trained(unet, family)
    ours = loss_and_gradients(unet, family, layers, layers)
    plain = {name: WrittenOut(layer.down, layer.up, 1 / 2) for name, layer in layers.items()}  # alpha 1, rank 2
    theirs = loss_and_gradients(unet, family, plain, layers)
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).abs().max() <= 1e-4 * b.abs().max()


@pytest.mark.parametrize("ends", [("",), (".attn1",), (".attn2", ".ff")], ids="+".join)
def test_recomputing_changes_no_gradient_of_the_lora(ends: tuple[str, ...]) -> None:
    family = "sdxl"
    unet = unet_of(unet_tensors(checkpoint(family)), family)
    layers = trained(unet, family)
    plain = loss_and_gradients(unet, family, layers, layers)
    blocks = [block for block in unet.checkpointable if block.endswith(ends)]
    again = loss_and_gradients(unet, family, layers, layers, checkpointed=blocks)
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


def test_kernels_that_lie_in_nhwc_order_give_the_same_prediction_where_they_lie() -> None:
    lent = unet_tensors(checkpoint("sd1"))
    turned = {name: tensor.detach().contiguous(memory_format=torch.channels_last) if tensor.ndim == 4 else tensor
              for name, tensor in lent.items()}
    x, t, context, _ = inputs("sd1")
    plain, ours = unet_of(lent, "sd1"), unet_of(turned, "sd1")
    assert relative_error(ours(x, t, context).detach(), plain(x, t, context).detach()) <= 1e-5
    assert ours.layers.copied_bytes == 0
    assert all(ours.tensors[name].data_ptr() == tensor.data_ptr() for name, tensor in turned.items())


class ImageCopies(TorchDispatchMode):
    """Counts copies of images [B, C, h, w]."""

    def __init__(self) -> None:
        super().__init__()
        self.copied = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ in ("clone", "copy_") and args[0].ndim == 4 and args[0].shape[1] in (32, 64, 128):
            self.copied += 1
        return result


@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
def test_off_the_cpu_images_lie_as_the_kernels_do_and_are_not_copied_between_layers(order: torch.memory_format) -> None:
    lent = {name: tensor.detach().to("meta", torch.float16) for name, tensor in unet_tensors(checkpoint("sd1")).items()}
    lent = {name: tensor.contiguous(memory_format=order) if tensor.ndim == 4 else tensor for name, tensor in lent.items()}
    unet = unet_of(lent, "sd1")
    x = torch.empty(2, 4, 16, 24, device="meta", dtype=torch.float16)
    context = torch.empty(2, 77, CONTEXT["sd1"], device="meta", dtype=torch.float16)
    with ImageCopies() as images:
        unet(x, torch.zeros(2, device="meta"), context, adapters=trained_shapes(unet))
    assert images.copied == 0


class Backward(TorchDispatchMode):
    """Counts the operations of each name."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_below_the_first_trained_layer_is_kept_or_differentiated(family: str) -> None:
    unet = unet_of(unet_tensors(checkpoint(family)), family)
    layers = trained(unet, family)
    name = [name for name in layers if name.startswith("output_blocks")][-1].rsplit(".transformer_blocks", 1)[0]
    name = max(n for n in layers if n.startswith(name) and n.endswith("ff.net.2"))
    x, t, context, pooled = inputs(family)
    kept: list[Tensor] = []
    before: list[int] = []

    class Watched:
        def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            before.append(len(kept))
            return shared_linears(x, [(weight, bias)], [layers[name].delta()])[0]

    with torch.autograd.graph.saved_tensors_hooks(lambda saved: kept.append(saved) or saved, lambda saved: saved):
        loss = unet(x, t, context, vector(family, pooled), adapters={name: Watched()}).square().mean()
    assert before == [0] and len(kept) > 0
    with Backward() as backward:
        loss.backward()
    block = int(name.split(".")[1])
    above = {tensor for tensor in unet.tensors if tensor.endswith(".weight") and unet.tensors[tensor].shape[2:] == (3, 3)
             and (tensor.startswith("out.") or tensor.startswith("output_blocks") and int(tensor.split(".")[1]) > block)}
    inner = {tensor for tensor in unet.tensors if tensor.startswith(f"output_blocks.{block}.2.conv.weight")}
    assert backward.seen["convolution"] == len(above | inner) < 10
    assert backward.seen["_scaled_dot_product_flash_attention_for_cpu_backward"] == 0
    assert backward.seen["_scaled_dot_product_flash_attention_backward"] == 0
