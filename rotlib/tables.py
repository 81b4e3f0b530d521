"""Arms of a comparison: runs that differ only in their seed, as mean ± standard error, and verdicts between two arms.

A claim "A is better than B" is judged by a rule fixed before the data: on the difference of KL divergences, paired by
seed, it is *reproduced* if A is lower by more than two standard errors, *not reproduced* if it is higher by more than
two, and *undecided* otherwise or with fewer than three seeds.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from math import sqrt
from statistics import fmean, stdev

from rotlib.recipe import Recipe
from rotlib.store import Result

_HEADER = "| rotation | rounding | seeds | perplexity | KL, nats | learning, s | quantizing, s | settings |"


@dataclass(frozen=True)
class Arm:
    """The runs of one recipe over its seeds, in the seeds' order."""

    recipe: Recipe
    results: tuple[Result, ...]

    @property
    def label(self) -> tuple[str, str]:
        """(rotation, rounding), the way tables and figures name the arm."""
        return self.recipe.rotation, self.recipe.rounding.upper() + (" act-order" if self.recipe.act_order else "")

    @property
    def settings(self) -> str:
        """Whatever else differs from the defaults, and whether today's code would compute it anew."""
        named = ("task", "rotation", "rounding", "act_order", "seed")
        others = [f"{name} {value}" for name, value in self.recipe.spec().items() if name not in named]
        return ", ".join(others + ["stale"] * self.stale)

    @property
    def stale(self) -> bool:
        return any(result.stale for result in self.results)

    def values(self, metric: str) -> dict[int, float]:
        """A metric of every seed."""
        return {recipe_of(result).seed: result.metrics[metric] for result in self.results}

    def seconds(self, stage: str) -> float:
        return fmean(result.seconds[stage] for result in self.results)


@dataclass(frozen=True)
class Verdict:
    """effect: mean of (worse − better) in nats of KL, paired by seed; ratio: of the two mean divergences."""

    effect: float
    standard_error: float
    ratio: float
    seeds: int
    verdict: str

    def __str__(self) -> str:
        return (
            f"{self.verdict} ({self.effect:+.3f} ± {self.standard_error:.3f} nats over {self.seeds} seeds, "
            f"ratio of the means {self.ratio:.2f})"
        )


def recipe_of(result: Result) -> Recipe:
    """The recipe that a result was computed from."""
    return Recipe(**{name: value for name, value in result.spec.items() if name != "task"})


def arms(results: Iterable[Result]) -> list[Arm]:
    """Group quantization results into arms, in order of first appearance."""
    groups: dict[tuple, list[Result]] = {}
    for result in results:
        if result.spec["task"] == "quantize":
            groups.setdefault(tuple(sorted((k, v) for k, v in result.spec.items() if k != "seed")), []).append(result)
    by_seed = [sorted(group, key=lambda result: recipe_of(result).seed) for group in groups.values()]
    return [Arm(recipe_of(group[0]), tuple(group)) for group in by_seed]


def mean_and_error(values: Iterable[float]) -> tuple[float, float]:
    """Mean and standard error; the error of a single value is NaN."""
    values = list(values)
    return fmean(values), stdev(values) / sqrt(len(values)) if len(values) > 1 else float("nan")


def judge(better: Arm, worse: Arm) -> Verdict:
    """Is `better` better, by the rule above?"""
    a, b = better.values("kl"), worse.values("kl")
    seeds = sorted(a.keys() & b.keys())
    effect, error = mean_and_error(b[seed] - a[seed] for seed in seeds)
    verdict = "undecided"
    if len(seeds) >= 3 and abs(effect) > 2 * error:
        verdict = "reproduced" if effect > 0 else "not reproduced"
    ratio = fmean(a[seed] for seed in seeds) / fmean(b[seed] for seed in seeds)
    return Verdict(effect, error, ratio, len(seeds), verdict)


def markdown(arms: Iterable[Arm]) -> str:
    """The table of arms; ± is the standard error over seeds."""
    lines = [_HEADER, "|" + "---|" * (_HEADER.count("|") - 1)]
    for arm in arms:
        cells = (_cell(arm.values("perplexity").values(), 2), _cell(arm.values("kl").values(), 4))
        times = (f"{arm.seconds('rotate'):.0f}", f"{arm.seconds('quantize'):.0f}")
        lines.append(f"| {' | '.join((*arm.label, str(len(arm.results)), *cells, *times, arm.settings))} |")
    return "\n".join(lines)


def _cell(values: Iterable[float], digits: int) -> str:
    mean, error = mean_and_error(values)
    return f"{mean:.{digits}f}" + (f" ± {error:.{digits}f}" if error == error else "")
