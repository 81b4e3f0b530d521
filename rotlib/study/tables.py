"""Arms of a comparison, runs that differ only in their seed, and verdicts between two arms.

"Is A better than B?" is answered on the logarithms of their KL divergences (`inference.py`): *yes*,
*no*, *equivalent*, or *undecided*, so with fewer than three seeds, on other machines, or where an
arm has diverged. With a margin m it reads "is A below m times B?".
"""

import logging
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from math import isfinite, nan, sqrt
from statistics import fmean, geometric_mean, stdev

from rotlib.checks import positive
from rotlib.study.files import content_of
from rotlib.study.inference import LEAST_SEEDS, Difference, Runs, compare, noise
from rotlib.study.recipe import MAKES, OWN, Recipe, rotations
from rotlib.study.store import DIVERGED, Result, load_results

_HEADER = (
    "| rotation | precision | rounding | seeds | perplexity | KL, nats "
    "| learning, s | quantizing, s | settings |"
)
# the settings that an arm's name and precision tell
_NAMED = (
    *("rotation", "block", "R1_order", "signs", "start", "local", "grouped", "activation_share"),
    *("R3", "R4", "rounding", "act_order", "bits", "grid", "activation_bits", "activation_grid"),
    *("kv_bits", "seed"),
)
_YARDSTICK = ("model", "text", "window", "test_windows")  # what two arms must share to be compared


@dataclass(frozen=True)
class Arm:
    """The runs of one recipe over its seeds, in the seeds' order."""

    recipe: Recipe
    results: tuple[Result, ...]

    @property
    def rotation(self) -> str:
        """How tables and figures name the arm: "hadamard", "GSR 64", "optrot + R3 R4"."""
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
        group_size = self.recipe.group_size
        return self.recipe.precision + (f" g{group_size}" if group_size else "")

    @property
    def rounding(self) -> str:
        """Of the weights: GPTQ, GPTQ act-order, RTN or none."""
        name = {"none": "none", "rtn": "RTN", "gptq": "GPTQ"}[self.recipe.rounding]
        return name + (" act-order" if self.recipe.act_order else "")

    @property
    def settings(self) -> str:
        """What else differs from the defaults, and whether today's code would compute it anew."""
        told = ("task", *_NAMED)
        spec = self.recipe.spec()
        others = [f"{name} {value}" for name, value in spec.items() if name not in told]
        return ", ".join(others + ["diverged"] * self.diverged + ["stale"] * self.stale)

    @property
    def stale(self) -> bool:
        return any(result.stale for result in self.results)

    @property
    def diverged(self) -> bool:
        """True where some seed's perplexity is beyond `DIVERGED`, or no number.

        Its divergence is noise, and no claim is judged on it.
        """
        return any(not result.metrics["perplexity"] < DIVERGED for result in self.results)

    def on(self, machine: str | None) -> "Arm":
        """The arm of those seeds alone that ran on one kind of machine, such as "cpu"."""
        return replace(self, results=tuple(r for r in self.results if machine_of(r) == machine))

    @property
    def runs(self) -> Runs:
        """Its divergences, as statistics have them."""
        windows = {
            recipe_of(result).seed: result.metrics.get("kl_windows", ()) for result in self.results
        }
        return Runs(self.values("kl"), windows)

    def values(self, metric: str) -> dict[int, float]:
        """A metric of every seed."""
        return {recipe_of(result).seed: result.metrics[metric] for result in self.results}

    def summary(self, metric: str) -> tuple[float, float]:
        """Mean and standard error of a metric over the seeds."""
        return mean_and_error(self.values(metric).values())

    def seconds(self, step: str) -> float:
        """Of its fastest seed: whatever else a machine does only adds."""
        return min(result.seconds[step] for result in self.results)


@dataclass(frozen=True)
class Verdict:
    """What a comparison of two arms says: `word`, or why there is none (`against`)."""

    effect: float  # mean of (worse − better) in nats of KL, paired by seed
    ratio: float  # of the two divergences, the geometric mean over the seeds
    seeds: int
    difference: Difference | None = None
    against: str = ""

    @property
    def word(self) -> str:
        if self.difference is None:
            return f"undecided, {self.against}"
        return self.difference.word()

    def __str__(self) -> str:
        if self.ratio != self.ratio:
            return self.word
        change = f"KL {100 * (self.ratio - 1):+.0f} %"
        if self.difference is None:
            return f"{self.word} ({change})"
        low, high, p = self.difference.low, self.difference.high, self.difference.p
        interval = f"{100 * (low - 1):+.0f} to {100 * (high - 1):+.0f}"
        surely = "p < 0.0001" if p < 1e-4 else f"p = {p:.2g}"
        return f"{self.word} ({change}, {interval}; {surely}, {self.seeds} seeds)"


