"""Sweeps: many recipes from one YAML file, run by local processes or on a Ray cluster, every result kept once.

The file crosses each of its `arms` with the lists of its `grid`; what all have in common stands under `base`:

    base: {bits: 3, group_size: 64, symmetric: false}
    grid: {rotation: [none, hadamard], seed: [0, 1, 2]}
    arms: [{}, {act_order: true, seed: [0, 1, 2, 3, 4]}]

A list in an arm is a grid of its own, and replaces the shared one of that name. Every combination is a `Recipe`, and all are made before
anything runs. Results go where `run` keeps them, one file a recipe, written as the run's last act: a sweep that was killed goes on where
it stopped, and the workers need nothing but the folder they share.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, fields
from difflib import get_close_matches
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import NamedTuple

import psutil
import torch
import yaml
from tqdm import tqdm

from rotlib import memory, store
from rotlib.checks import whole_number
from rotlib.engines import ENGINES, NoCluster
from rotlib.recipe import LEARNED, THROUGH_NETWORK, Recipe

_PARTS = ("base", "grid", "arms")
_FIELDS = {field.name for field in fields(Recipe)}


class Estimate(NamedTuple):
    """What a recipe should take: seconds a stage, judged by the finished run that is most like it, and memory by the model's config."""

    seconds: dict[str, float] | None
    memory_gb: float | None


