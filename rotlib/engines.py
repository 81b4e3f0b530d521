"""Who runs a sweep's tasks: processes of this machine, or a Ray cluster.

A task is a list of recipes, and its outcome says of each what went wrong, if anything. Results go straight to the store, so an engine
that dies loses what it was computing and nothing else: a worker that dies is replaced, and one whose driver is gone ends.
"""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from multiprocessing.connection import wait

import torch

from rotlib import store
from rotlib.memory import GB
from rotlib.pipeline import run_all
from rotlib.recipe import Recipe

_ATTEMPTS = 3  # at a task whose worker dies
Outcome = tuple[int, list[str | None]]  # a task's number, and for each of its recipes what went wrong


def work(recipes: list[dict]) -> list[str | None]:
    """Run one task's recipes; what goes wrong with one is told, and the next ones run."""
    failures = []
    for settings in recipes:
        try:
            recipe = Recipe(**settings)
            _clear_damaged(recipe)
            run_all([recipe])
            failures.append(None)
        except Exception as error:  # whatever it is, other recipes needn't suffer for it
            failures.append(f"{type(error).__name__}: {' '.join(str(error).split())}")
    return failures


def _clear_damaged(recipe: Recipe) -> None:
    try:
        store.find(recipe.spec())
    except ValueError:
        store.local_path(recipe.spec()).unlink(missing_ok=True)


def local(tasks: list[list[Recipe]], workers: int) -> Iterator[Outcome]:
    """Processes of this machine, each with its share of the cores and a GPU where there are some.

    A worker that dies takes the pool with it: what wasn't finished is handed to a new one.
    """
    left, broken = dict(enumerate(tasks)), 0
    while left and broken < _ATTEMPTS:
        context = multiprocessing.get_context("spawn")
        numbers = context.Queue()
        for number in range(workers):
            numbers.put(number)
        pool = ProcessPoolExecutor(workers, context, _begin, (workers, numbers))
        try:
            running = {pool.submit(work, [asdict(recipe) for recipe in task]): number for number, task in left.items()}
            for future in as_completed(running):
                outcome = running[future], future.result()
                del left[outcome[0]]
                broken = 0
                yield outcome
        except BrokenProcessPool:
            broken += 1
            waiting = list(left.items())
            left = dict(waiting[workers:] + waiting[:workers])  # the first ones were at work: others go before them now
        finally:  # also where the user interrupts: nothing goes on behind their back
            pool.shutdown(wait=False, cancel_futures=True)
            for child in multiprocessing.active_children():
                child.terminate()
    for number, task in left.items():
        yield number, _unfinished(task, f"its worker died, {_ATTEMPTS} times in a row")


def _begin(workers: int, numbers: multiprocessing.Queue) -> None:
    """A worker's first act."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the driver ends its workers
    threading.Thread(target=_end_with, args=(multiprocessing.parent_process().sentinel,), daemon=True).start()
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))
    if visible := _gpus():
        os.environ["CUDA_VISIBLE_DEVICES"] = visible[numbers.get() % len(visible)]


def _end_with(sentinel: int) -> None:
    wait([sentinel])
    os._exit(1)


def _gpus() -> list[str]:
    """The devices that this process may use, counted without touching them."""
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return [name for name in os.environ["CUDA_VISIBLE_DEVICES"].split(",") if name]
    return [str(number) for number in range(torch.cuda.device_count())]


def ray(tasks: list[list[Recipe]], workers: int, address: str | None = None, memory_gb: list[float] | None = None) -> Iterator[Outcome]:
    """A Ray cluster, the one at `address` or one on this machine; a task whose worker dies is tried again elsewhere.

    `memory_gb` is what each task should need. Raises ConnectionError where there is no cluster at the address.
    """
    import ray as cluster  # an engine of its own, and only needed here

    address = address or os.environ.get("RAY_ADDRESS")
    cores = 1 if address else max(1, (os.cpu_count() or 1) // workers)
    if not cluster.is_initialized():  # workers elsewhere must find the same folders
        places = {"env_vars": {name: value for name, value in os.environ.items() if name.startswith("ROTLIB_")}}
        options = {"log_to_driver": False, "include_dashboard": False, "runtime_env": places}
        cluster.init(address=address or "local", num_cpus=None if address else workers * cores, **options)
    resources = {"num_cpus": cores, "num_gpus": 1 if cluster.cluster_resources().get("GPU") else 0}
    remote = cluster.remote(max_retries=_ATTEMPTS - 1, **resources)(work)
    fitting = [node["Resources"] for node in cluster.nodes() if node["Alive"] and node["Resources"].get("GPU", 0) >= resources["num_gpus"]]
    biggest = max((node.get("memory", 0) for node in fitting), default=0)
    running = {}
    for number, task in enumerate(tasks):  # Ray would wait for ever for a machine that it hasn't: the biggest one's worker refuses then
        needed = min(biggest, memory_gb[number] * GB if memory_gb else 0)
        running[remote.options(memory=int(needed)).remote([asdict(recipe) for recipe in task])] = number
    while running:
        (ready, *_), _ = cluster.wait(list(running))
        number = running.pop(ready)
        try:
            yield number, cluster.get(ready)
        except cluster.exceptions.RayError as error:
            yield number, _unfinished(tasks[number], f"{type(error).__name__}: {str(error).splitlines()[0]}")


def _unfinished(task: list[Recipe], failure: str) -> list[str | None]:
    """The failure, for those of a task's recipes that have no result."""
    return [None if store.local_path(recipe.spec()).exists() else failure for recipe in task]


ENGINES: dict[str, Callable[..., Iterator[Outcome]]] = {"local": local, "ray": ray}
