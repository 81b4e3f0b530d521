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
import multiprocessing
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import asdict, fields
from difflib import get_close_matches
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch
import yaml
from tqdm import tqdm

from rotlib import memory, store
from rotlib.checks import whole_number
from rotlib.pipeline import run_all
from rotlib.recipe import LEARNED, THROUGH_NETWORK, Recipe

_PARTS = ("base", "grid", "arms")
_FIELDS = {field.name for field in fields(Recipe)}
_ATTEMPTS = 3  # at a task whose worker dies
Outcome = tuple[int, list[str | None]]  # a task's number, and for each of its recipes what went wrong


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
    at = {key.value: (key, node) for key, node in root.value}
    for name, (key, _) in at.items():
        if name not in _PARTS:
            raise ValueError(f"{_place(path, key)}: unknown part {name!r}, a sweep has {', '.join(_PARTS)}")
    base = _entries(path, at["base"][1]) if "base" in at else {}
    grid = _entries(path, at["grid"][1]) if "grid" in at else {}
    if "arms" in at and not (isinstance(at["arms"][1], yaml.SequenceNode) and at["arms"][1].value):
        raise ValueError(f"{_place(path, at['arms'][0])}: arms must be a list, each entry a mapping of what it changes")
    arms = [(_entries(path, node), node) for node in at["arms"][1].value] if "arms" in at else [({}, root)]
    for part, only_lists in ((grid, True), *((arm, False) for arm, _ in arms)):
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
    values = yaml.safe_load(yaml.serialize(node))
    return {key.value: (values[key.value], key) for key, _ in node.value}


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
        memory_gb = memory.estimate(recipe).host / memory.GB
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


def work(recipes: list[dict]) -> list[str | None]:
    """Run one task's recipes; what goes wrong with one is told, and the next ones run."""
    failures = []
    for settings in recipes:
        try:
            recipe = Recipe(**settings)
            if status(recipe) == "damaged":
                store.local_path(recipe.spec()).unlink(missing_ok=True)
            run_all([recipe])
            failures.append(None)
        except Exception as error:  # whatever it is, other recipes needn't suffer for it
            failures.append(f"{type(error).__name__}: {' '.join(str(error).split())}")
    return failures


def local(tasks: list[list[Recipe]], workers: int) -> Iterator[Outcome]:
    """Processes of this machine. A worker that dies takes the pool with it: what wasn't finished is handed to a new one."""
    left, broken = dict(enumerate(tasks)), 0
    while left and broken < _ATTEMPTS:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(workers, context, _share_cores, (workers,)) as pool, suppress(BrokenProcessPool):
            running = {pool.submit(work, [asdict(recipe) for recipe in task]): number for number, task in left.items()}
            for future in as_completed(running):
                outcome = running[future], future.result()
                del left[outcome[0]]
                broken = 0
                yield outcome
            return
        broken += 1
        waiting = list(left.items())
        left = dict(waiting[workers:] + waiting[:workers])  # the first ones were at work: others go before them now
    for number, task in left.items():
        yield number, [f"its worker died {_ATTEMPTS} times"] * len(task)


def _share_cores(workers: int) -> None:
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))


def ray(tasks: list[list[Recipe]], workers: int, address: str | None = None) -> Iterator[Outcome]:
    """A Ray cluster, the one at `address` or one on this machine; a task whose worker dies is tried again elsewhere."""
    import ray as cluster  # an engine of its own, and only needed here

    address = address or os.environ.get("RAY_ADDRESS")
    if not cluster.is_initialized():  # workers elsewhere must find the same folders
        places = {"env_vars": {name: value for name, value in os.environ.items() if name.startswith("ROTLIB_")}}
        options = {"log_to_driver": False, "include_dashboard": False, "runtime_env": places}
        cluster.init(address=address, num_cpus=None if address else workers, **options)
    resources = {"num_cpus": 1, "num_gpus": 1 if cluster.cluster_resources().get("GPU") else 0}
    remote = cluster.remote(max_retries=_ATTEMPTS - 1, **resources)(work)
    fitting = [node["Resources"] for node in cluster.nodes() if node["Alive"] and node["Resources"].get("GPU", 0) >= resources["num_gpus"]]
    biggest = max((node.get("memory", 0) for node in fitting), default=0)
    running = {}
    for number, task in enumerate(tasks):  # Ray would wait for ever for a machine that it hasn't: the biggest one's worker refuses then
        needed = min(biggest, max((estimate(recipe, []).memory_gb or 0) for recipe in task) * memory.GB)
        running[remote.options(memory=int(needed)).remote([asdict(recipe) for recipe in task])] = number
    while running:
        (ready, *_), _ = cluster.wait(list(running))
        number = running.pop(ready)
        try:
            yield number, cluster.get(ready)
        except cluster.exceptions.RayError as error:
            yield number, [f"{type(error).__name__}: {str(error).splitlines()[0]}"] * len(tasks[number])


