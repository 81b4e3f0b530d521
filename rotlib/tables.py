"""Arms of a comparison: runs that differ only in their seed, as mean ± standard error, and verdicts between two arms.

A claim "A is better than B" is judged by a rule fixed before the data: on the difference of KL divergences, paired by
seed, it is *reproduced* if A is lower by more than two standard errors, *not reproduced* if it is higher by more than
two, and *undecided* otherwise, with fewer than three seeds, or where an arm has diverged. With a margin m it reads "A is below m times B".
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from math import sqrt
from statistics import fmean, stdev

from rotlib.checks import positive
from rotlib.fixed import DRAWN
from rotlib.recipe import Recipe
from rotlib.store import SHIPPED, Result, load_results, local_path

_HEADER = "| rotation | precision | rounding | seeds | perplexity | KL, nats | learning, s | quantizing, s | settings |"
DIVERGED = 1e4  # a perplexity beyond it says that the model is broken, not how much
_NAMED = (
    "rotation", "block", "R1_order", "signs", "start", "local", "grouped", "activation_share", "R3", "R4", "rounding", "act_order", "bits",
    "activation_bits", "kv_bits", "seed",
)  # fmt: skip
_YARDSTICK = ("model", "text", "window", "test_windows")  # what two arms must share to be compared


@dataclass(frozen=True)
class Arm:
    """The runs of one recipe over its seeds, in the seeds' order."""

    recipe: Recipe
    results: tuple[Result, ...]

    @property
    def rotation(self) -> str:
        """Such as "hadamard", "GSR 64", "mixed 0.5" or "optrot + R3 R4": how tables and figures name the arm."""
        recipe = self.recipe
        name = _hadamard_R1(recipe) if recipe.rotation == "gsr" else recipe.rotation
        name += " for groups" if recipe.grouped else ""
        if recipe.start == "gsr":
            name += f" {'within' if recipe.local else 'from'} {_hadamard_R1(recipe)}"
        name += f" {recipe.activation_share:g}" if recipe.activation_share else ""
        return name + (f" + {' '.join(recipe.online)}" if recipe.online else "")

    @property
    def grid(self) -> str:
        """Such as "W3A16 g64": the precision, and the group where there is one."""
        return self.recipe.precision + (f" g{self.recipe.group_size}" if self.recipe.group_size else "")

    @property
    def rounding(self) -> str:
        """Of the weights: GPTQ, GPTQ act-order, RTN or none."""
        name = {"none": "none", "rtn": "RTN", "gptq": "GPTQ"}[self.recipe.rounding]
        return name + (" act-order" if self.recipe.act_order else "")

    @property
    def settings(self) -> str:
        """Whatever else differs from the defaults, and whether today's code would compute it anew."""
        others = [f"{name} {value}" for name, value in self.recipe.spec().items() if name not in ("task", *_NAMED)]
        return ", ".join(others + ["diverged"] * self.diverged + ["stale"] * self.stale)

    @property
    def stale(self) -> bool:
        return any(result.stale for result in self.results)

    @property
    def diverged(self) -> bool:
        """True where some seed's perplexity is beyond `DIVERGED`, or no number: its divergence is noise, and no claim is judged on it."""
        return any(not result.metrics["perplexity"] < DIVERGED for result in self.results)

    def values(self, metric: str) -> dict[int, float]:
        """A metric of every seed."""
        return {recipe_of(result).seed: result.metrics[metric] for result in self.results}

    def summary(self, metric: str) -> tuple[float, float]:
        """Mean and standard error of a metric over the seeds."""
        return mean_and_error(self.values(metric).values())

    def seconds(self, stage: str) -> float:
        """Of its fastest seed: whatever else a machine does only adds."""
        return min(result.seconds[stage] for result in self.results)


@dataclass(frozen=True)
class Verdict:
    """effect: mean of (margin · worse − better) in nats of KL, paired by seed; ratio: of the two mean divergences."""

    effect: float
    standard_error: float
    ratio: float
    seeds: int
    verdict: str

    def __str__(self) -> str:
        if self.effect != self.effect:
            return self.verdict
        spread = f" ± {self.standard_error:.3f} nats over {self.seeds} seeds" if self.seeds > 1 else " nats, one seed"
        return f"{self.verdict} ({self.effect:+.3f}{spread}, ratio of the means {self.ratio:.2f})"


def _hadamard_R1(recipe: Recipe) -> str:
    """GSR's names for its arms: GH and GW global, LH and GSR in blocks of this size; ± with random signs."""
    kind = {("hadamard", True): "GH", ("walsh", True): "GW", ("hadamard", False): "LH", ("walsh", False): "GSR"}
    name = kind[recipe.R1_order, recipe.block is None]
    return name + (f" {recipe.block}" if recipe.block else "") + " ±" * recipe.signs


def recipe_of(result: Result) -> Recipe:
    """The recipe that a result was computed from."""
    try:
        return Recipe(**{name: value for name, value in result.spec.items() if name != "task"})
    except (TypeError, ValueError) as error:
        name = local_path(result.spec).name
        raise ValueError(f"the result {name} comes from another version of rotlib: delete it ({error})") from error


