"""Results on disk: one JSON file per finished run, written atomically, with where it came from.

`results/study/` holds the committed study; `results/local/` is what this machine computed and wins where both have a
result. A run is finished when its file is there and was computed by today's code: the code's fingerprint hashes the
modules that its numbers depend on, without comments and docstrings. Anything else is stale, and shown as such.
"""

import ast
import json
import os
import platform
import re
import resource
import subprocess
import time
from collections.abc import Callable
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from uuid import uuid4

import torch

ROOT = Path(__file__).resolve().parent.parent
# the modules that numbers depend on: all of them, and what only some results read
_COMMON = (
    "activations", "checks", "covariance", "families", "fixed", "fuse", "gptq", "hadamard", "kept", "measure", "online", "pipeline",
    "quant", "recipe", "rotation", "text", "zoo",
)  # fmt: skip
_OF_TASK = {"outliers": ("outliers",), "bounds": ("bounds",), "groups": ("groups",), "zero-shot": ("zeroshot",)}
_OF_OPTROT = ("grouped", "manifold", "objective", "optrot", "sampling")
SHIPPED = (None, "none", "random", "hadamard", "gsr")  # which need no more than those; other names are of `own.py`
_OF_ROTATION = {
    "optrot": _OF_OPTROT,
    "kurtail": _OF_OPTROT,
    "mixed": _OF_OPTROT,
    "optrot+": (*_OF_OPTROT, "optrot_plus"),
    "spinquant": (*_OF_OPTROT, "network", "spinquant"),
    "ostquant": (*_OF_OPTROT, "network", "ostquant"),
}


@dataclass
class Result:
    """One finished run: what was asked for, what came out, how long each stage took and where it ran.

    A stage that reused a kept rotation or kept weights shows the seconds that making them took; the peak memory is this run's.
    """

    spec: dict
    metrics: dict
    seconds: dict[str, float]
    peak_memory_mb: float
    provenance: dict

    @property
    def stale(self) -> bool:
        """True where the code has changed since."""
        return self.provenance["code"] != code_fingerprint(self.spec["task"], self.spec.get("rotation"))


def results_folder() -> Path:
    """`ROTLIB_RESULTS`, else results/ of this checkout."""
    return ROOT / (os.environ.get("ROTLIB_RESULTS") or "results")


def spec_hash(spec: dict) -> str:
    """Twelve hexadecimal digits that name a specification; the order of its keys doesn't matter."""
    return sha256(json.dumps(spec, sort_keys=True).encode()).hexdigest()[:12]


@dataclass
class Record:
    """What a run notes down while it goes: metrics, seconds per stage, the sha256 of each token stream it read."""

    metrics: dict = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    tokens: dict[str, str] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str):
        """Time the block under this name."""
        start = time.perf_counter()
        yield
        self.seconds[name] = round(self.seconds.get(name, 0.0) + time.perf_counter() - start, 2)


def once(spec: dict, device: torch.device, compute: Callable[[Record], None]) -> Result:
    """The finished result of a specification, or else computed now, saved and returned."""
    if result := find(spec):
        return result
    _check_writable(local_path(spec).parent)
    origin = _origin(spec, device)  # as it is now: the code may be edited while the run goes on
    record = Record()
    _reset_peak_memory(device)
    compute(record)
    memory = peak_memory_mb(device)
    result = Result(spec, record.metrics, record.seconds, memory, origin | {"tokens": record.tokens})
    path = local_path(spec)
    write_atomically(path, lambda scratch: scratch.write_text(json.dumps(asdict(result), indent=1, sort_keys=True) + "\n"))
    return result


def find(spec: dict) -> Result | None:
    """This machine's finished result for a specification, unless the code has changed since."""
    result = _read(local_path(spec))
    return None if result is None or result.stale else result


def load_results() -> list[Result]:
    """Every result, sorted by file name: this machine's, and the committed ones it hasn't recomputed."""
    return [result for path in saved("*.json") if (result := _read(path)) is not None]


def load_result(name: str) -> Result:
    """The result in the file of this name, this machine's before the committed one; raises FileNotFoundError where there is neither."""
    for path in saved(name):
        if result := _read(path):
            return result
    raise FileNotFoundError(f"the result {name} is neither in results/local nor in results/study")


