"""Statistics that are right as often as they say: each is tried on made-up runs."""

from math import inf, log

import numpy as np
import pytest
from scipy.stats import ttest_rel

from rotlib.disk import ROOT
from rotlib.study import claims, inference
from rotlib.study.inference import Difference, Runs, Spread, compare, holm, noise, smallest_effect


def made_up(draw, effects, seeds=3, sigma=0.04):
    """Arms with these effects on log KL, and an offset of every seed that all share."""
    shared = draw.normal(0, 0.1, seeds)
    sigmas = np.broadcast_to(sigma, len(effects))
    values = (
        np.exp(effect + shared + draw.normal(0, own, seeds))
        for effect, own in zip(effects, sigmas, strict=True)
    )
    return [Runs(dict(enumerate(kl)), {}) for kl in values]


def test_the_noise_of_arms_alike_is_pooled():
    draw = np.random.default_rng(0)
    found = [noise(made_up(draw, np.arange(12) / 3)) for _ in range(300)]
    assert np.mean([one.arms[0].variance for one in found]) == pytest.approx(0.04**2, rel=0.08)
    assert np.median([one.arms[0].freedom for one in found]) == pytest.approx(22)


def test_the_noise_of_arms_unlike_stays_their_own():
    draw = np.random.default_rng(1)
    sigma = np.repeat([0.01, 0.2], 6)
    found = [noise(made_up(draw, np.zeros(12), 10, sigma)) for _ in range(50)]
    calm, wild = (np.mean([one.arms[arm].variance for one in found]) for arm in (0, 11))
    assert wild == pytest.approx(0.2**2, rel=0.3)
    assert calm < 0.2 * wild  # the offsets of the seeds are known no better than by all
    assert np.median([one.whole.freedom for one in found]) < 4
    assert np.median([one.arms[0].freedom for one in found]) < 14


def test_a_seed_that_shifts_all_arms_is_no_noise():
    shifted = [Runs({0: scale, 1: 2 * scale, 2: 5 * scale}, {}) for scale in (1, 3, 4)]
    assert noise(shifted).arms[0].variance == pytest.approx(0, abs=1e-20)


def test_arms_with_other_seeds_count_as_far_as_they_tell():
    draw = np.random.default_rng(1)
    whole = made_up(draw, [0.0, 0.5, 1.0], seeds=5)
    runs = [whole[0], Runs({0: 1.0, 1: 1.1, 2: 0.9}, {}), whole[2], Runs({0: 1.0}, {})]
    found = noise(runs)
    assert max(arm.freedom for arm in found.arms) == pytest.approx(13 - 3 - 5 + 1)
    assert found.arms[3].variance == found.whole.variance  # of one seed nothing is known


def test_an_arm_that_reads_no_seed_has_no_noise_and_tells_none():
    draw = np.random.default_rng(4)
    moving = made_up(draw, [0.0, 0.5, 1.0])
    still = Runs({0: 1.1, 1: 1.1, 2: 1.1}, {})
    alone, beside = noise(moving), noise([*moving, still])
    assert beside.arms[3] == Spread(0.0, inf)
    for one, other in zip(beside.arms, alone.arms, strict=False):
        assert one == pytest.approx(other)


@pytest.mark.parametrize("windows", [0, 8])
def test_equal_arms_are_told_apart_one_time_in_twenty(windows):
    """With the noise pooled over ten arms, and the windows' own where there are some."""
    draw, wrong, covered, count = np.random.default_rng(2), 0, 0, 800
    for _ in range(count):
        runs = made_up(draw, [0.0] * 10)
        if windows:  # an arm is worse on some text than on other
            likes = np.exp(draw.normal(0, 0.1, (10, windows)))
            runs = [
                Runs(
                    {seed: kl * like.mean() for seed, kl in run.kl.items()},
                    {seed: kl * like for seed, kl in run.kl.items()},
                )
                for run, like in zip(runs, likes, strict=True)
            ]
        found = compare(runs[0], runs[1], tuple(noise(runs).arms[:2]))
        wrong += found.p < 0.05
        covered += found.low < 1 < found.high
    assert 0.03 < wrong / count < 0.075
    assert covered == count - wrong