def _hadamard_R1(recipe: Recipe) -> str:
    """GSR's names: GH and GW global, LH and GSR in blocks of this size; ± with random signs."""
    names = {"hadamard": ("GH", "LH"), "walsh": ("GW", "GSR")}[recipe.R1_order]
    name = f"{names[1]} {recipe.block}" if recipe.block else names[0]
    return name + " ±" * recipe.signs


def machine_of(result: Result) -> str:
    """The kind of device that a result was computed on: all processors are one."""
    return str(result.provenance.get("device", "")).split(",")[0]


def recipe_of(result: Result) -> Recipe:
    """The recipe that a result was computed from."""
    try:
        return _recipe(tuple(result.spec.items()))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"the result {result.file} comes from another version of rotlib: delete it ({error})"
        ) from error


@cache  # a table asks for the recipes of all results, again and again
def _recipe(spec: tuple) -> Recipe:
    return Recipe(**{name: value for name, value in spec if name != "task"})


def arms(results: Iterable[Result]) -> list[Arm]:
    """Group quantization results into arms, in order of first appearance.

    Those of rotations of one's own that aren't registered are left out, which is said once.
    """
    groups: dict[tuple, list[Result]] = {}
    for result in results:
        if result.spec["task"] == "quantize" and _is_known(result.spec.get("rotation", "none")):
            groups.setdefault((_but_for_the_seed(result.spec), _content(result)), []).append(result)
    found = []
    for group in groups.values():
        group.sort(key=lambda result: recipe_of(result).seed)
        found.append(Arm(recipe_of(group[0]), tuple(group)))
    return found


@lru_cache
def _warn_of(rotation: str) -> None:
    logging.getLogger("rotlib").warning(
        f"rotlib: results of the rotation {rotation!r} are left out: "
        "it isn't registered here (rl.register_rotation)"
    )


def _is_known(rotation: str) -> bool:
    if rotation not in rotations():
        _warn_of(rotation)
    return rotation in rotations()


def stored(recipes: Iterable[Recipe], own: bool = False) -> list[Arm]:
    """The arms of these recipes, in their order, with every seed there is, here or committed.

    With `own`, beside an arm with a random Hadamard rotation stand those with rotations of one's
    own, all else the same.
    """
    found: dict[tuple, list[Arm]] = {}
    for arm in arms(load_results()):
        found.setdefault(_but_for_the_seed(arm.recipe.spec()), []).append(arm)
    asked = {}
    for recipe in recipes:
        beside = OWN if own and recipe.rotation == "hadamard" else ()
        for one in (recipe, *(replace(recipe, rotation=name) for name in beside)):
            asked[_but_for_the_seed(one.spec())] = one
    return [arm for key, one in asked.items() if (arm := _of_today(one, found.get(key, [])))]


def _of_today(recipe: Recipe, named_alike: list[Arm]) -> Arm | None:
    """The arm of the model and text that a recipe's names stand for now.

    Where these aren't at hand it is the only arm of those names. Raises ValueError for several.
    """
    try:
        today = tuple(sorted(content_of(recipe.spec()).items()))
    except (ImportError, ValueError) as error:
        if len(named_alike) < 2:
            return named_alike[0] if named_alike else None
        raise ValueError(
            f"there are results of {len(named_alike)} models or texts of the names "
            f"{recipe.model!r} and {recipe.text!r}: delete those of the others ({error})"
        ) from error
    return next((arm for arm in named_alike if _content(arm.results[0]) == today), None)


def mean_and_error(values: Iterable[float]) -> tuple[float, float]:
    """Mean and standard error; the error of a single value, or beside an infinite one, is NaN."""
    values = list(values)
    if not all(map(isfinite, values)):
        return fmean(values), float("nan")
    return fmean(values), stdev(values) / sqrt(len(values)) if len(values) > 1 else float("nan")