def saved(pattern: str) -> list[Path]:
    """The files that match in results/study/ and results/local/, sorted by name; where both have one, this machine's."""
    paths = {path.name: path for folder in ("study", "local") for path in (results_folder() / folder).glob(pattern)}
    return [path for _, path in sorted(paths.items())]


def local_path(spec: dict, suffix: str = ".json") -> Path:
    """Where this machine keeps the result of a specification."""
    return results_folder() / "local" / f"{spec['task']}-{spec_hash(spec)}{suffix}"


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a scratch file beside `path`, then rename it: a killed run leaves no half file to read."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{uuid4().hex}.partial")  # on a shared folder processes of two machines may have one number
    try:
        write(scratch)
        os.replace(scratch, path)
    except RuntimeError as error:  # what torch.save makes of a full disk
        raise OSError(f"{path.name} couldn't be written: is the disk full? ({str(error).splitlines()[0]})") from error
    finally:
        scratch.unlink(missing_ok=True)


def clear_leftovers() -> None:
    """Remove the scratch files of processes that were killed while they wrote, a day ago or more."""
    for path in (results_folder() / "local").glob(".*.partial"):
        with suppress(OSError):  # its owner lives, and has just renamed it
            if time.time() - path.stat().st_mtime > 24 * 3600:
                path.unlink()


def absolute_folders() -> None:
    """Let the folders that the environment names mean the same in processes that run elsewhere."""
    for name in ("ROTLIB_RESULTS", "ROTLIB_FIGURES", "ROTLIB_DATA", "ROTLIB_CACHE"):
        if name in os.environ:
            os.environ[name] = str(Path(os.environ[name]).resolve())


def commit() -> str | None:
    """The checkout's, None where it is no git repository."""
    return _git("rev-parse", "HEAD")


def _origin(spec: dict, device: torch.device) -> dict:
    """Commit, code, versions and device."""
    return {
        "commit": commit(),
        "uncommitted_changes": bool(_git("status", "--porcelain", "--untracked-files=no", "--", "rotlib")),
        "code": code_fingerprint(spec["task"], spec.get("rotation")),
        "versions": {name: version(name) for name in ("torch", "transformers", "numpy")} | {"python": platform.python_version()},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads",
    }


@lru_cache
def code_fingerprint(task: str | None = None, rotation: str | None = None) -> str:
    """Twelve hexadecimal digits over the modules that such a result's numbers depend on, or over all of them.

    Comments and docstrings don't count.
    """
    special = (*_OF_TASK.get(task, ()), *_OF_ROTATION.get(rotation, () if rotation in SHIPPED else ("own",)))
    if task is None:
        special = sorted({module for modules in (*_OF_TASK.values(), *_OF_ROTATION.values()) for module in modules})
    sources = ((Path(__file__).parent / f"{name}.py").read_text(encoding="utf-8") for name in (*_COMMON, *special))
    return sha256("".join(_without_docstrings(source) for source in sources).encode()).hexdigest()[:12]


def _without_docstrings(source: str) -> str:
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            node.body = node.body[1:]
    return ast.dump(tree)


def _check_writable(folder: Path) -> None:
    """Raises ValueError now rather than after hours of work."""
    try:
        write_atomically(folder / ".writable", lambda scratch: scratch.touch())
    except OSError as error:
        raise ValueError(f"results can't be written to {folder}: let ROTLIB_RESULTS name a writable folder ({error.strerror})") from error


def _read(path: Path) -> Result | None:
    try:
        result = Result(**json.loads(path.read_text(encoding="utf-8")))
        result.spec["task"], result.provenance["code"]
        return result
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} isn't a result of rotlib: delete it and run again ({error})") from error


def _reset_peak_memory(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with suppress(OSError):  # Linux: start the high-water mark again from what is resident now
            Path("/proc/self/clear_refs").write_text("5")


def peak_memory_mb(device: torch.device) -> float:
    """The device's peak where it has memory of its own, else the process's since the reset (elsewhere: since it began)."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 2**20)
    with suppress(OSError, TypeError):
        return round(int(re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())[1]) / 2**10)
    unit = 2**20 if platform.system() == "Darwin" else 2**10  # macOS counts bytes, Linux KiB
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit)


def _git(*arguments: str) -> str | None:
    run = subprocess.run(["git", "-C", ROOT, *arguments], capture_output=True, text=True, check=False)
    return run.stdout.strip() if run.returncode == 0 else None