def test_a_change_of_the_smallest_size_shown_is_found_four_times_of_five():
    draw, found, count = np.random.default_rng(3), 0, 600
    size = smallest_effect(Spread(0.04**2, 18), seeds=3)
    for _ in range(count):
        runs = made_up(draw, [0.0, log(1 + size), *[0.3] * 8])
        found += compare(runs[0], runs[1], tuple(noise(runs).arms[:2])).word() == "yes"
    assert found / count == pytest.approx(0.8, abs=0.05)
    assert smallest_effect(Spread(0.04**2, 18), 3, tests=16) > size
    assert smallest_effect(Spread(0.04**2, 18), 10) < size
    assert smallest_effect(Spread(0.04**2, 18), 3, Spread(0.03**2, 7)) > size
    assert smallest_effect(Spread(0.0, 18), 3) == 0


def test_holm_multiplies_the_smallest_most_and_keeps_the_order():
    assert holm([0.02, 0.001, 0.5, 0.04]) == pytest.approx([0.06, 0.004, 0.5, 0.08])
    assert holm([]) == []


@pytest.mark.parametrize(
    ("difference", "word"),
    [
        (Difference(0.9, 0.85, 0.95, 0.001, 3), "yes"),
        (Difference(1.1, 1.02, 1.2, 0.01, 3), "no"),
        (Difference(1.0, 0.98, 1.02, 0.9, 3), "equivalent"),
        (Difference(0.98, 0.975, 0.985, 0.001, 3), "equivalent"),
        (Difference(0.98, 0.9, 1.05, 0.5, 3), "undecided"),
        (Difference(1.01, 1.0, 1.02, 0.001, 3, margin=1.1), "yes"),
        (Difference(1.2, 1.15, 1.25, 0.001, 3, margin=1.1), "no"),
    ],
)
def test_a_difference_is_told_in_a_word(difference, word):
    assert difference.word() == word


def test_a_correction_takes_a_verdict_back():
    assert Difference(0.9, 0.85, 0.95, 0.001, 3).word(p=0.06) == "undecided"


def test_what_cant_be_known_is_said_and_no_number_given():
    a, b = (Runs({seed: 1.0 + seed for seed in range(seeds)}, {}) for seeds in (2, 5))
    assert compare(a, b, None) == "2 seeds"
    assert compare(a._replace(kl={0: 1.0}), b, None) == "one seed"
    assert noise([b]) is None
    assert noise([]) is None


def test_arms_of_two_classes_are_compared_by_their_own_differences():
    a = Runs({0: 1.0, 1: 1.1, 2: 1.2}, {})
    b = Runs({0: 1.11, 1: 1.2, 2: 1.33}, {})
    found = compare(a, b, None)
    known = ttest_rel(np.log([*a.kl.values()]), np.log([*b.kl.values()]))
    assert found.p == pytest.approx(known.pvalue)
    assert (found.low, found.high) == pytest.approx(np.exp(known.confidence_interval(0.95)))


def test_the_margin_is_what_a_ratio_is_tested_against():
    draw = np.random.default_rng(5)
    a, b = made_up(draw, [log(1.01), 0.0], sigma=0.001)
    found = compare(a, b, None, margin=1.1)
    assert found.word() == "yes"
    assert found.ratio == pytest.approx(1.01, abs=0.003)
    assert compare(a, b, None).word() != "yes"


def test_the_plan_says_the_numbers_that_the_code_has():
    plan = " ".join((ROOT / "docs" / "statistics.md").read_text().split())
    assert f"p-value below {100 * inference.LEVEL:g} %" in plan
    assert f"lies within ±{100 * inference.OF_INTEREST:g} %" in plan
    assert inference.LEAST_SEEDS == 3
    assert "fewer than three seeds" in plan
    assert f"{claims.PLANNED['seeds']} seeds, {claims.PLANNED['windows']} windows" in plan
