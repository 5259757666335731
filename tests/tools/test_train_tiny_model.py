"""The tool that trains the demo's model: its graph gives every weight ldm's gradient, and what is held back is not shown."""

from __future__ import annotations

import importlib
import importlib.util
import random
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from lib_lora_train.model.family import SD1
from lib_lora_train.model.sd.detection import unet_config
from lib_lora_train.model.sd.unet import UNet
from tests.model.small_checkpoints import CONTEXT, HINTS, ldm_unet, randomised, relative_error
from tools import styles
from tools.bench import real_images

GRAPH = Path(__file__).resolve().parents[2] / "tools" / "train_tiny_model" / "graph.py"


@pytest.fixture(scope="module")
def graph() -> ModuleType:
    spec = importlib.util.spec_from_file_location("train_tiny_model_graph", GRAPH)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("plain", [False, True])
def test_every_weight_has_ldms_gradient(graph: ModuleType, plain: bool) -> None:
    theirs = randomised(ldm_unet("sd1"))
    weights = {name: tensor.detach().clone().requires_grad_() for name, tensor in theirs.named_parameters()}
    config = unet_config(dict(weights), family=SD1, hints=HINTS["sd1"])
    ours = graph.TrainedUNet(UNet({}, config), weights)
    generator = torch.Generator().manual_seed(3)
    x, context = torch.randn(2, 4, 8, 16, generator=generator), torch.randn(2, 77, CONTEXT["sd1"], generator=generator)
    steps = torch.tensor([20, 700])
    expected = theirs.requires_grad_(True)(x, steps, context=[context])
    if plain:
        with graph.plain_attention():
            generated = ours(x, steps, context)
    else:
        generated = ours(x, steps, context)
    assert relative_error(generated.detach(), expected.detach()) <= 1e-5
    (generated - x).square().mean().backward()
    (expected - x).square().mean().backward()
    exact = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    # A bias before a norm with one channel a group has no gradient but rounding.
    noise = 1e-6 * max(gradient.abs().max().item() for gradient in exact.values())
    for name, gradient in exact.items():
        assert (weights[name].grad - gradient).abs().max() <= 1e-4 * gradient.abs().max() + noise, name


def imported(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A module of the tool, which is none of the tests' afterwards."""
    monkeypatch.syspath_prepend(str(GRAPH.parent))
    before = set(sys.modules)
    module = importlib.import_module(name)
    for other in set(sys.modules) - before:
        if not hasattr(sys.modules[other], "__path__") and "." not in other:
            monkeypatch.delitem(sys.modules, other)
    return module


def test_the_words_that_the_model_learns_are_split_as_the_benchmark_splits_them(monkeypatch) -> None:
    images, real = imported("images", monkeypatch), real_images.load()
    assert {split: set(real.words_of(split)) for split in ("style", "held_out", "test")} == {
        "style": set(images.STYLE), "held_out": set(images.HELD_OUT), "test": set(images.TEST)}
    assert not set(images.GATE) & images.ASKED


def test_notos_pictures_of_the_gates_words_and_the_unseen_styles_are_never_shown(monkeypatch) -> None:
    """Noto's drawings are blank here: words that may be shown in its style are so now and then, the gate's never."""
    training_images, gate_words = imported("training_images", monkeypatch), imported("images", monkeypatch).GATE
    words = [styles.Emoji("0", label, (), "", ()) for label in (gate_words[0], "pebble")]
    full, blank = np.zeros((2, 64, 64, 4), dtype=np.uint8)
    full[16:48, 16:48] = 200, 30, 30, 255
    drawn = {style.name: {word.label: blank if style == styles.NOTO else full for word in words} for style in styles.SEEN}
    monkeypatch.setattr(styles, "shared", lambda folder, always: (words, drawn))
    images = training_images.TrainingImages(Path(), lambda shown: shown, every_word=True, gate_words=gate_words)
    pixels, captions = images.batch(400, random.Random(0))
    is_blank = (pixels - pixels[:, :, :1, :1]).abs().amax(dim=(1, 2, 3)) < 1e-3
    blank_of = {word.label: sum(bool(one) for one, said in zip(is_blank, captions, strict=True) if word.label in said)
                for word in words}
    assert blank_of[gate_words[0]] == 0 and blank_of["pebble"] > 20
    assert not {style.name for style in styles.UNSEEN} & {style.name for style in styles.SEEN}
