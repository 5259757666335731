"""The scorers on real images: accurate where the styles differ, at chance where they do not."""

from __future__ import annotations

import pytest
import torch

from tools.bench.real_images import HELD_OUT, NOTO, STYLES, TWEMOJI, RealImages, load
from tools.bench.scorers import StyleScorer, WordScorer, across_styles


@pytest.fixture(scope="module")
def real() -> RealImages:
    return load()


@pytest.fixture(scope="module")
def scorer(real) -> StyleScorer:
    return StyleScorer.fit(real.pixels, real, steps=24, seed=0)


def test_the_style_is_known_on_words_the_scorer_never_saw(scorer, real):
    assert scorer.accuracy["palette"] > 0.93 and scorer.accuracy["both"] > 0.93
    noto, twemoji = (scorer.twemoji(real.pixels_of(style, HELD_OUT)).float().mean().item() for style in STYLES)
    assert (1 - noto + twemoji) / 2 == pytest.approx(scorer.accuracy["both"])


def test_a_mirrored_image_is_in_the_same_style(scorer, real):
    images = real.pixels_of(TWEMOJI, HELD_OUT)
    assert torch.equal(scorer.twemoji(images), scorer.twemoji(images.flip(3)))


@pytest.fixture(scope="module")
def thinned(real) -> RealImages:
    """Enough where fits are only compared."""
    return real.thinned(6)


def test_two_styles_that_are_one_are_told_apart_by_chance_only_and_count_for_nothing(thinned):
    same = StyleScorer.fit({NOTO: thinned.pixels[NOTO], TWEMOJI: thinned.pixels[NOTO]}, thinned, steps=3, seed=0)
    assert same.accuracy["both"] == 0.5
    assert not same.counts


def test_scorers_of_the_same_seed_are_the_same_and_leave_the_global_random_state_alone(thinned):
    before = torch.get_rng_state()
    first, second = (StyleScorer.fit(thinned.pixels, thinned, steps=3, seed=4) for _ in range(2))
    assert torch.equal(before, torch.get_rng_state())
    assert first.accuracy == second.accuracy


@pytest.fixture(scope="module")
def few(real) -> RealImages:
    """Eight held-out words and eight others."""
    indices = [*real.indices(HELD_OUT)[:8].tolist(), *real.indices("other")[:8].tolist()]
    return RealImages(tuple(real.words[p] for p in indices), tuple(real.splits[p] for p in indices),
                        {style: pixels[indices] for style, pixels in real.pixels.items()})


def test_words_are_known_in_both_styles_and_their_features_are_near(few):
    images = torch.cat([few.pixels[style] for style in STYLES])
    scorer = WordScorer.fit(images, torch.arange(16).repeat(2), steps=40, seed=0)
    among = few.indices(HELD_OUT)
    assert scorer.accuracy(few.pixels[TWEMOJI][among], among) > 0.8
    assert scorer.word(few.pixels[NOTO][among].flip(0), among).tolist() == [7, 6, 5, 4, 3, 2, 1, 0]
    likeness = scorer.features(few.pixels[NOTO]) @ scorer.features(few.pixels[TWEMOJI]).T
    own = likeness.diagonal()
    assert own.mean() > likeness.mean() + 0.5
    assert scorer.features(few.pixels[NOTO]).norm(dim=1).tolist() == pytest.approx([1.0] * 16, abs=1e-5)


def test_the_honest_figure_is_measured_on_a_style_that_was_not_shown(few):
    """Images that say nothing in the hidden style are found by chance, however well the shown style is known."""
    blank = {NOTO: few.pixels[NOTO], TWEMOJI: torch.ones_like(few.pixels[TWEMOJI])}
    assert across_styles(blank, few, steps=10, seed=0) == pytest.approx(1 / 8)
