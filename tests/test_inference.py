"""Statistics that are right as often as they say: each is tried on made-up runs."""

from math import log

import numpy as np
import pytest
from scipy.stats import ttest_rel

from rotlib.study import inference
from rotlib.study.inference import Difference, Runs, Spread, compare, holm, noise, smallest_effect

SIGMAS = {"fixed": 0.02, "drawn": 0.05, "learned": 0.04}


def made_up(draw, effects, seeds=3, sigmas=SIGMAS):
    """Arms with these effects on log KL, by kind, and an offset of every seed that all share."""
    shared = draw.normal(0, 0.1, seeds)
    runs = []
    for kind, effect in effects:
        values = np.exp(effect + shared + draw.normal(0, sigmas[kind], seeds))
        runs.append(Runs(kind, dict(enumerate(values)), {}))
    return runs


def test_each_kinds_noise_is_estimated_without_bias():
    draw = np.random.default_rng(0)
    effects = [(kind, number / 3) for number, kind in enumerate([*SIGMAS] * 4)]
    found = [noise(made_up(draw, effects)) for _ in range(400)]
    for kind, sigma in SIGMAS.items():
        known = [spreads[kind].variance for spreads in found if len(set(spreads.values())) > 1]
        assert len(known) > 300
        assert np.mean(known) == pytest.approx(sigma**2, rel=0.12)


def test_a_seed_that_shifts_all_arms_is_no_noise():
    shifted = [Runs("drawn", {0: scale, 1: 2 * scale, 2: 5 * scale}, {}) for scale in (1, 3, 4)]
    assert noise(shifted)["drawn"].variance == pytest.approx(0, abs=1e-20)


def test_arms_with_other_seeds_count_as_far_as_they_tell():
    draw = np.random.default_rng(1)
    whole = made_up(draw, [("drawn", 0.0), ("drawn", 0.5), ("drawn", 1.0)], seeds=5)
    runs = [whole[0], whole[1]._replace(kl={0: 1.0, 1: 1.1, 2: 0.9}), whole[2]]
    assert noise(runs)["drawn"].freedom == pytest.approx(13 - 3 - 5 + 1)


@pytest.mark.parametrize("windows", [0, 8])
def test_equal_arms_are_told_apart_one_time_in_twenty(windows):
    """With the noise pooled over ten arms, and the windows' own where there are some."""
    draw, wrong, covered, count = np.random.default_rng(2), 0, 0, 800
    for _ in range(count):
        runs = made_up(draw, [("drawn", 0.0)] * 10, sigmas={"drawn": 0.04})
        if windows:  # an arm is worse on some text than on other
            likes = np.exp(draw.normal(0, 0.1, (10, windows)))
            runs = [
                Runs(
                    run.kind,
                    {seed: kl * like.mean() for seed, kl in run.kl.items()},
                    {seed: kl * like for seed, kl in run.kl.items()},
                )
                for run, like in zip(runs, likes, strict=True)
            ]
        found = compare(runs[0], runs[1], noise(runs))
        wrong += found.p < 0.05
        covered += found.low < 1 < found.high
    assert 0.03 < wrong / count < 0.075
    assert covered == count - wrong


def test_a_change_of_the_smallest_size_shown_is_found_four_times_of_five():
    draw, found, count = np.random.default_rng(3), 0, 600
    size = smallest_effect(Spread(0.04**2, 18), seeds=3)
    for _ in range(count):
        effects = [("drawn", 0.0), ("drawn", log(1 + size)), *[("drawn", 0.3)] * 8]
        runs = made_up(draw, effects, sigmas={"drawn": 0.04})
        found += compare(runs[0], runs[1], noise(runs)).word() == "yes"
    assert found / count == pytest.approx(0.8, abs=0.05)
    assert smallest_effect(Spread(0.04**2, 18), 3, tests=16) > size
    assert smallest_effect(Spread(0.04**2, 18), 10) < size


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
    ],
)
def test_a_difference_is_told_in_a_word(difference, word):
    assert difference.word() == word


def test_a_correction_takes_a_verdict_back():
    assert Difference(0.9, 0.85, 0.95, 0.001, 3).word(p=0.06) == "undecided"


def test_what_cant_be_known_is_said_and_no_number_given():
    a, b = (Runs("drawn", dict.fromkeys(range(seeds), 1.0), {}) for seeds in (2, 5))
    assert compare(a, b, noise([a, b])) == "2 seeds"
    assert compare(a._replace(kl={0: 1.0}), b, None) == "one seed"
    assert compare(b, b, {}) == "no degree of freedom in its class"
    assert noise([b]) == {}


def test_arms_of_two_classes_are_compared_by_their_own_differences():
    a = Runs("drawn", {0: 1.0, 1: 1.1, 2: 1.2}, {})
    b = Runs("drawn", {0: 1.11, 1: 1.2, 2: 1.33}, {})
    found = compare(a, b, None)
    known = ttest_rel(np.log([*a.kl.values()]), np.log([*b.kl.values()]))
    assert found.p == pytest.approx(known.pvalue)
    assert (found.low, found.high) == pytest.approx(np.exp(known.confidence_interval(0.95)))


def test_the_plans_numbers_are_the_codes():
    said = (inference.LEVEL, inference.OF_INTEREST, inference.LEAST_SEEDS, inference.LEAST_FREEDOM)
    assert said == (0.05, 0.03, 3, 4)
