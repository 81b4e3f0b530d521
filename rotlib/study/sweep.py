"""Run a sweep: ``python -m rotlib.study.sweep configs/sweeps/gsr.yaml --workers 4 [--dry-run]``.

Many recipes from one YAML file (`sweep_file.py`) are run by local processes or on a Ray cluster
(`engines.py`). Results go where `run` keeps them, one file a recipe, written as the run's last act:
a sweep that was killed goes on where it stopped, and the workers need nothing but the folder they
share.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import psutil
import torch
from tqdm import tqdm

from rotlib.checks import whole_number
from rotlib.models.zoo import pick_device
from rotlib.study import memory, numerics, store
from rotlib.study.engines import ENGINES, NoCluster
from rotlib.study.files import (
    check_results_folder,
    local_path,
    print_any_name,
    reader_may_leave,
    results_folder,
)
from rotlib.study.recipe import LEARNED, READS, THROUGH_NETWORK, Recipe
from rotlib.study.suits import check_suits
from rotlib.study.sweep_file import FIELDS, read_sweep
from rotlib.study.yaml_file import word_of

# which windows the time of a step grows with
_TOKENS = {
    "quantize": "calibration_windows",
    "evaluate": "test_windows",
    "rotate": "learning_windows",
    "tune": "tuning",
}


class Estimate(NamedTuple):
    """What a recipe should take.

    Seconds a step are judged by the finished run that is most like it, memory by the model's
    config.
    """

    seconds: dict[str, float] | None
    memory_gb: float | None


class State(NamedTuple):
    """How a recipe stands, and for "stale" and "refused" why.

    "complete" here or "committed" in results/study, "stale" (a stage it read has changed since),
    "damaged" (its file can't be read), "partial" (weights are kept), "missing", or "refused": its
    run would end in that sentence, as things are.
    """

    name: str
    why: tuple[str, ...] = ()


def state_of(recipe: Recipe) -> State:
    """How a recipe stands, without running anything but the canaries."""
    spec = recipe.spec()
    try:
        path = local_path(spec)
    except (ImportError, ValueError) as error:  # no such model here, or another text
        return State("refused", (str(error),))
    try:
        if result := store.read(path):
            return _fresh_or_stale(result, "complete")
    except ValueError:
        return State("damaged")
    weights = recipe.sharing_weights().spec() | {"task": "weights"}
    if local_path(weights, ".pt").exists():
        return State("partial")
    with suppress(ValueError):  # a damaged one of the study is no hindrance
        if result := store.read(results_folder() / "study" / path.name):
            return _fresh_or_stale(result, "committed")
    try:
        check_suits(recipe)
    except ValueError as error:
        return State("refused", (str(error),))
    return State("missing")


def _fresh_or_stale(result: store.Result, fresh: str) -> State:
    noted = result.provenance["stages"]
    changed = [f"{stage} has changed" for stage in numerics.changed_since(noted)]
    drifted = [f"{stage}: {what}" for stage in noted if (what := numerics.drift(stage))]
    return State("stale", (*changed, *drifted)) if changed or drifted else State(fresh)


def tasks_of(recipes: list[Recipe]) -> list[list[Recipe]]:
    """Recipes that share a learned rotation, or else their weights, belong to one worker."""
    groups: dict[object, list[Recipe]] = {}
    for recipe in recipes:
        learned = recipe.rotation in LEARNED
        shared = tuple(recipe.rotation_reads.items()) if learned else recipe.sharing_weights()
        groups.setdefault(shared, []).append(recipe)
    return list(groups.values())


def estimate(recipe: Recipe, finished: list[store.Result], device: str = "auto") -> Estimate:
    """The time of the finished run of the same model with most settings in common, by the tokens.

    It ran on a GPU where this one would, and was tuned where the recipe is. What learns
    through the network takes at least the memory that the run did. Either is None where it can't be
    told here.
    """
    memory_gb, on_gpu = None, pick_device(device).type == "cuda"
    with suppress(ValueError, ImportError):  # the run itself will tell
        needed = memory.estimate(recipe)
        memory_gb = (needed.beside if on_gpu else needed.host) / memory.GB
    wanted, defaults = asdict(recipe), asdict(Recipe())

    def settings_of(result: store.Result) -> dict:
        return defaults | {name: v for name, v in result.spec.items() if name in defaults}

    def likeness(result: store.Result) -> int:
        settings = settings_of(result)
        common = sum(settings[name] == value for name, value in wanted.items())
        return common + 10 * (settings["rotation"] == recipe.rotation)

    comparable = [
        result
        for result in finished
        if result.spec["task"] == "quantize"
        and settings_of(result)["model"] == recipe.model
        and str(result.provenance.get("device")).startswith("cpu") != on_gpu
        and ("tune" in result.seconds) == bool(recipe.tuning)
    ]
    if not comparable:
        return Estimate(None, memory_gb)
    result = max(comparable, key=likeness)
    settings = settings_of(result)
    if recipe.rotation in THROUGH_NETWORK:
        memory_gb = max(memory_gb or 0, result.peak_memory_mb * 2**20 / memory.GB)
    learns_on_text = "learning_windows" in READS.get(recipe.rotation, ())
    scale = {
        step: recipe.window * wanted[name] / (settings["window"] * settings[name])
        for step, name in _TOKENS.items()
        if step in result.seconds and (step != "rotate" or learns_on_text)
    }
    seconds = {step: taken * scale.get(step, 1.0) for step, taken in result.seconds.items()}
    return Estimate(seconds, memory_gb)


def plan(states: dict[Recipe, State], rerun_stale: bool) -> dict[Recipe, State]:
    """What has to run, and how it stands."""
    wanted = {"missing", "partial", "damaged", "committed", "refused"} | (
        {"stale"} if rerun_stale else set()
    )
    return {recipe: state for recipe, state in states.items() if state.name in wanted}


def estimates_of(todo: list[Recipe], device: str = "auto") -> dict[Recipe, Estimate]:
    """Every recipe's estimate, by the results that there are; the same one for every seed."""
    finished = []
    with suppress(ValueError):  # a damaged result, of any sweep, takes no more than the estimates
        finished = store.load_results()
    of_settings = {replace(recipe, seed=0): recipe for recipe in todo}
    found = {key: estimate(recipe, finished, device) for key, recipe in of_settings.items()}
    return {recipe: found[replace(recipe, seed=0)] for recipe in todo}


def forecast(estimates: dict[Recipe, Estimate], workers: int) -> str:
    """A line of what is to come: runs, time, memory; what several runs share counts once."""
    if not estimates:
        return "nothing to run"
    steps: dict[tuple, float] = {}
    for recipe, (seconds, _) in estimates.items():
        reads = tuple(recipe.rotation_reads.items())
        shared = {"rotate": reads, "quantize": recipe.sharing_weights()}
        for step, taken in (seconds or {}).items():
            steps[step, shared.get(step, recipe)] = taken
    tasks = len(tasks_of(list(estimates)))
    line = f"{len(estimates)} to run in {tasks} tasks"
    if most := _most_memory(estimates.values()):
        line += f", up to {most:.1f} GB a worker"
    if steps:
        line += f", about {sum(steps.values()) / 60 / min(workers, tasks):.0f} minutes"
    unknown = sum(found.seconds is None for found in estimates.values())
    return line + (f"; the time of {unknown} is unknown" if unknown else "")


def _most_memory(estimates: Iterable[Estimate]) -> float:
    return max((found.memory_gb or 0 for found in estimates), default=0)


def _options(arguments: list[str] | None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = argparse.ArgumentParser(
        prog="python -m rotlib.study.sweep",
        description="Run every recipe of a sweep that has no result here.",
    )
    parser.add_argument("sweep", type=Path, help="such as configs/sweeps/gsr.yaml")
    parser.add_argument("--engine", choices=ENGINES, default="local")
    parser.add_argument("--workers", type=int, default=max(1, torch.cuda.device_count()))
    parser.add_argument("--address", help="of a running Ray cluster; 'auto' finds it")
    only = {"nargs": "+", "action": "extend", "metavar": "FIELD=VALUE"}
    parser.add_argument("--only", **only, help="just the recipes with these settings")
    parser.add_argument("--rerun-stale", action="store_true", help="compute what is stale anew")
    parser.add_argument("--dry-run", action="store_true", help="say what would run, run nothing")
    return parser, parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    print_any_name()
    parser, options = _options(arguments)
    try:
        whole_number("workers", options.workers, 1)
        recipes = _chosen(read_sweep(options.sweep), options.only or [])
        if options.address and options.engine != "ray":
            raise ValueError("--address is of a Ray cluster: it needs --engine ray")
        if options.engine == "ray" and find_spec("ray") is None:
            raise ValueError("the engine 'ray' isn't installed: pip install ray")
    except ValueError as error:
        parser.error(str(error))
    looked_at = tqdm(recipes, desc="looking for results", unit="recipe", delay=2, leave=False)
    states = {recipe: state_of(recipe) for recipe in looked_at}
    todo = plan(states, options.rerun_stale)
    estimates = estimates_of(list(todo))
    counts = Counter(state.name for state in states.values())
    found = ", ".join(f"{count} {name}" for name, count in counts.items())
    done = counts["complete"] + counts["committed"]
    print(f"{done} of {len(recipes)} recipes have a result that today's code stands behind")
    print(f"{len(recipes)} recipes: {found}; {forecast(estimates, options.workers)}")
    reasons = Counter((state.name, why) for state in states.values() for why in state.why)
    for (name, why), count in reasons.items():
        print(f"{name} are {count} by {why}")
    if counts["committed"]:
        print("committed are of other machines: copied to results/local they count as complete")
    if options.dry_run:
        with reader_may_leave():
            for recipe, state in todo.items():
                print(f"{state.name:9} {recipe.spec()}")
        return 0
    if not todo:
        return 0
    tasks = tasks_of(list(todo))
    memory_gb = [_most_memory(estimates[recipe] for recipe in task) for task in tasks]
    needed = sum(sorted(memory_gb)[-options.workers :])
    free = psutil.virtual_memory().available / memory.GB
    if options.engine == "local" and options.workers > 1 and memory.SURE * needed > free:
        parser.error(
            f"{options.workers} workers may need {needed:.1f} GB at a time, and {free:.1f} GB are "
            "free: take fewer"
        )
    try:
        check_results_folder()
    except ValueError as error:
        parser.error(str(error))
    place = {"address": options.address, "memory_gb": memory_gb} if options.engine == "ray" else {}
    failed = 0
    with tqdm(total=len(todo), desc="sweep", unit="run", disable=False) as bar:
        try:
            for number, failures in ENGINES[options.engine](tasks, options.workers, **place):
                bar.update(len(tasks[number]))
                for recipe, failure in zip(tasks[number], failures, strict=True):
                    if failure:
                        failed += 1
                        bar.write(f"failed: {recipe.spec()}: {failure}", file=sys.stderr)
        except KeyboardInterrupt:
            bar.write("interrupted: the same command goes on from here", file=sys.stderr)
            return 130
        except NoCluster as error:
            parser.error(str(error))
    return 1 if failed else 0


def _chosen(recipes: list[Recipe], only: list[str]) -> list[Recipe]:
    """Those with one of the values given for each field."""
    wanted: dict[str, list] = {}
    for entry in only:
        name, _, value = entry.partition("=")
        if name not in FIELDS or not value:
            raise ValueError(
                f"--only takes a recipe's fields, such as rotation=optrot, not {entry!r}"
            )
        wanted.setdefault(name, []).append(_read_value(value))

    def fits(recipe: Recipe) -> bool:
        return all(
            any(_same(getattr(recipe, name), value) for value in values)
            for name, values in wanted.items()
        )

    for name, values in wanted.items():
        there = [getattr(recipe, name) for recipe in recipes]
        for value in values:
            if recipes and not any(_same(one, value) for one in there):
                raise ValueError(f"no recipe of this sweep has {name}={value}")
    chosen = [recipe for recipe in recipes if fits(recipe)]
    if not chosen and only:
        raise ValueError(f"no recipe of this sweep has {' and '.join(only)}")
    if not chosen:
        raise ValueError("this sweep holds no recipes")
    return chosen


def _same(value: object, other: object) -> bool:
    """Equal, and both truth values or neither: False isn't the seed 0."""
    return value == other and isinstance(value, bool) == isinstance(other, bool)


def _read_value(text: str) -> object:
    """As a sweep file has it, and 1e-2, which YAML takes for a word, as a number."""
    value = word_of(text)
    if isinstance(value, str):
        with suppress(ValueError):
            return float(value)
    return value


if __name__ == "__main__":
    sys.exit(main())
