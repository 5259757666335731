"""The judges on real pictures: right where there is something to tell, and without an opinion where there is not."""

from __future__ import annotations

import pytest
import torch

from tools.bench.real_images import HANDS, HELD_OUT, NOTO, TWEMOJI, RealPictures, load
from tools.bench.scorers import HandJudge, WordJudge, across_hands


@pytest.fixture(scope="module")
def real() -> RealPictures:
    return load()


@pytest.fixture(scope="module")
def judge(real) -> HandJudge:
    return HandJudge.fit(real.pixels, real, steps=40, seed=0)


def test_the_hand_is_known_on_words_the_judge_never_saw(judge, real):
    assert judge.accuracy["palette"] > 0.93 and judge.accuracy["both"] > 0.93
    noto, twemoji = (judge.twemoji(real.pixels_of(hand, HELD_OUT)).float().mean().item() for hand in HANDS)
    assert (1 - noto + twemoji) / 2 == pytest.approx(judge.accuracy["both"])


def test_a_mirrored_picture_is_in_the_same_hand(judge, real):
    images = real.pixels_of(TWEMOJI, HELD_OUT)
    assert torch.equal(judge.twemoji(images), judge.twemoji(images.flip(3)))


@pytest.fixture(scope="module")
def thinned(real) -> RealPictures:
    """Enough where fits are only compared."""
    return real.thinned(3)


def test_two_hands_that_are_one_are_told_apart_by_chance_only_and_count_for_nothing(thinned):
    same = HandJudge.fit({NOTO: thinned.pixels[NOTO], TWEMOJI: thinned.pixels[NOTO]}, thinned, steps=3, seed=0)
    assert same.accuracy["both"] == 0.5
    assert not same.counts


def test_judges_of_the_same_seed_are_the_same_and_leave_the_global_random_state_alone(thinned):
    before = torch.get_rng_state()
    first, second = (HandJudge.fit(thinned.pixels, thinned, steps=3, seed=4) for _ in range(2))
    assert torch.equal(before, torch.get_rng_state())
    assert first.accuracy == second.accuracy


@pytest.fixture(scope="module")
def few(real) -> RealPictures:
    """Eight held-out words and eight others."""
    places = [*real.places(HELD_OUT)[:8].tolist(), *real.places("other")[:8].tolist()]
    return RealPictures(tuple(real.words[p] for p in places), tuple(real.splits[p] for p in places),
                        {hand: pixels[places] for hand, pixels in real.pixels.items()})


def test_words_are_known_in_both_hands_and_their_features_are_near(few):
    images = torch.cat([few.pixels[hand] for hand in HANDS])
    judge = WordJudge.fit(images, torch.arange(16).repeat(2), steps=40, seed=0)
    among = few.places(HELD_OUT)
    assert judge.accuracy(few.pixels[TWEMOJI][among], among) > 0.8
    assert judge.word(few.pixels[NOTO][among].flip(0), among).tolist() == [7, 6, 5, 4, 3, 2, 1, 0]
    likeness = judge.features(few.pixels[NOTO]) @ judge.features(few.pixels[TWEMOJI]).T
    own = likeness.diagonal()
    assert own.mean() > likeness.mean() + 0.5
    assert judge.features(few.pixels[NOTO]).norm(dim=1).tolist() == pytest.approx([1.0] * 16, abs=1e-5)


def test_the_honest_figure_is_measured_on_a_hand_that_was_not_shown(few):
    """Pictures that say nothing in the hidden hand are found by chance, however well the shown hand is known."""
    blank = {NOTO: few.pixels[NOTO], TWEMOJI: torch.ones_like(few.pixels[TWEMOJI])}
    assert across_hands(blank, few, steps=10, seed=0) == pytest.approx(1 / 8)