def judge(
    better: Arm, worse: Arm, margin: float = 1.0, among: Iterable[Arm] | None = None
) -> Verdict:
    """Is `better` better, by the rule above?

    The seeds are those that ran on one kind of machine; the noise is that of all arms of the class
    there, those stored or the ones given. Raises ValueError where the arms share no seed, or were
    measured on other text.
    """
    positive("margin", margin)
    for name in _YARDSTICK:
        a, b = ((getattr(arm.recipe, name), arm.results[0].content) for arm in (better, worse))
        if (a[0], a[1].get(name)) != (b[0], b[1].get(name)):
            raise ValueError(
                f"{better.rotation} and {worse.rotation} differ in {name}: "
                "compare arms with the same"
            )
    seeds = better.values("kl").keys() & worse.values("kl").keys()
    if diverged := [arm.rotation for arm in (better, worse) if arm.diverged]:
        return Verdict(nan, nan, len(seeds), against=f"{diverged[0]} diverged")
    if not seeds:
        raise ValueError(
            f"{better.rotation} and {worse.rotation} have no seed in common: "
            "run both on the same seeds"
        )
    machine = _shared_machine(better, worse)
    if machine is None:
        return Verdict(nan, nan, len(seeds), against="on other machines")
    pair = better.on(machine), worse.on(machine)
    a, b = (arm.values("kl") for arm in pair)
    seeds = sorted(a.keys() & b.keys())
    if not all(map(_is_sound, pair)):
        return Verdict(nan, nan, len(seeds), against="no divergence to compare")
    spreads = None
    if len(seeds) >= LEAST_SEEDS and _class_of(better) == _class_of(worse):
        among = arms(load_results()) if among is None else among
        every = (*of_class(better, among), better, worse)  # these two may not be stored
        once = {_but_for_the_seed(arm.recipe.spec()): arm.on(machine) for arm in every}
        found = noise([arm.runs for arm in once.values()])
        if found is None:
            return _undecided(a, b, seeds, "no degree of freedom in its class")
        by_name = dict(zip(once, found.arms, strict=True))
        spreads = tuple(by_name[_but_for_the_seed(arm.recipe.spec())] for arm in pair)
    difference = compare(*(arm.runs for arm in pair), spreads, margin)
    if isinstance(difference, str):
        return _undecided(a, b, seeds, difference)
    return replace(_undecided(a, b, seeds, ""), difference=difference)


def _undecided(a: dict[int, float], b: dict[int, float], seeds: list[int], why: str) -> Verdict:
    """The change alone."""
    effect = fmean(b[seed] - a[seed] for seed in seeds)
    ratio = geometric_mean(a[seed] / b[seed] for seed in seeds)
    return Verdict(effect, ratio, len(seeds), against=why)


def _shared_machine(better: Arm, worse: Arm) -> str | None:
    """The kind of machine that most seeds of both ran on; None where no seed did."""
    on = [{recipe_of(r).seed: machine_of(r) for r in arm.results} for arm in (better, worse)]
    same = Counter(name for seed, name in on[0].items() if on[1].get(seed) == name)
    return same.most_common(1)[0][0] if same else None


def of_class(of: Arm, among: Iterable[Arm]) -> list[Arm]:
    """The sound arms that differ from one in the rotation alone."""
    own = _class_of(of)
    alike = (arm for arm in among if _class_of(arm) == own)
    return [arm for arm in alike if _is_sound(arm) and not arm.stale and not arm.diverged]


def _is_sound(arm: Arm) -> bool:
    """Whether all its divergences, and its windows', are numbers above 0: they have logarithms."""
    runs = arm.runs
    every = (*runs.kl.values(), *(kl for kls in runs.windows.values() for kl in kls))
    return all(isfinite(kl) for kl in every) and min(runs.kl.values()) > 0


def beside(asked: Iterable[Arm], among: Iterable[Arm] | None = None) -> list[Arm]:
    """The arms of a class with one of these, stale ones apart: among those stored, or given."""
    own = {_class_of(arm) for arm in asked}
    among = arms(load_results()) if among is None else among
    return [arm for arm in among if _class_of(arm) in own and not arm.stale]


def _class_of(arm: Arm) -> tuple:
    """All but what makes the rotation: precision, quantizer, model and text."""
    settings = ((name, value) for name, value in arm.recipe.spec().items() if name not in MAKES)
    return (*sorted(settings), _content(arm.results[0]))


def verdict(arms: Mapping[tuple, Arm], better: tuple, worse: tuple, margin: float = 1.0) -> str:
    """`judge` of two arms by their keys, as a sentence; one that has not been run is named."""
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


def provenance(results: Iterable[Result]) -> str:
    """What results were computed with, and how many no run at a recorded commit stands behind."""
    results = list(results)
    origins = [result.provenance for result in results]
    versions = (pair for origin in origins for pair in (origin.get("versions") or {}).items())
    kinds = Counter(f"{name} {number}" for name, number in versions)
    commits = (origin.get("model_commit") for origin in origins)
    kinds |= Counter(f"model commit {commit}" for commit in commits if commit)
    unverified = sum("unverified" in result.provenance for result in results)
    made_with = ", ".join(f"{kind} ({count})" for kind, count in sorted(kinds.items()))
    return f"{len(results)} results, {unverified} unverified, made with: {made_with}"


def kl_by_precision(rows: Mapping[str, Mapping[str, Arm]]) -> str:
    """KL of many arms as Markdown: a line a rotation, a column a precision and rounding.

    A line also has what learning its first arm's rotation took. Memory is the process's peak up to
    the end of learning, model and reference included. It is of the seed with the least: whatever
    the process did before only adds.
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


def _content(result: Result) -> tuple:
    return tuple(sorted(result.content.items()))


def _cell(mean: float, error: float, digits: int) -> str:
    return f"{mean:.{digits}f}" + (f" ± {error:.{digits}f}" if error == error else "")
