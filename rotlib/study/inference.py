"""How sure a difference of two arms is; docs/statistics.md says why it is judged so.

The logarithm of an arm's divergence on a seed is taken as arm + seed + noise. What differs between
two arms of one class (one precision, quantizer and text) on the same seeds is free of the seed's
part. The noise is pooled over the class, for arms of fixed, of drawn and of learned matrices apart,
by the method of moments. Which text was measured on adds to it, as the windows tell.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import exp, inf, log
from statistics import fmean, variance
from typing import NamedTuple

import numpy as np
from scipy.special import nctdtr, stdtr, stdtrit

LEVEL = 0.05  # of errors, two-sided
OF_INTEREST = 0.03  # a change of KL by less is none
LEAST_SEEDS = 3
LEAST_FREEDOM = 4  # of a kind, to be told from the others


class Runs(NamedTuple):
    """An arm's divergences: one a seed, and one a window of every seed's test text."""

    kind: str
    kl: Mapping[int, float]
    windows: Mapping[int, Sequence[float]]


class Spread(NamedTuple):
    """A variance, and on how many degrees of freedom it is known."""

    variance: float
    freedom: float


@dataclass(frozen=True)
class Difference:
    """One arm's KL over another's: the ratio, its interval at `LEVEL`, its p-value, seeds."""

    ratio: float
    low: float
    high: float
    p: float
    seeds: int

    def word(self, p: float | None = None) -> str:
        """ "yes" where the ratio is surely below 1, "no" above, "equivalent" where surely near it.

        "undecided" otherwise. `p` is the p-value where others are judged beside it (`holm`).
        """
        if self.low > 1 / (1 + OF_INTEREST) and self.high < 1 + OF_INTEREST:
            return "equivalent"
        if (self.p if p is None else p) < LEVEL:
            return "yes" if self.ratio < 1 else "no"
        return "undecided"


def noise(runs: Sequence[Runs]) -> dict[str, Spread]:
    """The variance of log KL about arm + seed in one class, by kind; none where nothing is left.

    Squared residuals have the expectation Σ_j M_ij² σ_j², M the projection that leaves them:
    summed by kind these are as many equations as kinds. A kind with few degrees of freedom, or no
    positive solution, makes all share one variance.

    >>> runs = [Runs("drawn", {0: 1.0, 1: 1.1}, {}), Runs("drawn", {0: 2.0, 1: 2.0}, {})]
    >>> noise(runs)["drawn"].freedom
    1.0
    """
    seeds = sorted({seed for run in runs for seed in run.kl})
    rows = [(number, seed) for number, run in enumerate(runs) for seed in run.kl]
    if not rows:
        return {}
    X = np.zeros((len(rows), len(runs) + len(seeds)))
    for row, (number, seed) in enumerate(rows):
        X[row, [number, len(runs) + seeds.index(seed)]] = 1
    M = np.eye(len(rows)) - X @ np.linalg.pinv(X)
    residuals = M @ [log(runs[number].kl[seed]) for number, seed in rows]
    of = np.array([runs[number].kind for number, _ in rows])
    kinds = sorted({run.kind for run in runs if run.kl})
    freedom = [M.diagonal()[of == kind].sum() for kind in kinds]
    if round(sum(freedom)) < 1:
        return {}
    squares = [np.square(residuals[of == kind]).sum() for kind in kinds]
    share = [[np.square(M[of == k][:, of == other]).sum() for other in kinds] for k in kinds]
    solved = np.linalg.lstsq(np.array(share), np.array(squares), rcond=None)[0]
    if min(freedom) < LEAST_FREEDOM or min(solved) <= 0:
        whole = Spread(float(sum(squares) / sum(freedom)), float(round(sum(freedom), 6)))
        return dict.fromkeys(kinds, whole)
    known = zip(kinds, solved, freedom, strict=True)
    return {kind: Spread(float(value), float(free)) for kind, value, free in known}


def compare(
    better: Runs, worse: Runs, spreads: dict[str, Spread] | None, margin: float = 1.0
) -> Difference | str:
    """`better`'s KL over `margin` times `worse`'s on the seeds that both have, or why not.

    `spreads` is the noise of their class. Arms of two classes have None: then the differences
    themselves tell their noise.
    """
    seeds = sorted(better.kl.keys() & worse.kl.keys())
    if len(seeds) < LEAST_SEEDS:
        return "one seed" if len(seeds) == 1 else f"{len(seeds)} seeds"
    differences = [log(better.kl[seed] / (margin * worse.kl[seed])) for seed in seeds]
    if spreads is None:
        parts = [Spread(variance(differences) / len(seeds), len(seeds) - 1)]
    elif not spreads:
        return "no degree of freedom in its class"
    else:
        sides = [spreads[run.kind] for run in (better, worse)]
        parts = [Spread(side.variance / len(seeds), side.freedom) for side in sides]
        if sides[0] == sides[1]:  # one estimate
            parts = [Spread(2 * parts[0].variance, parts[0].freedom)]
    parts += _of_text(better, worse, seeds)
    total = sum(part.variance for part in parts)
    effect = fmean(differences)
    if not total:
        return Difference(exp(effect), exp(effect), exp(effect), float(effect == 0), len(seeds))
    # Satterthwaite's
    freedom = total**2 / sum(part.variance**2 / part.freedom for part in parts)
    error = total**0.5
    half = error * stdtrit(freedom, 1 - LEVEL / 2)
    p = 2 * stdtr(freedom, -abs(effect) / error)
    return Difference(exp(effect), exp(effect - half), exp(effect + half), float(p), len(seeds))


def _of_text(better: Runs, worse: Runs, seeds: list[int]) -> list[Spread]:
    """What other windows of test text would change in the log of the ratio, to first order."""
    sides = []
    for run in (better, worse):
        if not all(len(run.windows.get(seed, ())) > 1 for seed in seeds):
            return []
        mean = np.mean([run.windows[seed] for seed in seeds], axis=0)
        sides.append(mean / mean.mean())
    pulls = sides[0] - sides[1]
    return [Spread(float(pulls.var(ddof=1)) / len(pulls), len(pulls) - 1)]


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


def smallest_effect(spread: Spread, seeds: int, tests: int = 1, power: float = 0.8) -> float:
    """The smallest change of KL that two arms of one kind show with this power, as a share.

    With the first of Holm's levels for so many tests, on this text.

    >>> round(smallest_effect(Spread(0.04**2, 20.0), seeds=3), 3)
    0.101
    """
    error = (2 * spread.variance / seeds) ** 0.5
    edge = stdtrit(spread.freedom, 1 - LEVEL / tests / 2)
    low, high = 0.0, 1.0
    while nctdtr(spread.freedom, high / error, edge) > 1 - power:
        high *= 2
        if high == inf:
            return inf
    for _ in range(40):
        middle = (low + high) / 2
        enough = nctdtr(spread.freedom, middle / error, edge) <= 1 - power
        low, high = (low, middle) if enough else (middle, high)
    return exp(high) - 1
