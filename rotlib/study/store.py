"""Results on disk: one JSON file per finished run, written atomically, with where it came from.

`results/study/` holds the committed study; `results/local/` is what this machine computed and wins
where both have a result. A run is finished when its file is there and no stage of the computation
that it read has changed since (`numerics.py`). Anything else is stale, and shown as such.
"""

import json
import platform
import re
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from math import inf
from pathlib import Path

import torch

from rotlib.disk import ROOT, write_json
from rotlib.study import numerics
from rotlib.study.files import (
    check_results_folder,
    content_of,
    file_name,
    local_path,
    results_folder,
    saved,
)
from rotlib.study.recipe import Recipe

_VERSIONS = ("torch", "transformers", "tokenizers", "numpy")
DIVERGED = 1e4  # a perplexity beyond it says that the model is broken, not how much
# what a result of each task holds at least
_MEASURED = {
    "quantize": ("perplexity", "kl", "reference_perplexity"),
    "outliers": ("modules", "histogram"),
    "bounds": ("modules",),
    "groups": ("modules",),
    "slopes": ("agreement",),
    "zero-shot": ("accuracy", "average"),
}


@dataclass
class Result:
    """One finished run: what was asked for, what came out, what it took and where it ran.

    A step that reused a kept rotation or kept weights shows the seconds that making them took; the
    peak memory is this run's.
    """

    spec: dict
    metrics: dict
    seconds: dict[str, float]
    peak_memory_mb: float
    provenance: dict

    @property
    def content(self) -> dict[str, str]:
        """What its model and text were, by their bytes, where they aren't pinned."""
        return self.provenance.get("content", {})

    @property
    def file(self) -> str:
        """The name of its file."""
        return file_name(self.spec, self.content)

    @property
    def stale(self) -> bool:
        """True where a stage that it read computes something else by now."""
        return bool(numerics.changed_since(self.provenance["stages"]))


@dataclass
class Record:
    """What a run notes down while it goes.

    Metrics, seconds by step, the sha256 of each token stream, the model's commit on the Hub, a
    digest of the weights that were measured.
    """

    metrics: dict = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    tokens: dict[str, str] = field(default_factory=dict)
    model_commit: str | None = None
    weights: str | None = None

    @contextmanager
    def timed(self, name: str):
        """Time the block under this name."""
        start = time.perf_counter()
        yield
        self.seconds[name] = round(self.seconds.get(name, 0.0) + time.perf_counter() - start, 2)


def once(spec: dict, device: torch.device, compute: Callable[[Record], None]) -> Result:
    """The finished result of a specification, or else computed now, saved and returned.

    Raises ValueError where a stage computes something else here than its committed entry says, or
    where the model's files or the text change while it goes on.
    """
    if result := find(spec):
        return result
    check_results_folder()
    numerics.check(numerics.stages_of(spec))
    content = content_of(spec)
    origin = _origin(spec, device)  # as it is now: the code may be edited while the run goes on
    record = Record()
    reset_peak_memory(device)
    compute(record)
    memory = peak_memory_mb(device)
    if content_of(spec) != content:
        raise ValueError(
            "the model's files or the text were changed during the run, so its result is of "
            "neither: run it again"
        )
    origin |= {"content": content} if content else {}
    origin |= {"tokens": record.tokens, "model_commit": record.model_commit}
    origin |= {"weights": record.weights} if record.weights else {}
    result = Result(spec, record.metrics, record.seconds, memory, origin)
    save(result, results_folder() / "local" / result.file)
    return result


def known(spec: dict) -> Result:
    """The result that there is of a specification, this machine's or a committed one.

    Raises ValueError where there is none.
    """
    try:
        name = local_path(spec).name
    except (ImportError, ValueError):  # a model needn't be at hand for its result to be shown
        if len(found := [result for result in load_results() if result.spec == spec]) == 1:
            return found[0]
        raise
    try:
        return load_result(name)
    except FileNotFoundError as error:
        raise ValueError(
            f"nothing is run, and there is no result of {spec} to show: run it first"
        ) from error


def save(result: Result, path: Path) -> None:
    """Write a result's file."""
    write_json(path, asdict(result), sort_keys=True)


def find(spec: dict) -> Result | None:
    """This machine's finished result for a specification, unless it is stale."""
    result = read(local_path(spec))
    return None if result is None or result.stale else result


def load_results() -> list[Result]:
    """Every result, sorted by file name.

    Where this machine has recomputed a committed one, its own counts.
    """
    return [result for path in saved("*.json") if (result := read(path)) is not None]


