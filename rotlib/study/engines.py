"""Who runs a sweep's tasks: processes of this machine, or a Ray cluster.

A task is a list of recipes, and its outcome says of each what went wrong, if anything. Results go
straight to the store, so an engine that dies loses what it was computing and nothing else: a worker
that dies is replaced, and one whose driver is gone ends.
"""

import multiprocessing
import os
import signal
import socket
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from multiprocessing.connection import wait

import torch

from rotlib.disk import folder_of
from rotlib.study import own, store
from rotlib.study.files import local_path
from rotlib.study.memory import GB
from rotlib.study.pipeline import run_all
from rotlib.study.recipe import Recipe

_ATTEMPTS = 3  # at a task whose worker dies
Outcome = tuple[int, list[str | None]]  # a task's number, and what went wrong with each recipe


class NoCluster(Exception):
    """There is no Ray cluster where one was asked for, or none that could run a task."""


def work(recipes: list[dict], own_rotations: bytes) -> list[str | None]:
    """Run one task's recipes; what goes wrong with one is told, and the next ones run."""
    own.unpack(own_rotations)
    failures = []
    for settings in recipes:
        try:
            recipe = Recipe(**settings)
            _clear_damaged(recipe)
            run_all([recipe])
            failures.append(None)
        # whatever it is, other recipes needn't suffer for it
        except (Exception, SystemExit) as error:
            failures.append(f"{type(error).__name__}: {' '.join(str(error).split())}")
    return failures


def _clear_damaged(recipe: Recipe) -> None:
    try:
        store.find(recipe.spec())
    except ValueError:
        local_path(recipe.spec()).unlink(missing_ok=True)


def local(tasks: list[list[Recipe]], workers: int) -> Iterator[Outcome]:
    """Processes of this machine, each with its share of the cores and a GPU where there are some.

    A worker that dies takes the pool with it. The tasks that were at work are tried again behind
    the others, one by one once no others are left.
    """
    left, deaths = dict(enumerate(tasks)), Counter()
    while left:
        size = 1 if all(deaths[number] for number in left) else min(workers, len(left))
        try:
            for number, failures in _pool(left, size):
                del left[number]
                yield number, failures
        except BrokenProcessPool:
            at_work = list(left)[:size]
            deaths.update(at_work)
            for number in at_work:
                task = left.pop(number)
                if deaths[number] < _ATTEMPTS:
                    left[number] = task
                else:
                    yield number, _unfinished(task, f"its worker died {_ATTEMPTS} times")