def read_sweep(path: Path) -> list[Recipe]:
    """The recipes of a sweep file, each once, in the file's order: arm by arm, the grid's last list fastest.

    Raises ValueError naming file and line for what isn't YAML, an unknown key, or a combination that a recipe refuses.
    """
    try:
        root = yaml.compose(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"the sweep {path} can't be read: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise ValueError(f"{path.name} isn't valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(root, yaml.MappingNode):
        raise ValueError(f"{path.name} must map {', '.join(_PARTS)} to what they hold")
    _refuse_twins(path, root)
    at = {key.value: (key, node) for key, node in root.value}
    for name, (key, _) in at.items():
        if name not in _PARTS:
            raise ValueError(f"{_place(path, key)}: unknown part {name!r}, a sweep has {', '.join(_PARTS)}")
    base = _entries(path, at["base"][1]) if "base" in at else {}
    grid = _entries(path, at["grid"][1]) if "grid" in at else {}
    if "arms" in at and not (isinstance(at["arms"][1], yaml.SequenceNode) and at["arms"][1].value):
        raise ValueError(f"{_place(path, at['arms'][0])}: arms must be a list, each entry a mapping of what it changes")
    arms = [(_entries(path, node), node) for node in at["arms"][1].value] if "arms" in at else [({}, root)]
    for part, only_lists in ((base, False), (grid, True), *((arm, False) for arm, _ in arms)):
        for values, key in part.values():
            if values == [] or (only_lists and not isinstance(values, list)):
                raise ValueError(f"{_place(path, key)}: {key.value} must be a list of values, such as [0, 1, 2], not {values!r}")
    recipes = []
    for arm, node in arms:
        together = {name: value if isinstance(value, list) else [value] for part in (base, grid, arm) for name, (value, _) in part.items()}
        for chosen in product(*together.values()):
            settings = dict(zip(together, chosen, strict=True))
            try:
                recipes.append(Recipe(**settings))
            except ValueError as error:
                keys = {name: key for part in (base, grid, arm) for name, (_, key) in part.items()}
                words = str(error).replace(",", " ").split()
                named = next((keys[word] for word in words if word in keys), node)
                raise ValueError(f"{_place(path, named)}: {error} (in {', '.join(f'{k}: {v}' for k, v in settings.items())})") from error
    return list(dict.fromkeys(recipes))


def _entries(path: Path, node: yaml.Node) -> dict[str, tuple[object, yaml.Node]]:
    """{field: (its value, where its name stands)} of one mapping."""
    if not isinstance(node, yaml.MappingNode):
        raise ValueError(f"{_place(path, node)}: this must map a recipe's fields to values, such as {{bits: 3}}")
    for key, _ in node.value:
        if key.value not in _FIELDS:
            hint = f", did you mean {match[0]}?" if (match := get_close_matches(key.value, _FIELDS)) else ""
            raise ValueError(f"{_place(path, key)}: a recipe has no field {key.value!r}{hint}")
    _refuse_twins(path, node)
    try:
        values = yaml.safe_load(yaml.serialize(node))
    except yaml.YAMLError as error:
        raise ValueError(f"{_place(path, node)}: {' '.join(str(error).split())}") from error
    return {key.value: (values[key.value], key) for key, _ in node.value}


def _refuse_twins(path: Path, node: yaml.MappingNode) -> None:
    """YAML would take the last of two entries with one name."""
    seen = set()
    for key, _ in node.value:
        if key.value in seen:
            raise ValueError(f"{_place(path, key)}: {key.value} stands there a second time")
        seen.add(key.value)


def _place(path: Path, node: yaml.Node) -> str:
    return f"{path.name}, line {node.start_mark.line + 1}"


def status(recipe: Recipe) -> str:
    """ "complete", "stale" (the code has changed since), "damaged" (its file can't be read), "partial" (weights are kept) or "missing"."""
    path = store.local_path(recipe.spec())
    try:
        if store.find(recipe.spec()):
            return "complete"
    except ValueError:
        return "damaged"
    if path.exists():
        return "stale"
    return "partial" if store.local_path(recipe.sharing_weights().spec() | {"task": "weights"}, ".pt").exists() else "missing"


def tasks_of(recipes: list[Recipe]) -> list[list[Recipe]]:
    """Recipes that share a learned rotation, or else their weights, belong to one worker: what they share is computed once."""
    groups: dict[object, list[Recipe]] = {}
    for recipe in recipes:
        shared = tuple(recipe.rotation_reads.items()) if recipe.rotation in LEARNED else recipe.sharing_weights()
        groups.setdefault(shared, []).append(recipe)
    return list(groups.values())


def estimate(recipe: Recipe, finished: list[store.Result]) -> Estimate:
    """Of the finished run of the same model with most settings in common the time, scaled by the tokens; None where there is none.

    What learns through the network takes at least the memory that the run did; None where the model isn't to be had here.
    """
    memory_gb = None
    with suppress(ValueError, ImportError):  # the run itself will tell
        needed = memory.estimate(recipe)
        memory_gb = (needed.beside if torch.cuda.is_available() else needed.host) / memory.GB
    wanted = asdict(recipe)
    defaults = asdict(Recipe())
    best, found = -1, None
    for result in finished:
        settings = defaults | {name: value for name, value in result.spec.items() if name in defaults}
        if result.spec["task"] != "quantize" or settings["model"] != recipe.model:
            continue
        common = sum(settings[name] == value for name, value in wanted.items()) + 10 * (settings["rotation"] == recipe.rotation)
        if common > best:
            best, found = common, (settings, result)
    if found is None:
        return Estimate(None, memory_gb)
    settings, result = found
    if recipe.rotation in THROUGH_NETWORK:
        memory_gb = max(memory_gb or 0, result.peak_memory_mb * 2**20 / memory.GB)
    tokens = {"quantize": "calibration_windows", "evaluate": "test_windows", "rotate": "learning_windows"}
    scale = {
        stage: recipe.window * wanted[name] / (settings["window"] * settings[name])
        for stage, name in tokens.items()
        if stage != "rotate" or "learning_windows" in LEARNED.get(recipe.rotation, ())
    }
    return Estimate({stage: seconds * scale.get(stage, 1.0) for stage, seconds in result.seconds.items()}, memory_gb)


def plan(recipes: list[Recipe], rerun_stale: bool) -> tuple[dict[Recipe, str], dict[str, int]]:
    """(what has to run and its status, how many recipes have which status)"""
    states = {recipe: status(recipe) for recipe in recipes}
    wanted = {"missing", "partial", "damaged"} | ({"stale"} if rerun_stale else set())
    return {recipe: state for recipe, state in states.items() if state in wanted}, Counter(states.values())


def estimates_of(todo: list[Recipe]) -> dict[Recipe, Estimate]:
    """Every recipe's estimate, by the results that there are."""
    finished = []
    with suppress(ValueError):  # a damaged result, this sweep's or another's, takes no more than the estimates
        finished = store.load_results()
    return {recipe: estimate(recipe, finished) for recipe in todo}


def forecast(estimates: dict[Recipe, Estimate], workers: int) -> str:
    """A line of what is to come: runs, time, memory; what several runs share counts once."""
    if not estimates:
        return "nothing to run"
    stages: dict[tuple, float] = {}
    for recipe, (seconds, _) in estimates.items():
        shared = {"rotate": tuple(recipe.rotation_reads.items()), "quantize": recipe.sharing_weights()}
        for stage, taken in (seconds or {}).items():
            stages[stage, shared.get(stage, recipe)] = taken
    tasks = len(tasks_of(list(estimates)))
    line = f"{len(estimates)} to run in {tasks} tasks"
    if most := _most_memory(estimates.values()):
        line += f", up to {most:.1f} GB a worker"
    line += f", about {sum(stages.values()) / 60 / min(workers, tasks):.0f} minutes" if stages else ""
    unknown = sum(found.seconds is None for found in estimates.values())
    return line + (f"; the time of {unknown} is unknown" if unknown else "")


def _most_memory(estimates: Iterable[Estimate]) -> float:
    return max((found.memory_gb or 0 for found in estimates), default=0)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m rotlib.sweep", description="Run every recipe of a sweep that has no result yet.")
    parser.add_argument("sweep", type=Path, help="such as configs/sweeps/gsr.yaml")
    parser.add_argument("--engine", choices=ENGINES, default="local")
    parser.add_argument("--workers", type=int, default=max(1, torch.cuda.device_count()))
    parser.add_argument("--address", help="of a running Ray cluster; 'auto' finds it")
    parser.add_argument("--only", nargs="+", default=[], metavar="FIELD=VALUE", help="just the recipes with these settings")
    parser.add_argument("--rerun-stale", action="store_true", help="compute anew what older code computed")
    parser.add_argument("--dry-run", action="store_true", help="say what would run, and run nothing")
    options = parser.parse_args(arguments)
    store.absolute_folders()
    try:
        whole_number("workers", options.workers, 1)
        recipes = _chosen(read_sweep(options.sweep), options.only)
        if options.address and options.engine != "ray":
            raise ValueError("--address is of a Ray cluster: it needs --engine ray")
        if options.engine == "ray" and find_spec("ray") is None:
            raise ValueError("the engine 'ray' isn't installed: pip install ray")
    except ValueError as error:
        parser.error(str(error))
    todo, counts = plan(recipes, options.rerun_stale)
    estimates = estimates_of(list(todo))
    found = ", ".join(f"{count} {name}" for name, count in counts.items())
    print(f"{len(recipes)} recipes: {found}; {forecast(estimates, options.workers)}")
    study = store.results_folder() / "study"
    if committed := sum(state == "missing" and (study / store.local_path(recipe.spec()).name).exists() for recipe, state in todo.items()):
        print(f"results/study holds {committed} of these, of other machines: copied to results/local they count as complete")
    if options.dry_run:
        for recipe, state in todo.items():
            print(f"{state:8} {recipe.spec()}")
        return 0
    tasks = tasks_of(list(todo))
    memory_gb = [_most_memory(estimates[recipe] for recipe in task) for task in tasks]
    needed, free = sum(sorted(memory_gb)[-options.workers :]), psutil.virtual_memory().available / memory.GB
    if options.engine == "local" and options.workers > 1 and memory.SURE * needed > free:
        parser.error(f"{options.workers} workers may need {needed:.1f} GB at a time, and {free:.1f} GB are free: take fewer")
    store.clear_leftovers()
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
        if name not in _FIELDS or not value:
            raise ValueError(f"--only takes a recipe's fields, such as rotation=optrot, not {entry!r}")
        wanted.setdefault(name, []).append(_read_value(value))
    chosen = [recipe for recipe in recipes if all(getattr(recipe, name) in values for name, values in wanted.items())]
    if not chosen:
        raise ValueError(f"no recipe of this sweep has {' and '.join(only)}" if only else "this sweep holds no recipes")
    return chosen


def _read_value(text: str) -> object:
    """As YAML has it, which takes 1e-2 for a word."""
    value: object = text
    with suppress(yaml.YAMLError):
        value = yaml.safe_load(text)
    if isinstance(value, str):
        with suppress(ValueError):
            return float(value)
    return value


if __name__ == "__main__":
    sys.exit(main())