def arms(results: Iterable[Result]) -> list[Arm]:
    """Group quantization results into arms, in order of first appearance."""
    groups: dict[tuple, list[Result]] = {}
    for result in results:
        if result.spec["task"] == "quantize":
            groups.setdefault(_but_for_the_seed(result.spec), []).append(result)
    by_seed = [sorted(group, key=lambda result: recipe_of(result).seed) for group in groups.values()]
    return [Arm(recipe_of(group[0]), tuple(group)) for group in by_seed]


def stored(recipes: Iterable[Recipe], own: bool = False) -> list[Arm]:
    """The arms of these recipes, in their order, with every seed that this machine has computed or that is committed.

    With `own`, beside an arm with a random Hadamard rotation stand those of `own.py`'s rotations, all else the same.
    """
    found = {_but_for_the_seed(arm.recipe.spec()): arm for arm in arms(load_results())}
    every = (one for recipe in recipes for one in (recipe, *(_own_rotations(recipe) if own else ())))
    asked = dict.fromkeys(_but_for_the_seed(recipe.spec()) for recipe in every)
    return [found[key] for key in asked if key in found]


def _own_rotations(recipe: Recipe) -> list[Recipe]:
    names = [name for name in DRAWN if name not in SHIPPED] if recipe.rotation == "hadamard" else []
    return [replace(recipe, rotation=name) for name in names]


def mean_and_error(values: Iterable[float]) -> tuple[float, float]:
    """Mean and standard error; the error of a single value is NaN."""
    values = list(values)
    return fmean(values), stdev(values) / sqrt(len(values)) if len(values) > 1 else float("nan")


def judge(better: Arm, worse: Arm, margin: float = 1.0) -> Verdict:
    """Is `better` better, by the rule above? Raises ValueError where the arms share no seed, or were measured on other text."""
    positive("margin", margin)
    for name in _YARDSTICK:
        if getattr(better.recipe, name) != getattr(worse.recipe, name):
            raise ValueError(f"{better.rotation} and {worse.rotation} differ in {name}: compare arms with the same")
    a, b = better.values("kl"), worse.values("kl")
    seeds = sorted(a.keys() & b.keys())
    if diverged := [arm.rotation for arm in (better, worse) if arm.diverged]:
        return Verdict(float("nan"), float("nan"), float("nan"), len(seeds), f"undecided, {diverged[0]} diverged")
    if not seeds:
        raise ValueError(f"{better.rotation} and {worse.rotation} have no seed in common: run both on the same seeds")
    effect, error = mean_and_error(margin * b[seed] - a[seed] for seed in seeds)
    verdict = "undecided"
    if len(seeds) >= 3 and abs(effect) > 2 * error:
        verdict = "reproduced" if effect > 0 else "not reproduced"
    ratio = fmean(a[seed] for seed in seeds) / fmean(b[seed] for seed in seeds)
    return Verdict(effect, error, ratio, len(seeds), verdict)


def verdict(arms: Mapping[tuple, Arm], better: tuple, worse: tuple, margin: float = 1.0) -> str:
    """`judge` of two arms by their keys, as a sentence that also says where one of them has not been run."""
    for key in (better, worse):
        if key not in arms:
            return f"undecided (no run of {', '.join(map(str, key))})"
    return str(judge(arms[better], arms[worse], margin))


def markdown(arms: Iterable[Arm]) -> str:
    """The table of arms; ± is the standard error over seeds."""
    lines = [_HEADER, "|" + "---|" * (_HEADER.count("|") - 1)]
    for arm in arms:
        cells = (_cell(*arm.summary("perplexity"), 2), _cell(*arm.summary("kl"), 4))
        times = (f"{arm.seconds('rotate'):.0f}", f"{arm.seconds('quantize'):.0f}")
        named = (arm.rotation, arm.recipe.precision, arm.rounding, str(len(arm.results)))
        lines.append(f"| {' | '.join((*named, *cells, *times, arm.settings))} |")
    return "\n".join(lines)


def grid(rows: Mapping[str, Mapping[str, Arm]]) -> str:
    """KL of many arms as Markdown: a line a rotation, with what learning its first arm's took, a column a precision and rounding.

    Memory is the process's peak up to the end of learning, model and reference included, of the seed with the least: whatever the
    process did before only adds.
    """
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    header = ("rotation", "tokens", "learning, s", "memory, GB", *columns)
    lines = [f"| {' | '.join(header)} |", "|" + "---|" * len(header)]
    for name, row in rows.items():
        arm = next(iter(row.values()))
        cost = ("–", "–", "–")
        known = [result.metrics for result in arm.results if "learning_tokens" in result.metrics]
        if known:
            tokens = max(metrics["learning_tokens"] for metrics in known)
            memory = min(metrics["learning_memory_mb"] for metrics in known)
            cost = (f"{tokens:,.0f}", f"{arm.seconds('rotate'):.0f}", f"{memory / 1024:.1f}")
        cells = [_marked(row[column]) if column in row else "" for column in columns]
        lines.append(f"| {' | '.join((name, *cost, *cells))} |")
    return "\n".join(lines)


def _marked(arm: Arm) -> str:
    return _cell(*arm.summary("kl"), 3) + " (diverged)" * arm.diverged + " (stale)" * arm.stale


def _but_for_the_seed(spec: dict) -> tuple:
    return tuple(sorted((name, value) for name, value in spec.items() if name != "seed"))


def _cell(mean: float, error: float, digits: int) -> str:
    return f"{mean:.{digits}f}" + (f" ± {error:.{digits}f}" if error == error else "")