def load_result(name: str) -> Result:
    """The result in the file of this name, this machine's before the committed one.

    Raises FileNotFoundError where there is neither.
    """
    for path in saved(name):
        if result := read(path):
            return result
    raise FileNotFoundError(f"the result {name} is neither in results/local nor in results/study")


def read(path: Path) -> Result | None:
    """The result in a file, None where there is no file.

    Raises ValueError, naming it, for a file that holds anything else.
    """
    try:
        if path.exists() and not path.is_file():  # a pipe would be waited for
            raise ValueError("it is no file")
        result = Result(**json.loads(path.read_text(encoding="utf-8")))
        noted, file = dict(result.provenance["stages"]), result.file
        missing = _missing(result)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, RecursionError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"{path} isn't a result of rotlib: delete it and run again ({error})"
        ) from error
    if strangers := numerics.unknown(noted):
        raise ValueError(
            f"{path} notes the stage {strangers[0]!r}, which this version of rotlib hasn't: "
            "it is of another version; delete it and run again"
        )
    if missing:
        raise ValueError(f"{path} holds no {missing[0]}: delete it and run again")
    if path.name != file:
        raise ValueError(
            f"{path} holds the result that belongs into {file}: give it that name, or delete it"
        )
    return result


def _missing(result: Result) -> list[str]:
    """What a whole result holds and this one doesn't; a number that is none counts as missing."""
    if not isinstance(metrics := result.metrics, dict):
        raise TypeError("its metrics are no mapping")
    missing = [name for name in _MEASURED[result.spec["task"]] if name not in metrics]
    missing += [] if result.provenance["stages"] else ["stages of its computation"]
    named = ("perplexity", "reference_perplexity", "kl")
    numbers = {name: metrics[name] for name in named if name in metrics}
    windows = metrics.get("kl_windows", [])
    if not isinstance(windows, list) or not all(map(_is_number, windows)):
        missing.append("numbers as its kl_windows")
    elif windows and len(windows) != result.spec.get("test_windows", Recipe.test_windows):
        missing.append("number for each of its windows")
    fallbacks = metrics.get("fallbacks", 0)
    if isinstance(fallbacks, bool) or not isinstance(fallbacks, int) or fallbacks < 0:
        missing.append("number as its fallbacks")
    versions = result.provenance.get("versions") or {}
    missing += [] if isinstance(versions, dict) else ["versions by their names"]
    others = result.seconds | {"peak_memory_mb": result.peak_memory_mb}
    perplexity = numbers.get("perplexity")
    sound = _is_number(perplexity) and perplexity < inf
    for name, value in (numbers | others).items():
        number = _is_number(value)
        # a broken model's may be NaN
        least = -1e-3 if name == "kl" else 1
        below = name in numbers and number and sound and not value >= least
        beyond = name in others and number and (value < 0 or value == inf)
        if not number or below or beyond:
            missing.append(f"number as its {name}")
    return missing


def _is_number(value: object) -> bool:
    """Whether this is a number that a float holds; a broken model's is NaN or infinite."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return isinstance(value, float) or abs(value) <= sys.float_info.max


def commit() -> str | None:
    """The checkout's, None where it is no git repository."""
    return _git("rev-parse", "HEAD")


def _origin(spec: dict, device: torch.device) -> dict:
    """Commit, stages, versions and device."""
    changes = _git("status", "--porcelain", "--untracked-files=no", "--", "rotlib")
    versions = {name: version(name) for name in _VERSIONS}
    threads = f"cpu, {torch.get_num_threads()} threads"
    return {
        "commit": commit(),
        "uncommitted_changes": bool(changes),
        "stages": numerics.digests(numerics.stages_of(spec)),
        "versions": versions | {"python": platform.python_version()},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else threads,
    }


def reset_peak_memory(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with suppress(OSError):  # Linux: start the high-water mark again from what is resident now
            Path("/proc/self/clear_refs").write_text("5")


def peak_memory_mb(device: torch.device) -> float:
    """The device's peak where it has memory of its own, else the process's since the reset.

    Elsewhere than on Linux it is the process's since it began.
    """
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 2**20)
    with suppress(OSError, TypeError):
        status = Path("/proc/self/status").read_text()
        return round(int(re.search(r"VmHWM:\s*(\d+)", status)[1]) / 2**10)
    unit = 2**20 if platform.system() == "Darwin" else 2**10  # macOS counts bytes, Linux KiB
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit)


def _git(*arguments: str) -> str | None:
    command = ["git", "-C", ROOT, *arguments]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    return run.stdout.strip() if run.returncode == 0 else None
