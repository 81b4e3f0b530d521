"""How sure a difference of two arms is; docs/statistics.md says why it is judged so.

The logarithm of an arm's divergence on a seed is taken as arm + seed + noise. What differs between
two arms of one class (one precision, quantizer and text) on the same seeds is free of the seed's
part. An arm's noise is known from few seeds: it is drawn towards that of its class, by as much as
the class's arms are alike (Smyth 2004, "moderated t"). Which text was measured on adds to it, as
the windows tell.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import exp, inf, isfinite, log
from statistics import fmean, variance
from typing import NamedTuple

import numpy as np
from scipy.optimize import brentq
from scipy.special import digamma, nctdtr, polygamma, stdtr, stdtrit

LEVEL = 0.05  # of errors, two-sided
OF_INTEREST = 0.03  # a change of KL by less is none
LEAST_SEEDS = 3


class Runs(NamedTuple):
    """An arm's divergences: one a seed, and one a window of every seed's test text."""

    kl: Mapping[int, float]
    windows: Mapping[int, Sequence[float]]


class Spread(NamedTuple):
    """A variance, and on how many degrees of freedom it is known."""

    variance: float
    freedom: float


class Noise(NamedTuple):
    """The variance of a run about arm + seed, in log KL: the class's, and of each of its arms."""

    whole: Spread  # what an arm's own is drawn towards, with the weight of so many runs
    arms: list[Spread]


@dataclass(frozen=True)
class Difference:
    """One arm's KL over another's: the ratio, its interval at `LEVEL`, its p-value, seeds.

    The p-value is of its being `margin`.
    """

    ratio: float
    low: float
    high: float
    p: float
    seeds: int
    margin: float = 1.0

    def word(self, p: float | None = None) -> str:
        """ "yes" where the ratio is surely below the margin, "no" above, or "undecided".

        "equivalent" where it is surely near 1, and no margin asked for. `p` is the p-value where
        others are judged beside it (`holm`).
        """
        near = self.low > 1 / (1 + OF_INTEREST) and self.high < 1 + OF_INTEREST
        if self.margin == 1 and near:
            return "equivalent"
        if (self.p if p is None else p) < LEVEL:
            return "yes" if self.ratio < self.margin else "no"
        return "undecided"


def noise(runs: Sequence[Runs]) -> Noise | None:
    """Of the arms of one class; None where they leave no degree of freedom.

    An arm that is the same on every seed, such as a fixed matrix rounded to nearest, has none.

    >>> runs = [Runs({0: 1.0, 1: 1.1}, {}), Runs({0: 2.0, 1: 2.0}, {}), Runs({0: 1.0, 1: 1.2}, {})]
    >>> noise(runs).arms[1]
    Spread(variance=0.0, freedom=inf)
    """
    moving = [number for number, run in enumerate(runs) if len({*run.kl.values()}) > 1]
    rows = [(number, seed) for number in moving for seed in runs[number].kl]
    seeds = sorted({seed for _, seed in rows})
    X = np.zeros((len(rows), len(runs) + len(seeds)))
    for row, (number, seed) in enumerate(rows):
        X[row, [number, len(runs) + seeds.index(seed)]] = 1
    M = np.eye(len(rows)) - X @ np.linalg.pinv(X)
    squares = np.square(M @ [log(runs[number].kl[seed]) for number, seed in rows])
    of = np.array([number for number, _ in rows])
    freedom = {number: float(M.diagonal()[of == number].sum()) for number in moving}
    own = {
        number: Spread(float(squares[of == number].sum()) / free, free)
        for number, free in freedom.items()
        if free > 1e-9
    }
    most = sum(freedom.values())
    if round(most) < 1:
        return None
    whole = _shared([*own.values()])
    return Noise(
        whole,
        [
            Spread(0.0, inf)
            if len(run.kl) > 1 and number not in moving
            else _drawn_to(whole, own.get(number, Spread(0.0, 0.0)), most)
            for number, run in enumerate(runs)
        ],
    )


def _shared(own: list[Spread]) -> Spread:
    """Variances s² of d degrees of freedom as F-distributed about one: that, and its own degrees.

    By the mean and the variance of log s² (Smyth 2004, section 6.2). Arms no less alike than
    chance makes them have infinitely many.
    """
    pooled = sum(spread.variance * spread.freedom for spread in own)
    pooled /= sum(spread.freedom for spread in own)
    known = [spread for spread in own if spread.variance > 0]
    if len(known) < 3:
        return Spread(pooled, inf)
    d = np.array([spread.freedom for spread in known])
    e = np.log([spread.variance for spread in known]) - digamma(d / 2) + np.log(d / 2)
    left = e.var(ddof=1) - polygamma(1, d / 2).mean()
    if left <= polygamma(1, 5e3):
        return Spread(pooled, inf)
    half = brentq(lambda x: polygamma(1, x) - left, 1e-3, 5e3)
    return Spread(float(np.exp(e.mean() + digamma(half) - log(half))), 2 * half)