def _pool(tasks: dict[int, list[Recipe]], size: int) -> Iterator[Outcome]:
    """Outcomes as they come; nothing goes on behind the user's back, however this ends."""
    context = multiprocessing.get_context("spawn")
    gpus, places = _gpus(), context.Queue()
    for number in range(size):
        places.put(gpus[number % len(gpus)] if gpus else None)
    before = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(size, context, _begin, (_cores() // size, places))
    try:
        running = {pool.submit(work, *_parcel(task)): number for number, task in tasks.items()}
        for future in as_completed(running):
            yield running[future], future.result()
        pool.shutdown()  # workers that are let end leave no semaphores behind
    finally:
        workers = set(multiprocessing.active_children()) - before
        pool.shutdown(wait=False, cancel_futures=True)
        for worker in workers:
            worker.terminate()
        for worker in workers:
            worker.join()


def _parcel(task: list[Recipe]) -> tuple[list[dict], bytes]:
    """A task as it travels to a worker."""
    return [asdict(recipe) for recipe in task], own.packed()


def _begin(threads: int, places: multiprocessing.Queue) -> None:
    """A worker's first act."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the driver ends its workers
    driver = multiprocessing.parent_process().sentinel
    threading.Thread(target=_end_with, args=(driver,), daemon=True).start()
    torch.set_num_threads(max(1, threads))
    if gpu := places.get():
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu


def _end_with(sentinel: int) -> None:
    wait([sentinel])
    os._exit(1)


def _cores() -> int:
    return len(os.sched_getaffinity(0))


def _gpus() -> list[str]:
    """The devices that this process may use, by the names that CUDA_VISIBLE_DEVICES takes."""
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        names = os.environ["CUDA_VISIBLE_DEVICES"].split(",")
        return [name.strip() for name in names if name.strip()]
    return [str(number) for number in range(torch.cuda.device_count())]


def ray(
    tasks: list[list[Recipe]],
    workers: int,
    address: str | None = None,
    memory_gb: list[float] | None = None,
) -> Iterator[Outcome]:
    """A Ray cluster, the one at `address` or one of so many workers on this machine.

    A task whose worker dies is tried again elsewhere. `memory_gb` is what each task should need.
    Raises NoCluster, before any work, where there is none that can run them.
    """
    import ray as cluster  # an engine of its own, and only needed here

    address = address or os.environ.get("RAY_ADDRESS")
    _check_answers(address)
    if not cluster.is_initialized():
        options = {"log_to_driver": False, "include_dashboard": False}
        cpus = None if address else max(workers, _cores())
        try:
            cluster.init(address or "local", num_cpus=cpus, **options)
        except (ConnectionError, ValueError) as error:
            raise NoCluster(
                f"there is no Ray cluster at {address or 'this machine'}: "
                f"{' '.join(str(error).split())}"
            ) from error
    nodes = [node["Resources"] for node in cluster.nodes() if node["Alive"]]
    gpus = any(node.get("GPU") for node in nodes)
    fitting = [node for node in nodes if node.get("CPU", 0) >= 1 and node.get("GPU", 0) >= gpus]
    if not fitting:
        raise NoCluster("the Ray cluster has no machine with a CPU" + " and a GPU" * gpus)

    def cores_of(node: dict) -> float:
        if gpus:
            return node["CPU"] // node["GPU"]
        return 1 if address else node["CPU"] // workers

    cores = min(map(cores_of, fitting))
    each = {"num_cpus": max(1, int(cores)), "num_gpus": int(gpus)}
    remote = cluster.remote(max_retries=_ATTEMPTS - 1, **each)(_work_there)
    named = (name for name, value in os.environ.items() if name.startswith("ROTLIB_") and value)
    places = {name: str(folder_of(name, "")) for name in named}
    biggest = max(node.get("memory", 0) for node in fitting)
    running = {}
    for number, task in enumerate(tasks):
        # Ray would wait for ever for a machine it hasn't: the biggest one's worker refuses then
        needed = min(biggest, memory_gb[number] * GB if memory_gb else 0)
        running[remote.options(memory=int(needed)).remote(places, *_parcel(task))] = number
    try:
        while running:
            (ready, *_), _ = cluster.wait(list(running))
            number = running.pop(ready)
            try:
                yield number, cluster.get(ready)
            except cluster.exceptions.RayError as error:
                failure = f"{type(error).__name__}: {str(error).splitlines()[0]}"
                yield number, _unfinished(tasks[number], failure)
    finally:
        for task in running:
            cluster.cancel(task, force=True)


def _work_there(places: dict[str, str], recipes: list[dict], own_rotations: bytes) -> list:
    """`work` with the driver's folders. (Ray's own way, runtime_env, starts every worker anew.)"""
    os.environ.update(places)
    return work(recipes, own_rotations)


def _check_answers(address: str | None) -> None:
    """Raises NoCluster where nobody listens at host:port, which Ray would take minutes to say."""
    host, _, port = (address or "").removeprefix("ray://").rpartition(":")
    if not host or not port.isdecimal():
        return
    try:
        with socket.create_connection((host, int(port)), timeout=10):
            pass
    except (OSError, OverflowError) as error:
        raise NoCluster(f"nobody answers at {address}: {error}") from error


def _unfinished(task: list[Recipe], failure: str) -> list[str | None]:
    """The failure, for those of a task's recipes that have no result of today's code."""

    def finished(recipe: Recipe) -> bool:
        try:
            return store.find(recipe.spec()) is not None
        except ValueError:
            return False

    return [None if finished(recipe) else failure for recipe in task]


ENGINES: dict[str, Callable[..., Iterator[Outcome]]] = {"local": local, "ray": ray}
