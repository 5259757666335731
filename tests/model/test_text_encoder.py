"""The text encoders equal transformers' and open_clip's, layer by layer, and so does the condition made of them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from lib_lora_train.adapters.lora import LoRALayer
from lib_lora_train.errors import SettingError
from lib_lora_train.model.architecture import TextConfig
from lib_lora_train.model.frozen import FrozenModel, build
from lib_lora_train.model.sd.components import text_tensors
from lib_lora_train.model.sd.text_encoder import TextEncoder
from tests.model.plain_lora import WrittenOut
from tests.model.small_checkpoints import (
    END,
    HINTS,
    POOLED,
    START,
    checkpoint,
    clip_config,
    flat,
    openclip_text,
    random_parts,
    randomised,
    relative_error,
    tokenizers,
)


def tokens(pad: int = END) -> Tensor:
    """Three chunks whose end tokens lie at different places."""
    ids = torch.randint(10, 500, (3, 77), generator=torch.Generator().manual_seed(1))
    ids[:, 0] = START
    for row, end in enumerate((5, 40, 76)):
        ids[row, end] = END
        ids[row, end + 1:] = pad
    return ids


def config(**changes: object) -> TextConfig:
    base = dict(component="te", prefix="", openclip=False, skip=1, layers=3, width=48, heads=4, activation="quick_gelu",
                positions=77, projection=POOLED)
    return TextConfig(**{**base, **changes})


def encoder_of(module: nn.Module, prefix: str, **changes: object) -> TextEncoder:
    named = {prefix + name: tensor for name, tensor in module.state_dict().items()}
    return TextEncoder(text_tensors(named, "cond_stage_model."), config(**changes))


def hidden_states(tower: nn.Module, ids: Tensor) -> list[Tensor]:
    """What each of open_clip's layers gives, [B, n, C], and its pooled output last."""
    found: list[Tensor] = []

    def hear(_module: nn.Module, _inputs: object, output: Tensor) -> None:
        found.append(output if output.shape[0] == ids.shape[0] else output.transpose(0, 1))  # older ones are [n, B, C]

    hooks = [block.register_forward_hook(hear) for block in tower.transformer.resblocks]
    pooled = tower(ids)
    for hook in hooks:
        hook.remove()
    return [*found, pooled]


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
@torch.no_grad()
def test_every_hidden_state_and_the_pooled_vector_equal_transformers(activation: str) -> None:
    theirs = randomised(CLIPTextModelWithProjection(clip_config(activation=activation)))
    ours = encoder_of(theirs, "cond_stage_model.transformer.", activation=activation)
    expected = theirs(tokens(), output_hidden_states=True)
    for skip in (1, 2, 3, 4):
        hidden, pooled = ours(tokens(), skip=skip, final_norm=False, pooled=True)
        assert relative_error(hidden, expected.hidden_states[-skip]) <= 1e-5
        assert relative_error(pooled, expected.text_embeds) <= 1e-5
    assert relative_error(ours(tokens())[0], expected.last_hidden_state) <= 1e-5


@torch.no_grad()
def test_every_hidden_state_and_the_pooled_vector_equal_open_clip() -> None:
    theirs = randomised(openclip_text(width=48, heads=4))
    ours = encoder_of(theirs, "cond_stage_model.model.", activation="gelu")
    *states, pooled = hidden_states(theirs, tokens(pad=0))
    for skip in (1, 2, 3):
        hidden, ours_pooled = ours(tokens(pad=0), skip=skip, final_norm=False, pooled=True)
        assert relative_error(hidden, states[-skip]) <= 1e-5
        assert relative_error(ours_pooled, pooled) <= 1e-5
        assert relative_error(ours(tokens(pad=0), skip=skip)[0], theirs.ln_final(states[-skip])) <= 1e-5


@torch.no_grad()
def test_the_names_of_old_and_of_renaming_hosts_mean_the_same_tensors() -> None:
    theirs = randomised(CLIPTextModelWithProjection(clip_config()))
    expected, _ = encoder_of(theirs, "cond_stage_model.transformer.")(tokens())
    assert torch.equal(encoder_of(theirs, "cond_stage_model.model.transformer.")(tokens())[0], expected)
    bare = {f"cond_stage_model.transformer.{name.removeprefix('text_model.')}": tensor
            for name, tensor in theirs.state_dict().items()}
    assert torch.equal(TextEncoder(text_tensors(bare, "cond_stage_model."), config())(tokens())[0], expected)