def _drawn_to(whole: Spread, own: Spread, most: float) -> Spread:
    """An arm's own variance and the class's, each with its weight; never surer than all arms."""
    if whole.freedom == inf:
        return Spread(whole.variance, most)
    freedom = whole.freedom + own.freedom
    shared = whole.variance * whole.freedom + own.variance * own.freedom
    return Spread(shared / freedom, min(freedom, most))


def compare(
    better: Runs, worse: Runs, spreads: tuple[Spread, Spread] | None, margin: float = 1.0
) -> Difference | str:
    """`better`'s KL over `worse`'s on the seeds that both have, or why not.

    `spreads` are their noise. Arms of two classes have None: then the differences themselves tell
    it.
    """
    seeds = sorted(better.kl.keys() & worse.kl.keys())
    if len(seeds) < LEAST_SEEDS:
        return "one seed" if len(seeds) == 1 else f"{len(seeds)} seeds"
    differences = [log(better.kl[seed] / worse.kl[seed]) for seed in seeds]
    if spreads is None:
        parts = [Spread(variance(differences) / len(seeds), len(seeds) - 1)]
    else:
        parts = [_of_seeds(*spreads, len(seeds))]
    effect = fmean(differences)
    ratio = exp(effect)
    total = _sum([*parts, *_of_text(better, worse, seeds)])
    if not total.variance:
        return Difference(ratio, ratio, ratio, float(ratio == margin), len(seeds), margin)
    error = total.variance**0.5
    half = error * _edge(total.freedom)
    p = 2 * stdtr(min(total.freedom, 1e9), -abs(effect - log(margin)) / error)
    return Difference(ratio, exp(effect - half), exp(effect + half), float(p), len(seeds), margin)


def text_spread(better: Runs, worse: Runs) -> Spread | None:
    """What other windows of test text would change in the log of the ratio; None without any."""
    seeds = sorted(better.kl.keys() & worse.kl.keys())
    return next(iter(_of_text(better, worse, seeds)), None)


def _of_text(better: Runs, worse: Runs, seeds: list[int]) -> list[Spread]:
    """To first order, from the windows that all seeds share."""
    sides = []
    for run in (better, worse):
        if not all(len(run.windows.get(seed, ())) > 1 for seed in seeds):
            return []
        mean = np.mean([run.windows[seed] for seed in seeds], axis=0)
        if not (np.isfinite(mean).all() and mean.mean() > 0):
            return []
        sides.append(mean / mean.mean())
    pulls = sides[0] - sides[1]
    return [Spread(float(pulls.var(ddof=1)) / len(pulls), len(pulls) - 1)]


def _of_seeds(one: Spread, other: Spread, seeds: int) -> Spread:
    """Of the difference of two arms; what they were drawn to is one estimate."""
    return Spread((one.variance + other.variance) / seeds, min(one.freedom, other.freedom))


def _sum(parts: Sequence[Spread]) -> Spread:
    """The variance of a sum; its degrees of freedom by Satterthwaite's formula."""
    total = sum(part.variance for part in parts)
    if not total:
        return Spread(0.0, inf)
    share = sum((part.variance / total) ** 2 / part.freedom for part in parts)
    return Spread(total, 1 / share if share else inf)


def _edge(freedom: float, tests: int = 1) -> float:
    """How many standard errors are significant."""
    return float(stdtrit(min(freedom, 1e9), 1 - LEVEL / tests / 2))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values, in their order.

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    adjusted, least = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(order):
        least = max(least, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = least
    return adjusted


def smallest_effect(
    arm: Spread, seeds: int, text: Spread | None = None, tests: int = 1, power: float = 0.8
) -> float:
    """The smallest change of KL that two such arms show with this power, as a share.

    With the first of Holm's levels for so many tests. `text` is what the windows add, however many
    seeds there are.

    >>> round(smallest_effect(Spread(0.04**2, 20.0), seeds=3), 2)
    0.1
    """
    total = _sum([_of_seeds(arm, arm, seeds), *([text] if text else [])])
    if not total.variance:
        return 0.0
    freedom, edge = min(total.freedom, 1e6), _edge(total.freedom, tests)

    def missed(shift: float) -> float:
        found = float(nctdtr(freedom, shift, edge))
        return (found if isfinite(found) else 0.0) - (1 - power)

    shift = brentq(missed, 0.0, edge + 20)  # in standard errors
    return exp(shift * total.variance**0.5) - 1