ENGINES: dict[str, Callable[..., Iterator[Outcome]]] = {"local": local, "ray": ray}


def plan(recipes: list[Recipe], rerun_stale: bool) -> tuple[dict[Recipe, str], dict[str, int]]:
    """(what has to run and its status, how many recipes have which status)"""
    states = {recipe: status(recipe) for recipe in recipes}
    wanted = {"missing", "partial", "damaged"} | ({"stale"} if rerun_stale else set())
    return {recipe: state for recipe, state in states.items() if state in wanted}, Counter(states.values())


def forecast(todo: list[Recipe], workers: int) -> str:
    """A line of what is to come: runs, time, memory; what several runs share counts once."""
    if not todo:
        return "nothing to run"
    finished = []
    with suppress(ValueError):  # a damaged result, this sweep's or another's, takes no more than the estimates
        finished = store.load_results()
    estimates = {recipe: estimate(recipe, finished) for recipe in todo}
    stages: dict[tuple, float] = {}
    for recipe, (seconds, _) in estimates.items():
        shared = {"rotate": tuple(recipe.rotation_reads.items()), "quantize": recipe.sharing_weights()}
        for stage, taken in (seconds or {}).items():
            stages[stage, shared.get(stage, recipe)] = taken
    line = f"{len(todo)} to run in {len(tasks_of(todo))} tasks"
    if sizes := [found.memory_gb for found in estimates.values() if found.memory_gb]:
        line += f", up to {max(sizes):.1f} GB a worker"
    line += f", about {sum(stages.values()) / 60 / workers:.0f} minutes" if stages else ""
    unknown = sum(found.seconds is None for found in estimates.values())
    return line + (f"; the time of {unknown} is unknown" if unknown else "")


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
    print(
        f"{len(recipes)} recipes: {', '.join(f'{count} {name}' for name, count in counts.items())}; {forecast(list(todo), options.workers)}"
    )
    if options.dry_run:
        for recipe, state in todo.items():
            print(f"{state:8} {recipe.spec()}")
        return 0
    tasks = tasks_of(list(todo))
    engine = ENGINES[options.engine](tasks, options.workers, *([options.address] if options.engine == "ray" else []))
    failed = []
    with tqdm(total=len(todo), desc="sweep", unit="run", disable=False) as bar:
        for number, failures in engine:
            bar.update(len(tasks[number]))
            failed += [(recipe, failure) for recipe, failure in zip(tasks[number], failures, strict=True) if failure]
    for recipe, failure in failed:
        print(f"failed: {recipe.spec()}: {failure}", file=sys.stderr)
    return 1 if failed else 0


def _chosen(recipes: list[Recipe], only: list[str]) -> list[Recipe]:
    for wanted in only:
        name, _, value = wanted.partition("=")
        if name not in _FIELDS or not value:
            raise ValueError(f"--only takes a recipe's fields, such as rotation=optrot, not {wanted!r}")
        recipes = [recipe for recipe in recipes if str(getattr(recipe, name)) == str(yaml.safe_load(value))]
    if not recipes:
        raise ValueError(f"no recipe of this sweep has {' and '.join(only)}")
    return recipes


if __name__ == "__main__":
    sys.exit(main())