def test_layers_that_nobody_asked_for_are_not_run() -> None:
    ours = encoder_of(randomised(CLIPTextModel(clip_config())), "cond_stage_model.transformer.")
    without_last = {name: tensor for name, tensor in ours.tensors.items() if ".layers.2." not in name}
    hidden, pooled = TextEncoder(without_last, config())(tokens(), skip=2)
    assert torch.equal(hidden, ours(tokens(), skip=2)[0]) and pooled is None


def test_a_clip_skip_beyond_the_embeddings_is_refused() -> None:
    ours = encoder_of(CLIPTextModel(clip_config()), "cond_stage_model.transformer.")
    with pytest.raises(SettingError, match="clip skip of 5.*3 layers"):
        ours(tokens(), skip=5)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_reach_an_adapter_in_every_layer(checkpointing: bool) -> None:
    class Bias:
        def __init__(self, width: int) -> None:
            self.added = torch.zeros(width, requires_grad=True)

        def linear(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            return torch.nn.functional.linear(x, weight, bias) + self.added

    theirs = randomised(CLIPTextModel(clip_config()))
    ours = encoder_of(theirs, "cond_stage_model.transformer.")
    adapters = {name.removesuffix(".weight"): Bias(tensor.shape[0]) for name, tensor in ours.tensors.items()
                if tensor.ndim == 2 and ".layers." in name}
    assert len(adapters) == 6 * 3
    ours(tokens(), adapters=adapters, checkpointing=checkpointing)[0].pow(2).sum().backward()
    theirs(tokens()).last_hidden_state.pow(2).sum().backward()
    modules = dict(theirs.named_modules())
    for name, adapter in adapters.items():
        if name.endswith("k_proj"):
            continue  # a constant added to every key changes no attention: the true gradient is 0
        theirs_module = modules[name] if name in modules else modules[name.removeprefix("text_model.")]
        assert relative_error(adapter.added.grad, theirs_module.bias.grad) <= 1e-4


def test_nothing_below_the_first_trained_layer_is_kept() -> None:
    kept: list[Tensor] = []
    before: list[int] = []

    class Watched:
        def linear(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            before.append(len(kept))
            return torch.nn.functional.linear(x, weight, bias) * scale

    scale = torch.ones((), requires_grad=True)
    ours = encoder_of(randomised(CLIPTextModel(clip_config())), "cond_stage_model.transformer.")
    with torch.autograd.graph.saved_tensors_hooks(lambda saved: kept.append(saved) or saved, lambda saved: saved):
        hidden, _ = ours(tokens(), adapters={"text_model.encoder.layers.1.mlp.fc2": Watched()})
    assert before == [0] and len(kept) > 0 and hidden.requires_grad


def test_fused_layers_give_the_gradients_of_those_written_out() -> None:
    ours = encoder_of(randomised(CLIPTextModel(clip_config())), "cond_stage_model.transformer.")
    generator = torch.Generator().manual_seed(1)
    layers = {
        name.removesuffix(".weight"): LoRALayer(
            torch.randn(2, tensor.shape[1], generator=generator).div_(tensor.shape[1] ** 0.5),
            torch.randn(tensor.shape[0], 2, generator=generator).mul_(0.1), alpha=1)
        for name, tensor in ours.tensors.items() if tensor.ndim == 2 and ".layers." in name}
    factors = [factor for layer in layers.values() for factor in layer.parameters()]
    found, right = (
        torch.autograd.grad(ours(tokens(), adapters=adapters)[0].square().mean(), factors)
        for adapters in (layers, {name: WrittenOut(layer.down, layer.up, 1 / 2) for name, layer in layers.items()}))
    for a, b in zip(found, right, strict=True):
        assert (a - b).abs().max() <= 1e-4 * b.abs().max()


# --- the condition of each family -------------------------------------------------------------------------------------

CAPTIONS = ["11 22 33", " ".join(str(200 + n) for n in range(100))]  # one chunk, and two


def reference_chunks(caption: str, pad: int) -> list[list[int]]:
    """The chunks of a caption without commas, written down from the WebUI's rule; a missing chunk is an empty one."""
    words = [int(word) for word in caption.split()]
    return [[START, *part, END, *[pad] * (75 - len(part))] for part in (words[:75], words[75:])]


def chunk_of_each(index: int, *, pad: int) -> Tensor:
    """The chunk `index` of every caption, [2, 77]."""
    return torch.tensor([reference_chunks(caption, pad)[index] for caption in CAPTIONS])


def clip_states(module: nn.Module, index: int) -> tuple[Tensor, ...]:
    """What each of transformers' layers gives for the chunk `index` of every caption."""
    return module(chunk_of_each(index, pad=END), output_hidden_states=True).hidden_states


def model_and_text_modules(family: str) -> tuple[FrozenModel, list[nn.Module]]:
    """A small model of ours, and the modules of others that its text encoders' weights come from."""
    modules = random_parts(family)
    text = [module for prefix, module in modules.items() if prefix.startswith(("cond_stage_model", "conditioner"))]
    return build(flat(modules), hints=HINTS[family], tokenizers=tokenizers(family)), text


@pytest.mark.parametrize("clip_skip", [1, 2, 3])
@torch.no_grad()
def test_sd1_uses_the_layer_that_clip_skip_names_and_norms_it(clip_skip: int) -> None:
    model, (clip,) = model_and_text_modules("sd1")
    ours = model.text.encode([model.text.tokenize(caption) for caption in CAPTIONS], clip_skip=clip_skip)
    norm = clip.text_model.final_layer_norm if hasattr(clip, "text_model") else clip.final_layer_norm
    expected = [norm(clip_states(clip, chunk)[-clip_skip]) for chunk in (0, 1)]
    assert model.text.uses_clip_skip and ours.pooled is None
    assert relative_error(ours.context, torch.cat(expected, dim=1)) <= 1e-5


@pytest.mark.parametrize("clip_skip", [1, 2])
@torch.no_grad()
def test_sd2_uses_the_last_layer_but_one_normed_whatever_clip_skip_says(clip_skip: int) -> None:
    model, (tower,) = model_and_text_modules("sd2")
    ours = model.text.encode([model.text.tokenize(caption) for caption in CAPTIONS], clip_skip=clip_skip)
    expected = []
    for chunk in (0, 1):
        states = hidden_states(tower, chunk_of_each(chunk, pad=0))
        expected.append(tower.ln_final(states[-3]))  # the list ends with the pooled output
    assert not model.text.uses_clip_skip and ours.pooled is None
    assert relative_error(ours.context, torch.cat(expected, dim=1)) <= 1e-5


@torch.no_grad()
def test_sdxl_joins_both_encoders_unnormed_and_pools_the_first_chunk() -> None:
    model, (clip, tower) = model_and_text_modules("sdxl")
    ours = model.text.encode([model.text.tokenize(caption) for caption in CAPTIONS])
    expected, pooled = [], []
    for chunk in (0, 1):
        *states, pool = hidden_states(tower, chunk_of_each(chunk, pad=0))
        expected.append(torch.cat([clip_states(clip, chunk)[-2], states[-2]], dim=-1))
        pooled.append(pool)
    assert relative_error(ours.context, torch.cat(expected, dim=1)) <= 1e-5
    assert relative_error(ours.pooled, pooled[0]) <= 1e-5


@torch.no_grad()
def test_a_caption_is_encoded_alike_alone_and_in_a_batch() -> None:
    model = build(checkpoint("sdxl"), hints=HINTS["sdxl"], tokenizers=tokenizers("sdxl"))
    short, long = (model.text.tokenize(caption) for caption in CAPTIONS)
    alone, together = model.text.encode([short]), model.text.encode([short, long])
    assert alone.context.shape[1] == 77 and together.context.shape[1] == 2 * 77
    assert relative_error(together.context[:1, :77], alone.context) <= 1e-5
    assert relative_error(together.pooled[:1], alone.pooled) <= 1e-5
