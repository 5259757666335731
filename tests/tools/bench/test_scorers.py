"""The scorers on real images: words are known in a style that they never saw, styles whatever the contrast."""

from __future__ import annotations

import pytest
import torch

from tools.bench.augmentation import weathered
from tools.bench.features import contents
from tools.bench.real_images import HELD_OUT, NOTO, OTHER, STYLES, TWEMOJI, RealImages, load
from tools.bench.style_scorer import StyleClassifier, StyleEffort
from tools.bench.word_scorer import WordEffort, WordScorer, on_white, views

WORDS = 12


@pytest.fixture(scope="module")
def real() -> RealImages:
    return load()


@pytest.fixture(scope="module")
def words(real) -> WordScorer:
    """It was shown a dozen of the held-out words as Noto draws them, and nothing else."""
    return WordScorer.fit([(views(real.pixels_of(NOTO, HELD_OUT)[:WORDS], 2, seed=0), torch.arange(WORDS))],
                          WordEffort(steps=60, fits=1), seed=0)


def test_a_word_is_known_as_somebody_else_draws_it(words, real):
    shown = real.pixels_of(TWEMOJI, HELD_OUT)[:WORDS].flip(0)
    found = words.word(shown)
    assert (found == torch.arange(WORDS).flip(0)).float().mean() > 0.5  # chance: 0.08
    features = words.features(shown)
    assert features.norm(dim=1).tolist() == pytest.approx([1.0] * WORDS, abs=1e-5)


def test_the_colour_of_the_ground_tells_no_word(real):
    image = real.pixels_of(NOTO, HELD_OUT)[:1]
    assert (on_white(image) - image[:, :, 6:-6, 6:-6]).abs().max() <= 0.1
    # White lines on blue are dark lines on white, whose colours are what is missing of the lines'.
    lined = torch.tensor([0.1, 0.3, 0.6])[:, None, None].expand(1, 3, 128, 128).clone()
    lined[:, :, 40:90, 60:64] = 1.0
    lined[:, :, :, :3] = 1.0  # what the decoder does to a rim
    shown = on_white(lined)[0]
    assert (shown[:, 0, 0] == 1).all() and (shown[:, 54, 55] - torch.tensor([0.1, 0.3, 0.6])).abs().max() <= 0.1


def test_the_style_is_known_on_words_the_scorer_never_saw_at_any_contrast(real):
    fitted = StyleClassifier.fit({style: real.pixels_of(style, OTHER) for style in STYLES}, StyleEffort(steps=250, fits=1),
                                 seed=0)
    generator = torch.Generator().manual_seed(5)
    shown = {style: real.pixels_of(style, HELD_OUT)[::2] for style in STYLES}
    right = [fitted.is_in(TWEMOJI, change(pixels)) == (style == TWEMOJI) for style, pixels in shown.items()
             for change in (lambda pixels: pixels, lambda pixels: weathered(pixels, generator))]
    assert torch.cat(right).float().mean() > 0.8
    assert torch.equal(fitted.is_in(TWEMOJI, shown[TWEMOJI]), fitted.is_in(TWEMOJI, shown[TWEMOJI].flip(3)))


def test_scorers_of_the_same_seed_are_the_same_and_leave_the_global_random_state_alone(real):
    pixels, before = real.pixels_of(NOTO, HELD_OUT)[:6], torch.get_rng_state()
    effort = WordEffort(steps=3, fits=2)
    first, second = (WordScorer.fit([(views(pixels, 1, seed=4), torch.arange(6))], effort, seed=4) for _ in range(2))
    assert torch.equal(first.features(pixels), second.features(pixels))
    one, two = (StyleClassifier.fit({"a": pixels, "b": 1 - pixels}, StyleEffort(steps=3, fits=2), seed=1).is_in("a", pixels)
                for _ in range(2))
    assert torch.equal(one, two) and torch.equal(before, torch.get_rng_state())


def test_features_do_not_depend_on_what_else_is_looked_at(real):
    pixels = real.pixels_of(NOTO, HELD_OUT)[:34]  # more than are looked at together
    assert torch.allclose(contents(pixels)[33:], contents(pixels[33:]), atol=1e-4)
